"""What is asked, and of pairs what was said: dialogues, preference pairs, prompts of problems.

A dialogue is a list of turns {"role": ..., "content": ...}: a system turn or none, then user and
assistant by turns. A prompt ends with a user's turn, a response is the assistant's turn after it.
A pair is a prompt and two responses to it, each a string or a list of turns. Its fields are
`prompt, chosen, rejected`, or those of NAMES; `system` is put before the prompt (Orca):

Known too: SafeRLHF's `response_0, response_1` with the id of the better one, SHP's `human_ref_A,
human_ref_B, labels`.

    prompt          chosen, rejected
    text or turns   texts
    turns           one assistant's turn each
    text            whole dialogues, with the prompt in them (UltraFeedback, binarized)
    turns           whole dialogues that start with the prompt
    none            whole dialogues that differ in the last turn only (TRL's implicit prompt), as
                    turns or as a text "\\n\\nHuman: ...\\n\\nAssistant: ..." (HH-RLHF)

Contents are text, or a list of parts {"type": "text", "text": ...} that are put together. A turn
may have ShareGPT's names (`from`, `value`; human, gpt).

Not covered: tools and other roles, images, more than two responses (ranks, scores of each).
"""

import re
from pathlib import Path

from pfppo.config import UserError, reason, require
from pfppo.files import read_jsonl
from pfppo.problems.extract import definition_of

from transformers.utils.chat_template_utils import render_jinja_template

NAMES = {  # "instruction, pos, neg" are the PF-PPO authors', "question" and "input" Orca's
    "prompt": ("instruction", "question", "input", "query", "history", "conversations", "messages"),
    "chosen": ("pos", "better", "preferred", "chosen_response", "response_chosen", "response_j"),
    "rejected": ("neg", "worse", "dispreferred", "rejected_response", "response_rejected")
    + ("response_k",),
}
CHOICES = (  # fields of two responses, fields that say which is chosen, their values for the first
    (("response_0", "response_1"), ("better_response_id", "safer_response_id"), 0),
    (("human_ref_A", "human_ref_B"), ("labels",), 1),
)
SPEAKERS = {"Human": "user", "Assistant": "assistant", "human": "user", "gpt": "assistant"}
UNUSABLE = 0.01  # share of the rows of a file of pairs that may be left out
# The roles of a dialogue by that of its last turn; a response may stand there without its prompt.
BESIDE = ("input", "Body", "context", "passage", "options", "choices")  # belong to a question
ORDERS = {"user": r"(system, )?(user, assistant, )*user"}
ORDERS["assistant"] = r"(system, )?(user, assistant, )*user, assistant|assistant"
TEMPLATES = (".jinja", ".jinja2", ".j2")  # how the name of a chat template's file ends
MBPP_SHOTS = ("Mbpp/2", "Mbpp/3", "Mbpp/4")  # the three examples of the MBPP paper
# The wording of DeepSeek-Coder's evaluation of instruction-tuned models.
INSTRUCTION = """\
Please continue to complete the function. You are not allowed to modify the given code and do the \
completion only. Please return all completed function in a codeblock. Here is the given code to do \
completion:
```python
{prompt}
```"""
DEEPSEEK = """\
You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek \
Company, and you only answer questions related to computer science. For politically sensitive \
questions, security and privacy issues, and other non-computer science questions, you will refuse \
to answer
### Instruction:
{prompt}
### Response:
"""


def own_template(path):
    """The text of a chat template of one's own (Jinja, as a tokenizer's); "" where a --prompt_style
    names no file. Raises UserError where it cannot be read, does not run, or leaves out what the
    user says."""
    if not path.endswith(TEMPLATES):
        return ""
    here, said = f"--prompt_style {path}: ", "What the user says."
    try:
        text = Path(path).read_text()
        how = {"add_generation_prompt": True, "bos_token": "", "eos_token": "", "tools": None}
        turns = [{"role": "user", "content": said}]
        rendered = render_jinja_template([turns], chat_template=text, **how)[0][0]
    except OSError as error:
        raise UserError(f"{here}cannot be read: {reason(error)}") from error
    except Exception as error:  # a template is a program
        raise UserError(f"{here}no chat template that runs: {reason(error)}") from error
    lost = f"{said!r} as a user's message is not in what it makes of it, {rendered[:60]!r}"
    require(said in rendered, here + lost)
    return text


def short(value):
    """A value in a message: its first characters, or "nothing"."""
    return "nothing" if value is None else repr(value)[:40]


