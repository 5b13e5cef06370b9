"""The jail: what a candidate cannot reach, and the modes of machines that grant less.

The project's larger set of hostile programs, where its folder exists, runs here too.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from pfppo.config import UserError
from pfppo.sandbox import Check, Sandbox, walls

import pytest
from conftest import quick
from test_lies import FORGED
from test_sandbox import ADD, TEST_ADD, WRONG, exists, judge, needs_data, processes, rows

# ---- containment ---------------------------------------------------------------------------------

HELD = {  # each raises OSError, or the program passes
    "fork": "import ctypes\nif ctypes.CDLL(None).fork() < 0: raise OSError",
    "exec": "import os\nos.execv('/bin/true', ['true'])",
    "spawn": "import os\nos.posix_spawn('/bin/true', ['true'], {})",
    "connect": "import socket\nsocket.create_connection(('127.0.0.1', 22), 1)",
    "unix socket": "import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "ptrace": "import ctypes\nif ctypes.CDLL(None).ptrace(16, 1, 0, 0) < 0: raise OSError",
    "kill parent": "import os\nos.kill(os.getppid() or 1, 9)",
    "kill all": "import os\nos.kill(-1, 9)",
    "chmod": "import os\nopen('a', 'w')\nos.chmod('a', 0o777)",
    "read the password file": "open('/etc/passwd').read()",
    "read this test": f"open({__file__!r}).read()",
    "list the root's home": "import os\nos.listdir('/root')\nos.listdir('/home')",
    "write to the library": "import os\nopen(os.__file__ + 'x', 'w')",
    "write to shared memory": "open('/dev/shm/x', 'w')",
    "other processes": "import os\nos.listdir('/proc/1')",
    "outlive its parent": "import ctypes\n"
    "if ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) < 0: raise OSError",
    "memory beside the limit": "import os\nos.memfd_create('x')",
    "signals by fcntl": "import fcntl\nfcntl.fcntl(3, fcntl.F_SETOWN, 1)",
    "a lock that others see": "import fcntl\nfcntl.flock(open('/dev/null'), fcntl.LOCK_SH)",
    "a lock of the older kind": "import fcntl, os\nfcntl.lockf(open(os.__file__), fcntl.LOCK_SH)",
    "huge file": "f = open('a', 'wb')\nfor _ in range(64): f.write(bytes(1 << 20))",
}


def held_checks():
    code = "try:\n    {}\nexcept OSError: held = True\nelse: held = False\ndef add(x, y):\n"
    code += "    return x + y if held else None"
    return [Check(code.format(p.replace("\n", "\n    ")), TEST_ADD, "add") for p in HELD.values()]


def test_acts_that_are_refused(sandbox):
    verdicts = sandbox.run(held_checks())
    assert not [(n, v) for n, v in zip(HELD, verdicts, strict=True) if not v.passed]


def test_limits_cannot_be_raised(sandbox):
    program = """
import resource
for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_FSIZE):
    try: resource.setrlimit(kind, (resource.RLIM_INFINITY,) * 2)
    except ValueError: continue
    raise SystemExit
