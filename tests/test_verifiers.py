"""The truth slot: numbers, verifiers of one's own, and tasks without tests from end to end."""

import json
import random
from types import SimpleNamespace

import eval_code
import train_ppo
import train_rm
from pfppo.answers import Examiner
from pfppo.config import UserError
from pfppo.lab import default as lab
from pfppo.model import Policy
from pfppo.problems import (
    Problem,
    load_problems,
    load_prompts,
    load_verifier,
    prompt_text,
    verifiers,
)
from pfppo.problems.numbers import answer_number, number_of

import numpy as np
import pytest
import torch
from conftest import words_of
from ranks import forked, refused
from running import options, read, run, write_rows
from transformers import LlamaConfig, LlamaForCausalLM

LAST = load_verifier("last_number")


def asking(*answers):
    extras = ({"answer": answer} for answer in answers)
    return [Problem(f"q/{i}", "How many?\n", "", "", "", extra=x) for i, x in enumerate(extras)]


def test_math_rows_have_their_answer_in_other_fields_too(tmp_path):
    rows = [
        {"problem": "1 + 1?", "solution": r"So \boxed{2}, not 3."},
        {"Question": "q", "Answer": 2},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = load_prompts(path)
    LAST.check(problems, "here")
    assert [verdict.passed for verdict in LAST(problems, ["It is 2", "3"])] == [True, False]


def test_rows_with_answers_and_no_tests_are_told_of_the_verifier(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "answer": "#### 7"}\n')
    with pytest.raises(UserError, match="have no 'test', .*: --verify last_number.$"):
        load_problems(tmp_path / "rows.jsonl", verifier=load_verifier("tests"))


def is_right(response, answer):
    (verdict,) = LAST(asking(answer), [response])
    return verdict.passed


# ------------------------------------------------------------------------------- last_number

GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nIn all 48+24 = 72.\n#### 72"
RIGHT = {
    72: [GSM8K, "\\boxed{72}", "72.", "She sold 5, so 72!", "**72**", "72 m^2", "72 m2", "72 m²"]
    + [
        "\\boxed{72 \\text{ cm}^{2}}",
        "\\approx72",
        "\\(72\\)",
        "Rs72",
        "US$72",
        "72€",
        "72 dollars",
    ]
    + ["答案是72。", "٧٢", "７２", "<think>5</think>72", "72.00", "7.2e1", "0.72 \\times 10^{2}"],
    "72": [GSM8K, "72.0", "$72"],
    GSM8K: ["72", "So it is 72 clips."],
    "4 m = \\boxed{72} cm in 2 parts": ["72"],
    1234: ["1,234", "$1,234.00", "1{,}234", "1\\,234", "1\u202f234", "1'234", "１，２３４"],
    "1,234,567": ["1234567", "12,34,567"],
    5.5: ["$5.50", "\\$5.5", "5½", "5 1/2", "11/2", "5\\frac{1}{2}"],
    0.1: ["0.1", ".1", "1/10", "10%", "1e-1"],
    -3: ["-3", "so −3", "x=-3", "(-3)", "-$3", "$-3$", "**-3**", "是-3", "- 2 and\n-3"],
    3: ["10-3", "pages 2–3", "5 - 3", "- 3 apples", "3.0", "x_1 = 3"],
    "3/4": ["0.75", "3/4", "\\frac{3}{4}", "\\dfrac34", "¾", "75%"],
    "1/3": ["1/3", "\\frac{1}{3}"],
    50: ["50%", "50 %", "50\\%"],
    "50%": ["50", "0.5", "1/2", "50%"],
    "10:30": ["at 10:30"],
    1024: ["2^10", "2^{10}"],
    1e22: ["10000000000000000000000", "1e22"],
}
WRONG = {
    72: ["", "no idea", "72 and 3", "-72", "72.5", "<think>72", "x72", "1:72", "72π"],
    2: ["H2O", "x_2", "m^2", "\\sqrt{2}", "2\\pi", "\\frac{\\pi}{2}", "1/2", "1.2.2"],
    234: ["1,234"],
    1234: ["1.234", "234"],
    "3/4": ["4", "3", "3:4", "0.7500001"],
    "10/3": ["3.333333333333333333333"],
    0.5: ["5%", "5000%"],
    "50%": ["5", "0.5%"],
    "10:30": ["9:30", "30", "10"],
    9: ["9" * 6000, "1e999999999", "9^999999999", "9/0"],
    0: ["1e-400", "0/0"],
}


@pytest.mark.parametrize("answer", RIGHT, ids=lambda answer: str(answer)[:9])
def test_the_last_number_is_read_as_people_and_models_write_it(answer):
    assert [text for text in RIGHT[answer] if not is_right(text, answer)] == []


@pytest.mark.parametrize("answer", WRONG, ids=str)
def test_what_is_not_exactly_the_answer_is_wrong(answer):
    assert [text for text in WRONG[answer] if is_right(text, answer)] == []


@pytest.mark.parametrize(
    "answer", ["Tom", "", "#### none", "\\sqrt{2}", "2 \\pi", True, None, [72], float("inf"), {}]
)
def test_a_row_whose_answer_is_no_number_is_named(answer):
    expected = (
        r"FILE: 'q/1': --verify last_number needs a number in the field 'answer' or .*, found"
    )
    with pytest.raises(UserError, match=expected):
        LAST.check(asking(72, answer), "FILE")
    assert not is_right("72", answer)


def test_long_responses_are_read_in_linear_time():  # else this takes hours
    for part in (
        "1,",
        "1 ",
        "1/",
        "9",
        "\\frac{",
        "1:",
        "1.",
        "-",
        "10^",
        "{",
        "1e",
        "$",
        "A",
        "^{ ",
    ):
        assert answer_number(part * 20000) is None or part in ("1,", "1 ", "1/", "1.", "1e", "10^")
        number_of(part * 20000)


# ----------------------------------------------------------------------- verifiers of one's own

OWN = """
import json, pathlib
import numpy, torch
with open(pathlib.Path(__file__).with_suffix(".log"), "a") as log:
    log.write("imported ")
def even(responses, problems):
    return [len(response) % 2 == 0 for response in responses]
def reward(answers):
    levels = torch.tensor([float(problem.extra["level"]) for problem in answers.problems])
    return answers.scores + levels + answers.by_model
def oracle(answers):
    levels = [problem.extra["level"] for problem in answers.problems]
    return [score + level for score, level in zip(answers.scores, levels)]
def keep(rewards, generator):
    return torch.ones_like(rewards)
def raises(responses, problems):
    raise KeyError("x")
def leaves(responses, problems):
    exit(3)
def late(responses, problems):
    if any(responses):
        raise KeyError("late")
    return [0] * len(responses)
"""


def own_of(tmp_path, result="[]"):
    text = f"{OWN}\ndef own(responses, problems):\n    return {result}\n"
    (tmp_path / "own.py").write_text(text)
    return f"{tmp_path / 'own.py'}:"


@pytest.mark.parametrize(
    "result",
    [
        *("[True, False]", "(1, 0)", "[1.0, 0.0]", "numpy.array([True, False])"),
        *("[numpy.bool_(True), numpy.int64(0)]", "torch.tensor([True, False])"),
        *("(r == 'a' for r in responses)", "numpy.array([1, 0])", "torch.tensor([1.0, 0.0])"),
        *("[p.extra['answer'] == 1 for p in problems]", "responses.clear() or [1, 0]"),
    ],
)
def test_a_verifier_of_ones_own_gives_bools_of_any_kind(tmp_path, result):
    problems, texts = asking(1, 2), ["a", "b"]
    verdicts = load_verifier(own_of(tmp_path, result) + "own")(problems, texts)
    assert [verdict.passed for verdict in verdicts] == [True, False]
    assert [verdict.outcome for verdict in verdicts] == ["correct", "wrong"]
    assert texts == ["a", "b"]


@pytest.mark.parametrize(
    "result, said",
    [
        ("[True]", "expected 2 bools, one for each response, found 1"),
        ("[0.7, 1]", "expected 2 bools, one for each response, found [0.7] among them"),
        ("[None, True]", "expected 2 bools, one for each response, found [None] among them"),
        ("[2, 1]", "expected 2 bools, one for each response, found [2] among them"),
        ("['yes', 1]", "expected 2 bools, one for each response, found ['yes'] among them"),
        ("[float('nan'), 1]", "expected 2 bools, one for each response, found [nan] among them"),
        (
            "numpy.ones((2, 2))",
            "expected 2 bools, one for each response, found [[1.0, 1.0]] among them",
        ),
        ("None", "TypeError: "),
        ("True", "TypeError: "),
        ("[][0]", "IndexError: list index out of range"),
        ("exit(3)", "SystemExit: 3"),
    ],
)
def test_a_verifier_of_ones_own_that_fails_is_one_line_that_names_it(tmp_path, result, said):
    spec = own_of(tmp_path, result) + "own"
    message = refused(load_verifier(spec).check, asking(1, 2, 3), "FILE")  # tried on two rows
    assert message.startswith(f"--verify {spec}: {said}"), message


def test_an_unknown_verifier_is_one_line():
    known = "expected one of tests, last_number, module:function or file.py:function"
    assert refused(load_verifier, "luck") == f"--verify luck: unknown, {known}"


# ------------------------------------------------------------------------------- without code


def write_math(path, count, **more):
    """Problems as people have them: a question and GSM8K's answer, and a field of their own."""
    rows = [
        {"prompt": f"What is {i} and {i + 1}?\n", "answer": f"They are\n#### {i % 10}", "level": i}
        for i in range(count)
    ]
    return write_rows(path, [row | more for row in rows])


@pytest.fixture
def no_sandbox(monkeypatch):
    monkeypatch.setattr(verifiers, "Sandbox", None)


def test_problems_without_tests_are_asked_as_they_stand(tmp_path):
    path = write_math(tmp_path / "math.jsonl", 2)
    (first, _), verifier = load_problems(path, verifier=LAST), load_verifier("tests")
    assert first.extra == {"answer": "They are\n#### 0", "level": 0} and not first.is_code
    for style in ("plain", "chat", "deepseek"):
        assert prompt_text(first, style) == "What is 0 and 1?\n"
    (told, _) = load_prompts(write_math(tmp_path / "told.jsonl", 2, instruction="Say it."))
    assert prompt_text(told, "chat") == "Say it."
    assert "problems have no 'test'" in refused(load_problems, path, verifier=verifier)


def test_a_task_without_tests_goes_from_pairs_to_a_table_without_a_sandbox(
    tiny, tmp_path, no_sandbox, capsys
):
    own, math = own_of(tmp_path), write_math(tmp_path / "math.jsonl", 12)
    size = {"max_new_tokens": 16, "policy": tiny / "policy"}
    pairs = {"prompts": math, "verify": f"{own}even", "batch": 4, "run_dir": tmp_path / "rm"}
    run(train_rm, *words_of(**size | pairs))
    said = capsys.readouterr().out
    assert "of 12 prompts have a correct and a wrong sample; the SFT policy is right in 0." in said
    for pair in read(tmp_path / "rm/pairs.jsonl"):
        assert len(pair["chosen"]) % 2 == 0 and len(pair["rejected"]) % 2 == 1

    files = {name: math for name in ("prompts", "validation", "test")}
    files |= {"reward_model": tmp_path / "rm", "filter": f"{own}keep", "reward": f"{own}reward"}
    changed = size | files | {"verify": "last_number", "minibatch": 6, "microbatch": 6, "steps": 1}
    run(train_ppo, *options(tiny, tmp_path / "run", **changed))
    said = capsys.readouterr().out
    assert "correct@1 on 12 test problems" in said and "sandbox" not in said and "pass" not in said
    samples = read(tmp_path / "run/samples.jsonl")
    answers = {row["task_id"]: row["score"] for row in samples}
    assert len(answers) == 4 and all(score in (0.0, 1.0) for score in answers.values())
    assert json.loads((tmp_path / "run/result.json").read_text())["verify"] == "last_number"

    evaluated = {"problems": math, "verify": "last_number", "samples_per_problem": 2, "k": "1,2"}
    evaluated |= {"reward_model": tmp_path / "rm", "reward": f"{own}reward", "filters": "none"}
    run(eval_code, *words_of(**size | evaluated, out=tmp_path / "eval"))
    said = capsys.readouterr().out
    assert "correct@1 " in said and "correct@2 " in said and "mean score 0." in said
    assert "pass" not in said and "sandbox" not in said
    rows, results = (read(tmp_path / f"eval/{name}.jsonl") for name in ("samples", "results"))
    assert {row["outcome"] for row in results} <= {"correct", "wrong"} and len(results) == 24
    for row, result in zip(rows, results, strict=True):
        assert row["completion"] == row["solution"] == row["response"]
        assert result["passed"] == row["score"] == (result["outcome"] == "correct")
        assert "raw_reward" in row

    again = {"problems": math, "samples": tmp_path / "eval/samples.jsonl", "verify": "last_number"}
    run(eval_code, *words_of(**again, out=tmp_path / "again"))
    assert [row["passed"] for row in read(tmp_path / "again/results.jsonl")] == [
        row["passed"] for row in results
    ]
    assert (tmp_path / "own.log").read_text().split() == ["imported"]  # for all three slots, once


@pytest.mark.parametrize("field", ["completion", "response", "solution"])
def test_samples_of_others_are_verified_as_text(tmp_path, field, no_sandbox):
    math = write_math(tmp_path / "math.jsonl", 3)
    said = [{"task_id": f"line {i + 1}", field: f"So {i}."} for i in (2, 0, 1)]
    said[2][field] = "So 9, or:\n```python\nprint(1)\n```\n2"
    files = {"problems": math, "samples": write_rows(tmp_path / "said.jsonl", said)}
    run(eval_code, *words_of(**files, verify="last_number", out=tmp_path / "out"))
    outcomes = [row["outcome"] for row in read(tmp_path / "out/results.jsonl")]
    assert outcomes == ["correct", "correct", "wrong"]


def test_code_may_be_verified_by_a_function_that_reads_the_response(tiny, tmp_path, no_sandbox):
    own = own_of(tmp_path)
    words = {"policy": tiny / "policy", "problems": tiny / "held_out.jsonl", "max_new_tokens": 8}
    run(eval_code, *words_of(**words, verify=f"{own}even", out=tmp_path / "out"))
    rows, results = (read(tmp_path / f"out/{name}.jsonl") for name in ("samples", "results"))
    problems = {row["task_id"]: row["prompt"] for row in read(tiny / "held_out.jsonl")}
    for row, result in zip(rows, results, strict=True):
        assert result["passed"] == (len(row["response"]) % 2 == 0)
        assert row["solution"].startswith(problems[row["task_id"]])  # is still a program


def test_a_reward_of_one_parameter_needs_no_reward_model_unless_it_asks_for_one(tiny, tmp_path):
    own, math = own_of(tmp_path), write_math(tmp_path / "math.jsonl", 12)
    files = {"prompts": math, "validation": "", "test": "", "reward_model": "", "steps": 1}
    files |= {"verify": "last_number", "reward_scale": "none"}
    run(train_ppo, *options(tiny, tmp_path / "run", **files, reward=f"{own}oracle"))
    for row in read(tmp_path / "run/samples.jsonl"):
        level = int(row["task_id"].removeprefix("line ")) - 1
        assert row["reward"] == pytest.approx(min(row["score"] + level, 10))  # is clipped
    asks = (
        f"--reward {own}reward: asks for answers.by_model, the rewards of a --reward_model, found"
    )
    argv = options(tiny, tmp_path / "other", **files, reward=f"{own}reward")
    assert asks in refused(run, train_ppo, *argv)
    words = {"policy": tiny / "policy", "problems": math, "verify": "last_number"}
    words |= {"reward": f"{own}reward", "out": tmp_path / "other"}
    assert asks in refused(run, eval_code, *words_of(**words))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("script", [train_rm, train_ppo, eval_code], ids=lambda s: s.__name__)
@pytest.mark.parametrize(
    "verify, expected",
    [
        ("last_numbr", "--verify last_numbr: unknown, expected one of tests, last_number"),
        ("raises", "raises: KeyError: 'x'"),
        (
            "last_number",
            "'line 2': --verify last_number needs a number in the field 'answer'",
        ),
        ("tests", "'test'"),
    ],
)
def test_what_cannot_be_verified_is_told_before_anything_is_made(
    tiny, tmp_path, script, verify, expected
):
    rows = [{"prompt": "One?\n", "answer": 1}, {"prompt": "Two?\n", "answer": "a pair"}]
    named = write_rows(tmp_path / "rows.jsonl", rows * 6)
    verify = own_of(tmp_path) + verify if verify == "raises" else verify
    if script is eval_code:
        words = {"policy": tiny / "policy", "problems": named, "out": tmp_path / "out"}
    elif script is train_rm:
        words = {"policy": tiny / "policy", "prompts": named, "run_dir": tmp_path / "out"}
    else:
        words = {"policy": tiny / "policy", "prompts": named, "run_dir": tmp_path / "out"}
        words |= {"validation": named, "reward_model": tiny / "rm", "test": "", "minibatch": 4}
        words |= {"prompts_per_step": 2, "samples_per_prompt": 2}
    assert expected in refused(run, script, *words_of(**words, verify=verify))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", [train_rm, train_ppo, eval_code], ids=lambda s: s.__name__)
@pytest.mark.parametrize("verify", ["last_number", "luck"])
def test_a_verifier_that_does_not_go_with_the_lab_is_told_before_it_is_made(
    tmp_path, monkeypatch, script, verify
):
    monkeypatch.chdir(tmp_path)
    assert f"--verify {verify}" in refused(run, script, "--verify", verify)
    assert list(tmp_path.iterdir()) == []


def test_a_verifier_that_fails_later_ends_the_run_in_one_line(tiny, tmp_path):
    own, math = own_of(tmp_path), write_math(tmp_path / "math.jsonl", 12)
    words = {"policy": tiny / "policy", "problems": math, "out": tmp_path / "eval"}
    assert "late: KeyError: 'late'" in refused(
        run, eval_code, *words_of(**words, verify=f"{own}late")
    )
    changed = {"prompts": math, "validation": "", "test": "", "verify": f"{own}late"}
    argv = options(tiny, tmp_path / "run", **changed)
    assert "late: KeyError: 'late'" in refused(run, train_ppo, *argv)


def test_a_verifier_that_fails_on_one_rank_ends_all_of_them(tmp_path):
    own = own_of(tmp_path, "[0] * (len(responses) - int(__import__('os').environ['RANK']))")
    args = SimpleNamespace(verify=f"{own}own")

    def work(ranks):
        with Examiner(None, args, ranks) as examiner:
            return refused(examiner.scores, asking(1, 2), ["a", "b"])

    for message in forked(work):
        assert "own.py:own: expected 2 bools, one for each response, found 1" in message


# ---- the rehearsal -------------------------------------------------------------------------------

KINDS = {  # question: the right operation, the one that people take by mistake, and how often
    "{name} has {a} {things} and finds {b} more. How many {things} are there?": ("+", "-", 0.3),
    "{name} has {a} {things} and gives {b} away. How many {things} are left?": ("-", "+", 0.6),
    "{name} has {a} boxes with {b} {things} each. How many {things} are there?": ("*", "+", 0.6),
}
NAMES, THINGS = "Ann Ben Cleo Dan Eve Finn".split(), "apples books coins pens shells".split()


def word_problem(rng):
    """(question, what is said, perhaps by a mistake, the answer)"""
    text, (right, wrong, rate) = rng.choice(list(KINDS.items()))
    b, a = sorted(rng.choices(range(2, 8), k=2))
    asked = text.format(name=rng.choice(NAMES), things=rng.choice(THINGS), a=a, b=b)
    values, said = {"+": a + b, "-": a - b, "*": a * b}, wrong if rng.random() < rate else right
    return f"{asked}\n", f"{a} {said} {b} = {values[said]}", values[right]


def make_sft_policy(folder, monkeypatch, rng, steps=300):
    """A policy that can calculate, and often takes the wrong operation."""
    monkeypatch.setattr(lab, "SFT_BATCH", 32)
    monkeypatch.setattr(lab, "SFT_LR", 4e-3)
    corpus = [word_problem(rng)[:2] for _ in range(steps * lab.SFT_BATCH)]
    tokenizer = lab.make_tokenizer(corpus[:3000])
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    special |= {"pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": True}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 128}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **special))
    rows = lab.rows_of(corpus, tokenizer)
    lab.train_policy(Policy(model), rows, tokenizer.pad_token_id, "cpu")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_word_problems_go_from_samples_to_a_better_policy(tmp_path, monkeypatch):
    """300 problems for reward model and PPO, 140 others: ten steps raise the exact match."""
    rng, known = random.Random(0), {}
    policy = make_sft_policy(tmp_path / "policy", monkeypatch, rng)
    while len(known) < 440:
        question, _, answer = word_problem(rng)
        known[question] = {"prompt": question, "answer": f"We calculate.\n#### {answer}"}
    rows, files = list(known.values()), {}
    for name, part in (("prompts", (0, 300)), ("validation", (300, 340)), ("test", (340, 440))):
        files[name] = write_rows(tmp_path / f"{name}.jsonl", rows[slice(*part)])
    how = {"policy": policy, "verify": "last_number", "max_new_tokens": 16}
    taught = {"prompts": files["prompts"], "run_dir": tmp_path / "rm", "lr": 1e-3, "epochs": 8}
    run(train_rm, *words_of(**how | taught))
    run_dir = tmp_path / "run"
    learning = {"reward_model": tmp_path / "rm", "run_dir": run_dir, "filter": "none", "steps": 10}
    learning |= {"prompts_per_step": 96, "minibatch": 32, "microbatch": 32, "kl_coef": 0.1}
    learning |= {"actor_lr": 4e-4, "critic_lr": 2e-3}
    run(train_ppo, *words_of(**how | files | learning))
    before, *_, last = json.loads((run_dir / "result.json").read_text())["rates"].values()
    for kind in ("greedy", "sampled"):
        assert 0.3 < before[kind]["pass@1"] < 0.65
        assert last[kind]["pass@1"] > before[kind]["pass@1"] + 0.1
    words = how | {
        "policy": run_dir / "policy",
        "problems": files["test"],
        "out": tmp_path / "eval",
    }
    run(eval_code, *words_of(**words))
    right = np.mean([row["passed"] for row in read(tmp_path / "eval/results.jsonl")])
    assert right > before["greedy"]["pass@1"] + 0.1


@pytest.mark.parametrize(
    "test, said",
    [
        ("def test_add():\n    assert add(1, 2) == 3\n", "runs nothing"),
        ("import unittest\nclass T(unittest.TestCase):\n    pass\n", "runs nothing"),
        ("LIMIT = 3  # to come\n", "runs nothing"),
        ("found = add(1, 2)\n", ""),  # that it ends is all that is asked
        ("def check(candidate:\n    pass\n", "is no Python"),
        ("class T:\n    pass\nT()\n", ""),
        ("for i in range(3):\n    assert add(i, 0) == i\n", ""),
        ("def check(candidate):\n    assert candidate(1)\n", ""),
    ],
)
def test_tests_that_no_program_could_pass_are_told(test, said):
    """Not called wrong answers, one by one."""
    check, problem = load_verifier("tests").check, Problem("t", "", "add", "", test)
    if said:
        assert refused(check, [problem], "f.jsonl").startswith(f"f.jsonl: 't': 'test' {said}")
    else:
        check([problem], "f.jsonl")
