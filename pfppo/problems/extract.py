"""Code out of what a model said.

`extract_code` looks at margins, strings and brackets, in linear time and without parsing, so that
no response can raise or stall a training step. The first rule that fits:
1. The first line is indented: a function body, up to the first line that starts at the margin (def,
   class, if, print, prose, fence; a comment too, unless the body goes on below it).
2. A fenced block, or text before the first fence, defines the entry point. The first such block,
   Python ones first, is taken whole if it is closed. Open blocks and bare text are taken from the
   first line of code to the first line that is prose, a call, or a definition not yet mentioned.
   Imports and helpers that the prompt has above its signature are kept.
3. A fenced block without the definition is a body, and gets the indentation the prompt asks for.
4. Anything else continues the prompt exactly as it stands.

Not covered: a solution spread over several blocks; helpers that a completion defines *after* its
body (cut, as by Codex's stop words).
"""

import dataclasses
import re
import textwrap


def lines_of(text):
    return text.replace("\r\n", "\n").replace("\r", "\n")


def definition_of(problem):
    """Finds the entry point's definition at the margin: `def f`, `class Solution`, `f = ...`."""
    name = re.escape(re.split(r"[.(]", problem.entry_point)[0])
    define = rf"(?:(?:async[ \t]+)?def|class)[ \t]+{name}[ \t]*[(:\[]|{name}[ \t]*=(?!=)"
    return re.compile(f"^(?:{define})", re.M)


def program_of(problem, code, whole):
    """setup + the prompt down to the entry point's signature + code if whole, else all + code."""
    head, setup, future = problem.prompt, problem.setup, ""
    if whole:
        signature = definition_of(problem).search(head)
        head = head[: signature.start()] if signature else ""
    elif code[:1].isspace():  # a prompt may end with the indentation that the code has too
        head = head.rstrip(" \t")
    if setup and re.search(r"\b(?:np|numpy)\b", code):  # slow to import, so only where it is named
        setup += "import numpy\nimport numpy as np\n"
    if "from __future__" in code and (head or setup):  # stands first or not at all
        line = re.compile(r"^from __future__ import .*\n?", re.M)
        future, code = "".join(line.findall(code)), line.sub("", code)
    return f"{future}{setup}{head}{code}"


_FENCE = re.compile(r"^([ \t]*)(```|~~~)[ \t]*([\w+#.-]*)[^\n]*\n?", re.M)
_LINE = (  # a line at the margin that belongs to a solution
    r"import[ \t]+[\w.]+(?=[ \t]*(?:,|;|#|as[ \t]|$))|from[ \t]+[\w.]+[ \t]+import[ \t]|@[\w.]+"
    r"|(?:async[ \t]+)?def[ \t]+\w+[ \t]*[(\[]|class[ \t]+\w+[ \t]*[(:\[]"
    r"|[A-Za-z_][\w.]*(?:\[[^\]\n]*\])?[ \t]*[-+*/%&|^]{,2}=[^=]"
)
_CODE = re.compile(rf"^(?:{_LINE})", re.M)
_PROSE = re.compile(rf"^(?!{_LINE}|[#)\]}}\s]).", re.M)
# Strings, closed or not; comments; joined lines; brackets; the ends of lines before a margin.
_TOKEN = re.compile(
    r'"""(?:[^"\\]|\\.?|"(?!""))*+(?:"""|\Z)|"(?:[^"\\\n]|\\.?)*+"?'
    r"|'''(?:[^'\\]|\\.?|'(?!''))*+(?:'''|\Z)|'(?:[^'\\\n]|\\.?)*+'?"
    r"|#[^\n]*|\\\n|[()\[\]{}]|\n(?=\S)",
    re.DOTALL,
)


