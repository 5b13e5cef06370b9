"""Code out of what a model said.

`extract_code` looks at margins, strings and brackets, in linear time and without parsing, so that
no response can raise or stall a training step. A thought, closed or not, is no answer. The first
rule that fits the rest:
1. The first line is indented: a function body, up to the first line that starts at the margin (def,
   class, if, print, prose, fence; a comment too, unless the body goes on below it).
2. Text before the first fence, or a fenced block (Python ones first), defines the entry point. Of
   several the first counts, as for DeepSeek-Coder's, BigCode's and lm-eval's evaluators: the first
   that returns something (EvalPlus's rule: a stub that is only quoted does not), unless the words
   above a later one call it the corrected or complete one. Of its statements and those of other
   blocks all stay that the entry point or the tests reach, as in EvalPlus's sanitizer: helpers of
   other blocks come in, prose, demonstrations and what asks for input() do not. Imports and helpers
   that the prompt has above its signature are kept.
3. A fenced block without the definition is a body, and gets the indentation the prompt asks for.
4. Anything else continues the prompt exactly as it stands.

Not covered: helpers that a completion defines *after* its body (cut, as by Codex's stop words).
"""

import functools
import itertools
import re
import textwrap
from collections import defaultdict, namedtuple
from dataclasses import replace


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
    if "from __future__" in code:  # stands first or not at all
        line = re.compile(r"^from __future__ import .*\n?", re.M)
        future, code = "".join(line.findall(code)), line.sub("", code)
    return f"{future}{setup}{head}{code}"


_FENCE = re.compile(r"^[^\n`~#]*+(?:`{3,}+|~{3,}+)[ \t]*+([\w+#-]*+)([^\n`]*+)(?:\n|\Z)", re.M)
_CODE = re.compile(  # how a statement at the margin begins, and hardly any prose
    r"^(?:(?:(?:async[ \t]+)?def|class)[ \t]+(?P<name>\w+)[ \t]*[(:\[]"
    r"|(?P<imports>import[ \t]+[\w.]+(?=[ \t]*(?:[,;#]|as[ \t]|$))|from[ \t]+[\w.]+[ \t]+import\b)"
    r"|(?:if|for|while|with|try)\b[^\n]*:|[\w.]+[(\[]"
    r"|[(*]?[A-Za-z_][\w.]*+(?:[ \t]*+:[ \t]*+(?:[a-z]{3,5}|[A-Z]\w*+)(?:\[[^\n=]*+)?|,[^\n=]*+)?"
    r"[ \t]*+[-+*/%&|^]{,2}=[^=])",
    re.M,
)
_DEFINES = re.compile(r"(?:async[ \t]+def|def|class|import)[ \t]+\w|from[ \t]+[\w.]+[ \t]+import\b")
_SETS = re.compile(  # the names that a statement sets or changes
    r"(?:sys\.)?(setrecursionlimit)\(|\b(?:def|class|import|as)[ \t]+(\w+)"
    r"|(?<![\w.])(\w+)(?:(?:\.\w+)+\(|(?:\.\w+)*[ \t]*(?:\[|:[^\n=]{,80}=|[-+*/%&|^]{,2}=(?!=)))"
)
# Strings, closed or not; fences; comments; joined lines; brackets; ends of lines before a margin.
_TOKEN = re.compile(
    r'"""(?:[^"\\]|\\.?|"(?!""))*+(?:"""|\Z)|"(?:[^"\\\n]|\\.?)*+"?'
    r"|'''(?:[^'\\]|\\.?|'(?!''))*+(?:'''|\Z)|'(?:[^'\\\n]|\\.?)*+'?"
    r"|(?m:^)[ \t]*+(?P<start>`{3,}+|~{3,}+)|(?<!`)(?P<end>`{3,}+)"
    r"|#[^\n]*?(?=(?<=[^\s`])`{3,}+[ \t]*(?m:$)|(?m:$))|\\\n|[()\[\]{}]|\n(?=\S)",
    re.DOTALL,
)
_NAME = r"(?:\w{1,20}:)?(?:think(?:ing)?|thoughts?|reasoning)"
_UPPER = r"(?:THINK(?:ING)?|THOUGHT)"
_OPEN = rf"<{_NAME}>|\[{_UPPER}\]|◁{_NAME}▷|<\|(?i:start|begin)_(?i:of_)?(?i:{_UPPER})\|>"
_CLOSE = rf"</{_NAME}>|\[/{_UPPER}\]|◁/{_NAME}▷|<\|(?i:end)_(?i:of_)?(?i:{_UPPER})\|>"
_THOUGHT = re.compile(  # marks of a thought, but in strings they are only spoken of
    r"(?P<triple>\"{3}|'{3})(?:\\[^\n]|(?!(?P=triple))(?:[^\n\\]|\n(?=\s)))*+(?P=triple)"
    r"|(?<![\w`.!?])(?P<quote>['\"`])(?:\\[^\n]|(?!(?P=quote))[^\n\\])*+(?P=quote)(?!\w)"
    rf"|(?P<open>{_OPEN})|(?P<close>{_CLOSE})"
)
_RETURN = re.compile(r"\b(?:return|yield|lambda)\b")
_BODY = re.compile(r"^return\b", re.M)
_BETTER = (
    r"(?:fixed|revised|updated|final|complete|full)[ \w]{,12} (?:code|program|solution|version)"
)
_BETTER = re.compile(rf"\b(?:corrected|(?:fix|correct) (?:it|this|that)|{_BETTER})\b", re.I)
# kind: -1 the text before the first fence, 0 Python, 1 no language, 2 another one; code: moved to
# the margin; above: the words between it and the block before it
_Block = namedtuple("_Block", "kind start code above closed", defaults=("", False))


