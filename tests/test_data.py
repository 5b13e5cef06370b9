"""From files to token ids: pairs, prompts, hashes, what a run reads.

Not here: the forms of the files (test_rows.py, test_messages.py), tokenizers and templates
(test_tokens.py, test_templates.py).
"""

import json
from pathlib import Path
from types import SimpleNamespace

from pfppo.config import UserError
from pfppo.data import (
    ProblemSet,
    Tokens,
    load_tokenizer,
    problems_of,
    read_inputs,
    read_problems,
    render,
)
from pfppo.problems import assemble
from pfppo.run import read_pairs

import conftest
import pytest
from conftest import PAD, tiny_config, tiny_tokenizer, write, write_model
from ranks import refused
from test_messages import turn
from test_tokens import CHAT, DATA, answered, make_tokenizer
from transformers import PreTrainedTokenizerFast

STYLES = ("plain", "chat", "deepseek")


@pytest.fixture(scope="module")
def tokens_of(tmp_path_factory):
    """Makes the Tokens of a policy with 600 positions."""
    policy = tmp_path_factory.mktemp("policy")
    tiny_config("llama", max_position_embeddings=600).save_pretrained(policy)

    def make(style="plain", limit=1000, template=CHAT, **how):
        return conftest.tokens_of(make_tokenizer(template, **how), style, limit, str(policy))

    return make


ASK = [turn("user", "q")]
DIALOGUE = [turn("system", "s"), *ASK, turn("assistant", "a"), turn("user", "r")]
HUMAN = "\n\nHuman: q\n\nAssistant:"
RENDERED = "[system]s[user]q[assistant]a[user]r[assistant]"


def read_any(path, tokens, say=print):
    """Problems with tests or without."""
    args = SimpleNamespace(prompts=path, verify="tests")
    return read_problems(args, "prompts", tokens, tested=False, say=say)


def pair(prompt, chosen="yes", rejected="no"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# ------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "row",
    [
        pair("q"),
        pair("q", chosen=answered([], "yes")),
        pair(ASK, rejected=answered([], "no")),
        pair("q", answered(ASK, "yes"), answered(ASK, "no")) | {"score_chosen": 7.0},
        {"chosen": answered(ASK, "yes"), "rejected": answered(ASK, "no")},
        {"instruction": ASK, "pos": "yes", "neg": "no"},
        pair(HUMAN, f"{HUMAN} yes", f"{HUMAN} no"),
        pair("q", f"{HUMAN} yes", f"{HUMAN} no"),
    ],
)
def test_every_form_of_a_pair_gives_equal_rows(tokens_of, tmp_path, row, style):
    tokens = tokens_of(style)
    ((prompt, *responses),), said = read_pairs(write(tmp_path, row), tokens)
    assert said == [("q", "yes", "no")]
    assert prompt == render("q", tokens.tokenizer, style)
    assert responses == [tokens.response(prompt, text, "") for text in ("yes", "no")]


@pytest.mark.parametrize(
    "row",
    [
        pair(DIALOGUE),
        {"chosen": answered(DIALOGUE, "yes"), "rejected": answered(DIALOGUE, "no")},
        pair("q", answered(DIALOGUE, "yes"), answered(DIALOGUE, "no")),
    ],
)
def test_a_dialogue_of_several_turns_goes_through_the_chat_template(tokens_of, tmp_path, row):
    tokens = tokens_of("chat")
    (ids,), said = read_pairs(write(tmp_path, row), tokens)
    assert tokens.decode([[]] * 3, ids) == [RENDERED, "yes", "no"]
    assert said == [(DIALOGUE, "yes", "no")]
    # Written down as they were said they are read again.
    again = write(tmp_path, *(pair(*triple) for triple in said))
    assert read_pairs(again, tokens) == ([ids], said)


@pytest.mark.parametrize("style", ["plain", "deepseek"])
@pytest.mark.parametrize("prompt", [DIALOGUE, [turn("system", "s"), *ASK]])
def test_several_turns_or_a_system_turn_need_the_chat_style(tokens_of, tmp_path, style, prompt):
    path = write(tmp_path, "", pair(prompt))
    for read in (read_pairs, read_any):
        message = refused(read, path, tokens_of(style))
        assert message.startswith(str(path)) and "line 2: " in message
        assert "--prompt_style chat" in message


def test_a_chat_template_that_refuses_a_turn_is_named_with_the_line(tokens_of, tmp_path):
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    message = refused(read_pairs, write(tmp_path, pair(DIALOGUE)), tokens_of("chat", 9, strict))
    for part in ("line 1", "--prompt_style chat", "system, user", "no system"):
        assert part in message


