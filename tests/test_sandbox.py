"""The sandbox: every kind of end has its name, what the pool survives, the benchmarks' files.

Beside it: right programs (test_right_programs.py), what a verdict depends on (test_verdicts.py),
lies (test_lies.py), walls (test_jail.py), what is not contained (test_sandbox_limits.py).
"""

import contextlib
import gc
import gzip
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

from pfppo import sandbox as door
from pfppo.sandbox import OUTCOMES, Check, Sandbox

import pytest

DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark files at {DATA}")
ADD = "def add(x, y):\n    return x + y\n"
WRONG = "def add(x, y):\n    return x - y - 1\n"
TEST_ADD = (
    "def check(candidate):\n    assert candidate(0, 1) == 1\n    assert candidate(2, 3) == 5\n"
)


def judge(sandbox, program, test=TEST_ADD, entry_point=None, reference=""):
    entry_point = entry_point or ("add" if "def add" in program else "f")
    return sandbox.run([Check(program, test, entry_point, reference)])[0]


def check_of(lines):
    """A test: `lines` as the body of check(f)."""
    return "def check(f):\n" + textwrap.indent(lines, "    ")


# ---- ends ----------------------------------------------------------------------------------------

OUTCOME_OF = {
    "passed": [ADD],
    "wrong_answer": [WRONG, "def add(x, y): x + y", "def add(x, y): return [x + y]"],
    "syntax_error": ["def add(x, y) return x", ADD + "\0", "```python\n" + ADD + "```"],
    "exception": ["def add(x, y): return add(x, y)", "def add(x, y): return x / 0", "other = 1",
                  "n = input()\n" + ADD, "def add(x, y): return a", "import no_such\n" + ADD],
    "timeout": ["def add(x, y):\n    while 1: pass", "import time\ndef add(x, y): time.sleep(60)",
                "import re\ndef add(x, y): re.match(r'(a+)+$', 'a' * 45 + 'b')"],
    "memory": ["def add(x, y): return bytearray(1 << 30)"],
    "forbidden": ["import socket\nsocket.socket()\n" + ADD, "import os\nos.fork()\n" + ADD],
    "exit": ["quit()\n" + ADD, "import os\nos._exit(0)\n" + ADD,
             "def add(x, y): raise SystemExit(0)", "def add(x, y): raise KeyboardInterrupt"],
}  # fmt: skip
OUTCOME_OF = {program: outcome for outcome, programs in OUTCOME_OF.items() for program in programs}


def test_every_outcome_has_its_name(sandbox):
    verdicts = sandbox.run([Check(program, TEST_ADD, "add") for program in OUTCOME_OF])
    assert {p: v.outcome for p, v in zip(OUTCOME_OF, verdicts, strict=True)} == OUTCOME_OF
    assert {*OUTCOME_OF.values()} == {*OUTCOMES}
    assert all(v.passed == (v.outcome == "passed") and "\n" not in v.detail for v in verdicts)


BURN = "import time\nt = time.process_time()\nwhile time.process_time() - t < {}: pass\n"
SLEEP = "import time\ndef add(x, y):\n    time.sleep({})\n    return x + y\n"


def test_time_is_what_a_program_computes_and_sleeps(sandbox):
    """A right answer that comes late is a timeout; the sleeping ones are called twice."""
    programs = BURN.format(0.6) + ADD, BURN.format(1.5) + ADD, SLEEP.format(0.2), SLEEP.format(0.8)
    verdicts = sandbox.run([Check(program, TEST_ADD, "add") for program in programs])
    assert [v.outcome for v in verdicts] == ["passed", "timeout", "passed", "timeout"]


def test_a_sleep_in_small_drops_is_a_sleep(sandbox):
    drips = "def add(x, y):\n    end = time.time() + 2\n    while time.time() < end:\n"
    drips += "        sum(range(10_000))\n        time.sleep(0.03)\n    return x + y\n"
    assert judge(sandbox, "import time\n" + drips).outcome == "timeout"


