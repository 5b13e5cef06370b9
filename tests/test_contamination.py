"""Overlap of problems with training data."""

import json
import random

from pfppo.problems import Problem
from pfppo.problems.contamination import grams, overlaps, report_overlap

import pytest
from conftest import write
from ranks import refused

CODE = '''def mean(values):
    """The arithmetic mean of a list of numbers, or None of an empty one."""
    if not values:  # nothing to divide by
        return None
    return sum(values) / len(values)
'''


def overlap(training, *parts):
    (found,) = overlaps(enumerate(training), [grams(*parts)])
    return found


def test_overlap_is_the_share_of_grams_and_names_the_text_that_has_most():
    tokens = [f"t{i}" for i in range(50)]
    part, whole = " ".join(tokens[:25]), " ".join(tokens)
    assert overlap([part], whole) == (pytest.approx((25 - 12) / (50 - 12)), 0)
    assert overlap([part, "nothing", f"x {whole}"], whole) == (1.0, 2)
    assert overlap(["def mean(values): return 0", "import sum"], CODE) == (0.0, None)


def test_format_comments_and_quotes_hide_nothing():
    other = CODE.replace("    ", "\t").replace('"""', "'''").replace("  # nothing to divide by", "")
    assert overlap(["x = 1", other.upper()], CODE) == (1.0, 1)


def test_a_text_shorter_than_a_gram_is_one_gram():
    assert overlap(["x = 1"], "x=1")[0] == 1.0 and overlap(["x = 1; y = 2"], "x = 1")[0] == 0.0
    assert grams("# only a comment") == set() and overlap(["anything"], "")[0] == 0.0


def test_a_problem_is_found_whether_its_solution_follows_its_prompt_or_stands_elsewhere():
    prompt, solution = CODE.split("    if", 1)
    solution = "    if" + solution
    for training in (CODE, f"{solution}\n# and\n{prompt}"):
        assert overlap([training], prompt, solution)[0] == 1.0
    assert grams(prompt, "pass") == grams(prompt)  # too short to be anybody's
    assert 0 < overlap([prompt], prompt, solution)[0] < 1


def test_texts_are_read_once_and_searched_for_all_problems_together():
    draw = random.Random(0)
    words = [f"name_{i}" for i in range(1000)]
    texts = [" ".join(draw.choices(words, k=100)) for _ in range(100)]
    found = overlaps(((i, text) for i, text in enumerate(texts * 3)), list(map(grams, texts)))
    assert found == [(1.0, i) for i in range(100)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [{"role": "user", "content": "Write this:\n" + CODE}]},
        {"prompt": "x", "chosen": "y", "rejected": [{"role": "assistant", "content": CODE}]},
    ],
)
def test_a_report_names_the_problem_the_share_and_the_line(tmp_path, capsys, row):
    path = write(tmp_path, {"prompt": "x = 1"}, "", row)
    head, _, tail = CODE.partition('"""\n')
    mean = Problem("t/0", head + '"""\n', "mean", tail, "")
    clean = Problem("t/1", "Nothing like it at all, in so many words.", "", "", "")
    assert report_overlap(path, [mean, clean], tmp_path, 0.5) == 1
    out = capsys.readouterr().out
    assert "2 training texts, 2 problems" in out and "13-grams" in out
    assert "1 problems overlap, 1 by more than 0.5" in out
    written = json.loads((tmp_path / "contamination.json").read_text())["problems"]
    rows = [(r["task_id"], r["line"], r["overlap"]) for r in written]
    assert rows == [("t/0", 3, 1.0), ("t/1", None, 0.0)]
    assert report_overlap(path, [mean], tmp_path, 1.0) == 0  # nothing is more than all
    assert "line 1: not JSON" in refused(report_overlap, write(tmp_path, "x"), [], tmp_path, 1.0)
