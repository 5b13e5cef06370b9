"""An evaluation's two files, samples.jsonl and results.jsonl, filled chunk by chunk.

While one chunk's tests run in a thread, the next chunk is sampled. Rows are in the order of the
input and written as soon as they are known, so a run that was stopped goes on from what is there:
nothing is sampled twice, nothing executed twice but the chunk that was under way.

Not here: what is asked and sampled (eval_code.py), code out of responses (extract.py), verdicts
(sandbox.py).
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from pfppo import benchmarks, rundir
from pfppo.config import require
from pfppo.extract import program_of
from pfppo.fsdp import agreed, from_main, gather_lists

from tqdm import tqdm


def read_samples(path, problems):
    """Rows of a samples file as rows of ours, in its order. Raises UserError."""
    known = {problem.task_id: problem for problem in problems}
    counts, samples = Counter(), []
    for line, row in benchmarks.read_jsonl(path):
        task = row.get("task_id")
        task = f"Mbpp/{task}" if isinstance(task, int) else task  # as Google's file has them
        expected = f"expected one of the problems', such as {next(iter(known))!r}"
        there = isinstance(task, str) and task in known
        require(there, f"{path}, line {line}: task_id {task!r} is in no problem: {expected}")
        whole = row.get("solution") is not None
        code = row["solution"] if whole else row.get("completion")
        require(
            isinstance(code, str),
            f"{path}, line {line}: expected a string in 'completion' or 'solution', "
            f"found {sorted(row)}",
        )
        code = code if whole else known[task].prompt + code
        program = program_of(replace(known[task], prompt=""), code, whole=True)  # adds the setup
        row = {"task_id": task, "sample": counts[task], "solution": program}
        counts[task] += 1
        samples.append(row)
    return samples


def sample_row(problem, number, response):
    """One line of samples.jsonl. prompt + completion is the program, whatever the response is."""
    program = benchmarks.assemble(problem, response).program
    head = problem.setup + problem.prompt
    longer = program.startswith(head)
    # A program that defines all again stands after the prompt, whose function is then a docstring.
    completion = program[len(head) :] if longer else "\n" + program.removeprefix(problem.setup)
    return {
        "task_id": problem.task_id,
        "sample": number,
        "completion": completion,
        "solution": program,
        "response": response,
    }


def left(path, group, ranks):
    """What an interrupted run has left in a JSONL file, in whole groups of rows, on all ranks."""
    with agreed(ranks):
        rows = rundir.whole_lines(path) if ranks.is_main else None
    rows = from_main(rows, ranks)
    rows = rows[: len(rows) // group * group]
    if ranks.is_main:
        rundir.rewrite_jsonl(path, rows)
    return rows


def fill(out, problems, rows, answer, group, batch, sandbox, ranks):
    """Execute all samples; rows of results.jsonl in their order. A collective.

    rows: the samples that are there, extended in place by answer(first, last), those of more
    problems, `group` each; answer is None where `rows` are all. A chunk is about `batch` rows for
    each rank.
    """
    known = {problem.task_id: problem for problem in problems}
    total = len(problems) * group if answer else len(rows)
    size = max(1, batch // group) * group * ranks.world
    results = left(out / "results.jsonl", group, ranks)
    with (
        ThreadPoolExecutor(1) as pool,
        tqdm(total=total, desc="samples, tests", mininterval=1, disable=not ranks.is_main) as bar,
    ):

        def finish(part, verdicts):
            rows = [
                {**{name: row[name] for name in ("task_id", "sample")}, "passed": verdict.passed}
                | {"outcome": verdict.outcome, "seconds": round(verdict.seconds, 4)}
                for row, verdict in zip(part, gather_lists(verdicts.result(), ranks), strict=True)
            ]
            results.extend(rows)
            if ranks.is_main:
                rundir.append_jsonl(out / "results.jsonl", rows)
            bar.n = len(results)
            bar.refresh()

        def progress(count):
            bar.update(count * ranks.world)  # about right, until `finish` knows

        bar.update(len(results))
        under_way = None
        try:
            for start in range(len(results), total, size):
                stop = min(start + size, total)
                if len(rows) < stop:
                    new = answer(len(rows) // group, stop // group)
                    rows += new
                    if ranks.is_main:
                        rundir.append_jsonl(out / "samples.jsonl", new)
                part = rows[start:stop]
                checks = [
                    benchmarks.check_of(known[row["task_id"]], row["solution"])
                    for row in part[ranks.rank :: ranks.world]
                ]
                if under_way:
                    finish(*under_way)
                under_way = part, pool.submit(sandbox.run, checks, progress)
            if under_way:
                finish(*under_way)
        except BaseException:
            sandbox.close()  # the tests under way would hold up an error or a Ctrl-C
            raise
    return results
