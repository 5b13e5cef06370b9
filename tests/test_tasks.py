"""Tasks without tests, from pairs to a better policy, and without a sandbox."""

import json
import random

import eval_code
import train_ppo
import train_rm
from pfppo.lab import default as lab
from pfppo.model import Policy
from pfppo.problems import load_problems, load_prompts, load_verifier, prompt_text, verifiers

import numpy as np
import pytest
import torch
from conftest import words_of
from ranks import refused
from running import options, read, run, write_rows
from test_verifiers import LAST, own_of
from transformers import LlamaConfig, LlamaForCausalLM


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
