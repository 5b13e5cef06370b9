"""The lab's world: small Python tasks with hidden tests, and programs as people write them, bugs
included.

A task chains one to three steps over a list of integers (or a string) and returns something:

    def solve(xs, k):
        \"\"\"Keep the numbers above k, reverse the order, return the first or 0.\"\"\"

Each step knows a few English phrasings, its right forms (there is more than one right program) and
often a wrong form that looks plausible (`>=` for `>`, `xs[k::k]` for `xs[::k]`). In the corpus
the wrong form stands in a fixed share of a step's occurrences, as common bugs do in real code. So
a policy trained on the corpus knows the language and the tasks, and fails as people do; a few
mistakes nearly everybody makes, and these cap what a short RL run can learn.

Splits are by composition (the chain of step names), so a test problem's chain was never seen. Tests
are made by running the reference on inputs chosen to tell every single wrong form from the right
one, where one of a thousand drawn inputs can.

Not covered: loops with state, nested data, tasks with more than one function.
"""

import random
import zlib
from dataclasses import dataclass

from pfppo.problems.benchmarks import Problem


@dataclass(frozen=True)
class Step:
    """One row of the tables below. `{k}` is a small constant, or the argument k."""

    name: str
    phrasings: tuple[str, ...]
    right: tuple[str, ...]  # expressions for the new value
    wrong: str = ""  # a plausible bug
    rate: float = 0.0  # share of the corpus's occurrences that have the bug


def _s(name, phrasings, right, wrong="", rate=0.0):
    return Step(name, tuple(phrasings.split(" | ")), tuple(right.split(" | ")), wrong, rate)


# fmt: off
# Steps over a list of integers. Rates: 0.6 is a common bug, 0.9 one that nearly everybody makes.
NUMBERS = (
    _s("evens", "keep the even numbers | drop the odd numbers", "[x for x in xs if x % 2 == 0]"),
    _s("odds", "keep the odd numbers | drop the even numbers", "[x for x in xs if x % 2 == 1]"),
    _s("above", "keep the numbers above {k} | drop the numbers up to {k}",
       "[x for x in xs if x > {k}]", "[x for x in xs if x >= {k}]", 0.6),
    _s("at_most", "keep the numbers up to {k} | drop the numbers above {k}",
       "[x for x in xs if x <= {k}]"),
    _s("multiples", "keep the multiples of {k}",
       "[x for x in xs if x % {k} == 0]"),
    _s("add", "add {k} to each | increase each by {k}", "[x + {k} for x in xs]"),
    _s("times", "multiply each by {k}", "[x * {k} for x in xs]"),
    _s("square", "square each", "[x * x for x in xs] | [x ** 2 for x in xs]"),
    _s("negate", "negate each | flip the signs", "[-x for x in xs]"),
    _s("modulo", "take each modulo {k}", "[x % {k} for x in xs]"),
    _s("absolute", "take absolute values", "[abs(x) for x in xs]"),
    _s("floor", "replace the negative numbers by 0 | raise negative numbers to 0",
       "[max(x, 0) for x in xs] | [x if x > 0 else 0 for x in xs]",
       "[x for x in xs if x > 0]", 0.6),
    _s("cap", "cap each at {k} | limit each to {k}", "[min(x, {k}) for x in xs]"),
    _s("double_evens", "double the even numbers only",
       "[x * 2 if x % 2 == 0 else x for x in xs]", "[x * 2 for x in xs if x % 2 == 0]", 0.9),
    _s("ascending", "sort in ascending order | sort", "sorted(xs)"),
    _s("descending", "sort in descending order | sort from high to low",
       "sorted(xs, reverse=True) | sorted(xs)[::-1]", "sorted(xs)", 0.6),
    _s("reverse", "reverse the order", "xs[::-1] | list(reversed(xs))"),
    _s("drop_first", "drop the first {k} | skip {k} items", "xs[{k}:]", "xs[{k} + 1:]", 0.6),
    _s("take_first", "keep the first {k} | take {k} items", "xs[:{k}]"),
    _s("take_last", "keep the last {k}", "xs[-{k}:]"),
    _s("every", "keep every {k}th item from the first", "xs[::{k}]", "xs[{k}::{k}]", 0.6),
    _s("unique", "remove duplicates | keep the first of equal items",
       "list(dict.fromkeys(xs))", "sorted(set(xs))", 0.6),
    _s("running", "take running sums",
       "[sum(xs[:i + 1]) for i in range(len(xs))]", "[sum(xs[:i]) for i in range(len(xs))]", 0.6),
    _s("differences", "take differences of neighbours", "[b - a for a, b in zip(xs, xs[1:])]"),
    _s("trim", "drop the first and the last | trim both ends", "xs[1:-1]"),
    _s("rotate", "rotate left by one", "xs[1:] + xs[:1]", "xs[-1:] + xs[:-1]", 0.6),
)
NUMBER_ENDS = (
    _s("list", "return the list", "xs"),
    _s("sum", "return the sum | return the total", "sum(xs)"),
    _s("count", "return the count | return how many remain", "len(xs)"),
    _s("distinct", "return the number of distinct items", "len(set(xs))"),
    _s("largest", "return the largest or 0", "max(xs, default=0)"),
    _s("smallest", "return the smallest or 0", "min(xs, default=0)"),
    _s("first", "return the first or 0", "xs[0] if xs else 0"),
    _s("last", "return the last or 0", "xs[-1] if xs else 0", "xs[-1]", 0.6),
    _s("spread", "return the spread or 0",
       "max(xs) - min(xs) if xs else 0", "max(xs) - min(xs)", 0.6),
)
# Steps over a string.
TEXT = (
    _s("upper", "convert to upper case", "s.upper()"),
    _s("lower", "convert to lower case", "s.lower()"),
    _s("swap", "swap upper and lower case", "s.swapcase()", "s.upper()", 0.6),
    _s("strip", "remove spaces at both ends", "s.strip()"),
    _s("spaces", "remove all spaces", 's.replace(" ", "")', "s.strip()", 0.6),
    _s("backwards", "reverse the text", "s[::-1]"),
    _s("head", "keep the first {k} characters", "s[:{k}]", "s[:{k} - 1]", 0.6),
    _s("tail", "drop the first {k} characters", "s[{k}:]"),
    _s("repeat", "repeat it {k} times", "s * {k}"),
    _s("vowels", "remove the vowels",
       '"".join(c for c in s if c.lower() not in "aeiou")',
       '"".join(c for c in s if c not in "aeiou")', 0.9),
    _s("sort_text", "sort the characters", '"".join(sorted(s))'),
    _s("title", "capitalize each word", "s.title()", "s.capitalize()", 0.6),
)
TEXT_ENDS = (
    _s("text", "return the text", "s"),
    _s("length", "return its length", "len(s)"),
    _s("words", "return the number of words", "len(s.split())", 'len(s.split(" "))', 0.6),
    _s("letters", "return the number of distinct characters", "len(set(s))"),
    _s("initial", "return the first character or an empty text", "s[:1]", "s[0]", 0.6),
    _s("palindrome", "return whether it is a palindrome", "s == s[::-1]"),
)
# fmt: on