@pytest.mark.slow
def test_a_busy_machine_fails_no_honest_program():
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(6)]
    try:
        with Sandbox(workers=2, timeout=0.5) as busy:
            found = busy.run([Check(BURN.format(s) + ADD, TEST_ADD, "add") for s in (0.3, 0.31, 5)])
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    assert [v.outcome for v in found] == ["passed", "passed", "timeout"]


def test_no_check_goes_on_for_ever(sandbox, monkeypatch):
    monkeypatch.setattr(door, "WALL", 0.1)
    assert judge(sandbox, SLEEP.format(0.6)).outcome == "timeout"


@pytest.mark.parametrize(
    "answer, line, outcome",
    [
        ("range(10**12)", "sum(f())", "timeout"),
        ("10**6, 10**8", "pow(*f())", "timeout"),
        ("[i * (2**61 - 1) for i in range(100_000)]", "len({*f()})", "timeout"),
        ("10**11", "[0] * f()", "memory"),
    ],
)
def test_a_test_has_limits_for_what_it_does_with_the_answers(sandbox, answer, line, outcome):
    verdict = judge(sandbox, f"def f():\n    return {answer}\n", check_of(f"assert {line} == 1"))
    assert verdict.outcome == outcome and ("the test" in verdict.detail or outcome == "memory")


# ---- it survives ---------------------------------------------------------------------------------


def descendants(pid):
    with contextlib.suppress(OSError):
        lists = [p.read_text() for p in pathlib.Path(f"/proc/{pid}/task").glob("*/children")]
        children = [int(child) for child in " ".join(lists).split()]
        return children + [pid for child in children for pid in descendants(child)]
    return []


def processes(box):
    """The process ids of a sandbox, of its servers first."""
    own = [server.process.pid for worker in box._workers for server in worker.servers.values()]
    return own + [pid for server in own for pid in descendants(server)]


def exists(pid):
    """Zombies do as well."""
    return os.path.exists(f"/proc/{pid}")


def numbered(count, slow=0.0):
    """Programs of which the odd ones are wrong."""
    wait = f"import time\ntime.sleep({slow})\n" if slow else ""
    programs = [f"{wait}{(ADD, WRONG)[i % 2]}# {i}" for i in range(count)]
    return [Check(program, TEST_ADD, "add") for program in programs]


@pytest.mark.parametrize("victim", ["candidate", "judge", "inside"])  # servers; in its namespaces
def test_killed_processes_lose_no_verdict(victim, capfd):
    with Sandbox(workers=2) as shot:
        seen = []

        def progress(done):
            seen.append(done)
            if len(seen) == 5:
                module = "judge" if victim == "judge" else "candidate"
                pid = shot._workers[0].servers[module,].process.pid
                os.kill(descendants(pid)[0] if victim == "inside" else pid, signal.SIGKILL)

        verdicts = shot.run(numbered(40, slow=0.01), progress)
    assert [v.outcome for v in verdicts] == ["passed", "wrong_answer"] * 20
    assert sum(seen) == 40 and capfd.readouterr().err == ""


