"""The lab's world: small Python tasks with hidden tests, and programs as people write them, bugs
included.

A task chains one to three steps over a list of integers (or a string) and returns something:

    def solve(xs, k):
        \"\"\"Keep the numbers above k, reverse the order, return the first or 0.\"\"\"

Each step knows a few English phrasings, its right forms (there is more than one right program) and
often a wrong form that looks plausible (`>=` for `>`, `xs[k::k]` for `xs[::k]`). In the corpus the
wrong form stands in a fixed share of a step's occurrences, as common bugs do in real code. So a
policy trained on the corpus knows the language and the tasks, and fails as people do; a few
mistakes nearly everybody makes, and these cap what a short RL run can learn.

Splits (train, validation, test) are by composition, the chain of step names: a test problem's chain
was never seen. Tests are made by running the reference on inputs chosen to tell every single wrong
form from the right one, where one of a thousand drawn inputs can.

Not covered: loops with state, nested data, tasks with more than one function.
"""

import random
import zlib
from dataclasses import dataclass
from itertools import islice

from pfppo.problems import Problem


class Step:
    """One row of the tables below. `{k}` is a small constant, or the argument k."""

    def __init__(self, name, phrasings, right, wrong="", rate=0.6):
        self.name = name
        self.phrasings = phrasings.split(" | ")
        self.right = right.split(" | ")  # expressions for the new value
        self.wrong = wrong  # a plausible bug, or ""
        self.rate = rate if wrong else 0.0  # share of the corpus's occurrences that have the bug


# fmt: off
# Steps over a list of integers. A rate of 0.9 is a bug that nearly everybody makes.
NUMBERS = (
    Step("evens", "keep the even numbers | drop the odd numbers", "[x for x in xs if x % 2 == 0]"),
    Step("odds", "keep the odd numbers | drop the even numbers", "[x for x in xs if x % 2 == 1]"),
    Step("above", "keep the numbers above {k} | drop the numbers up to {k}",
         "[x for x in xs if x > {k}]", "[x for x in xs if x >= {k}]"),
    Step("at_most", "keep the numbers up to {k} | drop the numbers above {k}",
         "[x for x in xs if x <= {k}]"),
    Step("multiples", "keep the multiples of {k}", "[x for x in xs if x % {k} == 0]"),
    Step("add", "add {k} to each | increase each by {k}", "[x + {k} for x in xs]"),
    Step("times", "multiply each by {k}", "[x * {k} for x in xs]"),
    Step("square", "square each", "[x * x for x in xs] | [x ** 2 for x in xs]"),
    Step("negate", "negate each | flip the signs", "[-x for x in xs]"),
    Step("modulo", "take each modulo {k}", "[x % {k} for x in xs]"),
    Step("absolute", "take absolute values", "[abs(x) for x in xs]"),
    Step("floor", "replace the negative numbers by 0 | raise negative numbers to 0",
         "[max(x, 0) for x in xs] | [x if x > 0 else 0 for x in xs]", "[x for x in xs if x > 0]"),
    Step("cap", "cap each at {k} | limit each to {k}", "[min(x, {k}) for x in xs]"),
    Step("double_evens", "double the even numbers only",
         "[x * 2 if x % 2 == 0 else x for x in xs]", "[x * 2 for x in xs if x % 2 == 0]", 0.9),
    Step("ascending", "sort in ascending order | sort", "sorted(xs)"),
    Step("descending", "sort in descending order | sort from high to low",
         "sorted(xs, reverse=True) | sorted(xs)[::-1]", "sorted(xs)"),
    Step("reverse", "reverse the order", "xs[::-1] | list(reversed(xs))"),
    Step("drop_first", "drop the first {k} | skip {k} items", "xs[{k}:]", "xs[{k} + 1:]"),
    Step("take_first", "keep the first {k} | take {k} items", "xs[:{k}]"),
    Step("take_last", "keep the last {k}", "xs[-{k}:]"),
    Step("every", "keep every {k}th item from the first", "xs[::{k}]", "xs[{k}::{k}]"),
    Step("unique", "remove duplicates | keep the first of equal items",
         "list(dict.fromkeys(xs))", "sorted(set(xs))"),
    Step("running", "take running sums",
         "[sum(xs[:i + 1]) for i in range(len(xs))]", "[sum(xs[:i]) for i in range(len(xs))]"),
    Step("differences", "take differences of neighbours", "[b - a for a, b in zip(xs, xs[1:])]"),
    Step("trim", "drop the first and the last | trim both ends", "xs[1:-1]"),
    Step("rotate", "rotate left by one", "xs[1:] + xs[:1]", "xs[-1:] + xs[:-1]"),
)
NUMBER_ENDS = (
    Step("list", "return the list", "xs"),
    Step("sum", "return the sum | return the total", "sum(xs)"),
    Step("count", "return the count | return how many remain", "len(xs)"),
    Step("distinct", "return the number of distinct items", "len(set(xs))"),
    Step("largest", "return the largest or 0", "max(xs, default=0)"),
    Step("smallest", "return the smallest or 0", "min(xs, default=0)"),
    Step("first", "return the first or 0", "xs[0] if xs else 0"),
    Step("last", "return the last or 0", "xs[-1] if xs else 0", "xs[-1]"),
    Step("spread", "return the spread or 0", "max(xs) - min(xs) if xs else 0", "max(xs) - min(xs)"),
)
# Steps over a string.
TEXT = (
    Step("upper", "convert to upper case", "s.upper()"),
    Step("lower", "convert to lower case", "s.lower()"),
    Step("swap", "swap upper and lower case", "s.swapcase()", "s.upper()"),
    Step("strip", "remove spaces at both ends", "s.strip()"),
    Step("spaces", "remove all spaces", 's.replace(" ", "")', "s.strip()"),
    Step("backwards", "reverse the text", "s[::-1]"),
    Step("head", "keep the first {k} characters", "s[:{k}]", "s[:{k} - 1]"),
    Step("tail", "drop the first {k} characters", "s[{k}:]"),
    Step("repeat", "repeat it {k} times", "s * {k}"),
    Step("vowels", "remove the vowels",
         '"".join(c for c in s if c.lower() not in "aeiou")',
         '"".join(c for c in s if c not in "aeiou")', 0.9),
    Step("sort_text", "sort the characters", '"".join(sorted(s))'),
    Step("title", "capitalize each word", "s.title()", "s.capitalize()"),
)
TEXT_ENDS = (
    Step("text", "return the text", "s"),
    Step("length", "return its length", "len(s)"),
    Step("words", "return the number of words", "len(s.split())", 'len(s.split(" "))'),
    Step("letters", "return the number of distinct characters", "len(set(s))"),
    Step("initial", "return the first character or an empty text", "s[:1]", "s[0]"),
    Step("palindrome", "return whether it is a palindrome", "s == s[::-1]"),
)
# fmt: on


