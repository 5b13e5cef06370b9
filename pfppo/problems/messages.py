"""What is asked, and of pairs what was said: dialogues, preference pairs, prompts of problems.

A dialogue is a list of turns {"role": ..., "content": ...}: a system turn or none, then user and
assistant by turns. A prompt ends with a user's turn, a response is the assistant's turn after it.
A pair is a prompt and two responses to it, each a string or a list of turns. Its fields are
`prompt, chosen, rejected`, or those of NAMES; `system` is put before the prompt (Orca):

    prompt          chosen, rejected
    text or turns   texts
    turns           one assistant's turn each
    text            whole dialogues, with the prompt in them (UltraFeedback, binarized)
    turns           whole dialogues that start with the prompt
    none            whole dialogues that differ in the last turn only (TRL's implicit prompt), as
                    turns or as a text "\\n\\nHuman: ...\\n\\nAssistant: ..." (HH-RLHF)

Contents are text, or a list of parts {"type": "text", "text": ...} that are put together.

Not covered: tools and other roles, images, ShareGPT's names (`from`, `value`).
"""

import re

from pfppo.config import require
from pfppo.files import read_jsonl
from pfppo.problems.extract import definition_of

# "instruction, pos, neg" are the PF-PPO authors', "question" and "input" Orca's
NAMES = {"prompt": ("instruction", "question", "input"), "chosen": ("pos",), "rejected": ("neg",)}
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
# The roles of a dialogue by that of its last turn; a response may stand there without its prompt.
ORDERS = {"user": r"(system, )?(user, assistant, )*user"}
ORDERS["assistant"] = r"(system, )?(user, assistant, )*user, assistant|assistant"
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


def short(value):
    """A value in a message: its first characters, or "nothing"."""
    return "nothing" if value is None else repr(value)[:40]


def read_turns(value, where, last):
    """The turns of a dialogue, role and content alone; a string is one turn. `last` is the role of
    the last one; only a response may be empty. Raises UserError, beginning with `where`."""
    expected = f"expected a string or a list of messages, found {short(value)}"
    require(isinstance(value, str | list), f"{where}: {expected}")
    given = [{"role": last, "content": value}] if isinstance(value, str) else value
    turns = []
    for number, turn in enumerate(given, 1):
        place = f"{where}, message {number}"
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
    both = row.get("instruction") and row.get("input")
    require(not both, f"{where}: 'instruction' and 'input': expected one text of both, in 'prompt'")
    values, places = {}, {}
    for name, others in NAMES.items():
        values[name] = next((row[n] for n in (name, *others) if row.get(n) is not None), None)
        places[name] = f"{where}: field '{name}' (or '{others[0]}')"
    if values["prompt"] is None:
        values = {name: _transcript(value) for name, value in values.items()}
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
    if row.get("system") and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": row["system"]}, *prompt]
        prompt = read_turns(prompt, f"{where}: field 'system' and the prompt", "user")
    prompt = prompt[0]["content"] if len(prompt) == 1 else prompt
    return prompt, chosen["content"], rejected["content"]


def _transcript(value):
    """HH-RLHF's text as turns; anything else as it is."""
    if not isinstance(value, str) or not re.match(r"\s*Human:", value):
        return value
    parts = re.split(r"(?:\A\s*|\n\n)(Human|Assistant):", value)[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": SPEAKERS[who], "content": words.strip()} for who, words in pairs]


def load_pairs(path):
    """[(line, (prompt, chosen, rejected))] of a JSONL file. Raises UserError."""
    return [(line, read_pair(row, f"{path}, line {line}")) for line, row in read_jsonl(path)]


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
