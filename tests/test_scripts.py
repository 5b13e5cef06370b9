"""The three scripts, end to end on tiny random checkpoints; and the lab's own making, shortened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import eval_code  # noqa: E402
import train_ppo  # noqa: E402
import train_rm  # noqa: E402
from pfppo.run import checkpoint, folder as rundir  # noqa: E402
from pfppo import data  # noqa: E402
from pfppo.lab import default as lab  # noqa: E402
from pfppo.config import UserError  # noqa: E402
from pfppo.filters import FILTERS  # noqa: E402
from pfppo.metrics import NAMES  # noqa: E402

import numpy as np
import pytest
import torch
from conftest import ROOT
from running import numbers, options, read, run
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)


def test_a_run_leaves_what_the_readme_promises(finished):
    names = {path.name for path in finished.iterdir()}
    wanted = {"args.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "policy"}
    assert wanted <= names
    rows = read(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(tuple(row) == NAMES for row in rows)
    assert all(row["ratio_first_minibatch"] == 1.0 for row in rows)
    assert rows[0]["kl_k1"] == 0 and rows[0]["kl_k3"] == 0
    samples = read(finished / "samples.jsonl")
    assert len(samples) == 4 * 4 * 3
    fields = {"step", "task_id", "sample", "prompt", "response", "reward", "score", "weight"}
    assert fields <= set(samples[0])
    for step in range(1, 5):
        kept = [s["weight"] for s in samples if s["step"] == step]
        assert sum(kept) == 8 and [s for s in kept if s not in (0, 1)] == []


def test_the_exported_policy_loads_in_transformers(finished):
    model = AutoModelForCausalLM.from_pretrained(finished / "policy")
    assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_metrics_agree_with_the_samples(finished):
    samples = read(finished / "samples.jsonl")
    for row in read(finished / "metrics.jsonl"):
        mine = [s for s in samples if s["step"] == row["step"]]
        kept = [s["reward"] for s in mine if s["weight"]]
        dropped = [s["score"] for s in mine if not s["weight"]]
        assert row["reward_all"] == pytest.approx(sum(s["reward"] for s in mine) / len(mine), 1e-4)
        assert row["reward_kept"] == pytest.approx(sum(kept) / len(kept), 1e-4)
        assert row["score_dropped"] == pytest.approx(sum(dropped) / len(dropped))


def test_equal_arguments_give_equal_files(tiny, finished, tmp_path):
    run(train_ppo, *options(tiny, tmp_path / "again", steps=4, save_every=2))
    assert numbers(tmp_path / "again") == numbers(finished)
    assert (tmp_path / "again/samples.jsonl").read_text() == (
        finished / "samples.jsonl"
    ).read_text()


@pytest.mark.parametrize("instant", ["append_jsonl", "start", "finish"])
def test_an_interrupted_run_resumes_to_the_same_numbers(
    tiny, finished, tmp_path, monkeypatch, instant
):
    def interrupted(*args, **kwargs):
        step = {
            "append_jsonl": lambda: args[1][0]["step"],
            "start": lambda: args[1],
            "finish": lambda: args[0].pending and args[0].pending[0],
        }[instant]()
        if step == 4:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    owner = rundir if instant == "append_jsonl" else checkpoint.Saver
    original = getattr(owner, instant)
    monkeypatch.setattr(owner, instant, interrupted)
    argv = options(tiny, tmp_path / "run", steps=4, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        run(train_ppo, *argv)
    monkeypatch.undo()
    run(train_ppo, *argv, "--resume")
    assert numbers(tmp_path / "run") == numbers(finished)
    final = "policy/model.safetensors"
    resumed, whole = load_file(tmp_path / "run" / final), load_file(finished / final)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_killed_run_resumes_to_the_same_numbers(tiny, finished, tmp_path):
    argv = options(tiny, tmp_path / "run", steps=4, save_every=2)
    command = [sys.executable, "train_ppo.py", *map(str, argv)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(train_ppo, *argv, "--resume")
    assert numbers(tmp_path / "run") == numbers(finished)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tiny, finished, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    saved = json.loads((copy / "args.json").read_text()) | {"run_dir": str(copy)}
    (copy / "args.json").write_text(json.dumps(saved))
    broken = next((copy / "checkpoints/step_4/sharded").glob("*.distcp"))
    broken.write_bytes(broken.read_bytes()[:-10])
    run(train_ppo, *options(tiny, copy, steps=4, save_every=2), "--resume")
    assert "step_4: incomplete, falling back to" in capsys.readouterr().out
    assert numbers(copy) == numbers(finished)


@pytest.mark.parametrize("name", FILTERS)
def test_every_filter_trains(tiny, tmp_path, name):
    samples = 1 if name == "single" else 3
    kept = {"single": 4, "none": 12, "best_of_n": 4, "best_random": 8, "best_worst": 8}
    argv = options(
        tiny,
        tmp_path / "run",
        filter=name,
        steps=1,
        samples_per_prompt=samples,
        validation="",
        test="",
    )
    run(train_ppo, *argv)
    (row,) = numbers(tmp_path / "run")
    assert row["kept"] == pytest.approx(kept.get(name, 12 * row["kept"]) / (4 * samples))
    assert row["grad_norm_actor"] is None or row["grad_norm_actor"] > 0


def test_other_options_run(tiny, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "import torch\n"
        "def first(rewards, generator):\n"
        "    return (torch.arange(rewards.shape[1]) == 0) * torch.ones_like(rewards) * 0.5\n"
        "def long(prompts, responses, problems):\n"
        "    return [float(len(r)) / 20 for r in responses]\n"
    )
    argv = options(
        tiny,
        tmp_path / "run",
        steps=1,
        filter=f"{own}:first",
        reward=f"{own}:long",
        reward_model="",
        ppo_epochs=2,
        loss_aggregation="token_mean",
        kl_target=0.5,
        missing_eos_penalty=0.5,
        temperature=0.8,
        gamma=0.99,
        param_dtype="bfloat16",
        sampling_batch=5,
    )
    run(train_ppo, *argv)
    (row,) = numbers(tmp_path / "run")
    samples = read(tmp_path / "run/samples.jsonl")
    assert [s["weight"] for s in samples if s["sample"] == 0] == [0.5] * 4
    assert row["kept"] == pytest.approx(1 / 3)
    assert row["truncated"] > 0.5 and min(s["reward"] for s in samples) >= -0.5


def test_a_run_that_cannot_fit_ends_before_it_loads(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train_ppo.loading, "load_policies", None)
    with pytest.raises(UserError, match="--device_memory 0.0001: .* needs .* GB per rank"):
        run(train_ppo, *options(tiny, tmp_path / "run", device_memory=1e-4))
    assert not (tmp_path / "run").exists()


def test_the_oracle_is_a_reward(tiny, tmp_path):
    run(train_ppo, *options(tiny, tmp_path / "run", steps=1, reward="tests", test=""))
    samples = read(tmp_path / "run/samples.jsonl")
    assert all(s["reward"] == 2 * s["score"] - 1 for s in samples)


def test_prompts_without_tests_train_without_scores(tiny, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": row["prompt"]} for row in read(tiny / "train.jsonl")]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = options(tiny, tmp_path / "run", prompts=prompts, validation="", test="", steps=1)
    run(train_ppo, *argv)
    (row,) = numbers(tmp_path / "run")
    assert row["score_all"] is None and row["reward_all"] is not None
    assert (tmp_path / "run/policy/config.json").exists()


def test_a_step_in_which_nothing_is_kept_makes_no_update(tiny, tmp_path, capsys):
    own = tmp_path / "own.py"
    own.write_text("def nothing(rewards, generator):\n    return rewards * 0\n")
    run(train_ppo, *options(tiny, tmp_path / "run", filter=f"{own}:nothing", test=""))
    assert numbers(tmp_path / "run")[-1]["empty_steps"] == 2
    assert "nothing kept: no update" in capsys.readouterr().out
    folders = (tiny / "policy", tmp_path / "run/policy")
    before, after = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_reward_model_loads_in_transformers_with_equal_scores(tiny):
    from pfppo.model import ScalarModel, read_classifier

    theirs = AutoModelForSequenceClassification.from_pretrained(tiny / "rm")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    ours = ScalarModel(read_classifier(tiny / "rm"))(ids, torch.tensor([[4]]))
    assert theirs.config.num_labels == 1
    torch.testing.assert_close(ours[0, 0], theirs(ids).logits[0])


@pytest.mark.parametrize("padding", ["none", "eos", "its own"])
def test_an_exported_reward_model_scores_a_response_with_eos_as_here(tiny, tmp_path, padding):
    """transformers reads the score before what it takes for padding, which EOS must not be."""
    from pfppo.batch import collate
    from pfppo.model import ScalarModel, read_classifier

    shutil.copytree(tiny / "policy", tmp_path / "policy")
    tokenizer = data.load_tokenizer(tmp_path / "policy")
    if padding != "its own":
        tokenizer.pad_token = None if padding == "none" else tokenizer.eos_token
        tokenizer.save_pretrained(tmp_path / "policy")
        config = json.loads((tmp_path / "policy/config.json").read_text())
        config["pad_token_id"] = tokenizer.pad_token_id
        (tmp_path / "policy/config.json").write_text(json.dumps(config))
    rm = ("--policy", tmp_path / "policy", "--pairs", tiny / "pairs.jsonl", "--batch", 8)
    run(train_rm, *rm, "--run_dir", tmp_path / "rm")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    rows = collate([[5, 6, 7]], [[8, 9, tokenizer.eos_token_id]], data.pad_id_of(tokenizer))
    ours = ScalarModel(read_classifier(tmp_path / "rm"))(rows.ids, rows.ends)
    with torch.no_grad():
        torch.testing.assert_close(ours[:, 0], theirs(rows.ids).logits)


def test_all_pairs_of_a_prompt_are_held_out_together(tiny, tmp_path, capsys):
    row = {"prompt": "def f(x):\n", "rejected": "    return 0\n"}
    rows = [row | {"chosen": f"    return {i}\n"} for i in range(1, 9)]
    rows += [row | {"prompt": "def g(x):\n", "chosen": "    return x\n"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rm = ("--policy", tiny / "policy", "--pairs", tmp_path / "pairs.jsonl", "--batch", 1)
    run(train_rm, *rm, "--run_dir", tmp_path / "rm", "--held_out", 0.5, "--epochs", 1)
    said = capsys.readouterr().out
    assert "8 pairs for training, 1 held out" in said or "1 pairs for training, 8 held out" in said


def test_chat_pairs_and_prompts_train_through_one_template(tiny, tmp_path):
    """The policy's tokenizer has a chat template; pairs and prompts are lists of messages."""
    shutil.copytree(tiny / "policy", tmp_path / "policy")
    tokenizer = data.load_tokenizer(tmp_path / "policy")
    tokenizer.chat_template = (
        "{% for turn in messages %}<{{ turn.role }}> {{ turn.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>\n{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "policy")
    system = {"role": "system", "content": "Answer in Python."}
    rows, prompts = [], []
    for pair in read(tiny / "pairs.jsonl"):
        turns = [system, {"role": "user", "content": pair["prompt"]}]
        prompts.append({"prompt": turns})
        answers = {name: {"role": "assistant", "content": pair[name]} for name in pair}
        rows.append({name: [*turns, answers[name]] for name in ("chosen", "rejected")})
    for name, lines in (("pairs", rows), ("prompts", prompts)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    rm = ("--policy", tmp_path / "policy", "--pairs", tmp_path / "pairs.jsonl", "--batch", 8)
    style = ("--prompt_style", "chat")
    run(train_rm, *rm, *style, "--run_dir", tmp_path / "rm")
    assert read(tmp_path / "rm/pairs.jsonl")[0]["prompt"] == prompts[0]["prompt"]
    files = {"policy": tmp_path / "policy", "reward_model": tmp_path / "rm"}
    files |= {"prompts": tmp_path / "prompts.jsonl", "validation": "", "test": ""}
    run(train_ppo, *options(tiny, tmp_path / "run", **files, steps=1), *style)
    asked = {row["prompt"] for row in read(tmp_path / "run/samples.jsonl")}
    assert asked <= {row["prompt"][1]["content"] for row in prompts}
    with pytest.raises(UserError, match=r"pairs.jsonl, line 1: .*--prompt_style chat"):
        run(train_rm, *rm, "--run_dir", tmp_path / "other")


@pytest.mark.parametrize("world", [1, 2, 3, 12, 24])
def test_the_labs_reward_model_is_made_on_any_number_of_ranks(monkeypatch, world):
    asked = []
    monkeypatch.setattr(train_rm, "main", lambda args, ranks: asked.append(args))
    train_rm.make_for_lab("folder", SimpleNamespace(world=world))
    assert asked[0].run_dir == "folder" and asked[0].batch % world == 0
    assert 16 <= asked[0].batch < 16 + world


def test_eval_code_reads_what_it_writes(tiny, tmp_path, capsys):
    problems = tiny / "held_out.jsonl"
    shared = ("--problems", problems)
    asked = ("--policy", tiny / "policy", "--samples_per_problem", 2, "--k", "1,2")
    run(eval_code, *shared, *asked, "--max_new_tokens", 8, "--out", tmp_path / "a")
    run(eval_code, *shared, "--samples", tmp_path / "a/samples.jsonl", "--out", tmp_path / "b")
    first, second = read(tmp_path / "a/results.jsonl"), read(tmp_path / "b/results.jsonl")
    fields = {"task_id", "sample", "passed", "outcome", "seconds"}
    assert len(first) == 12 and set(first[0]) == fields
    assert [(r["task_id"], r["sample"], r["passed"]) for r in first] == [
        (r["task_id"], r["sample"], r["passed"]) for r in second
    ]
    assert "pass@2" in capsys.readouterr().out


def test_eval_code_judges_completions_and_solutions_in_input_order(tiny, tmp_path):
    problems = read(tiny / "held_out.jsonl")[:3]
    samples = [
        {"task_id": p["task_id"], **answer}
        for p in reversed(problems)
        for answer in (
            {"completion": p["canonical_solution"]},
            {"solution": p["prompt"] + "    return None\n"},
        )
    ]
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    files = ("--problems", tiny / "held_out.jsonl", "--samples", file)
    run(eval_code, *files, "--out", tmp_path / "o")
    results = read(tmp_path / "o/results.jsonl")
    assert [r["task_id"] for r in results] == [s["task_id"] for s in samples]
    assert [r["passed"] for r in results] == [True, False] * 3


EVALUATION = ("--samples_per_problem", 2, "--max_new_tokens", 8, "--sampling_batch", 4)


def test_eval_code_goes_on_where_it_was_stopped(tiny, tmp_path, capsys, monkeypatch):
    argv = ("--policy", tiny / "policy", "--problems", tiny / "held_out.jsonl", *EVALUATION)
    argv = (*argv, "--reward_model", tiny / "rm", "--filters", "best_worst")
    run(eval_code, *argv, "--out", tmp_path / "whole")
    table = capsys.readouterr().out.split("held_out.jsonl: ")[1].split(str(tmp_path))[0]
    original, calls = rundir.append_jsonl, []

    def interrupted(path, rows):
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt
        original(path, rows)

    monkeypatch.setattr(rundir, "append_jsonl", interrupted)
    argv_stopped = (*argv, "--out", tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        run(eval_code, *argv_stopped)
    monkeypatch.undo()
    left = len(read(tmp_path / "stopped/samples.jsonl"))
    assert 0 < left < 12
    with pytest.raises(UserError, match="--out .* holds a run with these arguments: give"):
        run(eval_code, *argv_stopped)
    with pytest.raises(UserError, match="--out .* holds a run with other arg.*seed 1 there"):
        run(eval_code, *argv_stopped, "--resume", "--seed", 2)
    capsys.readouterr()
    run(eval_code, *argv_stopped, "--resume", "--k", "1,2")
    again = capsys.readouterr().out
    for name in ("samples.jsonl", "results.jsonl"):
        whole, stopped = (
            [{k: v for k, v in row.items() if k != "seconds"} for row in read(tmp_path / d / name)]
            for d in ("whole", "stopped")
        )
        assert len(whole) == 12 and whole == stopped
    assert "pass@2" in again and table.split("outcome")[1] in again


@pytest.mark.parametrize("style", ["chat", "deepseek"])
def test_eval_code_asks_in_dialogue(tiny, tmp_path, style, monkeypatch):
    policy = tmp_path / "policy"
    shutil.copytree(tiny / "policy", policy)
    config = json.loads((policy / "tokenizer_config.json").read_text())
    config["chat_template"] = "<{{ messages[0]['content'] }}>"
    (policy / "tokenizer_config.json").write_text(json.dumps(config))
    seen, original = [], data.render

    def watch(prompt, tokenizer, style):
        ids = original(prompt, tokenizer, style)
        seen.append(tokenizer.decode(ids))
        return ids

    monkeypatch.setattr(data, "render", watch)
    argv = ("--policy", policy, "--problems", tiny / "held_out.jsonl", "--prompt_style", style)
    argv = (*argv, "--max_new_tokens", 250)
    with pytest.raises(UserError, match="max_position_embeddings"):  # 256 are too few for these
        run(eval_code, *argv, "--out", tmp_path / "o")
    ends = {"chat": ("<Please", "```>"), "deepseek": ("You are an AI", "### Response:\n")}
    begin, end = ends[style]
    assert len(seen) == 6
    assert all(text.startswith(begin) and text.endswith(end) for text in seen)
    assert all("```python\ndef" in text for text in seen)


def test_few_shots_are_mbpps(tiny, tmp_path):
    argv = ("--policy", tiny / "policy", "--problems", tiny / "held_out.jsonl")
    with pytest.raises(UserError, match="--prompt_style few_shot: the examples are MBPP's"):
        run(eval_code, *argv, "--out", tmp_path / "o", "--prompt_style", "few_shot")


def test_eval_code_compares_filters(tiny, tmp_path, capsys):
    argv = ("--policy", tiny / "policy", "--problems", tiny / "held_out.jsonl")
    rm = ("--reward_model", tiny / "rm", "--samples_per_problem", 4, "--max_new_tokens", 8)
    run(eval_code, *argv, *rm, "--out", tmp_path / "o", "--bins", 4)
    out = capsys.readouterr().out
    assert all(name in out for name in FILTERS) and "4 bins" in out
    assert all("reward" in row for row in read(tmp_path / "o/samples.jsonl"))


def comparison_of(folder):
    return json.loads((folder / "reliability.json").read_text())


def test_judged_samples_give_the_same_numbers_without_a_model(tiny, tmp_path, capsys):
    """Also of a reward model without a card, whose raw rewards are normalised here."""
    rm = tmp_path / "rm"
    shutil.copytree(tiny / "rm", rm)
    (rm / "reward_model.json").unlink()
    argv = ("--policy", tiny / "policy", "--problems", tiny / "held_out.jsonl", "--bins", 4)
    argv += ("--samples_per_problem", 4, "--max_new_tokens", 8, "--reward_model", rm)
    run(eval_code, *argv, "--out", tmp_path / "o")
    first, samples = comparison_of(tmp_path / "o"), (tmp_path / "o/samples.jsonl").read_text()
    rewards = [row["reward"] for row in read(tmp_path / "o/samples.jsonl")]
    assert np.mean(rewards) == pytest.approx(0, abs=1e-5)
    assert np.std(rewards, ddof=1) == pytest.approx(1, abs=1e-5)
    run(eval_code, *argv, "--out", tmp_path / "o", "--resume")
    assert comparison_of(tmp_path / "o") == first
    assert (tmp_path / "o/samples.jsonl").read_text() == samples
    (tmp_path / "o/samples.jsonl").rename(tmp_path / "mine.jsonl")
    alone = ("--from_samples", tmp_path / "mine.jsonl", "--out", tmp_path / "again", "--bins", 4)
    run(eval_code, *alone)
    assert comparison_of(tmp_path / "again") == first


@pytest.mark.parametrize("reward", ["tests", "noisy:tails", "combined"])
def test_other_rewards_are_compared_too(tiny, tmp_path, reward):
    argv = ("--policy", tiny / "policy", "--problems", tiny / "held_out.jsonl", "--reward", reward)
    argv += ("--samples_per_problem", 4, "--max_new_tokens", 8, "--out", tmp_path / "o")
    if reward == "combined":
        with pytest.raises(UserError, match="--reward combined: needs a --reward_model, found non"):
            run(eval_code, *argv)
        argv += ("--reward_model", tiny / "rm")
    run(eval_code, *argv, "--filters", "none")
    rows = read(tmp_path / "o/samples.jsonl")
    if reward == "combined":
        assert all(r["reward"] == np.float32(r["raw_reward"] + 2 * r["score"] - 1) for r in rows)
    elif reward == "tests":
        assert all(r["reward"] == 2 * r["score"] - 1 for r in rows)
    first = comparison_of(tmp_path / "o")
    run(eval_code, *argv, "--filters", "none", "--resume")
    assert comparison_of(tmp_path / "o") == first


def test_samples_of_training_can_be_compared(finished, tmp_path):
    run(eval_code, "--from_samples", finished / "samples.jsonl", "--out", tmp_path, "--bins", 3)
    metrics_rows = read(finished / "metrics.jsonl")
    found = {row["filter"]: row for row in comparison_of(tmp_path)["filters"]}
    scores = [row["score_all"] for row in metrics_rows]
    assert found["none"]["pass_kept"] == pytest.approx(np.mean(scores))
    assert {"r2_all", "r2_kept"} <= metrics_rows[0].keys()


def test_contamination_ends_with_1_above_the_limit_that_was_asked_for(tiny, tmp_path, capsys):
    path = tiny / "held_out.jsonl"
    argv = ("--problems", path, "--contamination", path, "--out", tmp_path)
    for limit, status in ((1.0, 0), (0.9, 1)):
        with pytest.raises(SystemExit) as ended:
            run(eval_code, *argv, "--max_overlap", limit)
        assert ended.value.code == status
    assert "100.0%" in capsys.readouterr().out


def test_pairs_are_built_by_executing_samples(tiny, tmp_path, capsys):
    """An untaught policy goes on with the comment, and passes, or breaks the line, and fails."""
    problem = {
        "prompt": "def solve(xs):\n    return 1  #",
        "entry_point": "solve",
        "canonical_solution": "\n",
        "test": "def check(candidate):\n    assert candidate([]) == 1\n",
    }
    problems = tmp_path / "problems.jsonl"
    rows = [problem | {"task_id": str(i)} for i in range(12)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = ("--max_new_tokens", 24, "--batch", 2, "--epochs", 1, "--held_out", 0.2)
    argv = ("--policy", tiny / "policy", "--prompts", problems, "--run_dir", tmp_path / "rm")
    run(train_rm, *argv, *sizes)
    assert "have a passing and a failing sample" in capsys.readouterr().out
    pairs = read(tmp_path / "rm/pairs.jsonl")
    assert len(pairs) >= 2
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)


def test_the_lab_is_made_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lab, "SFT_STEPS", 3)
    monkeypatch.setattr(lab, "PROBLEMS", {"train": 8, "rm": 8, "validation": 4, "test": 4})
    run(eval_code, "--max_new_tokens", 8)
    made = capsys.readouterr().out
    assert "SFT policy of" in made and "8 problems in" in made
    assert len(read("runs/lab/test.jsonl")) == 4
    run(eval_code, "--max_new_tokens", 8)
    again = capsys.readouterr().out
    assert "SFT policy of" not in again and "runs/eval-2" in again


BAD = {
    "unknown filter": ({"filter": "bset"}, "--filter bset: unknown, expected one of single, none"),
    "one sample": ({"samples_per_prompt": 1}, "needs at least 2 samples per prompt, found 1"),
    "minibatch": ({"minibatch": 6}, "--minibatch 6: does not divide the 8 samples"),
    "microbatch": ({"microbatch": 3}, "--microbatch 3: does not divide the 4 rows"),
    "prompts": ({"prompts_per_step": 32, "minibatch": 64}, "more than the 24 prompts"),
    "zero steps": ({"steps": 0}, "--steps 0: expected at least 1"),
    "negative KL": ({"kl_coef": -0.1}, "--kl_coef -0.1: expected at least 0"),
    "discount": ({"gamma": 1.5}, "--gamma 1.5: expected 0 to 1"),
    "huge seed": ({"seed": 10**20}, f"--seed {10**20}: expected 0 to 4294967295"),
    "long prompt": ({"max_prompt_tokens": 5}, "tokens, expected 1 to 5"),
    "long response": ({"max_new_tokens": 250}, "expected at most 256, the max_position_embeddings"),
    "no file": ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl: cannot be read"),
    "no policy": ({"policy": "./nowhere"}, "--policy ./nowhere: there is no such folder"),
    "no reward model": ({"reward_model": ""}, "--reward model: needs a --reward_model, found none"),
    "unknown reward": ({"reward": "nice"}, "--reward nice: unknown, expected one of model, tests"),
    "chat": ({"prompt_style": "chat"}, "has no chat template"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_option_is_one_line(tiny, tmp_path, case):
    changed, expected = BAD[case]
    with pytest.raises(UserError) as error:
        run(train_ppo, *options(tiny, tmp_path / "run", **changed))
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl: cannot be read"),
        ({"reward": "nice"}, "--reward nice: unknown"),
        ({"reward_model": "./nowhere"}, "--reward_model ./nowhere: there is no such folder"),
        ({"run_dir": "file/run"}, "--run_dir file/run: .*file is a file, expected a folder"),
        ({"filter": "my_filters:own"}, "--filter my_filters:own: cannot import my_filters"),
    ],
)
def test_a_mistake_is_told_before_the_lab_is_made(tmp_path, monkeypatch, changed, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=expected):
        run(train_ppo, *(word for name, value in changed.items() for word in (f"--{name}", value)))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--top_p", 0), "--top_p 0.0: expected more than 0, at most 1"),
        (("--top_k", -1), "--top_k -1: expected at least 0"),
        (("--k", "1,0"), "--k 1,0: expected numbers from 1 on"),
        (("--k", "one"), "--k one: expected numbers from 1 on"),
        (("--k", "2"), "--k 2: expected at most --samples_per_problem 1"),
        (
            ("--temperature", 0, "--samples_per_problem", 2),
            "--temperature 0: gives one answer 2 times",
        ),
        (("--filters", "best_of_n"), "--filters best_of_n: what they keep is judged by a --reward"),
        (("--reward_model", "lab", "--filters", "foo"), "--filters foo: unknown, expected one of"),
        (("--temperature", -0.5), "--temperature -0.5: expected at least 0, or -1"),
        (("--max_new_tokens", 250), "expected at most 256, the max_position_embeddings"),
    ],
)
def test_eval_code_says_what_is_wrong_in_one_line(tiny, tmp_path, words, expected):
    argv = ("--policy", tiny / "policy", "--problems", tiny / "held_out.jsonl")
    with pytest.raises(UserError) as error:
        run(eval_code, *argv, "--out", tmp_path / "o", *words)
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--held_out", 1.5), "--held_out 1.5: expected 0 to 1"),
        (("--held_out", 1), "more than the 0 pairs"),
        (("--batch", 64), "--batch 64: more than the"),
        (("--pairs", "", "--samples_per_prompt", 1), "a pair needs at least 2"),
        (("--pairs", "", "--max_new_tokens", 250), "expected at most 256"),
    ],
)
def test_train_rm_says_what_is_wrong_in_one_line(tiny, tmp_path, words, expected):
    argv = ("--policy", tiny / "policy", "--prompts", tiny / "train.jsonl")
    pairs = ("--pairs", tiny / "pairs.jsonl", "--run_dir", tmp_path / "rm")
    with pytest.raises(UserError) as error:
        run(train_rm, *argv, *pairs, *words)
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "rm").exists()


