"""Text to token ids and back: tokenizers of a folder, what a response says, how prompts begin."""

import json
from pathlib import Path

from pfppo.data import load_tokenizer
from pfppo.problems import Problem, assemble, load_problems
from pfppo.problems.extract import extract_code
from pfppo.sandbox import Sandbox

import conftest
import pytest
from conftest import tiny_config, tiny_tokenizer
from ranks import refused
from test_messages import turn
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

EOS = "<eos>"
CHAT = (
    "{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer(chat_template=None, closing=False, order=1):
    """One token per byte. `closing`: puts EOS after every text; `order`: -1 reverses the ids."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[::order]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([EOS, *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if closing:
        how = {"single": f"$A {EOS}", "special_tokens": [(EOS, 0)]}
        tokenizer.post_processor = processors.TemplateProcessing(**how)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, chat_template=chat_template
    )


def prompt_of(tokens, prompt):
    """Its token ids."""
    return tokens.rendered([("here", prompt)])[0]


def answered(before, content):
    return [*before, turn("assistant", content)]


@pytest.mark.parametrize(
    "architecture, named, make",
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
    ids, (first, second) = made(text)["input_ids"], map(conftest.tokens_of, (made, loaded))
    assert loaded(text)["input_ids"] == ids != []
    assert first.decode([[]], [ids]) == second.decode([[]], [ids])
    assert loaded.eos_token_id == made.eos_token_id


def test_a_folder_without_a_usable_tokenizer_is_refused_with_its_option(tmp_path):
    absent = tmp_path / "none"
    assert refused(load_tokenizer, absent).startswith(f"--policy {absent}: there is no such")
    message = refused(load_tokenizer, tmp_path, "reward_model")
    assert message.startswith(f"--reward_model {tmp_path}: cannot read the tokenizer")
    (tmp_path / "tokenizer.json").write_text("{")
    assert refused(load_tokenizer, tmp_path).startswith(f"--policy {tmp_path}: cannot read")
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    said = refused(load_tokenizer, tmp_path)
    assert said.startswith(f'--policy {tmp_path}: the tokenizer has no EOS: expected "eos_token"')


CODE = ["def f(xs):\n", "    return sum(xs)\n", "    if x:\n        y = 1\n", "a = 'é'\n"] * 9
DATA = Path(__file__).parents[2] / "shared" / "data"


def sentencepiece(marks=(), **special):
    """A tokenizer of Llama 2's kind: a blank is put first and taken off again."""
    inner, blank = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>")), "\u2581"
    written = normalizers.Prepend(blank), normalizers.Replace(" ", blank)
    read = decoders.Replace(blank, " "), decoders.ByteFallback(), decoders.Fuse()
    inner.normalizer = normalizers.Sequence(list(written))
    inner.decoder = decoders.Sequence([*read, decoders.Strip(" ", 1, 0)])
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *marks]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=names, show_progress=False)
    inner.train_from_iterator([" ".join(CODE), *CODE], trainer)
    whole = json.loads(inner.to_str())  # bytes are no special tokens
    whole["added_tokens"] = [t for t in whole["added_tokens"] if t["content"][:3] != "<0x"]
    inner = Tokenizer.from_str(json.dumps(whole))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


