"""Code out of responses, by what the program does: in the sandbox, or by plain `exec`.

answers.txt has what chat models write, each answer below a line `=== NAME [PROBLEM] fails`: of the
constants here, CODEX if none is named; without the last word the answer passes.
"""

import itertools
import re
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
BARE = Problem(
    "T/2", '"""\nWrite f.\n"""\n', "f", "def f(xs): return 5\n", "assert f([4, 9]) == 5\n"
)
PAIR = Problem(  # whose test needs a name besides the entry point
    "T/4", '"""\nWrite f.\n"""\n', "f", "", "assert f([Pair(4), Pair(9)]) == 5\n"
)
TABS = Problem(
    "T/3", 'def f(xs):\n\t"""Write f."""\n', "f", "\treturn 5\n", "assert f([4, 9]) == 5\n"
)

SIGNATURE = "def f(xs: List[int]) -> int:\n"
CASES = [  # name, problem, response, f([4, 9]) or the exception
    ("body", CODEX, "    return 1\n", 1),
    ("body without newline", CODEX, "    return 2", 2),
    ("body after blank lines", CODEX, "\n\n    return 3\n", 3),
    ("body with CRLF", CODEX, "    y = 4\r\n    return y\r\n", 4),
    ("body indented by tabs", BARE, "def f(xs):\n\ty = 5\n\treturn y\n", 5),
    ("body with the prompt's import and helper", CODEX, "    return half(math.ceil(11.5))", 6),
    ("body, then a def", CODEX, "    return 7\n\ndef g(x:\n", 7),
    ("body, then a class", CODEX, "    return 8\n\nclass A(\n", 8),
    ("body, then an if", CODEX, "    return 9\n\nif __name__ == '__main__':\n    f(", 9),
    ("body, then a print", CODEX, "    return 10\nprint(f([1)\n", 10),
    ("body, then a comment and a test", CODEX, "    return 11\n# Test\nassert f([) == 1\n", 11),
    ("body, then prose", CODEX, "    return 12\n\nThis function isn't slow: it's O(n).\n", 12),
    ("body, then a fence", CODEX, "    return 13\n```\n\nExplanation: none.\n", 13),
    ("body, then the next few-shot marker", CODEX, "    return 14\n[DONE]\n\nYou are an\n", 14),
    ("body with a comment at the margin", CODEX, "    y = 15\n# why\n\n    return y\n", 15),
    ("body with a string at the margin", CODEX, '    s = """\ndef x\n"""\n    return 16', 16),
    ("body with brackets at the margin", CODEX, "    y = [\n17\n]\n    return y[0]\n", 17),
    ("body with joined lines", CODEX, "    return 9 + \\\n9\n", 18),
    ("body with quotes in comments", CODEX, "    # (it's \"\"\"\n    return 19\nHere's\n", 19),
    ("body with escaped quotes", CODEX, "    s = 'it\\'s ('\n    return 20\nSo (\n", 20),
    ("body with a helper f", CODEX, "    def f(x):\n        return x\n    return f(21)", 21),
    ("signature repeated, indented", CODEX, "    def f(xs):\n        return 22\n", 22),
    ("signature repeated, bare", CODEX, SIGNATURE + "    return half(46)\n", 23),
    ("one leading space", CODEX, " " + SIGNATURE + "    return 24\n", 24),
    ("function in prose", CODEX, f"Sure! Here's it:\n\n{SIGNATURE}    return 25\n\nIt's (so.", 25),
    ("prose between imports and function", CODEX,
     f"import os\nNow f:\nimport re\n{SIGNATURE}    return len(re.escape('x' * 26))", 26),
    ("helper above", CODEX, f"def g():\n    return 27\n\n{SIGNATURE}    return g()\n\nDone.", 27),
    ("helper below", CODEX, f"{SIGNATURE}    return g()\n\n# g\ndef g():\n    return 28\nSo", 28),
    ("rambling below", CODEX, f"{SIGNATURE}    return 29\n\n@cache\ndef other(x):\n  y = (", 29),
    ("f again below", CODEX, f"{SIGNATURE}    return 30\n\n{SIGNATURE}    return (", 30),
    ("constant above", CODEX, f"N = [\n    31,\n]\n\n{SIGNATURE}    return N[0]\n", 31),
    ("lambda", CODEX, "```python\nf = lambda xs: 32\n```", 32),
    ("async helper", CODEX, f"async def g():\n    pass\n\n\n{SIGNATURE}    return 33\nSo", 33),
    ("future import", CODEX,
     f"```python\nfrom __future__ import annotations\n{SIGNATURE}    return 34\n```", 34),
    ("fence", CODEX, f"Sure:\n```python\n{SIGNATURE}    return 35\n```\nIt's good.", 35),
    ("fence without a language", CODEX, f"```\n{SIGNATURE}    return 36\n```", 36),
    ("fence of tildes", CODEX, f"~~~py\n{SIGNATURE}    return 37\n~~~\n", 37),
    ("closing fence indented", CODEX, f"```\n{SIGNATURE}    return 62\n  ```\nSo", 62),
    ("fence left open", CODEX, f"Code:\n```python\n{SIGNATURE}    return 38\n", 38),
    ("fence left open, cut off", CODEX, f"```python\n{SIGNATURE}    return 39\n\nprint(f([1", 39),
    ("second block has the function", CODEX,
     f"```python\nf([1])\n```\nso\n```python\n{SIGNATURE}    return 40\n```", 40),
    ("first of two functions", CODEX,
     f"```python\n{SIGNATURE}    return 41\n```\nor\n```python\n{SIGNATURE}    return 0\n```", 41),
    ("stub quoted before the function", CODEX,
     f"```python\n{SIGNATURE}    ...\n```\nso\n```python\n{SIGNATURE}    return 63\n```", 63),
    ("draft while thinking", CODEX,
     f"<think>\n{SIGNATURE}    return 0\n</think>\n{SIGNATURE}    return 64\n", 64),
    ("prose that begins like a definition", CODEX,
     f"def f takes xs.\n\n{SIGNATURE}    return 65\n", 65),
    ("state filled below", CODEX,
     f"T = {{}}\nT['a'] = 60\nT['a'] += 6\n\n{SIGNATURE}    return T['a']\n", 66),
    ("Python block before others", CODEX,
     f"```text\nf = nothing (\n```\n```python\n{SIGNATURE}    return 42\n```", 42),
    ("indented fence in a list", CODEX,
     f"1. Code:\n   ```python\n   {SIGNATURE}       return 43\n   ```\n", 43),
    ("block with the body alone", CODEX, "Body:\n```python\n    return 44\n```\n", 44),
    ("block with the body at the margin", CODEX, "```python\ny = 45\nreturn y\n```\n", 45),
    ("opened by the prompt", CODEX, f"{SIGNATURE}    return 46\n```\nThat's all (", 46),
    ("byte-order mark", CODEX, f"\ufeff{SIGNATURE}    return 47\n", 47),
    ("fence in a docstring", CODEX,
     f'```python\n{SIGNATURE}    """\n    ```python\n    ```\n    """\n    return 57\n```', 57),
    ("other fence in a docstring", CODEX,
     f"```python\n{SIGNATURE}    '''\n~~~\n'''\n    return 58\n```", 58),
    ("fence not closed before the next", CODEX,
     f"```python\n{SIGNATURE}    return 59\n```python\nf(1\n```", 59),
    ("bare function before a block", CODEX,
     f"{SIGNATURE}    return 60\n\nOr:\n```python\n{SIGNATURE}    return 0\n```", 60),
    ("body indented by a tab", TABS, "\treturn 61\nSo (", 61),
    ("stub goes on", STUB, "y = 48\n        return y\n", 48),
    ("stub goes on, then a fence", STUB, "return 49\n```\nSo (\n", 49),
    ("stub's body indented again", STUB, "        y = 50\n        return y\n", 50),
    ("stub's body on the next line, a second method", STUB,
     "\n        return self.g()\n    def g(self):\n        return 51\n", 51),
    ("stub's class again", STUB,
     "```python\nclass Solution:\n    def f(self, xs: List[int]):\n        return 52\n```", 52),
    ("stub's setup and head are kept", STUB,
     "```python\nclass Solution:\n    def f(self, xs):\n        assert Node\n"
     "        return deque([53])[0]\n```", 53),
    ("stub, numpy without an import", STUB, "return int(np.sum([50, 4]))", 54),
    ("stub's body in a block", STUB, "```python\nreturn 55\n```", 55),
    ("few-shot markers", BARE, "[BEGIN]\ndef f(xs):\n    return 56\n[DONE]\n\nYou are (", 56),
    ("nothing", CODEX, "", None),
    ("a word", CODEX, "garbage it's", SyntaxError),
    ("valid code, but no body", CODEX, "y = 3\n", None),
    ("unclosed bracket", CODEX, "    return (57\n\nSo", SyntaxError),
    ("unclosed string", CODEX, '    return """57\n\nSo', SyntaxError),
    ("body at the margin is not mended", CODEX, "return 57\n", SyntaxError),
    ("function of another name", BARE, "```python\ndef g(xs):\n    return 57\n```", NameError),
]  # fmt: skip


