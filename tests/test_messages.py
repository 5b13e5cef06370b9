"""Dialogues and pairs of files: what is taken, and what is said of what is not."""

from pfppo.config import UserError
from pfppo.problems.messages import only_text, read_pair, read_turns

import pytest


def turn(role, content):
    return {"role": role, "content": content}


ASK, YES, NO = turn("user", "q"), turn("assistant", "yes"), turn("assistant", "no")


def refused(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_of_a_turn_role_and_content_are_kept():
    assert read_turns([ASK | {"name": "x", "weight": 1}], "here", "user") == [ASK]


def test_parts_of_text_are_put_together():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read_turns([turn("user", parts)], "here", "user") == [turn("user", "ab")]


@pytest.mark.parametrize(
    "roles",
    ["user", "system user", "user assistant user", "system user assistant user assistant user"],
)
def test_a_prompt_has_a_system_turn_or_none_then_user_and_assistant_by_turns(roles):
    turns = [turn(role, "x") for role in roles.split()]
    assert read_turns(turns, "here", "user") == turns


@pytest.mark.parametrize(
    ("roles", "last"),
    [
        ("user assistant", "user"),  # a whole dialogue where a prompt is expected
        ("user", "assistant"),  # and the other way round
        ("system", "user"),
        ("system assistant", "assistant"),
        ("user user", "user"),
        ("assistant user", "user"),
        ("user system", "user"),
        ("human", "user"),
        ("user tool assistant", "assistant"),
    ],
)
def test_other_orders_and_roles_are_refused_with_what_was_found(roles, last):
    message = refused(read_turns, [turn(role, "x") for role in roles.split()], "here", last)
    assert message.startswith("here: expected ") and f"the last one {last}" in message
    assert message.endswith(f"found {', '.join(roles.split())}")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([], "here: expected messages, found an empty list"),
        (["a"], "here, message 1: expected an object with 'role' and 'content', found 'a'"),
        ([{"from": "human", "value": "a"}], "found one with from, value"),
        ([turn("user", " \n")], "here, message 1: 'content' is empty"),
        ([turn("user", [])], "here, message 1: 'content' is empty"),
        ([turn("user", None)], "here, message 1: 'content': expected a string, found nothing"),
        ([ASK, turn("assistant", ""), ASK], "here, message 2: 'content' is empty"),
        ([turn("user", [{"type": "image", "url": "x"}])], "parts of text only, found {'type'"),
        ([turn(["user"], "x")], "found ['user']"),
    ],
)
def test_a_bad_turn_is_named_with_its_number(value, expected):
    assert expected in refused(read_turns, value, "here", "user")


def test_a_response_may_be_empty_as_text_and_as_a_turn():
    row = {"prompt": "q", "chosen": "yes"}
    for empty in ("", [turn("assistant", "")], [ASK, turn("assistant", "")]):
        chosen = [ASK, YES] if len(empty) == 2 else "yes"
        assert read_pair(row | {"chosen": chosen, "rejected": empty}, "here") == ("q", "yes", "")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"chosen": [ASK, YES], "rejected": [turn("user", "other"), NO]},
            "here: chosen and rejected differ before their last messages (1 and 1 messages there)",
        ),
        ({"chosen": [ASK, YES], "rejected": "no"}, "(1 and 0 messages there)"),
        ({"chosen": [YES], "rejected": [NO]}, "here: field 'prompt' (or 'instruction'): expected"),
        ({"chosen": "yes", "rejected": "no"}, "expected a string or a list of messages, found no"),
        ({"prompt": [], "chosen": "yes", "rejected": "no"}, "found an empty list"),
        (
            {"prompt": "else", "chosen": [ASK, YES], "rejected": [ASK, NO]},
            "(or 'instruction'): expected what chosen and rejected start with, found 'else' in it",
        ),
        ({"prompt": [turn("user", "x")], "chosen": [ASK, YES], "rejected": [ASK, NO]}, "start wi"),
        ({"prompt": [ASK, YES], "chosen": "yes", "rejected": "no"}, "the last one user, found use"),
        ({"prompt": "q", "chosen": [ASK], "rejected": [ASK]}, "'chosen' (or 'pos'): expected a sy"),
        ({"chosen": [ASK, YES], "rejected": [ASK, YES]}, "here: chosen and rejected are the same"),
        ({"prompt": 3, "chosen": "yes", "rejected": "no"}, "list of messages, found 3"),
        ({"prompt": "q", "chosen": None, "rejected": "no"}, "'chosen' (or 'pos'): expected a stri"),
    ],
)
def test_a_pair_that_is_none_is_named_with_field_found_and_expected(row, expected):
    message = refused(read_pair, row, "here")
    assert message.startswith("here") and expected in message


def test_only_one_users_turn_is_text():
    assert only_text("q") == only_text([ASK]) == "q"
    message = refused(only_text, [turn("system", "s"), ASK])
    assert "system, user" in message and "--prompt_style chat" in message
