"""How much of a benchmark stands in the training data: n-gram overlap of normalised code tokens.

    overlap(problem) = share of the problem's 13-grams that some training text has too

Tokens are identifiers, numbers and single signs; comments, blanks and quotation marks' kind do not
count, nor does upper case, so that reformatting hides nothing. A problem is its prompt and its
reference solution; one shorter than 13 tokens is a single shorter gram. The measure is that of
GPT-3's report (arXiv 2005.14165, appendix C: 13-grams), per problem and as a share.

The released pairs for the paper's reward model were built on HumanEval's own prompts: this finds
them.

Not covered: paraphrase, renamed variables, translation.
"""

import re
from collections import Counter
from dataclasses import dataclass

LENGTH = 13
TOKEN = re.compile(r"[A-Za-z_]\w*|\d+(?:\.\d+)?|[^\s\w]")
COMMENT = re.compile(r"(?m)#.*$")


@dataclass(frozen=True)
class Overlap:
    """What a problem shares with the training texts."""

    share: float  # of the problem's n-grams, 0 to 1
    text: int | None  # index of the training text that shares most; None where none does


def grams(text, length=LENGTH):
    """The set of n-grams of a text's tokens, as tuples joined to strings; empty without tokens."""
    tokens = TOKEN.findall(COMMENT.sub("", text).lower().replace("'", '"'))
    last = max(1, len(tokens) - length + 1)
    return {" ".join(tokens[i : i + length]) for i in range(last)} if tokens else set()


def overlaps(training, benchmark, length=LENGTH):
    """[Overlap] of the texts `benchmark` with the texts `training` (an iterable, read once)."""
    wanted = [grams(text, length) for text in benchmark]
    owners = {}
    for number, own in enumerate(wanted):
        for gram in own:
            owners.setdefault(gram, []).append(number)
    seen, sources = [set() for _ in wanted], [Counter() for _ in wanted]
    for index, text in enumerate(training):
        for gram in grams(text, length) & owners.keys():
            for number in owners[gram]:
                seen[number].add(gram)
                sources[number][index] += 1
    return [
        Overlap(len(found) / len(own) if own else 0.0, max(source, key=source.get, default=None))
        for own, found, source in zip(wanted, seen, sources, strict=True)
    ]
