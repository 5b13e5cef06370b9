"""Prompts and pairs: JSONL in, token ids out. One function renders prompts for RM, PPO and eval.

A prompts file has one object per line with at least `prompt`. With `entry_point` and `test` as well
(HumanEval's form) samples can be executed, so that actual scores are known; without, scores are
missing. A prompt may be a dialogue, a list of messages: it is rendered as it stands, and its answer
is executed as a whole program, not as what continues the prompt. A pairs file has `prompt, chosen,
rejected` as text or as messages, see messages.py.

What a step sees is a function of (seed, step): epochs are permutations, and the part of an epoch
that does not fill a step is left out. So there is no data cursor to save but the step itself, and a
step never holds a prompt twice.

Not covered: streaming, several files, packing of several rows into one.
"""

import hashlib
import json

from pfppo.benchmarks import Problem, instruction_of, read_jsonl
from pfppo.config import UserError, reason, require, require_folder
from pfppo.messages import only_text, read_pair, read_turns

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file

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
    """The tokenizer in a directory. Raises UserError where there is none, or it has no EOS.

    Where there is a tokenizer.json it counts. The class that transformers chooses by the model's
    family or by a name in tokenizer_config.json may cut text otherwise, or even lose its blanks.
    """
    require_folder(path, option)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        file = cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
        if file and isinstance(tokenizer, PreTrainedTokenizerFast):
            if _rules(tokenizer.backend_tokenizer) != _rules(Tokenizer.from_file(file)):
                tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    except Exception as error:  # a damaged file fails in a dozen ways
        why = reason(error)
        raise UserError(f"--{option} {path}: cannot read the tokenizer: {why}") from error
    require(tokenizer.eos_token_id is not None, f"--{option} {path}: the tokenizer has no EOS")
    return tokenizer


def _rules(tokenizer):
    """How a tokenizer of `tokenizers` cuts text and puts it together again."""
    whole = json.loads(tokenizer.to_str())
    return [whole[name] for name in ("normalizer", "pre_tokenizer", "model", "decoder")]


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
    names = [name for name in Problem.__dataclass_fields__ if name != "messages"]
    for line, row in read_jsonl(path):
        where, turns = f"{path}, line {line}", []
        if isinstance(row.get("prompt"), list):
            turns = read_turns(row["prompt"], f"{where}: field 'prompt'", "user")
            row = row | {"prompt": ""}
        values = {"task_id": f"line {line}"} | row
        for name in names:
            value = values.setdefault(name, "") if name != "prompt" else values.get(name)
            found = "nothing" if name not in row else type(value).__name__
            require(
                isinstance(value, str),
                f"{where}: field '{name}': expected a string, found {found}",
            )
        filled = turns or values["prompt"].strip()
        require(filled, f"{where}: field 'prompt' is empty, expected some text")
        require(
            bool(values["test"]) == bool(values["entry_point"]),
            f"{where}: expected both or neither of the fields 'test' and 'entry_point'",
        )
        first = seen.setdefault(values["task_id"], line)
        require(first == line, f"{where}: task_id {values['task_id']!r} stands in line {first} too")
        problems.append(Problem(**{name: values[name] for name in names}, messages=turns))
    return problems


def render(prompt, tokenizer, style):
    """A prompt's token ids: as it stands ("plain", "few_shot"), through the tokenizer's chat
    template ("chat"), or in DeepSeek-Coder's ("deepseek").

    prompt: text, or a dialogue as in messages.py. Text is a user's turn in "chat"; a dialogue of
    more than one user's turn can only be rendered there. Raises UserError.
    """
    if style == "chat":
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program, and may refuse a system turn
            roles = ", ".join(turn["role"] for turn in turns)
            why = f"--prompt_style chat: the chat template refuses the messages ({roles}):"
            raise UserError(f"{why} {reason(error)}") from error
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    text = only_text(prompt)
    text = DEEPSEEK.format(prompt=text) if style == "deepseek" else text
    ids = tokenizer(text)["input_ids"]
    # Some tokenizers close every text with EOS; a prompt goes on.
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def render_within(prompt, tokenizer, style, limit, where):
    """`render`, with at most `limit` tokens. Raises UserError beginning with `where`."""
    try:
        ids = render(prompt, tokenizer, style)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    require(
        0 < len(ids) <= limit,
        f"{where}: prompt of {len(ids)} tokens, expected 1 to {limit} (--max_prompt_tokens)",
    )
    return ids


def check_style(tokenizer, style, policy):
    """Raise UserError if the style needs a chat template and the tokenizer has none."""
    require(
        style != "chat" or tokenizer.chat_template,
        f"--prompt_style chat: the tokenizer of --policy {policy} has no chat template",
    )


def text_of(problem, style):
    """What a problem asks: its dialogue; code to continue; an instruction in "chat", "deepseek"."""
    if problem.messages:
        return problem.messages
    return instruction_of(problem) if style in ("chat", "deepseek") else problem.prompt


def render_all(problems, tokenizer, style, limit, source, texts=None):
    """Token ids of every problem's prompt; `texts` instead, one for each, where they are given.

    Raises UserError on the first that is longer than `limit` tokens or cannot be rendered.
    """
    texts = texts or [text_of(problem, style) for problem in problems]
    return [
        render_within(text, tokenizer, style, limit, f"{source}, task {problem.task_id}")
        for problem, text in zip(problems, texts, strict=True)
    ]


def load_rendered(path, tokenizer, style, limit):
    """(problems, token ids of their prompts) of a JSONL file; ([], []) where path is ""."""
    problems = load_prompts(path) if path else []
    return problems, render_all(problems, tokenizer, style, limit, path)


def load_pairs(path, tokenizer, style, limit):
    """Pairs (prompt, chosen, rejected) of a JSONL file: as token ids, and as the file says them.

    A response is no part of the template: it reads as the policy would have written it, with EOS.
    Raises UserError naming file, line and field.
    """
    triples, pairs = [], []
    for line, row in read_jsonl(path):
        where = f"{path}, line {line}"
        prompt, *responses = triple = read_pair(row, where)
        ids = render_within(prompt, tokenizer, style, limit, where)
        pairs.append((ids, *(response_ids(text, tokenizer) for text in responses)))
        triples.append(triple)
    return pairs, triples


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
