"""One run on any number of ranks, in any memory, stopped and started again: the same numbers."""

import contextlib
import os
import random
import re
import shutil
import signal
import time

import train_ppo
from pfppo import sampler
from pfppo.metrics import SECONDS
from pfppo.reward import load_card
from pfppo.run import checkpoint, export

import kills
import pytest
import torch
from ranks import refused
from running import forked, numbers, options, read, run, started, wait_for_steps, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

LONG = {"steps": 4, "save_every": 2}  # those of the fixture `finished`


def of_step_1(folder):
    rows = [row for row in read(folder / "samples.jsonl") if row["step"] == 1]
    return [(row["task_id"], row["sample"], row["response"], row["weight"]) for row in rows]


def last_actor(run_dir):
    """{name: whole tensor} of the newest checkpoint's actor."""
    return export.policy_of(checkpoint.complete(run_dir)[0])


def assert_near(rows, others, keys=()):
    """Equal but for the order of sums."""
    rows, others = (sorted(x, key=lambda row: [row[key] for key in keys]) for x in (rows, others))
    for row, other in zip(rows, others, strict=True):
        for name in other.keys() - set(SECONDS):
            near = isinstance(other[name], float)
            value = pytest.approx(other[name], rel=1e-3, abs=1e-5) if near else other[name]
            assert row[name] == value, name


# ---- ranks ---------------------------------------------------------------------------------------