@pytest.mark.parametrize(
    "text", ["    return sum(xs)\n", "\treturn 1", "  x", "x = 1\n    y", "\n    return x", ""]
)
@pytest.mark.parametrize(
    "make", [make_tokenizer, lambda: make_tokenizer(closing=True), sentencepiece]
)
def test_a_response_is_read_and_written_behind_its_prompt_with_one_end(make, text):
    """What a response says does not depend on the blank that its tokenizer would put first."""
    tokens = conftest.tokens_of(make())
    for prompt in ("def f(xs):\n", "def f(xs):", "# 3"):
        ids = prompt_of(tokens, prompt)
        response = tokens.response(ids, text, "here")
        assert response[-1] == tokens.end and response.count(tokens.end) == 1
        assert tokens.decode([ids], [response]) == [text]
        whole, alone = (
            tokens.tokenizer(x, add_special_tokens=False)["input_ids"]
            for x in (prompt + text, prompt)
        )
        if whole[: len(alone)] == alone:  # as the policy would write it
            assert response[:-1] == whole[len(alone) :]


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark files at {DATA}")
def test_humanevals_references_pass_through_such_a_tokenizer():
    tokens, checks = conftest.tokens_of(sentencepiece(), limit=4000), []
    for problem in load_problems(DATA / "HumanEval.jsonl.gz", "humaneval"):
        ids = prompt_of(tokens, problem.prompt)
        response = tokens.response(ids, problem.canonical_solution, "here")
        checks.append(assemble(problem, *tokens.decode([ids], [response])))
    with Sandbox() as sandbox:
        assert sum(verdict.passed for verdict in sandbox.run(checks)) == 164


def test_stop_ids_leave_no_text_whether_the_tokenizer_calls_them_special_or_not():
    tokenizer = make_tokenizer()
    word, mark = (tokenizer(text)["input_ids"] for text in "x:")
    tokens = conftest.tokens_of(tokenizer, stop=[mark[0], tokenizer.eos_token_id])
    assert tokens.decode([[5], [5]], [[*word, end] for end in tokens.stop]) == ["x", "x"]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("make", [make_tokenizer, sentencepiece])
def test_a_thought_is_no_answer_where_its_marks_are_special_tokens(make, special):
    tokenizer, problem = make(), Problem("t", "", "f", "", "")
    marks = ["<think>", "</think>", "[THINK]", "[/THINK]"]
    tokenizer.add_tokens(marks, special_tokens=special)
    tokenizer.add_tokens(["<|fim|>"], special_tokens=True)  # says nothing
    tokens = conftest.tokens_of(tokenizer)
    for begin, end in (marks[:2], marks[2:]):
        prompt = prompt_of(tokens, f"Write f.{begin}\n")  # some templates begin the thought
        for before in ("", begin, f"x{end}{begin}"):
            said = f"{before}def f():\n    return 0{end}def f():<|fim|>\n    return 1\n"
            (text,) = tokens.decode([prompt], [tokens.response(prompt, said, "here")])
            program = {}
            exec(extract_code(text, problem), program)
            assert program["f"]() == 1


@pytest.mark.parametrize("named", [True, False])  # else only its post-processor knows the BOS
def test_text_that_was_rendered_before_gets_no_second_beginning(named):
    tokenizer = sentencepiece(**({} if named else {"bos_token": None}))
    around = {"single": "<s> $A </s>", "special_tokens": [("<s>", 1), ("</s>", 2)]}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(**around)
    tokens = conftest.tokens_of(tokenizer)
    for text in ("<s>[INST] f [/INST]", "\n<s>[INST] f [/INST]", "[INST] f [/INST]", ""):
        ids = prompt_of(tokens, text)
        assert ids.count(1) == 1 and ids.count(2) == 0
    # An end that the text has itself stays, as between the turns of a dialogue.
    assert prompt_of(tokens, "<s>[INST] f [/INST] g</s>").count(2) == 1


def test_a_prompt_begins_as_transformers_begins_it_whatever_class_cuts_the_text(tmp_path):
    sentencepiece().save_pretrained(tmp_path)  # says nothing of what is put around a text
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "CodeLlamaTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    named = AutoTokenizer.from_pretrained(tmp_path)("  x")["input_ids"]
    tokens = conftest.tokens_of(load_tokenizer(tmp_path))
    assert prompt_of(tokens, "  x")[0] == named[0] == tokens.tokenizer.bos_token_id
    load_tokenizer(tmp_path).save_pretrained(tmp_path)  # as an export does
    assert load_tokenizer(tmp_path)("  x")["input_ids"] == prompt_of(tokens, "  x")
