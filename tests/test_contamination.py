"""Overlap: whole, partial and none, whatever the format; fast enough for real data sets."""

import random
import time

from pfppo.contamination import grams, overlaps

import pytest

CODE = '''def mean(values):
    """The arithmetic mean of a list of numbers, or None of an empty one."""
    if not values:  # nothing to divide by
        return None
    return sum(values) / len(values)
'''


def test_a_problem_that_stands_in_the_training_data_overlaps_wholly():
    (found,) = overlaps(["x = 1", "before\n" + CODE + "after"], [CODE])
    assert (found.share, found.text) == (1.0, 1)


def test_format_comments_and_quotes_hide_nothing():
    other = CODE.replace("    ", "\t").replace('"""', "'''").replace("  # nothing to divide by", "")
    assert overlaps([other.upper()], [CODE])[0].share == 1.0


def test_texts_that_share_no_13_tokens_do_not_overlap():
    (found,) = overlaps(["def mean(values): return 0", "import sum"], [CODE])
    assert (found.share, found.text) == (0.0, None)


def test_a_part_is_a_share():
    tokens = [f"t{i}" for i in range(50)]
    (found,) = overlaps([" ".join(tokens[:25])], [" ".join(tokens)])
    assert found.share == pytest.approx((25 - 12) / (50 - 12))


def test_a_text_shorter_than_a_gram_is_one_gram():
    assert overlaps(["x = 1"], ["x=1"])[0].share == 1.0
    assert overlaps(["x = 1; y = 2"], ["x = 1"])[0].share == 0.0
    assert grams("# only a comment") == set()
    assert overlaps(["anything"], [""])[0].share == 0.0


def test_the_text_that_shares_most_is_named():
    half = " ".join(f"t{i}" for i in range(20))
    whole = " ".join(f"t{i}" for i in range(40))
    assert overlaps([half, "nothing", whole], [whole])[0].text == 2


def test_20000_times_1000_documents_take_less_than_a_minute_of_cpu():
    draw = random.Random(0)
    words = [f"name_{i}" for i in range(3000)]
    texts = [" ".join(draw.choices(words, k=200)) for _ in range(2000)]
    begin = time.process_time()
    found = overlaps((texts[i % 2000] for i in range(20_000)), texts[:1000])
    assert all(overlap.share == 1.0 for overlap in found)
    print(f"{time.process_time() - begin:.1f} s")  # a time is told, not asserted