WIDE = {"steps": 3, "prompts_per_step": 8, "minibatch": 8, "test": "", "filter": "top_bottom"}
WIDE |= {"actor_lr": 1e-4, "ppo_epochs": 2}


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """Three steps on one rank, with a filter that keeps another number of each prompt."""
    folder = tmp_path_factory.mktemp("ranks") / "1"
    run(train_ppo, *options(tiny, folder, **WIDE))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, words",
    [
        (2, []),
        pytest.param(4, ["--shard_group_size", "2", "--offload_optimizer"], marks=pytest.mark.slow),
    ],
)
def test_any_number_of_ranks_does_what_one_does(tiny, alone, tmp_path, ranks, words):
    folder = tmp_path / "run"
    statuses, said = forked(train_ppo, *options(tiny, folder, **WIDE), *words, ranks=ranks)
    assert not any(statuses), said
    assert of_step_1(folder) == of_step_1(alone)
    assert_near(numbers(folder), numbers(alone))
    actor, wanted = last_actor(folder), last_actor(alone)
    assert actor.keys() == wanted.keys()
    for name, value in actor.items():
        assert (value - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


HOSTILE = """
import torch

def skewed(rewards, generator):
    \"\"\"In turn: all of one prompt, nothing at all, one sample, everything but one prompt.\"\"\"
    kind = int(torch.randint(4, (1,), generator=generator))
    weights = torch.zeros_like(rewards)
    if kind == 0:
        weights[-1] = 1
    elif kind == 2:
        weights[1, 1] = 1
    elif kind == 3:
        weights[1:] = 1
    return weights
"""


@pytest.mark.slow
def test_four_ranks_live_with_any_lengths_and_any_filter(tiny, tmp_path):
    """Responses of 1 to 40 tokens, prompts of very different lengths, ranks with nothing to do."""
    (tmp_path / "hostile.py").write_text(HOSTILE)
    problems = read(tiny / "train.jsonl")[:12]
    for number, problem in enumerate(problems):
        problem["prompt"] = "# " + "long " * (17 * (number % 3)) + "\n" + problem["prompt"]
    prompts = write_rows(tmp_path / "prompts.jsonl", problems)
    changed = {"prompts": prompts, "filter": f"{tmp_path / 'hostile.py'}:skewed", "steps": 8}
    changed |= {"max_new_tokens": 40, "test": "", "save_every": 3, "microbatch": 1}
    statuses, said = forked(train_ppo, *options(tiny, tmp_path / "run", **changed), ranks=4)
    assert not any(statuses), said
    rows = read(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    kept = {round(row["kept"], 3) for row in rows}
    assert len(kept) >= 3 and "nothing kept" in said
    lengths = [len(row["response"]) for row in read(tmp_path / "run/samples.jsonl")]
    assert min(lengths) < 20 < max(lengths)


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_saves_memory_changes_no_metric(tiny, finished, tmp_path):
    words = ["--gradient_checkpointing"]
    words += [f"--offload_{what}" for what in ("ref", "reward", "optimizer")]
    run(train_ppo, *options(tiny, tmp_path / "run", **LONG | {"test": ""}), *words)
    assert numbers(tmp_path / "run") == numbers(finished)


def test_at_the_papers_learning_rate_master_weights_move_and_bf16_ones_would_not(tiny, tmp_path):
    changed = {"actor_lr": 5e-7, "warmup": 0, "steps": 3, "test": "", "validation": ""}
    changed |= {"save_every": 3}
    run(train_ppo, *options(tiny, tmp_path / "run", **changed), "--param_dtype", "bfloat16")
    before = AutoModelForCausalLM.from_pretrained(tiny / "policy").state_dict()
    moved, lost, total = 0, 0, 0
    for name, value in last_actor(tmp_path / "run").items():
        change = value - before[name]
        assert change.abs().max() <= 6 * 5e-7 * 1.01  # six optimizer steps
        total += value.numel()
        moved += (change != 0).sum().item()
        lost += ((change != 0) & (value.bfloat16() == before[name].bfloat16())).sum().item()
    assert moved > 0.9 * total
    assert lost > 0.9 * moved  # what rounding to bf16 would have undone


# ---- stopped, started again ----------------------------------------------------------------------


def test_a_run_goes_on_with_another_number_of_ranks(tiny, finished, tmp_path):
    """Saved by one rank, resumed by two: the same samples kept, the same numbers."""
    folder = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "step_4")
    statuses, said = forked(train_ppo, *options(tiny, folder, **LONG), "--resume")
    assert not any(statuses), said
    assert "step   3/4" in said and "step   2/4" not in said
    assert_near(read(folder / "metrics.jsonl"), read(finished / "metrics.jsonl"))
    keys = ("step", "task_id", "sample")
    assert_near(*(read(path / "samples.jsonl") for path in (folder, finished)), keys)
    weights = [load_file(path / "policy/model.safetensors") for path in (folder, finished)]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number, name", [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_signal_saves_and_the_run_goes_on_to_the_same_numbers(
    tiny, finished, tmp_path, monkeypatch, capsys, number, name
):
    """Asked twice in step 2: while it samples the step is given up, in its update it is ended."""
    argv = options(tiny, tmp_path / "run", steps=4, save_every=100, test="")
    metrics = tmp_path / "run/metrics.jsonl"

    def asking(work):
        def asked(*args):
            if metrics.exists() and len(read(metrics)) == 1 and not once:
                once.append(signal.raise_signal(number))
            return work(*args)

        return asked

    for done, room, called in ((1, sampler, "draw_tokens"), (2, train_ppo, "backward")):
        once = []
        with monkeypatch.context() as patched:
            patched.setattr(room, called, asking(getattr(room, called)))
            ends = pytest.raises(SystemExit, match="130")
            with ends if number == signal.SIGINT else contextlib.nullcontext():
                run(train_ppo, *argv, "--resume")
        assert f"{name}, saved after step {done}; go on with --resume" in capsys.readouterr().out
        assert (tmp_path / f"run/checkpoints/step_{done}").exists() and len(read(metrics)) == done
    run(train_ppo, *argv, "--resume")
    assert numbers(tmp_path / "run") == numbers(finished)
    first, second = last_actor(tmp_path / "run"), last_actor(finished)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def pressed(process):
    """Ctrl-C at the terminal of a process that leads its group: what the whole group gets."""
    os.killpg(process.pid, signal.SIGINT)
    return process.communicate(timeout=60)[0]


