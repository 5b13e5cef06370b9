r"""Numbers as people and models write them, compared exactly, as fractions.

    number_of("so she pays $1,234.50.")     [2469/2]
    same(number_of("50%"), number_of("1/2"))

Alike are 1,234.5 and $1,234.50; 0.75, 3/4 and \frac{3}{4}; 1.5 and 1 1/2; 1500, 1.5e3 and 1.5 x
10^3; 50%, 50 and 0.5; a minus may be any. A minus behind a digit, a letter or a bracket is none of
the number's. The digits of names and units (x2, m^2) are no numbers, nor are those of multiples and
roots of what is none (2 \pi, \sqrt{2}); 10:30 and 3:4 are whole.

Not covered: numbers in words (seven, 5 million), units, decimal commas, several numbers at once.
"""

import math
import re
import unicodedata
from fractions import Fraction

LONGEST = 300  # digits, and powers of ten: a number beyond equals nothing
_ALIKE = str.maketrans("−﹣－–，．％＄￥：／⁄×＊", "----,.%$¥://x*")
_PLAIN = [  # what typography and TeX write otherwise, in this order
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"[^\x00-\x7f]", lambda found: _ascii(found[0])),
        (r"\{,\}", ","),
        (r"\\!", ""),
        (r"(?<=\d)(?:\\[,; ]|[\u00a0\u2009\u202f'’_])(?=\d{3}(?!\d))", ","),
        (r"(?<=\d)(?=\\[dtc]?frac)", " "),
        (r"\\[dtc]?frac *(\d) *(\d)", r"\1/\2"),
        (r"\\[dtc]?frac *\{([^{}]{,99})\} *\{([^{}]{,99})\}", r"\1/\2"),
        (r"\^ *\{ *([-+]?\d+) *\}", r"^\1"),
        (r"\\(?:times|cdot)(?![A-Za-z])", "x"),
        (r"\\sqrt(?![A-Za-z])", "√"),
        (r"\\pi(?![A-Za-z])", "π"),
        (r"\\(?=[%$])", ""),
        (r"\\(?:[A-Za-z]+|[^A-Za-z])", " "),
        (r"(?<=[-+])[$€£¥₹] ?(?=\.?\d)", ""),
        (r"\b(?:(?:[A-Z]{1,3})?[$€£¥₹]|(?:Rs\.?|USD|EUR|GBP|INR|CNY)(?=[-\d]))", " "),
        (r"[$€£¥₹]", " "),
    )
]
_DECIMAL = r"(?:(?:[1-9]\d{,2}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(
    rf"""
    (?P<sign>(?<![A-Za-z0-9_.)\]}}%-])[-+])?
    (?<![A-Za-z0-9_^√/])(?<!\^[-+])(?<!√[{{(])(?<!\d\.)  # of a name, a power, a root, a decimal
    (?>(?P<clock>\d+(?::\d+)+)
      |(?P<whole>\d+)[ ](?P<part>\d+)/(?P<parts>\d+)(?![\d/])
      |(?P<over>{_DECIMAL})[ ]?/[ ]?(?P<under>{_DECIMAL})(?!\.?\d|[ ]?/)
      |(?P<plain>{_DECIMAL})
       (?:[eE](?P<e>[-+]?\d+)(?!\w)|[ ]?[x*][ ]?10\^(?P<ten>[-+]?\d+))?
       (?:\^(?P<power>[-+]?\d+))?)
    (?!\d)(?![ ]?[π√])(?:[ ]?(?P<percent>%))?
    """,
    re.X,
)


def _ascii(character):
    """Another script's digit as ours, a vulgar fraction as 1/2; anything else as it is."""
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    if unicodedata.decomposition(character).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", character).replace("⁄", "/")
    return character


def number_of(text):
    """The last number of a text: (parts, whether it is a percentage); None where there is none, or
    only one that is too long. parts: Fractions, more than one of a time or a ratio only."""
    text = text.translate(_ALIKE)
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    *_, last = None, *_NUMBER.finditer(text)
    return _value(last) if last else None


def _value(found):
    said = {name: text.replace(",", "") for name, text in found.groupdict().items() if text}
    scales = [int(said.get(name, 0)) for name in ("e", "ten") if len(said.get(name, "")) < 9]
    power = int(said.get("power", 1)) if len(said.get("power", "")) < 9 else math.inf
    longest = max(abs(n) for n in (len(found[0]), *scales, power))
    if longest > LONGEST or len(scales) < 2:
        return None
    try:
        if clock := said.get("clock"):
            parts = [Fraction(part) for part in clock.split(":")]
        elif "parts" in said:
            rest = Fraction(f"{said['part']}/{said['parts']}")
            parts = [rest + int(said["whole"]) * (rest < 1)]  # 2 1/2, but not 2 8/4
        elif "under" in said:
            parts = [Fraction(said["over"]) / Fraction(said["under"])]
        else:
            parts = [(Fraction(said["plain"]) * Fraction(10) ** sum(scales)) ** power]
    except ZeroDivisionError:
        return None
    sign = -1 if said.get("sign") == "-" else 1
    return [sign * parts[0], *parts[1:]], "percent" in said


def answer_number(answer):
    """The number of a row's `answer` (text, int or float), as `number_of` gives it, or None. Of a
    text, what stands behind `####` counts, and in it the last \\boxed{}, where they are there."""
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return ([Fraction(repr(answer))], False) if math.isfinite(answer) else None
    if not isinstance(answer, str):
        return None
    text = answer.rpartition("####")[2]
    boxes = re.findall(r"\\boxed *\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}", text)
    return number_of(boxes[-1] if boxes else text)


def same(one, other):
    """Whether two numbers are the same; a percentage is what it says, and what it means."""
    (parts, percent), (others, also) = one, other
    if percent != also:
        whole, share = (parts, others) if percent else (others, parts)
        return share in (whole, [part / 100 for part in whole])
    return parts == others