@pytest.mark.parametrize("read, where", [(read_pairs, "line 2"), (read_any, "task t/2")])
def test_prompts_longer_than_the_limit_are_left_out_and_counted(tokens_of, tmp_path, read, where):
    rows = pair("ab"), pair("abcd") | {"task_id": "t/2"}, pair("abcdef")
    path, said = write(tmp_path, *rows), []
    read(path, tokens_of(limit=6), said.append)
    assert said == []
    found = read(path, tokens_of(limit=3), said.append)
    assert len(found[0] if read is read_pairs else found) == 1
    first = f"{path}, {where}: prompt of 4 tokens, expected at most 3 (--max_prompt_tokens)"
    assert said == [f"left out: {first}; 2 of 3 are longer, up to 6 tokens"]
    with pytest.raises(UserError, match="prompt of 2 tokens, expected at most 1 .*3 of 3 are"):
        read(path, tokens_of(limit=1), said.append)


def test_pairs_longer_than_the_policy_has_positions_for_are_left_out(tokens_of, tmp_path):
    long, said = pair("q" * 9, "y" * 591), []  # and EOS
    path = write(tmp_path, pair("q" * 9, "y" * 590), long)
    pairs, texts = read_pairs(path, tokens_of(), said.append)
    assert len(pairs) == len(texts) == 1
    assert f"{path}, line 2: row of 601 tokens, expected at most 600" in said[0]
    assert "line 1: row of 601 tokens" in refused(read_pairs, write(tmp_path, long), tokens_of())


@pytest.mark.parametrize("closing", [False, True])  # such an EOS would end the prompt
@pytest.mark.parametrize(
    "style, begin, end", [("plain", "", ""), ("chat", "[user]", "[assistant]")]
)
def test_a_prompt_is_tokenized_as_it_stands_or_as_a_users_turn_and_no_more(
    closing, style, begin, end
):
    tokenizer, text = make_tokenizer(CHAT, closing), "def f(x):\n  # é\n"
    assert tokenizer.decode(render(text, tokenizer, style)) == begin + text + end


@pytest.mark.parametrize("name", ["validation", "test"])
def test_problems_that_choose_or_judge_the_policy_need_tests(args, name):
    setattr(args, name, args.prompts)
    said = f"--{name} {args.prompts}: 1 of 2 problems have no 'test', such as ['line 1']"
    assert refused(read_inputs, args) == said


def test_a_chat_template_that_is_not_used_is_told(args, capsys):
    Tokens.of(args)
    assert "hint" not in capsys.readouterr().out
    folder = Path(args.policy)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    Tokens.of(args)
    assert "has a chat template, but --prompt_style is plain" in capsys.readouterr().out


def test_each_option_takes_its_split_of_a_benchmark_as_it_is_published(args):
    """Google's file, gzipped, for all three: training, validation and test tasks."""
    path = DATA / "mbpp.jsonl.gz"
    if not path.exists():
        pytest.skip("mbpp.jsonl.gz is not in shared/data")
    args.prompts = args.validation = args.test = str(path)
    parts = [problems_of(args, option) for option in ("prompts", "validation", "test")]
    assert [len(part) for part in parts] == [374, 90, 500]
    assert [part[0].task_id for part in parts] == ["Mbpp/601", "Mbpp/511", "Mbpp/11"]
    for name, count in (
        ("HumanEval.jsonl.gz", 164),
        ("leetcode_contest_2023-07_2024-01.jsonl.gz", 180),
    ):
        args.prompts = str(DATA / name)
        assert len(problems_of(args, "prompts")) == count


def test_in_chat_style_an_instruction_is_asked_where_there_is_one(tokens_of, tmp_path):
    path = write(tmp_path, {"prompt": "code", "instruction": "ask"}, {"prompt": "code"})
    chat = ["[user]ask[assistant]", "[user]code[assistant]"]
    for style, expected in (("plain", ["code", "code"]), ("chat", chat)):
        tokens = tokens_of(style)
        asked = read_any(path, tokens)
        assert tokens.decode([[]] * 2, asked.prompts) == expected
        again = ProblemSet.of(asked.problems, "", tokens, ["code"] * 2)
        assert again.prompts == [asked.prompts[1]] * 2


def test_a_dialogue_is_a_prompt_and_its_last_turn_the_question(tokens_of, tmp_path):
    tested = {"entry_point": "f", "test": "assert f()", "canonical_solution": "def f(): return 1\n"}
    path = write(tmp_path, {"prompt": DIALOGUE} | tested, {"prompt": "q", "messages": 3})
    tokens = tokens_of("chat")
    asked = read_any(path, tokens)
    dialogue, text = asked.problems
    assert tokens.decode([[]], asked.prompts[:1]) == [RENDERED]
    assert (dialogue.question, text.question) == ("r", "q") and not text.messages
    check = assemble(dialogue, "Sure:\n```python\ndef f():\n    return 2\n```")
    assert check.program == "def f():\n    return 2\n"  # nothing of the dialogue is code


@pytest.mark.parametrize("style", STYLES)
def test_one_users_turn_is_rendered_as_its_text_and_not_put_into_an_instruction(
    tokens_of, tmp_path, style
):
    path = write(tmp_path, {"prompt": ASK, "entry_point": "f", "test": "assert f()"})
    tokens = tokens_of(style)
    assert read_any(path, tokens).prompts == [render("q", tokens.tokenizer, style)]


