"""How much of a benchmark stands in the training data: n-gram overlap of normalised code tokens.

    python eval_code.py --benchmark humaneval --problems FILE --contamination TRAIN.jsonl

The overlap of a problem is the share of its 13-grams (GPT-3's measure, arXiv 2005.14165, appendix
C) that some training text has too. Tokens are identifiers, numbers and single signs; comments,
blanks, quotation marks' kind and upper case do not count, so that reformatting hides nothing. A
problem has the grams of its prompt and those of its reference solution, a part of less than 13
tokens left out; one that is shorter altogether is a single shorter gram. A training text is one
line of the JSONL file, all strings in it put together, whatever their fields are called.

Not covered: paraphrase, renamed variables, translation.
"""

import re
from collections import Counter, defaultdict

from pfppo.files import read_jsonl, write_json

from tqdm import tqdm

LENGTH = 13
TOKEN = re.compile(r"[A-Za-z_]\w*|\d+(?:\.\d+)?|[^\s\w]")
COMMENT = re.compile(r"(?m)#.*$")


def grams(*parts):
    """The set of n-grams of the tokens of each part of a text, as tuples; empty without tokens."""
    tokens = [TOKEN.findall(COMMENT.sub("", p).lower().replace("'", '"')) for p in parts]
    whole = [part for part in tokens if len(part) >= LENGTH] or [sum(tokens, [])]
    if len(whole[0]) < LENGTH:
        return {tuple(whole[0])} - {()}
    return set().union(*(zip(*(p[i:] for i in range(LENGTH)), strict=False) for p in whole))


def overlaps(training, wanted):
    """[(share, line)] of each set of n-grams in `wanted`: the share of it that the training texts,
    (line, text) pairs, have together; the line of the one that has most of it, or None."""
    owners = defaultdict(list)
    for number, own in enumerate(wanted):
        for gram in own:
            owners[gram].append(number)
    seen, sources = [set() for _ in wanted], [Counter() for _ in wanted]
    for line, text in training:
        for gram in grams(text) & owners.keys():
            for number in owners[gram]:
                seen[number].add(gram)
                sources[number][line] += 1
    return [
        (len(shared) / len(own) if own else 0.0, max(source, key=source.get, default=None))
        for own, shared, source in zip(wanted, seen, sources, strict=True)
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
    training = tqdm(read_jsonl(path), "training texts", mininterval=1)
    texts = ((line, "\n".join(strings(row))) for line, row in training)
    shares = overlaps(texts, [grams(p.question, p.canonical_solution) for p in problems])
    rows = [
        {"task_id": problem.task_id, "overlap": share, "line": line}
        for problem, (share, line) in zip(problems, shares, strict=True)
    ]
    touched = sorted((r for r in rows if r["overlap"]), key=lambda r: -r["overlap"])
    above = sum(row["overlap"] > limit for row in rows)
    print(f"\n{path}: {len(training)} training texts, {len(problems)} problems")
    print(f"overlap: share of a problem's {LENGTH}-grams of code tokens in any training text")
    print(f"{len(touched)} problems overlap, {above} by more than {limit:g}")
    print(f"\noverlap  problem{'':13}  most of it in line" if touched else "")
    for row in touched[:shown]:
        print(f"{row['overlap']:>7.1%}  {row['task_id']:<20}  {row['line']}")
    if len(touched) > shown:
        print(f"... and {len(touched) - shown} more")
    out.mkdir(parents=True, exist_ok=True)
    report = {"training": str(path), "limit": limit, "problems": rows}
    write_json(out / "contamination.json", report)
    print(f"\n{out}: contamination.json")
    return int(above > 0)
