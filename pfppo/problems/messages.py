"""Dialogues as files give them, and preference pairs out of the common forms.

A dialogue is a list of turns {"role": ..., "content": ...}: a system turn or none, then user and
assistant by turns. A prompt ends with a user's turn, a response is the assistant's turn after it.
A pair is a prompt and two responses to it, `prompt, chosen, rejected` (or the PF-PPO authors' names
`instruction, pos, neg`), each a string or a list of turns:

    prompt          chosen, rejected
    text or turns   texts
    turns           one assistant's turn each
    text            whole dialogues, with the prompt in them (UltraFeedback, binarized)
    turns           whole dialogues that start with the prompt
    none            whole dialogues that differ in the last turn only (TRL's implicit prompt)

Contents are text, or a list of parts {"type": "text", "text": ...} that are put together.

Not covered: tools and other roles, images, ShareGPT's names (`from`, `value`).
"""

from pfppo.config import require
from pfppo.files import read_jsonl

FORM = "a string or a list of messages"
ROLES = ("user", "assistant")
NAMES = {"prompt": "instruction", "chosen": "pos", "rejected": "neg"}


def read_turns(value, where, last):
    """The turns of a dialogue, role and content alone; `last` is the role of its last turn.

    Raises UserError, beginning with `where`, unless roles and contents are as the module says.
    Only a response may be empty, or stand there without its prompt.
    """
    require(value, f"{where}: expected messages, found an empty list")
    turns = []
    for number, turn in enumerate(value, 1):
        place = f"{where}, message {number}"
        fits = isinstance(turn, dict) and {"role", "content"} <= turn.keys()
        found = f"one with {', '.join(turn)}" if isinstance(turn, dict) else _short(turn)
        require(fits, f"{place}: expected an object with 'role' and 'content', found {found}")
        content = _text_of(turn["content"], place)
        response = last == "assistant" and number == len(value)
        require(content.strip() or response, f"{place}: 'content' is empty, expected some text")
        turns.append({"role": turn["role"], "content": content})
    roles = [turn["role"] for turn in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    by_turns = [ROLES[i % 2] for i in range(len(spoken))]
    require(
        (spoken == by_turns and roles[-1] == last) or roles == ["assistant"] == [last],
        f"{where}: expected a system turn or none, then user and assistant by turns, the last one "
        f"{last}, found {', '.join(map(str, roles))}",
    )
    return turns


def _short(value):
    """A value in a message: its first characters, or "nothing"."""
    return "nothing" if value is None else repr(value)[:40]


def _text_of(content, place):
    """A content as one string. Raises UserError where it is neither text nor parts of text."""
    if not isinstance(content, list):
        text = isinstance(content, str)
        require(text, f"{place}: 'content': expected a string, found {_short(content)}")
        return content
    for part in content:
        fits = isinstance(part, dict) and isinstance(part.get("text"), str)
        fits = fits and part.get("type", "text") == "text"
        require(fits, f"{place}: 'content': expected parts of text only, found {_short(part)}")
    return "".join(part["text"] for part in content)


def only_text(prompt):
    """A prompt as text: a string as it stands, a dialogue if it is one user's turn.

    Raises UserError where it has several turns or a system turn, which need a chat template.
    """
    if isinstance(prompt, str):
        return prompt
    roles = [turn["role"] for turn in prompt]
    require(
        roles == ["user"],
        f"a prompt of {len(roles)} messages ({', '.join(roles)}), expected one user's turn; a "
        "system turn and several turns need --prompt_style chat",
    )
    return prompt[0]["content"]


def read_pair(row, where):
    """(prompt, chosen, rejected) of one object of a file: prompt is text, or a dialogue where it is
    more than one user's turn; the responses are texts. Raises UserError beginning with `where`."""
    values, places = {}, {}
    for name, other in NAMES.items():
        value = values[name] = row.get(name, row.get(other))
        places[name] = f"{where}: field '{name}' (or '{other}')"
        fits = isinstance(value, (str, list)) or (value is None and name == "prompt")
        require(fits, f"{places[name]}: expected {FORM}, found {_short(value)}")
    befores, texts = zip(
        *(_response(values[name], places[name]) for name in ("chosen", "rejected")), strict=True
    )
    shared = befores[0]
    require(
        shared == befores[1],
        f"{where}: chosen and rejected differ before their last messages ({len(shared)} and "
        f"{len(befores[1])} messages there), expected two responses to one prompt",
    )
    prompt = _prompt(values["prompt"], shared, places["prompt"])
    require(
        texts[0] != texts[1],
        f"{where}: chosen and rejected are the same, expected two responses",
    )
    one = isinstance(prompt, list) and [turn["role"] for turn in prompt] == ["user"]
    return (prompt[0]["content"] if one else prompt, *texts)


def _response(value, place):
    """(turns before it, text) of a response."""
    if isinstance(value, str):
        return [], value
    *before, last = read_turns(value, place, "assistant")
    return before, last["content"]


def _prompt(value, shared, place):
    """The prompt out of its field and the turns before both responses, which must agree."""
    if isinstance(value, list):
        value = read_turns(value, place, "user")
    if not shared:
        require(value, f"{place}: expected {FORM}, found {_short(value)}")
        return value
    asked = [turn["content"].strip() for turn in shared if turn["role"] == "user"]
    agree = not value or value == shared or (isinstance(value, str) and value.strip() in asked)
    found = f"found {_short(value)} in it and {_short(asked[-1])} in them"
    require(agree, f"{place}: expected what chosen and rejected start with, {found}")
    return shared


def load_pairs(path):
    """[(line, (prompt, chosen, rejected))] of a JSONL file. Raises UserError."""
    return [(line, read_pair(row, f"{path}, line {line}")) for line, row in read_jsonl(path)]
