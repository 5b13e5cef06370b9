"""Dialogues and pairs: turns, orders of roles, every form of a preference pair."""

from pfppo.problems import load_pairs
from pfppo.problems.messages import only_text, read_pair, read_turns

import pytest
from conftest import write
from ranks import refused


def turn(role, content):
    return {"role": role, "content": content}


SYSTEM, ASK = turn("system", "s"), turn("user", "q")
YES, NO = turn("assistant", "yes"), turn("assistant", "no")


def test_of_a_turn_role_and_content_are_kept_and_parts_of_text_put_together():
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]
    assert read_turns([ASK | {"name": "x"}], "here", "user") == [ASK]
    assert read_turns([turn("user", parts)], "here", "user") == [turn("user", "qr")]


@pytest.mark.parametrize("system", ["", "system "])
@pytest.mark.parametrize("roles", ["user", "user assistant user"])
def test_a_prompt_has_a_system_turn_or_none_then_user_and_assistant_by_turns(system, roles):
    turns = [turn(role, "x") for role in (system + roles).split()]
    assert read_turns(turns, "here", "user") == turns


ORDERS = "user assistant > user", "user > assistant"  # > what the last one must be
ORDERS += "system > user", "system assistant > assistant", "user user > user", "human > user"
ORDERS += "assistant user > user", "user system > user", "user tool assistant > assistant"


@pytest.mark.parametrize("roles, last", [order.split(" > ") for order in ORDERS])
def test_other_orders_and_roles_are_refused_with_what_was_found(roles, last):
    message = refused(read_turns, [turn(role, "x") for role in roles.split()], "here", last)
    assert message.startswith("here: expected ") and f"the last one {last}" in message
    assert message.endswith(f"found {', '.join(roles.split())}")


@pytest.mark.parametrize(
    "value, expected",
    [
        (3, "here: expected a string or a list of messages, found 3"),
        ([], "here: expected a system turn or none, then"),
        ([{"from": "human"}], "message 1: expected an object with 'role' and 'content', found {'f"),
        ([turn("user", " \n")], "here, message 1: 'content' is empty"),
        ([turn("user", [])], "here, message 1: 'content' is empty"),
        ([turn("user", None)], "message 1: 'content': expected a string or parts of text only, f"),
        ([ASK, turn("assistant", ""), ASK], "here, message 2: 'content' is empty"),
        ([turn("user", [{"type": "image", "url": "x"}])], "text only, found [{'type': 'image'"),
        ([turn(["user"], "x")], "found ['user']"),
    ],
)
def test_a_bad_turn_is_named_with_its_number(value, expected):
    assert expected in refused(read_turns, value, "here", "user")


OTHER = turn("user", "other")
ORCA, SHORT = [SYSTEM, ASK], "Human: q\n\nAssistant:"
HH = "\n\nHuman: q\n\nAssistant: a\n\nb: c\n\nHuman: r?\n\nAssistant: {}"
SAFE, SHP = {"prompt": "q", "response_0": "no", "response_1": "yes"}, {"history": "q"}
SHARED = {
    "conversations": [
        {"from": who, "value": what}
        for who, what in (("human", "q"), ("gpt", "a\n\nb: c"), ("human", "r?"))
    ],
    "chosen": {"from": "gpt", "value": "yes"},
    "rejected": {"from": "gpt", "value": "no"},
}
LONG = [turn("user", "q"), turn("assistant", "a\n\nb: c"), turn("user", "r?")]


@pytest.mark.parametrize(
    "row, wanted",
    [
        ({"prompt": "q", "chosen": "yes", "rejected": "no"}, "q"),
        ({"instruction": "q", "pos": "yes", "neg": "no"}, "q"),
        ({"instruction": [ASK], "pos": [YES], "neg": "no", "input": ""}, "q"),
        ({"prompt": "q", "chosen": [ASK, YES], "rejected": [ASK, NO], "score_chosen": 7.0}, "q"),
        ({"chosen": [ASK, YES], "rejected": [ASK, NO]}, "q"),
        ({"prompt": " r? ", "chosen": [*LONG, YES], "rejected": [*LONG, NO]}, LONG),
        ({"prompt": LONG, "chosen": "yes", "rejected": "no"}, LONG),
        ({"chosen": HH.format("yes"), "rejected": HH.format("no")}, LONG),  # HH-RLHF
        ({"chosen": f"\n\n{SHORT} yes", "rejected": f"{SHORT} no"}, "q"),
        ({"prompt": f"\n\n{SHORT}", "chosen": "yes", "rejected": "no"}, "q"),
        ({"system": "s", "question": "q", "chosen": "yes", "rejected": "no"}, ORCA),
        ({"system": "", "question": "q", "chosen": "yes", "rejected": "no"}, "q"),
        ({"system": "s", "input": "q", "chosen": "yes", "rejected": "no"}, ORCA),
        ({"system": "s", "chosen": [*ORCA, YES], "rejected": [*ORCA, NO]}, ORCA),
        ({"prompt": "q", "better": "yes", "worse": "no"}, "q"),
        ({"question": "q", "response_j": "yes", "response_k": "no"}, "q"),
        ({"prompt": "q", "chosen": YES, "rejected": NO}, "q"),
        (SHARED, LONG),
        (SAFE | {"better_response_id": 1, "safer_response_id": 1}, "q"),
        (SAFE | {"safer_response_id": 1}, "q"),
        (SHP | {"human_ref_A": "yes", "human_ref_B": "no", "labels": 1}, "q"),
        (SHP | {"human_ref_A": "no", "human_ref_B": "yes", "labels": 0}, "q"),
    ],
)
def test_every_form_of_a_pair_gives_prompt_and_two_texts(tmp_path, row, wanted):
    assert load_pairs(write(tmp_path, "", row)) == [(2, (wanted, "yes", "no"))]
    written = dict(zip(("prompt", "chosen", "rejected"), (wanted, "yes", "no"), strict=True))
    assert load_pairs(write(tmp_path, written)) == [(1, (wanted, "yes", "no"))]


