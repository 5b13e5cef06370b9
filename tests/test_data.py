"""Text and token ids: prompts, pairs, responses, hashes, what a step sees, what a run reads.

Not here: the forms of the files (test_problems and beside it).
"""

import json
from pathlib import Path
from types import SimpleNamespace

import eval_code
import train_ppo
import train_rm
from pfppo.config import UserError, parse
from pfppo.data import (
    ProblemSet,
    Tokens,
    load_tokenizer,
    problems_of,
    read_inputs,
    read_problems,
    render,
)
from pfppo.problems import Problem, assemble, load_problems
from pfppo.problems.extract import extract_code
from pfppo.rollout import step_prompts
from pfppo.run import read_pairs
from pfppo.sandbox import Sandbox

import conftest
import pytest
import torch
from conftest import PAD, tiny_config, tiny_tokenizer, write_model
from ranks import refused
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
STYLES = ("plain", "chat", "deepseek")
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


@pytest.fixture(scope="module")
def tokens_of(tmp_path_factory):
    """Makes the Tokens of a policy with 600 positions."""
    policy = tmp_path_factory.mktemp("policy")
    tiny_config("llama", max_position_embeddings=600).save_pretrained(policy)

    def make(style="plain", limit=1000, template=CHAT, **how):
        return conftest.tokens_of(make_tokenizer(template, **how), style, limit, str(policy))

    return make


def prompt_of(tokens, prompt):
    """Its token ids."""
    return tokens.rendered([("here", prompt)])[0]


def write(folder, *rows):
    """A JSONL file of objects; "" is a blank line."""
    path = folder / "rows.jsonl"
    path.write_text("".join((json.dumps(row) if row else "") + "\n" for row in rows))
    return path


def turn(role, content):
    return {"role": role, "content": content}


ASK = [turn("user", "q")]
DIALOGUE = [turn("system", "s"), *ASK, turn("assistant", "a"), turn("user", "r")]
HUMAN = "\n\nHuman: q\n\nAssistant:"
RENDERED = "[system]s[user]q[assistant]a[user]r[assistant]"


def answered(before, content):
    return [*before, turn("assistant", content)]


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


# ------------------------------------------------------------------------ what a response says

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


GENERATION = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + GENERATION
)
GEMMA = CHATML.replace("m.content", "m.content | trim").replace("<|im_end|>", "<end_of_turn>")
LLAMA2 = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content.strip() }} </s>{% endif %}{% endfor %}"
)
QWEN3 = CHATML.replace(
    "{{ m.content", "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content"
)
TEMPLATES = {  # family: (template, how it ends an assistant's turn)
    "chatml": (CHATML, "<|im_end|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "llama2": (LLAMA2, "</s>"),
    "qwen3": (QWEN3, "<|im_end|>"),
    "silent": ("{{ messages[0].content }}", None),  # says nothing of an end, nor of an answer
}


def policy_with(tokenizer, folder, stop):
    """Tokens of a policy whose folder names these ends, in style chat, and what was said."""
    tokenizer.save_pretrained(folder)
    tiny_config("llama", vocab_size=len(tokenizer), eos_token_id=stop).save_pretrained(folder)
    args = SimpleNamespace(policy=folder, prompt_style="chat", max_prompt_tokens=99, pairs="-")
    said = []
    return Tokens.of(args, said.append), said


OWN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ eos_token }}"


def test_a_template_of_ones_own_takes_the_place_of_the_tokenizers(tmp_path):
    """And is hashed as it is: with the tokenizer that it was saved with, style chat is the same."""
    file, tokenizer = tmp_path / "own.jinja", make_tokenizer(CHAT)
    file.write_text(OWN)
    make_tokenizer(CHAT).save_pretrained(tmp_path)
    tiny_config("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    args = SimpleNamespace(policy=tmp_path, prompt_style=str(file), max_prompt_tokens=99, pairs="-")
    own = Tokens.of(args, print)
    assert own.style == "chat" and own.tokenizer.chat_template == OWN
    assert own.tokenizer.decode(prompt_of(own, "a question")) == f"<user>a question{EOS}"
    before = Tokens.of(SimpleNamespace(**vars(args) | {"prompt_style": "chat"}), print)
    assert before.hashes()[0] != own.hashes()[0]
    own.tokenizer.save_pretrained(tmp_path)
    after = Tokens.of(SimpleNamespace(**vars(args) | {"prompt_style": "chat"}), print)
    assert after.hashes() == own.hashes()


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "cannot be read: No such file"),
        ("{% for m in messages %}", "no chat template that runs: TemplateSyntaxError"),
        ("{{ messages[0].content.nothing() }}", "no chat template that runs: UndefinedError"),
        ("You are an assistant.", "is not in what it makes of it, 'You are an assistant.'"),
        (b"\xff\xfe{{", "no chat template that runs: UnicodeDecodeError"),
    ],
)
@pytest.mark.parametrize("script", [train_ppo, train_rm, eval_code])
def test_what_is_wrong_with_a_template_of_ones_own_is_one_line_of_the_command_line(
    tmp_path, script, text, said
):
    file = tmp_path / "own.jinja"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused(parse, script.Args, ["--prompt_style", str(file)])
    assert message.startswith(f"--prompt_style {file}: ")
    assert said in message and "\n" not in message
    message = refused(parse, script.Args, ["--prompt_style", "poem"])
    assert message.startswith("--prompt_style poem: expected plain, ") and "FILE.jinja" in message