def marks_thought(token):
    """Whether a token's text begins or ends a thought. As a special token it must not be lost."""
    return bool(re.fullmatch(f"{_OPEN}|{_CLOSE}", token))


def answer_of(response):
    """What stands behind the last thought, and before an unfinished one."""
    start, end = 0, None
    for mark in _THOUGHT.finditer(response):
        if mark["close"]:
            start, end = mark.end(), None
        elif mark["open"] and end is None:
            end = mark.start()
    return response[start:end]


def extract_code(response, problem):
    """The whole program in a model's response, for `check_of`. Takes any text and never raises."""
    text = lines_of(answer_of(response).removeprefix("\ufeff"))
    if method := _method(text, problem):
        return program_of(problem, method, whole=True)
    define, rest = definition_of(problem), text.lstrip()
    indent = text[: len(text) - len(rest)].rpartition("\n")[2]
    inner = _inner(text, define)
    above = text[: inner.start()] if inner else ""
    if inner and not define.search(above) and not _FENCE.search(above):
        moved = _moved(text[inner.start() :])  # an indented function, unless it is a body's helper
        text, indent = (text, indent) if _BODY.search(moved) else (moved, "")
    fenced = re.match(r"[^\w\n]{,4}(?:```|~~~)", rest)
    if len(indent.expandtabs()) > 1 and not fenced:
        return program_of(problem, _body(text), whole=False)
    blocks = sorted(_blocks(text, define))
    defining = [b for b in blocks if define.search(b.code) and not _BODY.search(b.code)]
    if defining or define.search(text):  # or below the last fence
        block = _counting(defining) if defining else _Block(-1, 0, text)
        return program_of(problem, _reached(block, blocks, problem), whole=True)
    margin = problem.prompt.rpartition("\n")[2]  # of a stub that ends inside its body's first line
    fenced = fenced or (blocks and blocks[0].kind == 0)
    if rest and not indent and not fenced and margin.isspace():
        return program_of(problem, text[:1] + _body(" " + text[1:])[1:], whole=False)
    if blocks:
        text = next((b for b in blocks if _RETURN.search(b.code)), blocks[0]).code
        if define.search(problem.prompt):
            text = textwrap.indent(text, margin if margin.isspace() else _indent(problem.prompt))
    return program_of(problem, text, whole=False)


