"""Prompts and pairs: JSONL in, token ids out. One function renders prompts for RM, PPO and eval.

A prompts file has one object per line with at least `prompt`. With `entry_point` and `test` as well
(HumanEval's form) samples can be executed, so that actual scores are known; without, scores are
missing. A pairs file has `prompt, chosen, rejected`, or the authors' names `instruction, pos, neg`.

What a step sees is a function of (seed, step): epochs are permutations, and the part of an epoch
that does not fill a step is left out. So there is no data cursor to save but the step itself, and a
step never holds a prompt twice.

Not covered: streaming, several files, packing of several rows into one.
"""

import hashlib
import json

from pfppo.benchmarks import Problem, instruction_of, read_jsonl
from pfppo.config import UserError, reason, require, require_folder

import torch
from transformers import AutoTokenizer

DEEPSEEK = """\
You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek \
Company, and you only answer questions related to computer science. For politically sensitive \
questions, security and privacy issues, and other non-computer science questions, you will refuse \
to answer
### Instruction:
{prompt}
### Response:
"""


def load_tokenizer(path, option="policy"):
    """The tokenizer in a directory. Raises UserError where there is none, or it has no EOS."""
    require_folder(path, option)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a damaged file fails in a dozen ways
        why = reason(error)
        raise UserError(f"--{option} {path}: cannot read the tokenizer: {why}") from error
    require(tokenizer.eos_token_id is not None, f"--{option} {path}: the tokenizer has no EOS")
    return tokenizer


def pad_id_of(tokenizer):
    """What fills rows up: masks come from lengths, so EOS serves where there is no pad token."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def classifier_pad_id(tokenizer, stop):
    """The pad id for an exported reward model. transformers' classifiers read the score before the
    padding that they find at the end, so it must not be one of the `stop` ids: the last token that
    is no padding is the response's EOS. None: there is no such id; they then take single rows."""
    found = (tokenizer.pad_token_id, tokenizer.bos_token_id)
    return next((i for i in found if i is not None and i not in stop), None)


def load_prompts(path):
    """Prompts as a list of Problem; fields other than `prompt` may be empty. Raises UserError."""
    problems, seen = [], {}
    for line, row in read_jsonl(path):
        where = f"{path}, line {line}"
        values = {"task_id": f"line {line}"} | row
        for name in Problem.__dataclass_fields__:
            value = values.setdefault(name, "") if name != "prompt" else values.get(name)
            found = "nothing" if name not in row else type(value).__name__
            require(
                isinstance(value, str),
                f"{where}: field '{name}': expected a string, found {found}",
            )
        require(values["prompt"].strip(), f"{where}: field 'prompt' is empty, expected some text")
        require(
            bool(values["test"]) == bool(values["entry_point"]),
            f"{where}: expected both or neither of the fields 'test' and 'entry_point'",
        )
        first = seen.setdefault(values["task_id"], line)
        require(first == line, f"{where}: task_id {values['task_id']!r} stands in line {first} too")
        names = Problem.__dataclass_fields__
        problems.append(Problem(**{name: values[name] for name in names if name in values}))
    return problems


def load_pairs(path):
    """[(prompt, chosen, rejected)] strings. Raises UserError naming file, line and field."""
    pairs = []
    for line, row in read_jsonl(path):
        triple = []
        for name, other in (("prompt", "instruction"), ("chosen", "pos"), ("rejected", "neg")):
            value = row.get(name, row.get(other))
            require(
                isinstance(value, str) and (value or name != "prompt"),
                f"{path}, line {line}: expected a string in field '{name}' (or '{other}'), found "
                + ("nothing" if value is None else repr(value)[:40]),
            )
            triple.append(value)
        same = f"{path}, line {line}: chosen and rejected are the same, expected two responses"
        require(triple[1] != triple[2], same)
        pairs.append(tuple(triple))
    return pairs


def render(prompt, tokenizer, style):
    """A prompt's token ids: as it stands ("plain", "few_shot"), as a user's turn of the tokenizer's
    chat template ("chat"), or in DeepSeek-Coder's ("deepseek")."""
    if style == "chat":
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = DEEPSEEK.format(prompt=prompt) if style == "deepseek" else prompt
    ids = tokenizer(prompt)["input_ids"]
    # Some tokenizers close every text with EOS; a prompt goes on.
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def check_style(tokenizer, style, policy):
    """Raise UserError if the style needs a chat template and the tokenizer has none."""
    require(
        style != "chat" or tokenizer.chat_template,
        f"--prompt_style chat: the tokenizer of --policy {policy} has no chat template",
    )


def text_of(problem, style):
    """What a problem asks: code to continue, or an instruction in the styles that are dialogues."""
    return instruction_of(problem) if style in ("chat", "deepseek") else problem.prompt


def render_all(problems, tokenizer, style, limit, source, texts=None):
    """Token ids of every problem's prompt; `texts` instead, one for each, where they are given.

    Raises UserError on the first that is longer than `limit` tokens.
    """
    texts = texts or [text_of(problem, style) for problem in problems]
    rendered = [render(text, tokenizer, style) for text in texts]
    for problem, ids in zip(problems, rendered, strict=True):
        require(
            0 < len(ids) <= limit,
            f"{source}, task {problem.task_id}: prompt of {len(ids)} tokens, expected 1 to {limit} "
            "(--max_prompt_tokens)",
        )
    return rendered


def load_rendered(path, tokenizer, style, limit):
    """(problems, token ids of their prompts) of a JSONL file; ([], []) where path is ""."""
    problems = load_prompts(path) if path else []
    return problems, render_all(problems, tokenizer, style, limit, path)


def response_ids(text, tokenizer):
    """A response's token ids with EOS at the end, as a policy that has finished would give it."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def decode(ids, tokenizer):
    """Text of a response without its special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def template_hash(tokenizer, style):
    """12 hex digits that change when prompts are rendered differently."""
    return _hash([style, tokenizer.chat_template if style == "chat" else None])


def vocabulary_hash(tokenizer):
    """12 hex digits that change when any token has another id."""
    return _hash(sorted(tokenizer.get_vocab().items()))


def _hash(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def step_prompts(count, prompts_per_step, step, seed):
    """Indices [P] of the prompts of a step (0, 1, ...), all different."""
    per_epoch = count // prompts_per_step
    epoch, part = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(count, generator=generator)
    return order[part * prompts_per_step : (part + 1) * prompts_per_step].tolist()
