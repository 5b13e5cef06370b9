"""Chat templates: of one's own, and of families, whose turns give the ids of a response."""

from types import SimpleNamespace

import eval_code
import train_ppo
import train_rm
from pfppo.config import parse
from pfppo.data import Tokens

import pytest
from conftest import tiny_config
from ranks import refused
from test_messages import turn
from test_tokens import CHAT, EOS, answered, make_tokenizer, prompt_of, sentencepiece

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