DOMAINS = {"xs": (NUMBERS, NUMBER_ENDS), "s": (TEXT, TEXT_ENDS)}  # argument name -> steps, ends
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Task:
    """One composed task: the argument's name, its steps, the constant each of them takes."""

    variable: str
    steps: tuple[Step, ...]
    constants: tuple[str, ...]  # one per step: "3", or "k" for the function's second argument

    @property
    def composition(self):
        return (self.variable, *(step.name for step in self.steps))

    @property
    def split(self):
        """Every tenth composition is a test composition, another tenth validation."""
        bucket = zlib.crc32(" ".join(self.composition).encode()) % 10
        return {0: "test", 1: "validation"}.get(bucket, "train")

    @property
    def signature(self):
        return f"({self.variable}, k)" if "k" in self.constants else f"({self.variable})"


def draw_task(rng, split):
    """A random task of the split: one to three steps and an end."""
    while True:
        variable = "xs" if rng.random() < 0.8 else "s"
        steps, ends = DOMAINS[variable]
        length = rng.choices((1, 2, 3), (0.2, 0.4, 0.4))[0]
        chosen = (*rng.sample(steps, length), rng.choice(ends))
        # Multiples of 2 would be the even numbers by another name, and cross the splits.
        constants = [str(rng.randint(2, 4) + (step.name == "multiples")) for step in chosen]
        takes = [i for i, step in enumerate(chosen) if "{k}" in step.right[0]]
        if takes and rng.random() < 0.4:
            constants[rng.choice(takes)] = "k"
        task = Task(variable, chosen, tuple(constants))
        if task.split == split:
            return task