def settled(text, problem):
    """(form, first, last): how an answer has begun, "body" or "definition"; the first margin below
    that body, or the entry point's definition; and where something begins by which other rules may
    count, a fence, a thought, an indented definition. ("", 0, 0): not begun."""
    define, rest = definition_of(problem), text.lstrip()
    entry, indent = define.search(text), text[: len(text) - len(rest)].rpartition("\n")[2]
    is_body = bool(rest) and len(indent.expandtabs()) > 1
    if not is_body and not entry:
        return "", 0, 0
    begins = 0 if is_body else entry.start()
    first = next((m for m in _margins(text) if m > begins), len(text))
    if not is_body and not _RETURN.search(text, begins, first):  # a stub may only be quoted
        return "", 0, 0
    thoughts = (mark for mark in _THOUGHT.finditer(text) if mark["open"] or mark["close"])
    others = (_FENCE.search(text), _inner(text, define), next(thoughts, None))
    last = min((mark.start() for mark in others if mark), default=len(text))
    return ("body" if is_body else "definition"), first, last


def _inner(text, define):
    """The indentation of the entry point's definition, if it has one."""
    return re.search(rf"^[ \t]+(?=def|class)(?={define.pattern[1:]})", text, re.M)


def _indent(prompt):
    """The indentation of what continues a prompt that ends with a line."""
    line = prompt.rstrip().rpartition("\n")[2]
    indent = line[: len(line) - len(line.lstrip())]
    return indent + "    " if line.endswith(":") else indent or "    "


def _method(text, problem):
    """A method repeated without its class, put into a class of that name; or None."""
    names = re.fullmatch(r"(\w+)\(.*\)\.(\w+)", problem.entry_point) or ("", "", "\0")
    method = r"^{}(?:async[ \t]+)?def[ \t]+{}[ \t]*\([ \t\n]*self\b"
    there = re.search(method.format(r"[ \t]*", names[2]), text, re.M)
    if not there or re.search(rf"^[ \t]*class[ \t]+{names[1]}\b", text, re.M):
        return None
    code = extract_code(text, replace(problem, entry_point=names[2], prompt="", setup=""))
    first = re.search(method.format(r"(?:@.*\n)*", r"\w+"), code, re.M)
    start = first.start() if first else 0
    return f"{code[:start]}class {names[1]}:\n{textwrap.indent(code[start:], '    ')}"


def _moved(code):
    """Code without its first line's indentation; of a session (>>> and ...), what was typed."""
    indent = re.match(r"(?:[ \t]*\n)*([ \t]*)", code)[1]
    code = "\n".join(line.removeprefix(indent) for line in code.split("\n"))
    typed = re.findall(r"^(?:>>>|\.\.\.) ?(.*\n?)", code, re.M)
    return "".join(typed) if re.match(r"\s*>>> ", code) else code


def _blocks(text, define):
    """[_Block]. What closes a fence may stand behind code and before prose, not in a string."""
    blocks, at, bare = [], 0, define.search(text)
    if bare and not _FENCE.search(text[: bare.start()]):
        at = next((mark.start() for mark in _marks(text, bare.start())), len(text))
        blocks.append(_Block(-1, 0, text[:at]))
    while fence := _FENCE.search(text, at):
        language, info = fence.groups()
        named = not _CODE.match(language + info)  # else the code begins on the fence's line
        first = fence.end() if named else fence.start(1)
        first = fence.start(2) if named and _CODE.match(info.lstrip()) else first
        close = next(_marks(text, first), None)
        last = close.start() if close else len(text)
        kind = 0 if re.match("i?py", language, re.I) else 2 if language and named else 1
        above = text[at : fence.start(1)][-150:]
        blocks.append(_Block(kind, first, _moved(text[first:last]), above, bool(close)))
        at = close.end() if close else last
    return blocks


def _marks(text, start):
    """The fences outside strings."""
    return (token for token in _TOKEN.finditer(text, start) if token.lastgroup)


