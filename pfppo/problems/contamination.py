"""How much of a benchmark stands in the training data: n-gram overlap of normalised code tokens.

    overlap(problem) = share of the problem's 13-grams that some training text has too

Tokens are identifiers, numbers and single signs; comments, blanks and quotation marks' kind do not
count, nor does upper case, so that reformatting hides nothing. A problem has the grams of its
prompt and those of its reference solution, a part that is shorter than 13 tokens left out; one that
is shorter altogether is a single shorter gram. The measure is that of GPT-3's report (arXiv
2005.14165, appendix C: 13-grams), per problem and as a share.

The released pairs for the paper's reward model were built on HumanEval's own prompts: this finds
them.

    python eval_code.py --benchmark humaneval --problems FILE --contamination TRAIN.jsonl

A training text is one line of the JSONL file, all strings in it put together: prompts, dialogues,
pairs, whole problems, whatever their fields are called.

Not covered: paraphrase, renamed variables, translation.
"""

import re
from collections import Counter
from dataclasses import dataclass

from pfppo.files import read_jsonl, write_json

from tqdm import tqdm

LENGTH = 13
TOKEN = re.compile(r"[A-Za-z_]\w*|\d+(?:\.\d+)?|[^\s\w]")
COMMENT = re.compile(r"(?m)#.*$")


@dataclass(frozen=True)
class Overlap:
    """What a problem shares with the training texts."""

    share: float  # of the problem's n-grams, 0 to 1
    text: int | None  # index of the training text that shares most; None where none does


def grams(*parts, length=LENGTH):
    """The set of n-grams of the tokens of each part of a text, as tuples; empty without tokens."""
    tokens = [TOKEN.findall(COMMENT.sub("", p).lower().replace("'", '"')) for p in parts]
    whole = [part for part in tokens if len(part) >= length] or [sum(tokens, [])]
    if len(whole[0]) < length:
        return {tuple(whole[0])} - {()}
    return set().union(*(zip(*(p[i:] for i in range(length)), strict=False) for p in whole))


def overlaps(training, wanted):
    """[Overlap] of each set of n-grams in `wanted` with the texts `training` (an iterable, read
    once)."""
    owners = {}
    for number, own in enumerate(wanted):
        for gram in own:
            owners.setdefault(gram, []).append(number)
    seen, sources = [set() for _ in wanted], [Counter() for _ in wanted]
    for index, text in enumerate(training):
        for gram in grams(text) & owners.keys():
            for number in owners[gram]:
                seen[number].add(gram)
                sources[number][index] += 1
    return [
        Overlap(len(found) / len(own) if own else 0.0, max(source, key=source.get, default=None))
        for own, found, source in zip(wanted, seen, sources, strict=True)
    ]


def strings(value):
    """All strings in a JSON value, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def report_overlap(path, problems, out, limit, shown=10):
    """Print how much of each problem stands in the JSONL file `path`, write it to `out`.

    Returns the exit status: 1 if a problem overlaps by more than `limit`. Raises UserError.
    """
    lines = []

    def training():
        for line, row in tqdm(read_jsonl(path), "training texts", mininterval=1):
            lines.append(line)
            yield "\n".join(strings(row))

    wanted = [grams(problem.question, problem.canonical_solution) for problem in problems]
    found = overlaps(training(), wanted)
    rows = [
        {
            "task_id": problem.task_id,
            "overlap": overlap.share,
            "line": None if overlap.text is None else lines[overlap.text],
        }
        for problem, overlap in zip(problems, found, strict=True)
    ]
    touched = sorted((r for r in rows if r["overlap"]), key=lambda r: -r["overlap"])
    above = [row for row in rows if row["overlap"] > limit]
    print(f"\n{path}: {len(lines)} training texts, {len(problems)} problems")
    print(
        f"overlap: share of a problem's {LENGTH}-grams of code tokens that some training text has"
    )
    print(f"{len(touched)} problems overlap, {len(above)} by more than {limit:g}")
    if touched:
        print(f"\noverlap  problem{'':13}  most of it in line")
    for row in touched[:shown]:
        print(f"{row['overlap']:>7.1%}  {row['task_id']:<20}  {row['line']}")
    if len(touched) > shown:
        print(f"... and {len(touched) - shown} more")
    out.mkdir(parents=True, exist_ok=True)
    write_json(
        out / "contamination.json", {"training": str(path), "limit": limit, "problems": rows}
    )
    print(f"\n{out}: contamination.json")
    return int(bool(above))
