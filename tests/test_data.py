"""JSONL in, prompts rendered, hashes, what a step sees; a byte-level tokenizer made here."""

import json

from pfppo.config import UserError
from pfppo.data import (
    check_style,
    decode,
    load_pairs,
    load_prompts,
    load_rendered,
    load_tokenizer,
    render,
    response_ids,
    step_prompts,
    template_hash,
    vocabulary_hash,
)
from pfppo.problems.benchmarks import assemble

import pytest
import torch
from conftest import tiny_config, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

EOS = "<eos>"
CHAT = (
    "{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer(chat_template=None, closing=False, order=1):
    """One token per byte. `closing`: puts EOS after every text; `order`: -1 reverses the ids."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[::order]
    vocabulary = {token: i for i, token in enumerate([EOS, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if closing:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {EOS}", special_tokens=[(EOS, 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, chat_template=chat_template
    )


def write(folder, *rows):
    """A JSONL file of objects, and of lines that stand as they are."""
    path = folder / "rows.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def refused(function, *args):
    """The one line that a call ends in."""
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


TESTED = {"prompt": "def f():\n", "entry_point": "f", "test": "assert f() == 1"}

# ----------------------------------------------------------------------------------------- prompts


def test_a_prompt_alone_is_enough_and_is_named_by_its_line(tmp_path):
    (first, second) = load_prompts(write(tmp_path, {"prompt": "a"}, "", {"prompt": "b"}))
    assert (first.prompt, first.test, first.entry_point) == ("a", "", "")
    assert [first.task_id, second.task_id] == ["line 1", "line 3"]


def test_all_fields_of_a_problem_are_kept_and_others_ignored(tmp_path):
    row = TESTED | {"task_id": "t/1", "canonical_solution": "    return 1\n", "setup": "x = 1\n"}
    (problem,) = load_prompts(write(tmp_path, row | {"difficulty": 3}))
    assert {name: getattr(problem, name) for name in row} == row


@pytest.mark.parametrize(
    "row, found",
    [
        ({"text": "a"}, "field 'prompt': expected a string, found nothing"),
        ({"prompt": 3}, "field 'prompt': expected a string, found int"),
        ({"prompt": None}, "field 'prompt': expected a string, found NoneType"),
        ({"prompt": " \n"}, "field 'prompt' is empty"),
        ({"prompt": []}, "field 'prompt': expected messages, found an empty list"),
        ({"prompt": "a", "task_id": 7}, "field 'task_id': expected a string, found int"),
        (TESTED | {"test": ["x"]}, "field 'test': expected a string, found list"),
        (TESTED | {"entry_point": 1}, "field 'entry_point': expected a string, found int"),
        (TESTED | {"canonical_solution": 1}, "field 'canonical_solution': expected a string"),
        ({"prompt": "a", "test": "assert f()"}, "'test' and 'entry_point'"),
        ({"prompt": "a", "entry_point": "f"}, "'test' and 'entry_point'"),
        ("{'prompt'", "not JSON"),
        ("3", "expected an object"),
    ],
)
def test_a_bad_line_of_prompts_is_named_with_file_line_and_field(tmp_path, row, found):
    path = write(tmp_path, {"prompt": "fine"}, row)
    message = refused(load_prompts, path)
    assert message.startswith(f"{path}, line 2: ") and found in message


def test_a_task_id_that_stands_twice_is_refused_with_both_lines(tmp_path):
    rows = [{"prompt": str(i), "task_id": f"t/{i % 2}"} for i in range(3)]
    path = write(tmp_path, *rows)
    message = refused(load_prompts, path)
    assert message.startswith(f"{path}, line 3: ")
    assert "'t/0'" in message and "line 1" in message


def pairs_of(path, style="plain", limit=100):
    """(pairs as token ids, as said) of a file, with a tokenizer that has a chat template."""
    return load_pairs(path, make_tokenizer(CHAT), style, limit)


@pytest.mark.parametrize("load", [load_prompts, pairs_of])
def test_an_empty_or_absent_file_is_refused_by_name(tmp_path, load):
    path = write(tmp_path)
    assert refused(load, path).startswith(f"{path}: no rows")
    path.write_text("\n\n")
    assert refused(load, path).startswith(f"{path}: no rows")
    assert refused(load, tmp_path / "none.jsonl").startswith(f"{tmp_path}/none.jsonl: cannot be")


# ------------------------------------------------------------------------------------------- pairs


def test_pairs_are_taken_by_our_names_and_by_the_authors(tmp_path):
    ours = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    authors = {"instruction": "q", "pos": "yes", "neg": ""}
    _, said = pairs_of(write(tmp_path, ours, authors))
    assert said == [("p", "good", "bad"), ("q", "yes", "")]


@pytest.mark.parametrize(
    "row, field, found",
    [
        ({"chosen": "a", "rejected": "b"}, "'prompt' (or 'instruction')", "found nothing"),
        ({"prompt": "p", "rejected": "b"}, "'chosen' (or 'pos')", "found nothing"),
        ({"prompt": "p", "chosen": "a", "neg": 3}, "'rejected' (or 'neg')", "found 3"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "'prompt' (or 'instruction')", "''"),
        (
            {"prompt": "p", "chosen": ["a"], "rejected": "b"},
            "'chosen' (or 'pos'), message 1",
            "found 'a'",
        ),
        ({"prompt": {}, "chosen": "a", "rejected": "b"}, "'prompt' (or 'instruction')", "found {}"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "", "are the same"),
    ],
)
def test_a_bad_line_of_pairs_is_named_with_file_line_and_field(tmp_path, row, field, found):
    path = write(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b"}, row)
    message = refused(pairs_of, path)
    assert message.startswith(f"{path}, line 2: ") and field in message and found in message


def turn(role, content):
    return {"role": role, "content": content}


ASK = [turn("user", "q")]
DIALOGUE = [turn("system", "s"), *ASK, turn("assistant", "a"), turn("user", "r")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        {"prompt": "q", "chosen": [turn("assistant", "yes")], "rejected": "no"},
        {"prompt": ASK, "chosen": "yes", "rejected": [turn("assistant", "no")]},
        {
            "prompt": "q",
            "chosen": [*ASK, turn("assistant", "yes")],
            "rejected": [*ASK, turn("assistant", "no")],
            "score_chosen": 7.0,
        },
        {"chosen": [*ASK, turn("assistant", "yes")], "rejected": [*ASK, turn("assistant", "no")]},
        {"instruction": ASK, "pos": "yes", "neg": "no"},
    ],
)
def test_every_form_of_a_pair_gives_equal_rows(tmp_path, row):
    tokenizer = make_tokenizer(CHAT)
    for style in ("plain", "chat", "deepseek"):
        pairs, said = pairs_of(write(tmp_path, row), style, 1000)
        assert said == [("q", "yes", "no")]
        prompt, *responses = pairs[0]
        assert prompt == render("q", tokenizer, style)
        assert responses == [response_ids(text, tokenizer) for text in ("yes", "no")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": DIALOGUE, "chosen": "yes", "rejected": "no"},
        {
            name: [*DIALOGUE, turn("assistant", text)]
            for name, text in (("chosen", "yes"), ("rejected", "no"))
        },
        {
            "prompt": "q",
            "chosen": [*DIALOGUE, turn("assistant", "yes")],
            "rejected": [*DIALOGUE, turn("assistant", "no")],
        },
    ],
)
def test_a_dialogue_of_several_turns_goes_through_the_chat_template(tmp_path, row):
    pairs, said = pairs_of(write(tmp_path, row), "chat")
    tokenizer = make_tokenizer(CHAT)
    assert [decode(ids, tokenizer) for ids in pairs[0]] == [
        "[system]s[user]q[assistant]a[user]r[assistant]",
        "yes",
        "no",
    ]
    assert said == [(DIALOGUE, "yes", "no")]


def test_pairs_written_down_as_they_were_said_are_read_again(tmp_path):
    rows = [{"prompt": DIALOGUE, "chosen": "yes", "rejected": ""}]
    pairs, said = pairs_of(write(tmp_path, *rows), "chat")
    again = [dict(zip(("prompt", "chosen", "rejected"), triple, strict=True)) for triple in said]
    assert pairs_of(write(tmp_path, *again), "chat") == (pairs, said)


@pytest.mark.parametrize("style", ["plain", "deepseek"])
@pytest.mark.parametrize("prompt", [DIALOGUE, [turn("system", "s"), *ASK]])
def test_several_turns_or_a_system_turn_need_the_chat_style(tmp_path, style, prompt):
    path = write(tmp_path, "", {"prompt": prompt, "chosen": "yes", "rejected": "no"})
    message = refused(pairs_of, path, style)
    assert message.startswith(f"{path}, line 2: ") and "--prompt_style chat" in message
    problems = write(tmp_path, "", {"prompt": prompt})
    message = refused(load_rendered, problems, make_tokenizer(CHAT), style, 100)
    assert "line 2" in message and "--prompt_style chat" in message


def test_a_chat_template_that_refuses_a_turn_is_named_with_the_line(tmp_path):
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    row = {"prompt": DIALOGUE, "chosen": "yes", "rejected": "no"}
    message = refused(load_pairs, write(tmp_path, row), make_tokenizer(strict), "chat", 100)
    for part in ("line 1", "--prompt_style chat", "system, user", "no system"):
        assert part in message


def test_a_prompt_of_a_pair_longer_than_the_limit_is_refused_with_its_line(tmp_path):
    rows = [{"prompt": text, "chosen": "a", "rejected": "b"} for text in ("ab", "abcd")]
    message = refused(pairs_of, write(tmp_path, *rows), "plain", 3)
    for part in ("line 2", "4 tokens", "1 to 3", "--max_prompt_tokens"):
        assert part in message


# ---------------------------------------------------------------------------------------- rendering


def test_a_plain_prompt_is_tokenized_as_it_stands():
    tokenizer = make_tokenizer()
    text = "def f(x):\n  # é\n"
    assert tokenizer.decode(render(text, tokenizer, "plain")) == text


def test_an_eos_that_the_tokenizer_puts_after_a_prompt_is_taken_off():
    text = "def f(x):\n"
    assert render(text, make_tokenizer(closing=True), "plain") == render(
        text, make_tokenizer(), "plain"
    )


def test_a_chat_prompt_is_a_users_turn_and_asks_for_an_answer():
    tokenizer = make_tokenizer(CHAT)
    assert tokenizer.decode(render("hello", tokenizer, "chat")) == "[user]hello[assistant]"


def test_a_chat_prompt_gets_no_special_tokens_beside_those_of_its_template():
    tokenizer = make_tokenizer(CHAT, closing=True)
    assert tokenizer.eos_token_id not in render("hello", tokenizer, "chat")


def test_the_chat_style_needs_a_chat_template():
    check_style(make_tokenizer(CHAT), "chat", "some/policy")
    check_style(make_tokenizer(), "plain", "some/policy")
    message = refused(check_style, make_tokenizer(), "chat", "some/policy")
    assert "--prompt_style chat" in message and "--policy some/policy" in message


@pytest.mark.parametrize("closing", [False, True])
def test_a_response_ends_with_exactly_one_eos_and_decodes_to_its_text(closing):
    tokenizer = make_tokenizer(closing=closing)
    text = "    return x , y\n"
    ids = response_ids(text, tokenizer)
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert decode(ids, tokenizer) == text


def test_prompts_are_loaded_and_rendered_together(tmp_path):
    path, tokenizer = write(tmp_path, {"prompt": "ab"}, {"prompt": "abcd"}), make_tokenizer()
    problems, rendered = load_rendered(path, tokenizer, "plain", limit=4)
    assert [problem.prompt for problem in problems] == ["ab", "abcd"]
    assert rendered == [render("ab", tokenizer, "plain"), render("abcd", tokenizer, "plain")]
    assert load_rendered("", tokenizer, "plain", 4) == ([], [])


def test_in_chat_style_an_instruction_is_asked_where_there_is_one(tmp_path):
    path = write(tmp_path, {"prompt": "code", "instruction": "ask"}, {"prompt": "code"})
    tokenizer = make_tokenizer(CHAT)
    for style, expected in (
        ("plain", ["code", "code"]),
        ("chat", ["[user]ask[assistant]", "[user]code[assistant]"]),
    ):
        _, rendered = load_rendered(path, tokenizer, style, limit=50)
        assert [tokenizer.decode(ids) for ids in rendered] == expected


def test_a_prompt_longer_than_the_limit_is_refused_with_both_lengths(tmp_path):
    path = write(tmp_path, {"prompt": "ab"}, {"prompt": "abcd", "task_id": "t/2"})
    message = refused(load_rendered, path, make_tokenizer(), "plain", 3)
    for part in (str(path), "t/2", "4 tokens", "1 to 3", "--max_prompt_tokens"):
        assert part in message


def test_a_dialogue_is_a_prompt_and_its_last_turn_the_question(tmp_path):
    tested = {"entry_point": "f", "test": "assert f()", "canonical_solution": "def f(): return 1\n"}
    path = write(tmp_path, {"prompt": DIALOGUE} | tested, {"prompt": "q", "messages": 3})
    tokenizer = make_tokenizer(CHAT)
    (dialogue, text), rendered = load_rendered(path, tokenizer, "chat", 100)
    assert tokenizer.decode(rendered[0]) == "[system]s[user]q[assistant]a[user]r[assistant]"
    assert (dialogue.question, text.question) == ("r", "q") and not text.messages
    check = assemble(dialogue, "Sure:\n```python\ndef f():\n    return 2\n```")
    assert check.program == "def f():\n    return 2\n"  # nothing of the dialogue is code


def test_one_users_turn_is_rendered_as_its_text_and_not_put_into_an_instruction(tmp_path):
    tested = {"entry_point": "f", "test": "assert f()"}
    path, tokenizer = write(tmp_path, {"prompt": ASK} | tested), make_tokenizer(CHAT)
    for style in ("plain", "chat", "deepseek"):
        _, (ids,) = load_rendered(path, tokenizer, style, 1000)
        assert ids == render("q", tokenizer, style)


# ------------------------------------------------------------------------------ tokenizers, hashes


def test_a_saved_tokenizer_is_loaded_with_equal_hashes(tmp_path):
    made = make_tokenizer(CHAT)
    made.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert vocabulary_hash(loaded) == vocabulary_hash(made)
    assert template_hash(loaded, "chat") == template_hash(made, "chat")


@pytest.mark.parametrize(
    ("architecture", "named", "make"),
    [
        ("llama", "LlamaTokenizerFast", make_tokenizer),  # DeepSeek-Coder's folders, byte-level
        ("gpt2", "LlamaTokenizer", make_tokenizer),
        ("qwen2", "TokenizersBackend", tiny_tokenizer),  # words, in a family that has bytes
    ],
)
def test_text_is_cut_as_tokenizer_json_says_whatever_class_is_named(
    tmp_path, architecture, named, make
):
    made, text = make(), "w1  w2\n    w3 w4"
    made.save_pretrained(tmp_path)
    tiny_config(architecture, vocab_size=len(made)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = named
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert loaded(text)["input_ids"] == made(text)["input_ids"] != []
    assert decode(loaded(text)["input_ids"], loaded) == decode(made(text)["input_ids"], made)
    assert loaded.eos_token_id == made.eos_token_id


def test_a_folder_without_a_usable_tokenizer_is_refused_with_its_option(tmp_path):
    absent = tmp_path / "none"
    assert refused(load_tokenizer, absent).startswith(f"--policy {absent}: there is no such")
    message = refused(load_tokenizer, tmp_path, "reward_model")
    assert message.startswith(f"--reward_model {tmp_path}: cannot read the tokenizer")
    (tmp_path / "tokenizer.json").write_text("{")
    assert refused(load_tokenizer, tmp_path).startswith(f"--policy {tmp_path}: cannot read")


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    assert refused(load_tokenizer, tmp_path) == f"--policy {tmp_path}: the tokenizer has no EOS"


def test_the_template_hash_changes_with_what_renders_prompts():
    one, other = make_tokenizer(CHAT), make_tokenizer(CHAT + " ")
    assert template_hash(one, "chat") != template_hash(other, "chat")
    assert template_hash(one, "chat") != template_hash(one, "plain")
    assert template_hash(one, "plain") == template_hash(other, "plain")  # it plays no part there


def test_the_vocabulary_hash_changes_with_any_id_and_with_nothing_else():
    one = vocabulary_hash(make_tokenizer())
    assert one == vocabulary_hash(make_tokenizer(CHAT, closing=True))
    assert one != vocabulary_hash(make_tokenizer(order=-1))
    more = make_tokenizer()
    more.add_tokens(["one more"])
    assert one != vocabulary_hash(more)


# ----------------------------------------------------------------------------- what a step sees


def epoch_of(count, size, epoch, seed):
    steps = range(epoch * (count // size), (epoch + 1) * (count // size))
    return sum((step_prompts(count, size, step, seed) for step in steps), [])


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_is_a_permutation_of_the_prompts(epoch):
    assert sorted(epoch_of(12, 4, epoch, seed=1)) == list(range(12))


@pytest.mark.parametrize("step", range(9))
def test_a_step_never_holds_a_prompt_twice_where_the_size_does_not_divide(step):
    chosen = step_prompts(11, 4, step, seed=3)
    assert len(set(chosen)) == 4 and set(chosen) <= set(range(11))


def test_the_part_of_an_epoch_that_fills_no_step_is_left_out():
    assert len(set(epoch_of(11, 4, 0, seed=3))) == 8
    assert step_prompts(11, 4, 2, seed=3) == epoch_of(11, 4, 1, seed=3)[:4]


def test_every_prompt_is_seen_sooner_or_later():
    assert {i for step in range(40) for i in step_prompts(11, 4, step, 3)} == set(range(11))


def test_a_step_is_a_function_of_seed_and_step_alone():
    first = step_prompts(50, 5, 7, seed=1)
    torch.rand(3)  # the global state plays no part
    assert step_prompts(50, 5, 7, seed=1) == first
    assert step_prompts(50, 5, 7, seed=2) != first
    assert step_prompts(50, 5, 8, seed=1) != first


def test_epochs_have_different_orders():
    assert epoch_of(20, 5, 0, seed=1) != epoch_of(20, 5, 1, seed=1)