def read_turns(value, where, last):
    """The turns of a dialogue, role and content alone; a string is one turn. `last` is the role of
    the last one; only a response may be empty. Raises UserError, beginning with `where`."""
    expected = f"expected a string or a list of messages, found {short(value)}"
    value = [value] if isinstance(value, dict) else value
    require(isinstance(value, str | list), f"{where}: {expected}")
    given = [{"role": last, "content": value}] if isinstance(value, str) else value
    turns = []
    for number, turn in enumerate(given, 1):
        place = f"{where}, message {number}"
        if isinstance(turn, dict) and {"from", "value"} <= turn.keys():
            turn = {"role": SPEAKERS.get(turn["from"], turn["from"]), "content": turn["value"]}
        fits = isinstance(turn, dict) and {"role", "content"} <= turn.keys()
        require(fits, f"{place}: expected an object with 'role' and 'content', found {short(turn)}")
        content, place = turn["content"], f"{place}: 'content'"
        parts = content if isinstance(content, list) else [{"text": content}]
        texts = [p["text"] for p in parts if _is_text(p)]
        only = f"{place}: expected a string or parts of text only, found {short(content)}"
        require(len(texts) == len(parts), only)
        text, may_be_empty = "".join(texts), last == "assistant" and number == len(given)
        empty = f"{place} is empty: expected some text, found {short(content)}"
        require(may_be_empty or text.strip(), empty)
        turns.append({"role": turn["role"], "content": text})
    roles = ", ".join(str(turn["role"]) for turn in turns)
    expected = "expected a system turn or none, then user and assistant by turns, the last one"
    found = f"{where}: {expected} {last}, found {roles or 'an empty list'}"
    require(re.fullmatch(ORDERS[last], roles), found)
    return turns


def require_whole(row, name, where):
    """Raise UserError where a question in the field `name` has parts in other fields; what stands
    in `prompt`, or in a dialogue, is whole."""
    whole = name in ("", "prompt", "history", "conversations", "messages")
    beside = next((part for part in BESIDE if row.get(part) and part != name and not whole), "")
    both = f"{where}: {name!r} and {beside!r}: expected one text of both, in 'prompt'"
    require(not beside, both)


def with_system(turns, system, where):
    """A dialogue behind a row's field `system`, where it has one. Raises UserError."""
    if not system or turns[0]["role"] == "system":
        return turns
    turns = [{"role": "system", "content": system}, *turns]
    return read_turns(turns, f"{where}: field 'system' and the prompt", "user")


def _is_text(part):
    """Whether a part of a content is {"type": "text", "text": ...}; the type may be missing."""
    text = isinstance(part, dict) and part.get("type", "text") == "text" and part.get("text")
    return isinstance(text, str)


def only_text(prompt, style="plain"):
    """A prompt as text: a string or one user's turn, in "deepseek" inside its template. UserError
    where there are several turns or a system turn, which need a chat template."""
    roles = ["user"] if isinstance(prompt, str) else [turn["role"] for turn in prompt]
    several = f"a prompt of {len(roles)} messages ({', '.join(roles)}), expected one user's turn"
    advice = "a system turn and several turns need --prompt_style chat"
    require(roles == ["user"], f"{several}; {advice}")
    text = prompt if isinstance(prompt, str) else prompt[0]["content"]
    return DEEPSEEK.format(prompt=text) if style == "deepseek" else text