DOMAINS = {"xs": (NUMBERS, NUMBER_ENDS), "s": (TEXT, TEXT_ENDS)}  # argument name -> steps, ends


@dataclass(frozen=True)
class Task:
    """One composed task: the argument's name, its steps, the constant each of them takes."""

    variable: str
    steps: tuple[Step, ...]
    constants: tuple[str, ...]  # one per step: "3", or "k" for the function's second argument

    @property
    def split(self):
        """Every tenth composition is a test composition, another tenth validation."""
        composition = " ".join([self.variable, *(step.name for step in self.steps)])
        return {0: "test", 1: "validation"}.get(zlib.crc32(composition.encode()) % 10, "train")

    def filled(self, texts):
        """One text per step, each with its step's constant for {k}."""
        return [t.replace("{k}", k) for t, k in zip(texts, self.constants, strict=True)]


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
    text = ", ".join(task.filled([rng.choice(step.phrasings) for step in task.steps]))
    names = f"{task.variable}, k" if "k" in task.constants else task.variable
    return f'def solve({names}):\n    """{text[0].upper()}{text[1:]}."""\n'


def body(task, expressions):
    """The function's body from one expression per step."""
    *lines, last = task.filled(expressions)
    lines = [f"    {task.variable} = {expression}\n" for expression in lines]
    return "".join(lines) + f"    return {last}\n"


def draw_response(rng, task):
    """A body as the corpus has it: any of the right forms, or the common bug at its rate."""
    forms = [s.wrong if rng.random() < s.rate else rng.choice(s.right) for s in task.steps]
    return body(task, forms)


def draw_problem(rng, split, task_id):
    """A task with a reference and hidden tests. Returns a Problem in HumanEval's form."""
    while True:
        task = draw_task(rng, split)
        right = [step.right[0] for step in task.steps]
        reference, inputs = _function(task, right), _draw_inputs(rng, task, 24)
        if len(set(map(reference, inputs))) >= 5:
            break  # an answer that hardly depends on the input would test nothing
    telling = []  # for each bug, the first input on which it changes the answer
    for i, step in enumerate(task.steps):
        if step.wrong:
            program = _function(task, [*right[:i], step.wrong, *right[i + 1 :]])
            tried = inputs + _draw_inputs(rng, task, 1000)
            telling += islice((x for x in tried if program(x) != reference(x)), 1)
    chosen = list({repr(x): x for x in telling + inputs}.values())[:8]
    lines = [f"    assert candidate({', '.join(map(repr, x))}) == {reference(x)}\n" for x in chosen]
    test = "def check(candidate):\n" + "".join(lines)
    return Problem(task_id, draw_prompt(rng, task), "solve", body(task, right), test)


def draw_problems(seed, split, count, taken=()):
    """`count` problems of a split, one by one, with different prompts, none of them in `taken`."""
    rng, prompts = random.Random(f"{seed} {split}"), set(taken)
    number = 0
    while number < count:
        problem = draw_problem(rng, split, f"lab/{split}/{number}")
        if problem.prompt not in prompts:
            prompts.add(problem.prompt)
            number += 1
            yield problem


def draw_corpus(seed, count):
    """`count` pairs (prompt, response) of training compositions: the SFT corpus."""
    rng = random.Random(f"{seed} corpus")
    tasks = (draw_task(rng, "train") for _ in range(count))
    return [(draw_prompt(rng, task), draw_response(rng, task)) for task in tasks]


def _draw_inputs(rng, task, count):
    """`count` argument tuples, and one whose list or text is empty: what people forget."""
    inputs = []
    for _ in range(count):
        if task.variable == "xs":
            value = [rng.randint(-6, 9) for _ in range(rng.choice((0, 1, 2, 4, 5, 6, 7, 8)))]
        else:
            words = rng.choices(("Abc", "level", "To be", "noon", "x", "Red", "aEiou", "go"), k=3)
            spaces = rng.choice(("", " ", "  "))
            value = spaces + " ".join(words[: rng.randint(0, 3)]) + rng.choice(("", " "))
        inputs.append((value, rng.randint(1, 4)) if "k" in task.constants else (value,))
    return [*inputs, (type(value)(), *inputs[0][1:])]


def _function(task, expressions):
    """A program of our own (trusted): arguments -> repr of its answer; an exception is one too."""
    scope = {}
    exec(f"def solve({task.variable}, k=None):\n{body(task, expressions)}", scope)

    def run(arguments):
        try:
            return repr(scope["solve"](*arguments))
        except Exception as error:
            return repr(error)

    return run