def _counting(blocks):
    """Which of the blocks that define the entry point counts."""
    block = next((b for b in blocks if _RETURN.search(_TOKEN.sub(" ", b.code))), blocks[0])
    better = [b for b in blocks if b.start > block.start and b.kind < 2 and _BETTER.search(b.above)]
    return max([block, *better], key=lambda b: b.start)


def _margins(text):
    """Offsets where a body may end: lines at the margin outside strings, brackets and joined lines,
    save for comments with indented code below; fences; the end, unless something is open."""
    depth, comment = 0, None
    for token in _TOKEN.finditer(f"\n{text}\n."):
        symbol, start = token[0][0], token.end() - 1
        depth = max(0, depth + (symbol in "([{") - (symbol in ")]}"))
        if token.lastgroup:
            yield token.start() - 1
        elif symbol == "\n" and (depth == 0 or _DEFINES.match(text, start)):  # none inside brackets
            if comment is not None and not text[comment:start].partition("\n")[2].strip():
                yield comment
            depth, comment = 0, start if text.startswith("#", start) else None
            if comment is None:
                yield min(start, len(text))


def _body(text):
    return text[: next(_margins(text), len(text))]


def _statements(text):
    """The code of a text cut at its margins, with the decorators and comments above; the last one
    is empty, or unfinished."""
    starts, above = [], False
    for start in _margins(text):
        if not above and not re.compile(r"(?:el(?:if|se)|except|finally)\b").match(text, start):
            starts.append(start)
        above = text.startswith(("#", "@"), start)
    return [text[a:b].rstrip() + "\n" for a, b in itertools.pairwise([*starts, len(text)])]


def _words(text):
    return frozenset(re.findall(r"\w+|\*", text))


_test_words = functools.lru_cache(maxsize=4096)(_words)  # tests may be long


def _reached(block, blocks, problem):
    """What the entry point and the tests reach, among the statements of a block and of others."""
    define, own = definition_of(problem), _statements(block.code)
    entry = next((i for i, s in enumerate(own) if define.search(s)), None)
    if entry is None:  # in a string that begins on an indented line
        return block.code
    if not block.closed:  # up to prose, another definition, or what is unfinished
        ends = (i for i, s in enumerate(own) if define.search(s) or not _CODE.search(s))
        own = own[: next((i for i in ends if i > entry), max(entry + 1, len(own) - 1))]
    others = [s for b in blocks if b is not block and 0 <= b.kind < 2 for s in _statements(b.code)]
    statements = own + [s for s in others if not define.search(s)]
    setters, imports = _setters(statements, problem)
    kept, names = set(), ["*", "__future__", "setrecursionlimit", *_words(problem.entry_point)]
    names += _test_words(problem.test)
    while names:
        for i in setters.pop(names.pop(), ()):
            if i not in kept:
                kept.add(i)
                names += _words(statements[i])
    order = sorted(kept, key=lambda i: (i not in imports, i < len(own), i))
    return "".join(statements[i] for i in order)


def _setters(statements, problem):
    """({name: indices of the statements that set or change it}, indices of imports), without those
    that run the entry point or ask for input."""
    root = re.escape(re.split(r"[.(]", problem.entry_point)[0])
    sets_it = re.compile(rf"{definition_of(problem).pattern}|^{root}\.[\w.]+[ \t]*=", re.M)
    asks, bodies = {"input", "stdin", "argv", "__main__"} | _words(problem.entry_point), {}
    setters, imports = defaultdict(list), set()
    for i, statement in enumerate(statements):
        words, code = _words(statement), _CODE.search(statement)
        names = set().union(*_SETS.findall(statement)) if code else set()
        if code and code["name"]:
            bodies[code["name"]], names = names, {code["name"]}
            asks |= names if words & asks else set()
        elif code and code["imports"]:
            imports.add(i)
            names = words - {"import", "from", "as"}
        elif words & asks and not sets_it.search(statement):
            asks |= names
            continue
        elif code:  # an assignment: its targets; a call: what the function sets
            names |= _words(code[0]) if code[0][-2:-1] == "=" else bodies.get(code[0][:-1], set())
        for name in names:
            setters[name].append(i)
    return setters, imports