UNTESTED = '{"prompt": "def f():\\n"}\n'


@pytest.mark.parametrize("name", ["validation", "test"])
def test_problems_that_choose_or_judge_the_policy_need_tests(tiny, tmp_path, name):
    file = tmp_path / "untested.jsonl"
    file.write_text(UNTESTED)
    with pytest.raises(UserError, match=f"--{name} {file}: .*line 1.* has no 'test'"):
        run(train_ppo, *options(tiny, tmp_path / "run", **{name: file}))


@pytest.mark.parametrize(
    ("kind", "body", "expected"),
    [
        ("reward", "raise KeyError('x')", "KeyError: 'x'"),
        ("reward", "return [1.0]", r"expected 2 finite numbers, found shape \(1,\)"),
        ("reward", "exit(3)", "SystemExit: 3"),
        ("filter", "exit(0)", "SystemExit: 0"),
    ],
)
def test_what_a_user_s_function_does_wrong_is_told_before_anything_is_written(
    tiny, tmp_path, kind, body, expected
):
    own = tmp_path / "own.py"
    own.write_text(f"def own(*args):\n    {body}\n")
    with pytest.raises(UserError, match=f"--{kind} .*own.py:own.*{expected}"):
        run(train_ppo, *options(tiny, tmp_path / "run", **{kind: f"{own}:own"}))
    assert not (tmp_path / "run").exists()