def read_pair(row, where):
    """(prompt, chosen, rejected) of one object of a file: texts, but for a prompt that is more than
    one user's turn, a dialogue. Raises UserError beginning with `where`."""
    named = [name for name in ("prompt", *NAMES["prompt"]) if row.get(name) is not None]
    require_whole(row, next(iter(named), ""), where)
    values, places, row = {}, {}, _chosen(row, where)
    for name, others in NAMES.items():
        values[name] = next((row[n] for n in (name, *others) if row.get(n) is not None), None)
        places[name] = f"{where}: field '{name}' (or '{others[0]}')"
        found = f"expected a string or a list of messages, found nothing (has: {', '.join(row)}"
        found += "); write rows of prompt, chosen, rejected" if name != "prompt" else ")"
        require(name == "prompt" or values[name] is not None, f"{places[name]}: {found}")
    given = values["prompt"]
    values = {name: _transcript(value) for name, value in values.items()}
    if values["prompt"] != given and not values["prompt"][-1]["content"]:  # a bare "Assistant:"
        values["prompt"].pop()
    *before, chosen = read_turns(values["chosen"], places["chosen"], "assistant")
    *other, rejected = read_turns(values["rejected"], places["rejected"], "assistant")
    differ = f"{where}: chosen and rejected differ before their last messages ({len(before)} and "
    differ += f"{len(other)} messages there), expected two responses to one prompt"
    require(before == other, differ)
    same = f"{where}: chosen and rejected are the same, expected two responses"
    require(chosen != rejected, same)
    prompt = before
    if values["prompt"] or not before:
        prompt = read_turns(values["prompt"], places["prompt"], "user")
        asked = [turn["content"].strip() for turn in before if turn["role"] == "user"]
        is_asked = len(prompt) == 1 and prompt[0]["content"].strip() in asked
        expected = f"expected what chosen and rejected start with, found {short(values['prompt'])}"
        other = f"{places['prompt']}: {expected} in it and {short(asked[-1:])} in them"
        require(is_asked or before in ([], prompt), other)
        prompt = before or prompt
    prompt = with_system(prompt, row.get("system"), where)
    prompt = prompt[0]["content"] if len(prompt) == 1 else prompt
    return prompt, chosen["content"], rejected["content"]


class Undecided(UserError):
    """Two fields call different responses the better one, as published sets have many rows."""


def _chosen(row, where):
    """The row with `chosen` and `rejected`, where another field says which of two is which."""
    for names, marks, first in CHOICES:
        if set(names) <= row.keys() and "chosen" not in row:
            said = {mark: row[mark] for mark in marks if row.get(mark) is not None}
            expected = f"expected 0 or 1 in {' or '.join(marks)}, found {said}"
            require(said and {*said.values()} <= {0, 1}, f"{where}: {expected}")
            if len({*said.values()}) > 1:
                advice = f"to learn one of them, take {' or '.join(marks)} out of the rows"
                raise Undecided(f"{where}: {' and '.join(marks)} differ ({advice})")
            one, other = names if first in said.values() else names[::-1]
            return row | {"chosen": row[one], "rejected": row[other]}
    return row


def _transcript(value):
    """HH-RLHF's text as turns; anything else as it is."""
    if not isinstance(value, str) or not re.match(r"\s*Human:", value):
        return value
    parts = re.split(r"(?:\A\s*|\n\n)(Human|Assistant):", value)[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": SPEAKERS[who], "content": words.strip()} for who, words in pairs]


def load_pairs(path, say=print):
    """[(line, (prompt, chosen, rejected))] of a JSONL file. Raises UserError where rows are no
    pairs; a few among many, as published sets have them, and those that are undecided are left out,
    and a line says so."""
    rows, pairs, errors = read_jsonl(path), [], []
    for line, row in rows:
        try:
            pairs.append((line, read_pair(row, f"{path}, line {line}")))
        except UserError as error:
            errors.append(error)
    count = f"{len(errors)} of {len(rows)} rows are no pairs"
    wrong = [error for error in errors if not isinstance(error, Undecided)]
    if len(wrong) > UNUSABLE * len(rows) or not pairs:
        errors = wrong or errors
        raise UserError(f"{errors[0]}" + (f" ({count})" if len(errors) > 1 else ""))
    if errors:
        say(f"{path}: {count} and left out, the first: {errors[0]}")
    return pairs


def prompt_text(problem, style):
    """What a problem asks: its dialogue; in "chat" and "deepseek" the file's own instruction, or
    its code as a block to complete; else the prompt as it stands."""
    if problem.messages or style not in ("chat", "deepseek"):
        return problem.messages or problem.prompt
    code = problem.entry_point and definition_of(problem).search(problem.prompt)
    block = INSTRUCTION.format(prompt=problem.prompt.strip()) if code else problem.prompt
    return problem.instruction or block


def few_shot_prompts(problems, all_problems):
    """The MBPP paper's prompts for base models: tasks 2, 3 and 4 solved, then the task in question.
    UserError where `all_problems` does not hold these three."""
    known = {problem.task_id: problem for problem in all_problems}
    missing = [task for task in MBPP_SHOTS if task not in known]
    require(not missing, f"--prompt_style few_shot: the problems have no task {missing}")
    shown = [(known[task].instruction, known[task].canonical_solution) for task in MBPP_SHOTS]
    shots = "".join(f"{task}\n[BEGIN]\n{code.strip()}\n[DONE]\n\n" for task, code in shown)
    return [f"{shots}{problem.instruction}\n[BEGIN]\n" for problem in problems]
