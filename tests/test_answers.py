"""Answers and their verdicts; an evaluation's files, whole and in order wherever it was stopped."""

import json
import threading
from types import SimpleNamespace

from pfppo import answers, fsdp
from pfppo.answers import Answer, Examiner, cut_off, left, results_of, samples_of
from pfppo.config import UserError
from pfppo.data import ProblemSet
from pfppo.problems import Problem, load_verifier, sample_row
from pfppo.reward import RewardCard, load_reward
from pfppo.run import judge
from pfppo.sandbox import Sandbox, Verdict

import pytest
import torch
from conftest import scalar_of, tiny_classifier, tiny_lm, tokens_of
from ranks import forked


def problem(i):
    test = f"def check(candidate):\n    assert candidate(1) == {i + 1}\n"
    return Problem(f"t/{i}", f'def f(x):\n    """Add {i}."""\n', "f", f"    return x + {i}\n", test)


PROBLEMS = [problem(i) for i in range(7)]
UNTESTED = Problem("x", "def f():\n", "", "", "")
ASKED = ProblemSet([*PROBLEMS[:2], UNTESTED], [[3, 4], [4, 5, 6], [7]])
KEYS = {"task_id", "sample", "passed", "outcome", "seconds"}


def args_of(**changes):
    machine = {
        "verify": "tests",
        "workers": 1,
        "timeout": 3.0,
        "allow_weak_isolation": False,
        "compile": False,
    }
    sampling = {"max_new_tokens": 5, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    fixed = machine | sampling | {"seed": 1, "samples_per_problem": 2, "reward_model": ""}
    return SimpleNamespace(**(fixed | changes))


class Grader:
    """Stands for the tests: passes what adds 0, and notes what it is given."""

    apart = True

    def __init__(self):
        self.programs, self.closed, self.busy = [], False, threading.Event()

    def of_rows(self, problems, rows, progress=None):
        self.busy.set()
        assert [p.task_id for p in problems] == [row["task_id"] for row in rows]
        self.programs += [row["solution"] for row in rows]
        progress(len(rows))
        outcomes = ("passed" if "+ 0" in row["solution"] else "wrong_answer" for row in rows)
        return [Verdict(outcome, 0.01) for outcome in outcomes]

    def close(self):
        self.closed = True


@pytest.mark.parametrize(
    "rows, said",
    [
        ([(True, "x"), (True, "y")], ""),
        ([(False, "x"), (True, "y")], "1 of 2 responses reached --max_new_tokens 7"),
        (
            [(False, " \n"), (False, "y")],
            "2 of 2 responses reached --max_new_tokens 7, 1 are empty",
        ),
        ([(True, "")], "0 of 1 responses reached --max_new_tokens 7, 1 are empty"),
        ([], ""),
    ],
)
def test_answers_that_were_cut_off_or_are_empty_are_counted(rows, said):
    of_files = [{"finished": ended, "completion": text} for ended, text in rows]
    assert cut_off([*of_files, {"completion": "old"}], 7) == said
    assert cut_off([Answer([1], text, None, ended) for ended, text in rows], 7) == said


def rows_of(first, last, group, text="    return x + 0\n"):
    return [sample_row(PROBLEMS[i], j, text) for i in range(first, last) for j in range(group)]


def fill(folder, rows, answer, group, batch, verifier, ranks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "CHUNK", batch)
        return results_of(folder, PROBLEMS, rows, answer, group, batch, verifier, ranks)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def everything(ranks):
    """What an Examiner gives: answers twice, and with another tag; rows of samples in two ways."""
    rolled, lm, rm = [], tiny_lm("llama"), scalar_of(tiny_classifier("llama", seed=5), ranks)
    with Examiner(tokens_of(limit=9), args_of(), ranks) as examiner:
        groups = [examiner.answers(lm, ASKED, tag, 1.0, samples=2) for tag in ("a", "a", "b")]
        told = rolled.append
        whole = samples_of(examiner, lm, [rm], ASKED, 0, 3, told)
        parts = samples_of(examiner, lm, [rm], ASKED, 0, 1, told)
        parts += samples_of(examiner, lm, [rm], ASKED, 1, 3, told)
        greedy = examiner.greedy(None, ProblemSet([], []))
    answers = [[[(a.ids, a.text, a.passed) for a in group] for group in part] for part in groups]
    tested = [answer.verdict is not None for group in groups[0] for answer in group]
    return SimpleNamespace(answers=answers, tested=tested, whole=whole, parts=parts, greedy=greedy)


@pytest.fixture(scope="module")
def several():
    """What two ranks give, who share three problems."""
    return forked(everything)


def test_answers_and_samples_are_complete_repeat_and_do_not_depend_on_the_ranks(several, ranks):
    one = everything(ranks)
    first, again, other = one.answers
    assert [len(group) for group in first] == [2, 2, 2] and first == again
    assert [ids for ids, *_ in sum(first, [])] != [ids for ids, *_ in sum(other, [])]
    assert not any(passed for *_, passed in sum(first, []))
    assert one.tested == [True] * 4 + [False] * 2 and one.greedy == (None, None)
    keys = [(row["task_id"], row["sample"]) for row in one.whole]
    assert keys == [(problem.task_id, j) for problem in ASKED.problems for j in range(2)]
    assert len({row["reward"] for row in one.whole}) > 3
    for found in (one, *several):
        assert found.answers == one.answers and found.tested == one.tested
        for row, wanted in zip(found.whole + found.parts, one.whole * 2, strict=True):
            assert row["reward"] == pytest.approx(wanted["reward"], abs=1e-5)
            assert row | {"reward": 0} == wanted | {"reward": 0}


def test_references_pass_wrong_answers_fail_and_untested_problems_have_no_verdict(ranks):
    problems = [UNTESTED, PROBLEMS[1], PROBLEMS[2], PROBLEMS[1]]
    texts = ["    return 1\n", "    return None\n", PROBLEMS[2].canonical_solution, "    1 / 0\n"]
    with Examiner(None, args_of(), ranks) as examiner:
        verdicts = examiner.verifier(problems, texts)
        scores = examiner.scores(problems, texts)
    assert [verdict and verdict.passed for verdict in verdicts] == [None, False, True, False]
    assert scores.isnan().tolist() == [True, False, False, False]
    assert scores[1:].tolist() == [0.0, 1.0, 0.0]


def test_a_chunk_is_some_hundred_rows_at_most_and_fills_its_slots_again(tmp_path, ranks):
    chunks = []

    def answer(first, last, progress):
        chunks.append(last - first)
        return rows_of(first, last, 100)

    for slots, problems in ((1000, [2, 2, 2, 1]), (60, [2, 2, 2, 1]), (10, [1] * 7)):
        folder = tmp_path / str(slots)
        folder.mkdir()
        results_of(folder, PROBLEMS, [], answer, 100, slots, Grader(), ranks)
        assert chunks == problems
        chunks.clear()


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_samples_are_answered_and_executed_once_and_written_in_order(ranks, tmp_path, group, batch):
    grader, rows, asked = Grader(), [], []

    def answer(first, last, progress):
        asked.append((first, last))
        return rows_of(first, last, group)

    results = fill(tmp_path, rows, answer, group, batch, grader, ranks)
    keys = [(f"t/{i}", j) for i in range(7) for j in range(group)]
    assert [(r["task_id"], r["sample"]) for r in results] == keys
    assert read(tmp_path / "results.jsonl") == results and read(tmp_path / "samples.jsonl") == rows
    assert all(set(row) == KEYS for row in results)
    assert len(grader.programs) == 7 * group and not grader.closed
    assert [i for first, last in asked for i in range(first, last)] == list(range(7))
    assert all((last - first) * group <= max(batch, group) for first, last in asked)


@pytest.mark.parametrize(
    "samples, done", [(s, r) for s in range(0, 15, 3) for r in range(0, s + 1, 3)]
)
def test_what_is_there_is_not_done_again(ranks, tmp_path, samples, done):
    (whole := tmp_path / "whole").mkdir()
    finished = fill(whole, [], lambda a, b, progress: rows_of(a, b, 2), 2, 4, Grader(), ranks)
    for name, count in (("samples.jsonl", samples), ("results.jsonl", done)):
        lines = (whole / name).read_text().splitlines(keepends=True)
        (tmp_path / name).write_text("".join(lines[:count]) + '{"task_id": "t/')  # cut by a kill
    grader, asked = Grader(), []

    def answer(first, last, progress):
        asked.extend(range(first, last))
        return rows_of(first, last, 2)

    rows = left(tmp_path / "samples.jsonl", 2, ranks)
    results = fill(tmp_path, rows, answer, 2, 4, grader, ranks)
    assert results == finished == read(tmp_path / "results.jsonl")
    assert rows == rows_of(0, 7, 2) == read(tmp_path / "samples.jsonl")
    assert asked == list(range(samples // 2, 7))
    assert len(grader.programs) == 14 - done // 2 * 2


def test_the_bar_moves_as_samples_are_drawn_and_again_as_they_are_judged(
    ranks, tmp_path, monkeypatch, capsys
):
    """In a log, too: a real model takes minutes for its first chunk."""
    real, bars, seen = fsdp.bar, [], []
    monkeypatch.setattr(fsdp, "bar", lambda *a, **how: bars.append(real(*a, **how)) or bars[-1])

    def answer(first, last, progress):
        before = bars[0].n
        progress(2 * (last - first))
        seen.append(bars[0].n - before)
        return rows_of(first, last, 2)

    fill(tmp_path, [], answer, 2, 14, Grader(), ranks)
    assert seen == [7] and bars[0].n == 14 and "14/14" in capsys.readouterr().err


def test_one_chunk_is_executed_while_the_next_is_answered(ranks, tmp_path):
    grader = Grader()

    def answer(first, last, progress):
        assert first == 0 or grader.busy.wait(5)  # the chunk before is with the grader by now
        return rows_of(first, last, 1)

    assert len(fill(tmp_path, [], answer, 1, 1, grader, ranks)) == 7


def test_a_failure_ends_the_tests_under_way(ranks, tmp_path):
    class Watched(Sandbox):
        verdicts = None

        def run(self, *args):
            self.verdicts = super().run(*args)

    def answer(first, last, progress):
        if first:
            raise UserError("no more")
        return rows_of(0, 1, 1, "    while True: pass\n")

    verifier = load_verifier("tests")
    verifier.sandbox = sandbox = Watched(workers=1, timeout=20)
    with sandbox, pytest.raises(UserError, match="no more"):
        fill(tmp_path, [], answer, 1, 1, verifier, ranks)
    assert sandbox.verdicts is None and len(read(tmp_path / "samples.jsonl")) == 1


@pytest.mark.parametrize("card", [None, RewardCard(0.0, 1.0, "t", "v")])
@pytest.mark.parametrize("reward", ["model", "combined"])
def test_rewards_are_judged_from_what_the_rm_said_however_often(tmp_path, reward, card):
    """One from elsewhere is normalised over these samples, as is every reward but an RM's own."""
    if card:
        card.save(tmp_path)
    raw = torch.tensor([1.0, 5.0, 3.0])
    said = raw if card else (raw - 3) / 2
    rows = [row | {"reward": raw[i].item()} for i, row in enumerate(rows_of(0, 3, 1))]
    results = [{"passed": i == 1} for i in range(3)]
    args, wanted = args_of(reward_model=str(tmp_path), reward=reward), said
    if reward == "combined":
        both = said + torch.tensor([-1.0, 1.0, -1.0])
        wanted = (both - both.mean()) / both.std()
    for _ in range(2):
        judge(args, load_reward(reward), PROBLEMS, rows, results)
        assert [row["score"] for row in rows] == [0.0, 1.0, 0.0]
        assert torch.allclose(torch.tensor([row["reward"] for row in rows]), wanted)
        assert [row.get("raw_reward", row["reward"]) for row in rows] == raw.tolist()