def test_the_template_hash_changes_with_what_renders_prompts(tokens_of, tmp_path):
    one, other = tokens_of("chat"), tokens_of("chat", template=CHAT + " ")
    plain = tokens_of()
    assert len({tokens.hashes()[0] for tokens in (one, other, plain)}) == 3
    assert one.hashes(other.tokenizer) == other.hashes()
    assert plain.hashes(other.tokenizer)[0] == plain.hashes()[0]  # it plays no part there
    one.tokenizer.save_pretrained(tmp_path)
    assert one.hashes(load_tokenizer(tmp_path)) == one.hashes()


def test_the_vocabulary_hash_changes_with_any_id_and_with_nothing_else(tokens_of):
    one, more = tokens_of(), tokens_of()
    more.tokenizer.add_tokens(["one more"])
    assert one.hashes()[1] == tokens_of("chat", 3, "", closing=True).hashes()[1]
    assert len({tokens.hashes()[1] for tokens in (one, more, tokens_of(order=-1))}) == 3


@pytest.mark.parametrize(
    "special, pad, classifier_pad",
    [
        ({"pad_token": "<pad>", "bos_token": "<bos>"}, 0, 0),
        ({"pad_token": "<eos>", "bos_token": "<bos>"}, 1, 2),  # EOS must stay visible at the end
        ({"bos_token": "<bos>"}, 1, 2),
        ({"pad_token": "beyond the rows", "bos_token": "<bos>"}, 1, 2),
        ({"pad_token": "w0", "bos_token": "<bos>"}, 3, 2),  # w0 ends responses too
        ({}, 1, None),
    ],
)
def test_rows_are_padded_with_anything_and_a_classifiers_never_with_an_end(
    args, special, pad, classifier_pad
):
    inner = tiny_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", **special)
    tokenizer.save_pretrained(args.policy)
    ends = Path(args.policy) / "generation_config.json"
    ends.write_text(json.dumps({"eos_token_id": [1, 3]}))
    tokens = Tokens.of(args, print)
    assert (tokens.pad, tokens.classifier_pad) == (pad, classifier_pad)


@pytest.fixture
def args(lms, tmp_path):
    policy = write_model(tmp_path / "policy", lms["llama"])
    rows = {"prompt": "w1 w2 w3"}, {"prompt": "w4", "test": "pass", "entry_point": "f"}
    files = {"prompts": str(write(tmp_path, *rows)), "validation": "", "test": ""}
    limits = {"prompts_per_step": 2, "refill": 0, "max_prompt_tokens": 20, "max_new_tokens": 10}
    style = {"prompt_style": "plain", "reward": "model", "reward_model": "", "verify": "tests"}
    return SimpleNamespace(policy=policy, **files, **limits, **style)


def test_prompts_come_as_tokens_with_what_tokens_mean(args):
    tokenizer, said = tiny_tokenizer(), []
    inputs = read_inputs(args, said.append)
    assert said == ["problems: 2 to learn from (1 with tests), 0 for validation, 0 for the test"]
    wanted = [tokenizer(text)["input_ids"] for text in ("w1 w2 w3", "w4")]
    assert inputs.train.prompts == wanted and inputs.longest == 3
    assert (inputs.tokens.stop, inputs.tokens.pad) == ([tokenizer.eos_token_id], PAD)
    assert len(inputs.validation) == len(inputs.test) == 0
    rows = ({"prompt": f"w{i}", "tests": ["assert f()"], "level": i} for i in range(2))
    write(Path(args.prompts).parent, *rows)  # tests in a form that is not read
    read_inputs(args, said.append)
    assert "2 to learn from (0 with tests; not read: tests, level), 0 for" in said[1]


@pytest.mark.parametrize(
    "changed, parts",
    [
        ({"prompts_per_step": 3}, ["--prompts_per_step 3: more than the 2 prompts"]),
        ({"refill": 1}, ["--refill 1: more rounds of 2 than 2 prompts of "]),
        ({"reward": "tests"}, ["--prompts ", "1 of 2 problems have no 'test', such as ['line 1']"]),
        ({"max_new_tokens": 200}, ["--policy ", "200 leaves -72 of 128, the max_position_emb"]),
        ({"validation": "nowhere.jsonl"}, ["nowhere.jsonl"]),
    ],
)
def test_what_does_not_fit_is_one_line(args, changed, parts):
    vars(args).update(changed)
    message = refused(read_inputs, args)
    assert all(part in message for part in parts), message


def test_the_chat_style_needs_a_chat_template(args):
    args.prompt_style, args.max_prompt_tokens, tokenizer = "chat", 99, tiny_tokenizer()
    message = refused(read_inputs, args)
    lacks = f"--prompt_style chat: the tokenizer of --policy {args.policy} has no chat template"
    assert message.startswith(lacks)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(args.policy)
    assert read_inputs(args).tokens.style == "chat"