def block(code):
    return f"```python\n{code}```\n"


RIGHT, USES = f"{SIGNATURE}    return 5\n", f"{SIGNATURE}    return g(4)\n"
TEXT = (Path(__file__).parent / "answers.txt").read_text()
PARTS = iter(re.split(r"^=== (.+?)(?: \[(\w+)\])?( fails)?\n", TEXT, flags=re.M)[1:])
ANSWERS = {  # name: (problem, response, whether it passes)
    name: (globals()[problem or "CODEX"], response.removesuffix("\n"), not fails)
    for name, problem, fails, response in zip(*[PARTS] * 4, strict=True)
}


@pytest.fixture(scope="module")
def verdicts():
    checks = [assemble(problem, response) for problem, response, _ in ANSWERS.values()]
    with Sandbox(workers=2) as sandbox:
        return dict(zip(ANSWERS, sandbox.run(checks), strict=True))


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_of_a_chat_model_has_the_verdict_that_a_reader_gives_it(verdicts, name):
    assert verdicts[name].passed == ANSWERS[name][2], verdicts[name]


@pytest.mark.parametrize(
    "problem, response, expected", [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_code_is_taken_out_of_a_response(problem, response, expected):
    program, names = extract_code(response, problem), {}
    if isinstance(expected, type):
        with pytest.raises(expected):
            exec(program, names)
            eval(problem.entry_point, names)
    else:
        exec(program, names)
        assert eval(problem.entry_point, names)([4, 9]) == expected


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
    " " * N + "def f(x): y",
    "def f(self, x): y\n" * (N // 10),
]


@pytest.mark.parametrize("problem", [CODEX, STUB, BARE], ids=["codex", "stub", "bare"])
def test_no_response_raises_or_stalls(problem):
    for response in HOSTILE + HUGE:
        assert isinstance(extract_code(response, problem), str)


def test_every_cut_of_an_answer_is_taken():
    answer = f"Sure, it's:\n```python\nimport os\n{SIGNATURE}    s = '''a\n'''\n    return 1\n```\n"
    for problem, end in itertools.product((CODEX, STUB, BARE), range(len(answer))):
        assert isinstance(extract_code(answer[:end], problem), str)