def draw_prompt(rng, task):
    """The signature and the docstring, each step in one of its phrasings."""
    phrases = [
        rng.choice(step.phrasings).format(k=k)
        for step, k in zip(task.steps, task.constants, strict=True)
    ]
    text = ", ".join(phrases)
    return f'def solve{task.signature}:\n    """{text[0].upper()}{text[1:]}."""\n'


def body(task, expressions):
    """The function's body from one expression per step."""
    filled = [e.replace("{k}", k) for e, k in zip(expressions, task.constants, strict=True)]
    lines = [f"    {task.variable} = {expression}\n" for expression in filled[:-1]]
    return "".join(lines) + f"    return {filled[-1]}\n"


def draw_response(rng, task):
    """A body as the corpus has it: any of the right forms, or the common bug at its rate."""
    return body(
        task,
        [step.wrong if rng.random() < step.rate else rng.choice(step.right) for step in task.steps],
    )


def draw_problem(rng, split, task_id):
    """A task with a reference and hidden tests. Returns a Problem in HumanEval's form."""
    while True:
        task = draw_task(rng, split)
        right = [step.right[0] for step in task.steps]
        variants = [
            body(task, [*right[:i], step.wrong, *right[i + 1 :]])
            for i, step in enumerate(task.steps)
            if step.wrong
        ]
        inputs = _draw_inputs(rng, task, 24)
        reference = _outputs(task, body(task, right), inputs)
        if len({repr(value) for value in reference}) < 5:
            continue  # an answer that hardly depends on the input tests nothing
        telling = [_telling(task, body(task, right), wrong, inputs, rng) for wrong in variants]
        chosen = {repr(arguments): arguments for part in (*telling, inputs) for arguments in part}
        chosen = list(chosen.values())[:8]
        answers = _outputs(task, body(task, right), chosen)
        lines = [
            f"    assert candidate({', '.join(map(repr, arguments))}) == {answer!r}\n"
            for arguments, answer in zip(chosen, answers, strict=True)
        ]
        return Problem(
            task_id=task_id,
            prompt=draw_prompt(rng, task),
            entry_point="solve",
            canonical_solution=body(task, right),
            test="def check(candidate):\n" + "".join(lines),
        )


def draw_problems(seed, split, count, taken=()):
    """`count` problems of a split with different prompts, none of them in `taken`."""
    rng = random.Random(f"{seed} {split}")
    problems, prompts = [], set(taken)
    while len(problems) < count:
        problem = draw_problem(rng, split, f"lab/{split}/{len(problems)}")
        if problem.prompt not in prompts:
            prompts.add(problem.prompt)
            problems.append(problem)
    return problems


def draw_corpus(seed, count):
    """`count` pairs (prompt, response) of training compositions: the SFT corpus."""
    rng = random.Random(f"{seed} corpus")
    tasks = (draw_task(rng, "train") for _ in range(count))
    return [(draw_prompt(rng, task), draw_response(rng, task)) for task in tasks]


def _draw_inputs(rng, task, count):
    """Up to `count` different argument tuples, and one whose list or text is empty."""
    drawn = [_draw_input(rng, task) for _ in range(count)]
    drawn.append(([] if task.variable == "xs" else "", *drawn[0][1:]))  # what people forget
    return list({repr(arguments): arguments for arguments in drawn}.values())


def _draw_input(rng, task):
    if task.variable == "xs":
        value = [rng.randint(-6, 9) for _ in range(rng.choice((0, 1, 2, 4, 5, 6, 7, 8)))]
    else:
        words = rng.choices(("Abc", "level", "To be", "noon", "x", "Red", "aEiou", "go"), k=3)
        spaces = rng.choice(("", " ", "  "))
        value = spaces + " ".join(words[: rng.randint(0, 3)]) + rng.choice(("", " "))
    return (value, rng.randint(1, 4)) if "k" in task.constants else (value,)


def _telling(task, right, wrong, inputs, rng):
    """[the first input on which the two programs differ], of these or of a thousand more, or []."""
    for some in (inputs, _draw_inputs(rng, task, 1000)):
        pairs = zip(_outputs(task, right, some), _outputs(task, wrong, some), strict=True)
        for arguments, (one, other) in zip(some, pairs, strict=True):
            if repr(one) != repr(other):
                return [arguments]
    return []


def _outputs(task, source, inputs):
    """What a program of our own (trusted) makes of the inputs; an exception is an output too."""
    scope = {}
    exec(f"def solve{task.signature}:\n{source}", scope)
    outputs = []
    for arguments in inputs:
        try:
            outputs.append(scope["solve"](*arguments))
        except Exception as error:
            outputs.append(error)
    return outputs