def test_resume_without_a_name_goes_on_with_the_last_run(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [str(word) for word in options(tiny, "", test="", validation="")]
    run(train_ppo, *argv, "--resume")
    assert "runs/best_random: no checkpoint to go on from" in capsys.readouterr().out
    run(train_ppo, *argv)
    run(train_ppo, *argv, "--steps", "3", "--resume")
    out = capsys.readouterr().out
    assert "step   3/3" in out.split("step   2/2")[1] and "step   1/3" not in out
    assert [path.name for path in sorted((tmp_path / "runs").iterdir())] == [
        "best_random",
        "best_random-2",
    ]


@pytest.mark.slow
def test_a_filter_that_draws_from_elsewhere_is_the_same_on_all_ranks(tiny, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "import os, torch\n"
        "def half(rewards, generator):\n"
        "    torch.manual_seed(int(os.environ['RANK']))\n"
        "    return (torch.rand(rewards.shape) < 0.5).float()\n"
        "def second(rewards, generator):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise KeyError('only rank 1')\n"
        "    return torch.ones_like(rewards)\n"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

    def start(name, **changed):
        argv = options(tiny, tmp_path / name, filter=f"{own}:{name}", test="", validation="")
        return subprocess.run(
            [sys.executable, *launcher, "train_ppo.py", *map(str, argv), "--steps", "1"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=150,
        )

    done = start("half")
    assert done.returncode == 0, done.stderr[-2000:]
    failed = start("second")
    assert "train_ppo.py: error: --filter" in failed.stderr and "only rank 1" in failed.stderr
    assert "gloo" not in failed.stderr and not (tmp_path / "second").exists()


def test_what_only_the_second_rank_meets_is_one_line_of_the_first(tiny, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "import os\n"
        "def score(prompts, responses, problems):\n"
        "    return [float('nan') if os.environ['RANK'] == '1' else 0.5] * len(responses)\n"
    )
    argv = options(tiny, tmp_path / "run", reward=f"{own}:score", test="", validation="")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, "train_ppo.py", *map(str, argv)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    ours = [line for line in done.stderr.splitlines() if line.startswith("train_ppo.py: error:")]
    assert len(ours) == 1 and "finite numbers, found [nan" in ours[0]
    assert "gloo" not in done.stderr and done.returncode != 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none_is_one_line(tiny, tmp_path):
    with pytest.raises(UserError, match="--device cuda: torch finds no CUDA device"):
        run(train_ppo, *options(tiny, tmp_path / "run", device="cuda"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{not json", "line 2: not JSON"),
        ('{"task_id": "x"}', "line 2: field 'prompt'"),
        ('{"prompt": 3}', "line 2: field 'prompt': expected a string, found int"),
        ("", None),
    ],
)
def test_a_bad_prompts_file_is_one_line(tiny, tmp_path, line, expected):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "def f():\n"}) + "\n" + line if expected else "")
    with pytest.raises(UserError) as error:
        run(train_ppo, *options(tiny, tmp_path / "run", prompts=file))
    assert (expected or "no rows") in str(error.value) and str(file) in str(error.value)


def test_a_reward_model_that_does_not_fit_is_refused(tiny, tmp_path):
    other = tmp_path / "rm"
    shutil.copytree(tiny / "rm", other)
    card = json.loads((other / "reward_model.json").read_text())
    for name, what in (("vocabulary", "vocabulary"), ("template", "prompt template")):
        (other / "reward_model.json").write_text(json.dumps(card | {name: "0" * 12}))
        with pytest.raises(UserError, match=f"its {what} differs") as error:
            run(train_ppo, *options(tiny, tmp_path / "run", reward_model=other))
        assert "0" * 12 in str(error.value) and card[name] in str(error.value)


def test_a_causal_lm_is_refused_as_reward_model(tiny, tmp_path):
    with pytest.raises(UserError, match="not a reward model"):
        run(train_ppo, *options(tiny, tmp_path / "run", reward_model=tiny / "policy"))


def test_a_reward_model_from_elsewhere_is_normalised_on_samples(tiny, tmp_path):
    other = tmp_path / "rm"
    shutil.copytree(tiny / "rm", other)
    (other / "reward_model.json").unlink()
    run(train_ppo, *options(tiny, tmp_path / "run", reward_model=other, steps=1, test=""))
    (row,) = numbers(tmp_path / "run")
    assert abs(row["reward_all"]) < 1.5


def test_another_run_s_directory_is_refused(tiny, finished):
    with pytest.raises(UserError, match="kl_coef .* there, .* here.*--resume"):
        run(train_ppo, *options(tiny, finished, steps=4, save_every=2, kl_coef=0.5))


def test_the_command_line_ends_with_status_2_and_one_line(tiny, tmp_path):
    command = [sys.executable, "train_ppo.py", "--filter", "bset"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "--filter bset" in done.stderr
    assert not list(tmp_path.iterdir())