def extract_code(response, problem):
    """The whole program in a model's response, for `check_of`. Takes any text and never raises."""
    text = lines_of(response.removeprefix("\ufeff"))
    text = text.rpartition("</think>\n")[2]  # drafts are no answer
    if method := _method(text, problem):
        return program_of(problem, method, whole=True)
    define, rest = definition_of(problem), text.lstrip()
    indent = text[: len(text) - len(rest)].rpartition("\n")[2]
    if indent and define.match(rest):  # an indented signature, unless it is a helper of a body
        moved = _moved(indent + rest, indent)
        text, indent = (text, indent) if re.search(r"^return\b", moved, re.M) else (moved, "")
    if len(indent.expandtabs()) > 1 and not _FENCE.match(rest):
        return program_of(problem, _body(text), whole=False)
    blocks = sorted(_blocks(text))
    defining = [block for block in blocks if define.search(block[2])]
    defining.sort(key=lambda block: block[2].split()[-1] in ("...", "pass"))  # a stub quoted first
    bare = define.search(text)
    if bare and not (defining and bare.start() > min(offset for _, offset, *_ in blocks)):
        return program_of(problem, _solution(text, define), whole=True)
    if defining:
        _, _, code, closed = defining[0]
        return program_of(problem, code if closed else _solution(code, define), whole=True)
    margin = problem.prompt.rpartition("\n")[2]  # of a stub that ends inside its body's first line
    fenced = blocks and (_FENCE.match(rest) or blocks[0][0] == 0)
    if rest and not indent and not fenced and margin.isspace():
        return program_of(problem, text[:1] + _body(" " + text[1:])[1:], whole=False)
    if blocks:
        code = textwrap.dedent(blocks[0][2])
        wanted = margin if margin.isspace() else "    "
        text = textwrap.indent(code, wanted) if define.search(problem.prompt) else code
    return program_of(problem, text, whole=False)


def _method(text, problem):
    """A method repeated without its class, put into a class of that name; or None."""
    names = re.fullmatch(r"(\w+)\(.*\)\.(\w+)", problem.entry_point)
    if not names or re.search(rf"^[ \t]*class[ \t]+{names[1]}\b", text, re.M):
        return None
    define = re.compile(rf"^[ \t]*def[ \t]+{names[2]}[ \t]*\([ \t\n]*self\b", re.M)
    blocks = [code for _, _, code, _ in sorted(_blocks(text)) if define.search(code)]
    if not blocks and not define.search(text):
        return None
    alone = dataclasses.replace(problem, entry_point=names[2], prompt="", setup="")
    code = extract_code(textwrap.dedent(blocks[0] if blocks else text), alone)
    method = define.search(code)
    start = method.start() if method else 0
    return f"{code[:start]}class {names[1]}:\n{textwrap.indent(code[start:], '    ')}"


def _moved(text, indent):
    return "\n".join(line.removeprefix(indent) for line in text.split("\n"))


def _blocks(text):
    """[(0 Python, 1 unnamed, 2 other; offset; code, moved to the margin; closed)] of the blocks."""
    blocks, opened = [], None
    for fence in [*_FENCE.finditer(text), None]:
        if opened is None:
            opened = fence
        elif fence is None or (fence[2] == opened[2] and len(fence[1]) < len(opened[1]) + 4):
            code = text[opened.end() : fence.start() if fence else len(text)]
            kind = {"python": 0, "python3": 0, "py": 0, "": 1}.get(opened[3].lower(), 2)
            blocks.append((kind, opened.start(), _moved(code, opened[1]), fence is not None))
            opened = None
    return blocks


def _margins(text):
    """Offsets where a body may end: lines at the margin outside strings, brackets and joined lines,
    save for comments with indented code below; the end of the text, unless something is open."""
    depth, comment = 0, None
    for token in _TOKEN.finditer(f"\n{text}\n."):
        symbol = token[0][0]
        depth += (symbol in "([{") - (symbol in ")]}")
        if symbol == "\n" and depth == 0:
            start = token.end() - 1
            if comment is not None and not text[comment:start].partition("\n")[2].strip():
                yield comment
            comment = start if text.startswith("#", start) else None
            if comment is None:
                yield min(start, len(text))


def _body(text):
    return text[: next(_margins(text), len(text))]


def _solution(text, define):
    """A program that stands in prose: the code above its definition, and what follows up to a line
    that is no longer its own."""
    entry = define.search(text).start()
    prose = max((line.end() for line in _PROSE.finditer(text, 0, entry)), default=0)
    first = _CODE.search(text, prose)
    begin = min(entry, first.start()) if first else entry
    text, entry = text[begin:], entry - begin
    words, last, end = set(), 0, None  # end: where the comments and decorators just above begin
    for start in _margins(text):
        words.update(re.findall(r"\w+", text[last:start]))
        line, last = text[start : start + 200], start
        name = re.match(r"(?:async\s+)?(?:def|class)\s+(\w+)", line)
        mine = _CODE.match(line) and (not name or name[1] in words) and not define.match(line)
        if line.startswith(("#", "@")):
            end = start if end is None else end
        elif start <= entry or mine:
            end = None
        else:
            return text[: start if end is None else end]
    return text