def test_interrupted_run_leaves_nothing_for_the_next(sandbox):
    def interrupt(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sandbox.run(numbered(20, slow=0.05), interrupt)
    assert [v.passed for v in sandbox.run(numbered(6))] == [True, False] * 3


def test_closing_leaves_nothing_and_ends_a_run_under_way(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    tmp_path.chmod(0o755)
    box, found = Sandbox(workers=2), []

    def work():
        found.extend(verdict.passed for verdict in box.run(numbered(4)))
        with pytest.raises(RuntimeError, match="closed"):
            box.run(numbered(4, slow=60))
        found.append("closed")

    thread = threading.Thread(target=work)
    thread.start()
    while len(found) < 4:
        time.sleep(0.1)
    pids = processes(box)
    box.close()
    box.close()
    thread.join()
    assert found == [True, False, True, False, "closed"]
    with pytest.raises(RuntimeError, match="closed"):
        box.run(numbered(1))
    assert len(pids) > 8 and not any(map(exists, pids)) and not list(tmp_path.iterdir())


def test_killed_owner_leaves_no_process_and_no_file(tmp_path):
    tmp_path.chmod(0o755)
    program = f"""
import sys
sys.path.insert(0, {str(pathlib.Path(__file__).parents[1])!r})
from pfppo.sandbox import Check, Sandbox
box = Sandbox(timeout=1.0)
print("ready", flush=True)
box.run([Check("def f():\\n    while True: pass", "f()", "f")])
print("done", flush=True)
sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    owners = {w: subprocess.Popen(command, env=environment, **pipes) for w in ("ready", "done")}
    pids = []
    for last_word, owner in owners.items():
        while owner.stdout.readline().decode().strip() != last_word:
            pass
        time.sleep(0.2)
        pids += descendants(owner.pid)
        owner.kill()
        owner.communicate()
    end = time.monotonic() + 10
    while any(map(exists, pids)) or list(tmp_path.iterdir()):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert len(pids) >= 8


def test_a_sandbox_that_nothing_refers_to_closes_itself():
    box = Sandbox(workers=1)
    pids, folder = processes(box), box._workers[0].folder
    assert judge(box, ADD).passed and len(pids) > 4
    child = os.fork()
    if not child:
        box.close()  # the parent's alone to close
        os._exit(0)
    os.waitpid(child, 0)
    assert judge(box, ADD + "#").passed
    del box
    gc.collect()
    assert not any(map(exists, pids)) and not os.path.exists(folder)


def test_equal_checks_run_once_and_progress_adds_up(sandbox):
    steps = []
    verdicts = sandbox.run([numbered(1)[0]] * 50 + numbered(3)[1:], steps.append)
    assert [v.passed for v in verdicts] == [True] * 50 + [False, True]
    assert sorted(steps) == [1, 1, 50] and sandbox.run([]) == []


# ---- the benchmarks' files -----------------------------------------------------------------------


def rows(name):
    with (gzip.open if name.endswith("gz") else open)(DATA / name, "rt") as file:
        return [json.loads(line) for line in file]


@needs_data
@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_references_pass_and_pass_does_not(sandbox, step):
    checks, empty = [], []
    for row in rows("HumanEval.jsonl.gz")[::step]:
        reference = row["prompt"] + row["canonical_solution"]
        checks.append(Check(reference, row["test"], row["entry_point"], reference))
        program = row["prompt"] + "    pass\n"
        empty.append(Check(program, row["test"], row["entry_point"], reference))
    verdicts = sandbox.run(checks + empty)
    assert [v.passed for v in verdicts] == [True] * len(checks) + [False] * len(empty)
    checks = []
    for row in rows("mbpp.jsonl.gz")[:: 2 * step]:
        if row["task_id"] != 123:  # it takes longer than the limit
            test = row["test_setup_code"] + "\n" + "\n".join(row["test_list"])
            checks.append(Check(row["code"], test, "", row["code"]))
    assert [v for v in sandbox.run(checks) if not v.passed] == []


@needs_data
@pytest.mark.slow
def test_leetcode_s_references_pass_but_those_that_take_long_or_need_what_is_not_here():
    checks = []
    for row in rows("LeetCodeDataset-v0.3.1-test.jsonl.gz"):
        reference = row["prompt"] + "\n" + row["completion"]
        checks.append(Check(reference, row["test"], row["entry_point"], reference))
    with Sandbox(workers=2) as box:
        failed = [verdict for verdict in box.run(checks) if not verdict.passed]
    failed = [v for v in failed if "No module named 'sortedcontainers'" not in v.detail]
    assert all(v.outcome == "timeout" for v in failed) and len(failed) <= 12