@pytest.mark.parametrize("named", [True, False])  # as after training of a base model
@pytest.mark.parametrize("marks", [(), ("[INST]", "[/INST]", "<|start|>", "<think>", "</think>")])
@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("make", [make_tokenizer, sentencepiece])
def test_a_pair_s_response_has_the_ids_that_the_template_gives_a_turn(
    tmp_path, make, family, marks, named
):
    template, end = TEMPLATES[family]
    tokenizer = make()
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": [*marks, *([end] if end else [])]})
    eos = tokenizer.eos_token_id
    last = tokenizer.convert_tokens_to_ids(end) if end else eos
    tokens, said = policy_with(tokenizer, tmp_path, sorted({eos, last}) if named else eos)
    assert (tokens.end, tokens.stop) == (last, sorted({eos, last}))
    assert [repr(end) in line for line in said] == [True] * (last != eos and not named)
    prompt = prompt_of(tokens, "f")
    rendered = tokenizer.apply_chat_template(
        answered([turn("user", "f")], "return 1"), tokenize=False
    )
    whole = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    for text in ("return 1", f"return 1{end}", f"return 1{end}\n"):  # one that brings its end too
        response = tokens.response(prompt, text if end else "return 1", "here")
        assert response[-1] == last and sum(i in tokens.stop for i in response) == 1
        (said,) = tokens.decode([prompt], [response])
        assert said.rpartition("</think>")[2].strip() == "return 1"
        if end and text == "return 1":
            assert whole[: len(prompt)] == prompt
            assert response == whole[len(prompt) : len(prompt) + len(response)]
    # What a policy writes behind its end is no text.
    assert tokens.decode([prompt], [[*response, *response]]) == [said]


@pytest.mark.parametrize("template", [GEMMA, LLAMA2, CHATML])
def test_an_indent_that_a_template_strips_stays_in_a_response(tmp_path, template):
    tokenizer, text = make_tokenizer(template), "    if x:\n        return 1"
    tokens, _ = policy_with(tokenizer, tmp_path, tokenizer.eos_token_id)
    prompt = prompt_of(tokens, "f")
    (said,) = tokens.decode([prompt], [tokens.response(prompt, text, "here")])
    assert said.startswith(text)


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


# ----------------------------------------------------------------------------- what a step sees


def epoch_of(count, size, epoch, seed):
    steps = range(epoch * (count // size), (epoch + 1) * (count // size))
    return sum((step_prompts(count, size, step, seed) for step in steps), [])


@pytest.mark.parametrize("count, size", [(12, 4), (11, 4)])
def test_an_epoch_is_a_permutation_of_the_prompts_but_for_a_part_that_fills_no_step(count, size):
    epochs = [epoch_of(count, size, epoch, seed=1) for epoch in range(20)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == count // size * size
    assert len(set(map(tuple, epochs))) == 20  # each another one
    assert set(sum(epochs, [])) == set(range(count))  # every prompt is seen sooner or later


def test_a_step_is_a_function_of_seed_and_step_alone():
    first = step_prompts(50, 5, 7, seed=1)
    torch.rand(3)  # the global state plays no part
    assert step_prompts(50, 5, 7, seed=1) == first
    assert step_prompts(50, 5, 7, seed=2) != first
    assert step_prompts(50, 5, 8, seed=1) != first


def test_the_rounds_of_a_step_have_different_prompts():
    for step in range(3):
        rounds = [step_prompts(12, 4, step, 1, round) for round in range(3)]
        assert sorted(sum(rounds, [])) == list(range(12))
        assert rounds[0] == step_prompts(12, 4, step, 1)


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