"""
    assert judge(sandbox, program + ADD).passed


def test_nothing_of_the_runner_is_visible(sandbox, monkeypatch):
    monkeypatch.setenv("PFPPO_SECRET", "topsecret")
    with Sandbox(workers=1) as other:
        program = "import os, sys\nassert 'PFPPO_SECRET' not in os.environ and len(sys.argv) == 1\n"
        program += "assert os.getpgid and set(os.environ) <= {'HOME', 'TMPDIR'}\n"
        program += "for d in range(4, 64):\n    try: os.fstat(d)\n    except OSError: continue\n"
        assert judge(other, program + "    raise SystemExit\n" + ADD).passed


def test_candidates_find_nothing_of_each_other(sandbox):
    mess = "import os, builtins, math, sys\nos.mkdir('d', 0)\nopen('f{}', 'w').write('x' * 9999)\n"
    mess += "os.symlink('/', 'l') if 0 else None\nbuiltins.len = 7\nmath.sqrt = 4\n"
    mess += "sys.modules['heapq'] = None\n"
    clean = "import os, math, heapq\nassert os.listdir() == [] and math.sqrt(4) == 2 == len('ab')\n"
    checks = []
    for number in range(6):
        checks += [Check(mess.format(number) + WRONG, TEST_ADD, "add")]
        checks += [Check(clean + ADD + f"#{number}", TEST_ADD, "add")]
    assert all(verdict.passed for verdict in sandbox.run(checks)[1::2])


@pytest.mark.parametrize("without", [(), ("namespaces",)])
def test_no_tree_is_too_deep_to_be_removed(without, monkeypatch):
    empty = "import os\nassert not os.listdir()\nopen('a', 'w').write('a')\n"
    monkeypatch.setattr(Sandbox, "without", without)
    with Sandbox(workers=1) as sandbox:
        for name, depth in ("a" * 250, 40), ("d", 1200):
            deep = f"import os\nfor _ in range({depth}):\n    os.mkdir({name!r})\n"
            deep += f"    os.chdir({name!r})\n"
            deep += "open('big', 'w').write('x' * 1000)\nos.mkdir('e', 0)\n"
            for program in (deep + ADD, empty + ADD, empty + "\n" + ADD):
                assert judge(sandbox, program).passed


def test_nothing_outlives_the_verdict():
    with Sandbox(workers=1) as one:
        judge(one, ADD)
        time.sleep(0.3)  # the next candidate is forked after the verdict
        pids = processes(one)
        stay = (
            "import threading, time\nfor _ in range(20):\n    threading.Thread(target=time.sleep, "
        )
        judge(one, stay + "args=[99]).start()\n" + WRONG)
        time.sleep(0.3)
        assert len(processes(one)) == len(pids)
        pids += processes(one)
    deadline = time.monotonic() + 10  # the kernel ends them when it gets round to it
    while any(map(exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert pids and not any(map(exists, pids))


@pytest.mark.parametrize(
    "paths, directory",
    [
        (["/usr/lib", "/tmpfoo"], "/tmp"),
        (["/tmp/venv/lib"], "/var/tmp"),
        (["/tmp", "/var/tmp/a"], "/candidate"),
    ],
)
def test_the_working_directory_hides_no_library(paths, directory):
    assert walls.working_directory(paths) == directory


def test_a_virtual_environment_may_be_under_tmp():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        command = [sys.executable, "-m", "venv", "--without-pip", folder]
        subprocess.run(command, check=True)
        (site,) = pathlib.Path(folder).glob("lib/*/site-packages")
        (site / "own_module.py").write_text("one = 1\n")
        program = "import own_module, os\ndef f(x): return own_module.one + len(os.listdir())\n"
        code = f"import sys; sys.path.append({str(pathlib.Path(__file__).parents[1])!r})\n"
        code += "from pfppo.sandbox import Check, Sandbox\nwith Sandbox(workers=1) as sandbox:\n"
        code += (
            f"    print(sandbox.run([Check({program!r}, 'assert f(0) == 1', 'f')])[0].outcome)\n"
        )
        command = [f"{folder}/bin/python", "-c", code]
        assert subprocess.run(command, capture_output=True, text=True).stdout == "passed\n"


# ---- modes ---------------------------------------------------------------------------------------

MODES = {  # layers that are missing -> what the mode says
    ("namespaces",): "landlock + seccomp + limits",
    ("namespaces", "landlock"): "weak isolation: seccomp + limits",
    ("namespaces", "landlock", "seccomp"): "weak isolation: limits",
    ("seccomp",): "weak isolation: namespaces + landlock + limits",
}


@pytest.mark.parametrize("without", quick([("namespaces", "landlock")], MODES), ids="+".join)
def test_modes_work_and_say_so(without, monkeypatch):
    monkeypatch.setattr(Sandbox, "without", without)
    weak = MODES[without].startswith("weak")
    if weak:
        with pytest.raises(UserError, match="--allow_weak_isolation"):
            Sandbox(workers=1)
    with Sandbox(workers=1, timeout=0.5, allow_weak_isolation=weak) as lesser:
        assert lesser.mode == MODES[without]
        programs = [ADD, WRONG, FORGED["equals everything"], "def add(x, y):\n    while True: pass"]
        found = lesser.run([Check(program, TEST_ADD, "add") for program in programs])
        assert [v.outcome for v in found] == ["passed", "wrong_answer", "wrong_answer", "timeout"]
        fork = "import os\ndef add(x, y):\n    os.fork()\n    return x + y"
        assert not judge(lesser, fork).passed or without == ("seccomp",)
        held = {n for n, v in zip(HELD, lesser.run(held_checks()), strict=True) if v.passed}
        if not weak:
            assert held == HELD.keys()


@pytest.mark.parametrize("without", [(), ("namespaces",)], ids=["full", "lesser"])
def test_a_vanishing_temporary_folder_changes_no_verdict(without, monkeypatch, tmp_path):
    monkeypatch.setattr(Sandbox, "without", without)
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    monkeypatch.setenv("TMPDIR", str(private))
    monkeypatch.setattr(tempfile, "tempdir", None)
    write = "open('x', 'w').write('1')\nint(open('x').read())\n"
    checks = [Check(f"{write}{ADD if i % 2 else WRONG}\n# {i}", TEST_ADD, "add") for i in range(60)]
    with Sandbox(workers=2) as box:
        seen = []

        def progress(count):
            seen.append(count)
            if len(seen) % 20 == 0:
                shutil.rmtree(private, ignore_errors=True)

        verdicts = box.run(checks, progress)
    assert [v.outcome for v in verdicts] == ["wrong_answer", "passed"] * 30
    assert not private.exists() or not list(private.iterdir())


def test_root_s_private_temporary_folder_keeps_no_candidate_out(monkeypatch, tmp_path):
    monkeypatch.setattr(Sandbox, "without", ("namespaces", "landlock"))
    tmp_path.chmod(0o700)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with Sandbox(workers=1, allow_weak_isolation=True) as box:
        assert judge(box, ADD).passed


# ---- the project's hostile examples --------------------------------------------------------------

PREAMBLE = "from typing import *\nfrom collections import *\nfrom math import *\n"


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("file, seconds", [("hostile_examples", 1.6), ("hostile_examples_2", 3.0)])
def test_hostile_examples_get_their_verdicts(file, seconds):
    canary = pathlib.Path("/tmp/pf_canary")
    (canary / "home").mkdir(parents=True, exist_ok=True)
    files = [canary / "secret.txt", canary / "keep.txt", canary / "home" / "notes.txt"]
    for path in files:
        path.write_text("topsecret")
    files[0].chmod(0o600)
    examples, checks = rows(f"{file}.jsonl"), []
    for example in examples:
        preamble = PREAMBLE if example.get("format") == "leetcode" else ""
        reference = example.get("prompt", "") + example.get("canonical_solution", "")
        program, test = preamble + example["candidate"], example["test"]
        checks.append(Check(program, test, example["entry_point"], reference))
    with Sandbox(workers=2, timeout=seconds) as box:
        verdicts, pids = box.run(checks), processes(box)
        folders = [worker.folder for worker in box._workers]
    assert not any(map(exists, pids)) and not any(map(os.path.exists, folders))
    wrong = [
        (example["id"], verdict)
        for example, verdict in zip(examples, verdicts, strict=True)
        if verdict.passed != (example["expected"] == "pass") and example["id"] != "ok_subprocess"
    ]
    assert not wrong
    assert [path.read_text() for path in files] == ["topsecret"] * 3
    shutil.rmtree(canary)
