"""Overlap: whole, partial and none, whatever the format; fast enough for real data sets."""

import json
import random
import time

from pfppo.config import UserError
from pfppo.problems.benchmarks import Problem
from pfppo.problems.contamination import grams, overlaps, report

import pytest

CODE = '''def mean(values):
    """The arithmetic mean of a list of numbers, or None of an empty one."""
    if not values:  # nothing to divide by
        return None
    return sum(values) / len(values)
'''


def test_a_problem_that_stands_in_the_training_data_overlaps_wholly():
    (found,) = overlaps(["x = 1", "before\n" + CODE + "after"], [grams(CODE)])
    assert (found.share, found.text) == (1.0, 1)


def test_format_comments_and_quotes_hide_nothing():
    other = CODE.replace("    ", "\t").replace('"""', "'''").replace("  # nothing to divide by", "")
    assert overlaps([other.upper()], [grams(CODE)])[0].share == 1.0


def test_texts_that_share_no_13_tokens_do_not_overlap():
    (found,) = overlaps(["def mean(values): return 0", "import sum"], [grams(CODE)])
    assert (found.share, found.text) == (0.0, None)


def test_a_part_is_a_share():
    tokens = [f"t{i}" for i in range(50)]
    (found,) = overlaps([" ".join(tokens[:25])], [grams(" ".join(tokens))])
    assert found.share == pytest.approx((25 - 12) / (50 - 12))


def test_a_text_shorter_than_a_gram_is_one_gram():
    assert overlaps(["x = 1"], [grams("x=1")])[0].share == 1.0
    assert overlaps(["x = 1; y = 2"], [grams("x = 1")])[0].share == 0.0
    assert grams("# only a comment") == set()
    assert overlaps(["anything"], [grams("")])[0].share == 0.0


def test_the_text_that_shares_most_is_named():
    half = " ".join(f"t{i}" for i in range(20))
    whole = " ".join(f"t{i}" for i in range(40))
    assert overlaps([half, "nothing", whole], [grams(whole)])[0].text == 2


def test_20000_times_1000_documents_take_less_than_a_minute_of_cpu():
    draw = random.Random(0)
    words = [f"name_{i}" for i in range(3000)]
    texts = [" ".join(draw.choices(words, k=200)) for _ in range(2000)]
    begin = time.process_time()
    found = overlaps(
        (texts[i % 2000] for i in range(20_000)), [grams(text) for text in texts[:1000]]
    )
    assert all(overlap.share == 1.0 for overlap in found)
    print(f"{time.process_time() - begin:.1f} s")  # a time is told, not asserted


def problem(number, text=CODE):
    head, _, tail = text.partition('"""\n')
    return Problem(f"t/{number}", head + '"""\n', "mean", tail, "")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": CODE},
        {"prompt": [{"role": "user", "content": "Write this:\n" + CODE}]},
        {"prompt": "Write it.", "chosen": CODE, "rejected": "pass"},
        {"prompt": "x", "chosen": "y", "rejected": [{"role": "assistant", "content": CODE}]},
    ],
)
def test_a_report_names_the_problem_the_share_and_the_line(tmp_path, capsys, row):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"prompt": "x = 1"}) + "\n\n" + json.dumps(row) + "\n")
    clean = problem(1, 'def other(a):\n    """Nothing like it at all, in so many words."""\n')
    assert report(path, [problem(0), clean], tmp_path, 0.5) == 1
    out = capsys.readouterr().out
    assert "2 training texts, 2 problems" in out and "13-grams" in out
    assert "1 problems overlap, 1 by more than 0.5" in out
    written = json.loads((tmp_path / "contamination.json").read_text())["problems"]
    assert [(r["task_id"], r["line"]) for r in written] == [("t/0", 3), ("t/1", None)]
    assert written[0]["overlap"] == 1.0 and written[1]["overlap"] == 0.0
    assert report(path, [problem(0)], tmp_path, 1.0) == 0  # nothing is more than all


def test_a_training_file_that_is_none_is_one_line(tmp_path):
    (tmp_path / "train.jsonl").write_text("no json\n")
    with pytest.raises(UserError, match="train.jsonl, line 1: not JSON"):
        report(tmp_path / "train.jsonl", [problem(0)], tmp_path, 1.0)


def test_a_problem_is_found_whether_its_solution_follows_its_prompt_or_stands_elsewhere():
    prompt, solution = CODE.split("    if", 1)
    solution = "    if" + solution
    for training in (CODE, f"{solution}\n# and\n{prompt}"):
        assert overlaps([training], [grams(prompt, solution)])[0].share == 1.0
    assert grams(prompt, "pass") == grams(prompt)  # too short to be anybody's
    assert 0 < overlaps([prompt], [grams(prompt, solution)])[0].share < 1