@pytest.mark.slow
def test_ctrl_c_to_the_whole_group_saves_without_a_traceback(tiny, tmp_path):
    """And to a run that has begun no step: one line, and nothing left. The same command without its
    arguments goes on."""
    changed = {"steps": 5000, "save_every": 5000, "eval_every": 5000, "test": ""}
    alone = {"start_new_session": True}
    process = started("train_ppo.py", tiny, tmp_path / "run", popen=alone, **changed)
    wait_for_steps(process, tmp_path / "run", 2)
    said = pressed(process)
    assert process.returncode == 130 and "Traceback" not in said
    assert "Ctrl-C: saving, and then ending" in said
    (saved,) = (tmp_path / "run/checkpoints").glob("step_*")
    step = int(saved.name.removeprefix("step_"))
    assert f"Ctrl-C, saved after step {step}; go on with --resume" in said
    assert len(numbers(tmp_path / "run")) == step >= 2
    words = ["--run_dir", tmp_path / "run", "--resume", "--steps", step + 1]
    assert run(train_ppo, *words) is None
    assert [row["step"] for row in numbers(tmp_path / "run")] == list(range(1, step + 2))

    process = started("train_ppo.py", tiny, tmp_path / "none", popen=alone, **changed)
    while "sizes" not in process.stdout.readline():
        assert process.poll() is None
    said = pressed(process)
    line = "train_ppo.py: ended by Ctrl-C; the same command starts it again\n"
    assert process.returncode == 130 and said.endswith(line) and "Traceback" not in said
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number, name", [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_signal_to_torchrun_saves_and_one_rank_goes_on(tiny, tmp_path, number, name):
    changed = {"steps": 12, "save_every": 100, "eval_every": 100, "test": ""}
    process = started("train_ppo.py", tiny, tmp_path / "run", ranks=2, **changed)
    wait_for_steps(process, tmp_path / "run", 3)
    process.send_signal(number)
    assert f"{name}, saved after step" in process.communicate(timeout=60)[0]
    (saved,) = (tmp_path / "run/checkpoints").glob("step_*")
    assert 3 <= int(saved.name.removeprefix("step_")) == len(numbers(tmp_path / "run")) < 12
    run(train_ppo, *options(tiny, tmp_path / "run", **changed), "--resume")
    assert [row["step"] for row in numbers(tmp_path / "run")] == list(range(1, 13))


@pytest.mark.slow
def test_a_run_killed_twice_equals_one_that_never_stopped(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(kills.CHANGED, "steps", 9)
    assert kills.ended(tiny, tmp_path / "whole")
    run_dir, draw = tmp_path / "killed", random.Random(2)
    for steps in (2, 5):
        process = started("train_ppo.py", tiny, run_dir, "--resume", **kills.CHANGED)
        wait_for_steps(process, run_dir, steps)
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        process.communicate()
    assert not (run_dir / "result.json").exists() and len(numbers(run_dir)) < 9
    assert kills.ended(tiny, run_dir) and kills.equal(tmp_path / "whole", run_dir)


FAILS_ONCE = """
import os
from pathlib import Path

def score(prompts, responses, problems):
    mark, calls = Path(os.environ["MARK"]), Path(os.environ["MARK"] + ".calls")
    if int(os.environ["RANK"]) == 1:
        with open(calls, "a") as file:
            file.write(".")
        if len(calls.read_text()) > 5 and not mark.exists():  # in step 4: one try, one probe
            mark.write_text("")
            os._exit(9)
    return [len(response) % 7 for response in responses]
"""


@pytest.mark.slow
def test_torchruns_restart_goes_on_from_the_last_checkpoint(tiny, tmp_path, monkeypatch):
    (tmp_path / "fails.py").write_text(FAILS_ONCE)
    changed = {"reward": f"{tmp_path / 'fails.py'}:score", "steps": 6, "save_every": 2}
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    launch = ["--max-restarts", 1]
    process = started("train_ppo.py", tiny, tmp_path / "run", ranks=2, launch=launch, **changed)
    said = process.communicate(timeout=150)[0]
    assert process.returncode == 0 and (tmp_path / "mark").exists()
    assert said.count("step   1/6") == 1  # it did not start again from nothing
    assert [row["step"] for row in numbers(tmp_path / "run")] == list(range(1, 7))


# ---- exports -------------------------------------------------------------------------------------


def test_any_checkpoint_is_exported_with_the_reward_model(tiny, finished, tmp_path, capsys):
    for run_dir, step in ((finished, 4), (finished / "checkpoints/step_2", 2)):
        out = tmp_path / str(step)
        run(train_ppo, "--run_dir", run_dir, "--export", out)
        assert f"the policy after step {step}" in capsys.readouterr().out
        lm = AutoModelForCausalLM.from_pretrained(out)
        wanted = export.policy_of(finished / f"checkpoints/step_{step}")
        assert all(torch.equal(value, wanted[name]) for name, value in lm.named_parameters())
        assert load_card(out / "reward_model") == load_card(tiny / "rm")


def test_an_export_says_what_is_wrong_in_one_line(finished, tmp_path):
    for run_dir, folder, expected in (
        (tmp_path / "nowhere", tmp_path / "out", "--run_dir .*no complete checkpoint"),
        (finished, tmp_path, "--export .*is there already"),
    ):
        words = train_ppo, "--run_dir", run_dir, "--export", folder
        assert re.match(expected, refused(run, *words))
