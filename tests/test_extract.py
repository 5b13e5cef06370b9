"""Code out of responses, by what the program does: in the sandbox, or by plain `exec`.

answers.txt has what models write, each answer below a line === NAME [PROBLEM] VERDICT. The problem
is a constant of this file, CODEX where none is named; the answer passes, `fails`, or `gives N`.
"""

import re
from dataclasses import replace
from pathlib import Path

from pfppo.problems import Problem, assemble
from pfppo.problems.extract import extract_code
from pfppo.sandbox import Sandbox

import pytest

CODEX = Problem(
    "T/0",
    "import math\nfrom typing import List\n\n\ndef half(x: int) -> int:\n    return x // 2\n\n\n"
    'def f(xs: List[int]) -> int:\n    """Describe xs.\n    >>> f([4, 9])\n    5\n    """\n',
    "f",
    "    return int(sum(math.sqrt(x) for x in xs))\n",
    "def check(candidate):\n    assert candidate([4, 9]) == 5\n",
)
STUB = Problem(
    "T/1",
    '"""\nSay something about xs.\n"""\nclass Node:\n    pass\nclass Solution:\n'
    "    def f(self, xs: List[int]) -> int:\n        ",
    "Solution().f",
    "",
    "my_solution = Solution()\nassert my_solution.f([4, 9]) == 5\n",
    "from typing import *\nfrom collections import *\n",
)
DOC, TEST = '"""\nWrite f.\n"""\n', "assert f([4, 9]) == 5\n"
BARE = Problem("T/2", DOC, "f", "def f(xs): return 5\n", TEST)
TABS = Problem("T/3", 'def f(xs):\n\t"""Write f."""\n', "f", "\treturn 5\n", TEST)
PAIR = Problem("T/4", DOC, "f", "", "assert f([Pair(4), Pair(9)]) == 5\n")  # needs a class too
STUB_LINE = Problem(  # the prompt ends with a line, not inside one
    "T/5", "class Solution:\n    def f(self, xs):\n", "Solution().f", "", STUB.test
)
NAMELESS = Problem("T/6", "", "", "", "assert solve() == 5\n")

SIGNATURE = "def f(xs: List[int]) -> int:\n"


def block(code):
    return f"```python\n{code}```\n"


RIGHT, USES = f"{SIGNATURE}    return 5\n", f"{SIGNATURE}    return g(4)\n"
TEXT = (Path(__file__).parent / "answers.txt").read_bytes().decode()
HEADER = r"^=== (.+?)(?: \[(\w+)\])?(?: (fails|gives \w+))?\n"
PARTS = [iter(re.split(HEADER, TEXT, flags=re.M)[1:])] * 4
ANSWERS = {  # name: (problem, response, verdict)
    name: (globals()[problem or "CODEX"], response.removesuffix("\n"), verdict)
    for name, problem, verdict, response in zip(*PARTS, strict=True)
}


@pytest.fixture(scope="module")
def verdicts():
    checks = []
    for problem, response, verdict in ANSWERS.values():
        if verdict and verdict.startswith("gives "):
            test = f"assert {problem.entry_point}([4, 9]) == {verdict.removeprefix('gives ')}"
            problem = replace(problem, test=test)
        checks.append(assemble(problem, response))
    with Sandbox(workers=2) as sandbox:
        return dict(zip(ANSWERS, sandbox.run(checks), strict=True))


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_has_the_verdict_that_a_reader_gives_it(verdicts, name):
    assert verdicts[name].passed == (ANSWERS[name][2] != "fails"), verdicts[name]


def test_a_lab_body_is_exactly_prompt_plus_response():
    lab = Problem("L/0", 'def f(xs, k):\n    """Keep x > k."""\n', "f", "    return xs\n", "t")
    for body in ("    return [x for x in xs]\n", "    xs = xs[::-1]\n    return xs", "", "x"):
        assert extract_code(body, lab) == lab.prompt + body


HOSTILE = [
    "\0    return 1",
    "    return '\ud800'",
    '    return \'"""\'\'\'"""\'' * 50,
    '    return """\\',
    "```\n```python\n~~~\n```" * 50,
    "\u3000\u3000return 1\n\x0c\x1c\x85x",
    "\r\r\n\r    return 1\r",
]
N = 30_000  # so large that a step of quadratic time takes minutes
HUGE = [
    "    x = " + "(" * N,
    "    x = '" + "\"'" * N,
    "    x = " + '"""a' * N,
    '    x = "' + "\\" * N,
    " " * N,
    "\n    " * N + "x",
    "    x\n" + "# a\n" * N,
    f"{USES}" + "def g():\n    g\n" * (N // 10),
    f"{USES}" + "from " * N,
    f"{USES}g" + ", g" * N,
    f"{USES}g," + " " * N + "\ng",
    f"{USES}g = {{" + "a:" * N,
    f"{USES}g: int[" + "] " * N,
    f"{USES}x" + ".a" * N,
    f"{USES}# " + "`" * N + "x",
    f"{USES}x " + "`" * N + "x",
    "@a\n" * N + RIGHT,
    "".join(f"x{i} = x{i + 1}\n" for i in range(N // 10)) + f"{SIGNATURE}    return x0\n",
    "".join(block(f"def h{i}(): h{i + 1}\n") for i in range(N // 10)) + block(f"{SIGNATURE}    h0"),
    "a" * N,
    "```" + "a" * N + "`",
    "```" + " " * N + "`",
    "~" * N + "x\n" + "~~~\n" * N,
    "def g\n" + block("x\n") * (N // 10),
    f"```python\n{RIGHT}" * (N // 10),
    "```python\n'''\n```\n" + '```python\n"""\n```\n' + "```python\nx\n```\n" * (N // 10),
    "</think>" * N,
    "'" + "</think>" * N,
    "\"'</think>" * N,
    "<a:think" * N,
    "``` x " * N,
    " " * N + "def f(x): y",
    "def f(self, x): y\n" * (N // 10),
]


SURE = f"Sure, it's:\n```python\nimport os\n{SIGNATURE}    s = '''a\n'''\n    return 1\n```\n"


@pytest.mark.parametrize("problem", [CODEX, STUB, BARE], ids=["codex", "stub", "bare"])
def test_no_response_and_no_beginning_of_one_raises_or_stalls(problem):
    for response in HOSTILE + HUGE + [SURE[:end] for end in range(len(SURE))]:
        assert isinstance(extract_code(response, problem), str)