def test_a_response_may_be_empty_as_text_and_as_a_turn():
    assert read_pair({"chosen": f"{SHORT} yes", "rejected": SHORT}, "here") == ("q", "yes", "")
    for empty in ("", [turn("assistant", "")], [ASK, turn("assistant", "")]):
        chosen = [ASK, YES] if len(empty) == 2 else "yes"
        row = {"prompt": "q", "chosen": chosen, "rejected": empty}
        assert read_pair(row, "here") == ("q", "yes", "")


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"chosen": [ASK, YES], "rejected": [OTHER, NO]}, "differ before their last messages (1 a"),
        ({"chosen": HH.format("a"), "rejected": f"{SHORT} b"}, "(3 and 1 messages there)"),
        ({"chosen": [YES], "rejected": [NO]}, ": field 'prompt' (or 'instruction'): expected a s"),
        ({"prompt": "x", "chosen": [ASK, YES], "rejected": [ASK, NO]}, "start with, found 'x' in"),
        ({"prompt": [OTHER], "chosen": [ASK, YES], "rejected": [ASK, NO]}, "(or 'instruction'): e"),
        ({"prompt": [ASK, YES], "chosen": "a", "rejected": "b"}, "the last one user, found user"),
        ({"prompt": "q", "chosen": [ASK], "rejected": [ASK]}, "'chosen' (or 'pos'): expected a s"),
        ({"chosen": [ASK, YES], "rejected": [ASK, YES]}, ": chosen and rejected are the same"),
        ({"prompt": "q", "rejected": "no"}, "'chosen' (or 'pos'): expected a string or a list of"),
        ({"prompt": "q", "chosen": "a", "neg": 3}, "'rejected' (or 'neg'): expected a string or"),
        ({"instruction": "q", "input": "r", "pos": "a", "neg": "b"}, "one text of both, in 'prom"),
        ({"question": "q", "context": "c", "pos": "a", "neg": "b"}, "'question' and 'context': e"),
        ({"system": 3, "question": "q", "pos": "a", "neg": "b"}, "field 'system' and the prompt"),
        (
            {"prompt": "q", "completion": "a", "label": True},
            "nothing (has: prompt, completion, label); write rows of prompt, chosen, rejected",
        ),
        (SAFE, "expected 0 or 1 in better_response_id or safer_response_id, found {}"),
        (SAFE | {"better_response_id": 2}, "found {'better_response_id': 2}"),
    ],
)
def test_a_pair_that_is_none_is_named_with_line_field_found_and_expected(tmp_path, row, expected):
    path = write(tmp_path, {"prompt": "q", "chosen": "yes", "rejected": "no"}, row)
    message = refused(load_pairs, path)
    assert message.startswith(f"{path}, line 2") and expected in message


def test_rows_whose_two_choices_differ_are_left_out_however_many(tmp_path):
    agreed, said = SAFE | {"better_response_id": 1, "safer_response_id": 1}, []
    differ = SAFE | {"better_response_id": 1, "safer_response_id": 0}
    pairs = load_pairs(write(tmp_path, agreed, differ, differ), said.append)
    assert [line for line, _ in pairs] == [1] and "2 of 3 rows are no pairs" in said[0]
    advice = "to learn one of them, take better_response_id or safer_response_id out of the rows"
    assert advice in said[0] and advice in refused(load_pairs, write(tmp_path, differ, differ))


def test_a_few_rows_among_many_that_are_no_pairs_are_left_out_and_told(tmp_path):
    fine = [{"prompt": "q", "chosen": "yes", "rejected": str(i)} for i in range(199)]
    same, said = {"prompt": "q", "chosen": "no", "rejected": "no"}, []
    path = write(tmp_path, *fine[:50], same, *fine[50:])
    assert [line for line, _ in load_pairs(path, said.append)] == [*range(1, 51), *range(52, 201)]
    (line,) = said
    assert line.startswith(
        f"{path}: 1 of 200 rows are no pairs and left out, the first: {path}, li"
    )
    message = refused(load_pairs, write(tmp_path, *fine[:197], same, same, same))
    assert "line 198: chosen and rejected are the same" in message
    assert message.endswith(" (3 of 200 rows are no pairs)")


def test_only_one_users_turn_is_text():
    assert only_text("q") == only_text([ASK]) == "q"
    message = refused(only_text, [SYSTEM, ASK])
    assert "system, user" in message and "--prompt_style chat" in message
