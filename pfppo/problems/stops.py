"""Strings that end an answer: a base model writes on behind it, to the last token.

`--stop` names them, and each counts wherever it stands. The usual ones (those of BigCode's harness
and EvalPlus) are taken for HumanEval and MBPP where a prompt is to be continued and tests say what
is right; they count only where `extract_code` keeps nothing of what stands there or below:

- behind a function's body, at the margin, outside strings and brackets;
- behind the entry point's definition, where helpers may still follow: so no def or class ends it;
- not in an answer with a fence or a thought in it, which comes from a model that ends by itself.

No "\\n#" among them: a body may go on below a comment at the margin. What is lost is what models
that need a stop do not write: a function that a demonstration, not the answer, needs to be right,
or a corrected version in a fenced block below.

Few-shot prompts of MBPP teach an end of their own.
"""

import bisect
import re
from dataclasses import dataclass, replace

from pfppo.config import require
from pfppo.problems.extract import settled

DEFINITION = ("\nassert", '\n"""', "\n'''", "\nprint", "\nif __name__", "\n```")
USUAL = {
    "body": ("\ndef", "\nclass", "\n@", "\nimport", "\nfrom", "\nif", *DEFINITION),
    "definition": DEFINITION,
}
FEW_SHOT = ("[DONE]", "\nYou are an expert Python programmer")  # messages.few_shot_prompts
SPECIAL = ("<file_sep>", "<|endoftext|>")  # tokens that part documents, where a model has them
ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


@dataclass(frozen=True)
class Stops:
    texts: tuple[str, ...] = ()  # strings that end an answer; empty: nothing does
    usual: bool = False  # they are those of USUAL, and count where these may
    special: tuple[str, ...] = ()  # those that end it as tokens only

    def __bool__(self):
        return bool(self.texts)

    def __str__(self):
        return " ".join(repr(text) for text in self.texts)

    def find(self, text, problem):
        """Where in a response the first string that counts begins; None where none does."""
        texts, first, last = self.texts, 0, len(text)
        if self.usual:
            form, first, last = settled(text, problem)
            texts = USUAL.get(form, ())
        places = (text.find(string, max(0, first - 1)) for string in texts)
        return min((at for at in places if 0 <= at < last), default=None)

    def cut(self, text, problem):
        """The text up to the string that ends it, if there is one."""
        return text[: self.find(text, problem)]

    def known_to(self, tokens):
        """`tokens` (data.Tokens), for which a string that is one token of its own ends a response
        as EOS does: as text nobody would see it."""
        added = ((i, token.content) for i, token in tokens.tokenizer.added_tokens_decoder.items())
        ends = {i for i, text in added if text in self.texts + self.special and i < tokens.rows}
        return replace(tokens, stop=sorted({*tokens.stop, *ends}))

    def kept(self, tokens, prompt, problem, ids, new):
        """How many of a response's ids stay: those up to the first that completes a string; None
        where none does. The last `new` of the ids have not been looked at. tokens: data.Tokens."""

        def has_ended(count):
            text = tokens.decode([prompt], [ids[:count]])[0]
            return self.find(text, problem) is not None

        longest = max(len(text.encode()) for text in self.texts)  # no token is less than a byte
        tail = "" if new == len(ids) else tokens.decode([[]], [ids[-new - longest :]])[0]
        if tail and not any(text in tail for text in self.texts) or not has_ended(len(ids)):
            return None
        return bisect.bisect_left(range(len(ids)), True, key=has_ended)


def load_stops(args):
    """Stops of --stop, or the usual ones of --benchmark, --prompt_style and --verify, where any
    are. Raises UserError."""
    if args.stop is None:
        code = args.benchmark in ("humaneval", "mbpp") and args.verify == "tests"
        if code and args.prompt_style == "few_shot":
            return Stops(FEW_SHOT, special=SPECIAL)
        plain = code and args.prompt_style == "plain"
        return Stops(USUAL["body"], usual=True, special=SPECIAL) if plain else Stops()
    expected = 'expected strings, or "" alone for none'
    require("" not in args.stop or len(args.stop) == 1, f"--stop: {expected}, found both")
    texts = (re.sub(r"\\[nt\\]", lambda mark: ESCAPES[mark[0]], text) for text in args.stop)
    return Stops(tuple(text for text in texts if text))
