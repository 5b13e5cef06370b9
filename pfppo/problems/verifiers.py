"""The truth slot: what says whether a response is right, `--verify` of all three scripts.

    tests          its code passes the problem's tests, in the sandbox
    last_number    its last number is that of the row's `answer`
    a user's own   verify(responses, problems) -> bools, by `module:function` or `file.py:function`;
                   further fields of a row are in `problem.extra`

`load_verifier` gives one object for all of them: (problems, responses) -> verdicts. A response
passes its tests or fails; elsewhere it is correct or wrong, and no sandbox is needed. A user's own
function runs in this process, in its main thread, and is believed.

What `last_number` takes for a number, and for the same number: numbers.py. A thought is no answer.

Not covered: verdicts between right and wrong, which are for a reward to give.
"""

import ast
import warnings
from dataclasses import dataclass
from functools import partial

from pfppo.config import UserError, load_function, own_reason, require
from pfppo.problems.extract import answer_of
from pfppo.problems.messages import short
from pfppo.problems.numbers import answer_number, number_of, same
from pfppo.problems.programs import assemble, check_of
from pfppo.sandbox import Sandbox

import numpy as np

ANSWERS = ("answer", "Answer", "final_answer", "solution")  # fields, the last one as MATH has it
TRIED = 2  # rows of a file that a user's own verifier is tried on


def _idle(test):
    """Why no program could pass a test, or "": it is no Python, or defines tests, as for pytest and
    unittest, that nobody calls."""
    try:
        with warnings.catch_warnings(action="ignore"):
            parts = ast.parse(test).body
    except (SyntaxError, ValueError) as error:
        return f"'test' is no Python: {error}"
    defined = [part for part in parts if isinstance(part, ast.FunctionDef | ast.ClassDef)]
    run = [node for part in parts if part not in defined for node in ast.walk(part)]
    runs = any(isinstance(node, ast.Assert | ast.Call) for node in run)
    expected = "expected asserts, or check(candidate); pytest's and unittest's are not called"
    checked = runs or any(part.name == "check" for part in defined)
    return "" if checked else f"'test' runs nothing: {expected}"


class ByTests:
    """`tests`: the problem's tests, in a sandbox, which is there from `open` to `close`."""

    spec, apart = "tests", True  # apart: may run in a thread, beside the sampling
    both, is_good, rate = "a passing and a failing", "passes", "pass"  # words for tables

    def open(self, args, say):
        """Start the sandbox of a command line, and say what this machine grants it."""
        how = {"allow_weak_isolation": args.allow_weak_isolation}
        self.sandbox = Sandbox(args.workers, args.timeout, **how)
        say(f"sandbox: {self.sandbox.mode}")
        return self

    def close(self):
        self.sandbox.close()

    def check(self, problems, where):
        """Raise UserError, beginning with `where`, if a problem has no truth."""
        lacking = [problem.task_id for problem in problems if not problem.test]
        count = f"{len(lacking)} of {len(problems)} problems have no 'test', such as {lacking[:1]}"
        named = [p for p in problems if not p.test and not lacks_answer(p)]
        advice = "; their answers are numbers: --verify last_number?" if named else ""
        extra = next((", ".join(p.extra) for p in problems if not p.test), "")
        has = f" (has also: {extra})" * bool(extra)
        require(not lacking, f"{where}: {count}{has}{advice}")
        for problem in problems:
            require(not (why := _idle(problem.test)), f"{where}: {problem.task_id!r}: {why}")

    def __call__(self, problems, responses, progress=None):
        """Verdicts of responses: objects with `passed`, `outcome` and `seconds`; None where a
        problem has no truth. progress(count) is called as they come in."""
        tested = [i for i, problem in enumerate(problems) if problem.test]
        checks = [assemble(problems[i], responses[i]) for i in tested]
        verdicts = self.sandbox.run(checks, progress) if checks else []
        verdicts = dict(zip(tested, verdicts, strict=True))
        return [verdicts.get(i) for i in range(len(problems))]

    def of_rows(self, problems, rows, progress=None):
        """Verdicts of rows of samples.jsonl: of their `solution`, a whole program, unchanged."""
        checks = [check_of(p, row["solution"]) for p, row in zip(problems, rows, strict=True)]
        return self.sandbox.run(checks, progress)


@dataclass(frozen=True)
class Said:
    """A verdict that no sandbox made."""

    passed: bool
    seconds: float = 0.0

    @property
    def outcome(self):
        return "correct" if self.passed else "wrong"


class ByFunction:
    """verify(responses, problems) -> bools as a verifier; its face is that of `ByTests`.

    lacks(problem): what the function needs of a problem and does not find, or "".
    """

    apart = False  # a user's function may need the main thread (one that sets an alarm does)
    both, is_good, rate = "a correct and a wrong", "is right in", "correct"

    def __init__(self, spec, function, lacks=lambda problem: ""):
        self.spec, self.function, self.lacks = spec, function, lacks

    def open(self, args, say):
        return self

    def close(self):
        pass

    def check(self, problems, where):
        """Raise UserError if a problem lacks what is needed, or the function fails on the first."""
        for problem in problems:
            lacks = self.lacks(problem)
            expected = f"--verify {self.spec} needs {lacks}"
            require(not lacks, f"{where}: {problem.task_id!r}: {expected}")
        some = problems[:TRIED]
        self(some, [problem.canonical_solution for problem in some])

    def __call__(self, problems, responses, progress=None):
        """Verdicts. Raises UserError where the function fails, or gives no bool per response."""
        where = f"--verify {self.spec}"
        try:
            found = self.function(list(responses), list(problems))
            found = found.tolist() if hasattr(found, "tolist") else list(found)
            found = [x.item() if hasattr(x, "item") else x for x in found]
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(f"{where}: {own_reason(error)}") from error
        kinds = bool | int | float | np.bool_
        odd = [x for x in found if not (isinstance(x, kinds) and x in (0, 1))]
        expected = f"expected {len(problems)} bools, one for each response, found"
        require(not odd, f"{where}: {expected} {str(odd[:1])[:40]} among them")
        require(len(found) == len(problems), f"{where}: {expected} {len(found)}")
        if progress:
            progress(len(found))
        return [Said(bool(x)) for x in found]

    def of_rows(self, problems, rows, progress=None):
        """Verdicts of rows of samples.jsonl: of their `response`."""
        return self(problems, [row["response"] for row in rows], progress)


def last_number(responses, problems):
    """Whether the last number of each response is that of its problem's `answer`."""
    found = [number_of(answer_of(response)) for response in responses]
    wanted = [answer_number(_answer(problem)) for problem in problems]
    return [bool(a and b and same(a, b)) for a, b in zip(found, wanted, strict=True)]


def lacks_answer(problem):
    answer = _answer(problem)
    has = short(answer) if answer is not None else f"none of them (has: {', '.join(problem.extra)})"
    what = f"a number in the field {' or '.join(map(repr, ANSWERS))}, found"
    return "" if answer_number(answer) else f"{what} {has}"


def _answer(problem):
    return next((problem.extra[name] for name in ANSWERS if name in problem.extra), None)


VERIFIERS = {
    "tests": ByTests,
    "last_number": partial(ByFunction, "last_number", last_number, lacks_answer),
}


def load_verifier(spec):
    """The verifier of a name in VERIFIERS, or of a user's own function; `open` makes it ready.
    Raises UserError where there is none."""
    found = load_function(spec, "verify", VERIFIERS)
    return found() if spec in VERIFIERS else ByFunction(spec, found)
