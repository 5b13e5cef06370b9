"""Runs of train_ppo.py and train_rm.py that were stopped go on to the same numbers."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import train_ppo
import train_rm
from pfppo import fsdp, lab
from pfppo.lab import default
from pfppo.loading import read_classifier
from pfppo.model import read_config
from pfppo.run import checkpoint, export, is_trained, pairs, session
from pfppo.run.reward_session import RewardSession

import pytest
import torch
from conftest import ROOT, files_of, quick
from ranks import refused
from running import numbers, options, read, run, wait_for_steps, write_rows
from safetensors.torch import load_file
from test_folders import BARE
from test_stopping import ask
from test_train_rm import EASY, rm_words, sampled_words
from transformers import AutoModelForSequenceClassification


def test_an_own_reward_is_in_standard_deviations_as_a_checkpoint_knows_them(tiny, tmp_path, capsys):
    own = tmp_path / "own.py"
    own.write_text("def large(p, responses, q):\n    return [100.0 + len(r) for r in responses]\n")
    reward = {"reward": f"{own}:large", "reward_clip": 1e9, "filter": "none"}
    argv = options(tiny, tmp_path / "run", **BARE, **reward)
    run(train_ppo, *argv)
    said, (row,) = capsys.readouterr().out, numbers(tmp_path / "run")
    state = json.loads((tmp_path / "run/checkpoints/step_1/state.json").read_text())
    assert abs(row["reward_all"]) < 1.5 and row["value_loss"] < 100
    assert re.search(r"own.py:large: rewards of 24 samples of the SFT policy: mean 1\d\d", said)
    run(train_ppo, *argv, "--resume", "--steps", 2)
    again = json.loads((tmp_path / "run/checkpoints/step_2/state.json").read_text())
    assert again["scale"] == state["scale"] and "SFT policy" not in capsys.readouterr().out


@pytest.mark.parametrize("instant", quick(["start"], ["append_jsonl", "start", "finish"]))
def test_an_interrupted_run_resumes_to_the_same_numbers(
    tiny, finished, tmp_path, monkeypatch, instant
):
    step_of = {
        "append_jsonl": lambda path, rows: rows[0]["step"],
        "start": lambda saver, trained, state: state["step"],
        "finish": lambda saver: saver.pending and saver.pending[0],
    }[instant]

    def interrupted(*args):
        if step_of(*args) == 4:
            raise KeyboardInterrupt
        return original(*args)

    owner = session if instant == "append_jsonl" else checkpoint.Saver
    original = getattr(owner, instant)
    monkeypatch.setattr(owner, instant, interrupted)
    argv = options(tiny, tmp_path / "run", steps=4, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        run(train_ppo, *argv)
    monkeypatch.undo()
    run(train_ppo, *argv, "--resume")
    assert numbers(tmp_path / "run") == numbers(finished)
    folders = tmp_path / "run", finished
    samples = [(folder / "samples.jsonl").read_text() for folder in folders]
    assert samples[0] == samples[1]
    resumed, whole = (load_file(folder / "policy/model.safetensors") for folder in folders)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tiny, finished, tmp_path, capsys):
    copy = shutil.copytree(finished, tmp_path / "copy")
    broken = next((copy / "checkpoints/step_4/sharded").glob("*.distcp"))
    broken.write_bytes(broken.read_bytes()[:-10])
    run(train_ppo, *options(tiny, copy, steps=4, save_every=2), "--resume")
    assert "step_4: incomplete, falling back to" in capsys.readouterr().out
    assert numbers(copy) == numbers(finished)


def test_resume_without_a_name_goes_on_with_the_last_run(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = options(tiny, "", test="", validation="", steps=1)
    run(train_ppo, *argv, "--resume")
    assert "runs/best_random: no checkpoint to go on from" in capsys.readouterr().out
    run(train_ppo, *argv, "--steps", 2, "--resume")
    said = capsys.readouterr().out
    assert "step   2/2" in said and "step   1/2" not in said
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["best_random"]


def stop_in(monkeypatch, name, count, stop, owner=fsdp):
    """From its `count`-th call on, a function calls `stop` first."""
    calls, call = [], getattr(owner, name)

    def counted(*args, **options):
        calls.append(name)
        if len(calls) >= count:
            stop()
        return call(*args, **options)

    monkeypatch.setattr(owner, name, counted)


def crash():
    raise KeyboardInterrupt


def test_stopped_and_resumed_training_is_bit_equal_and_samples_once(tiny, tmp_path, monkeypatch):
    """A crash at step 2, before the first checkpoint; SIGTERM in step 4; a crash at the end, when
    the model is to be written."""
    words = sampled_words(tiny, tmp_path / "rm", 24, save_every=3)
    run(train_rm, *sampled_words(tiny, tmp_path / "whole", 24, save_every=3))
    resumed = ("--resume", "--save_every", 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in(patch, "step", 2, crash)
        run(train_rm, *words)
    assert {"args.json", "samples.jsonl", "pairs.jsonl"} <= {
        p.name for p in (tmp_path / "rm").iterdir()
    }
    monkeypatch.setattr(pairs, "Examiner", pytest.fail)  # nothing is sampled again
    with monkeypatch.context() as patch:
        stop_in(patch, "step", 4, ask)
        run(train_rm, *words, *resumed)
    assert len(read(tmp_path / "rm/metrics.jsonl")) == 4
    assert checkpoint.complete(tmp_path / "rm")[0].name == "step_4"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(export, "write", lambda *args: crash())
        run(train_rm, *words, *resumed)
    assert not is_trained(tmp_path / "rm")
    said = refused(read_config, tmp_path / "rm", "reward_model")
    assert "go on with it (train_rm.py --run_dir FOLDER --resume)" in said
    with monkeypatch.context() as patch:
        patch.setattr(fsdp, "step", pytest.fail)  # all steps are done
        run(train_rm, *words, *resumed)
    whole, stopped = (files_of(tmp_path / name) for name in ("whole", "rm"))
    assert whole.keys() == stopped.keys()  # no checkpoints are left
    assert [name for name in whole if whole[name] != stopped[name]] == ["args.json"]


def test_a_finished_reward_model_needs_nothing_and_is_left_as_it_is(
    tiny, tmp_path, monkeypatch, capsys
):
    words = rm_words(tmp_path / "rm", tiny / "policy", tiny / "pairs.jsonl")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RewardSession, "_clear", lambda self: crash())  # killed after the last file
        run(train_rm, *words)
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    before = files_of(tmp_path / "rm")
    assert "give --resume" in refused(run, train_rm, *words)
    assert not run(train_rm, *words, "--resume", "--save_every", 5)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"{tmp_path / 'rm'}: the reward model is finished, nothing to do"
    kept = {name: text for name, text in before.items() if not name.startswith("checkpoints")}
    assert files_of(tmp_path / "rm") == kept


def test_a_sampling_that_is_stopped_keeps_the_parts_that_are_there(tiny, tmp_path, monkeypatch):
    """Parts of two prompts; a crash in the fourth, whose first rows are half-way in the file."""
    monkeypatch.setattr(pairs, "LEAST", 10)
    run(train_rm, *sampled_words(tiny, tmp_path / "whole"))
    words, answers = sampled_words(tiny, tmp_path / "rm"), pairs.Examiner.answers
    drawn = []

    def three(examiner, model, asked, *how, **more):
        drawn.extend(problem.task_id for problem in asked.problems)
        return crash() if len(drawn) == 8 else answers(examiner, model, asked, *how, **more)

    monkeypatch.setattr(pairs.Examiner, "answers", three)
    with pytest.raises(KeyboardInterrupt):
        run(train_rm, *words)
    path, whole = tmp_path / "rm/samples.jsonl", (tmp_path / "whole/samples.jsonl").read_bytes()
    assert read(path) == read(tmp_path / "whole/samples.jsonl")[: 6 * 5]
    path.write_bytes(whole[: len(path.read_bytes()) + 1000])
    run(train_rm, *words, "--resume")
    assert path.read_bytes() == whole
    assert len(drawn) == len(set(drawn)) + 2 == 12 + 2  # only the part that crashed


@pytest.mark.parametrize(
    "damage, expected",
    [
        (lambda text: text.split("\n", 5)[5], "not the 5 samples of each of the 12 prompts"),
        (lambda text: text + text, "not the 5 samples of each of the 12 prompts"),
        (lambda text: text.replace('"ids"', '"tokens"'), "not the 5 samples of each"),
        (lambda text: "x" + text, "line 1: damaged, expected a JSON object"),
    ],
)
def test_samples_that_do_not_fit_are_one_line(tiny, tmp_path, monkeypatch, damage, expected):
    words, path = sampled_words(tiny, tmp_path / "rm"), tmp_path / "rm/samples.jsonl"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_rm.loading, "new_scalar", lambda *args: crash())
        run(train_rm, *words)
    path.write_text(damage(path.read_text()))
    said = refused(run, train_rm, *words, "--resume")
    assert said.startswith(str(path)) and expected in said


def test_a_training_goes_on_with_the_pairs_that_it_began_with(tiny, tmp_path, monkeypatch):
    file = shutil.copy(tiny / "pairs.jsonl", tmp_path / "pairs.jsonl")
    words = rm_words(tmp_path / "rm", tiny / "policy", file)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in(patch, "step", 1, crash)
        run(train_rm, *words)
    rows = read(file)
    write_rows(tmp_path / "pairs.jsonl", rows[1:])
    said = refused(run, train_rm, *words, "--resume")
    assert said.startswith(f"{tmp_path / 'rm/pairs.jsonl'}: not the pairs that {file} gives now")
    write_rows(tmp_path / "pairs.jsonl", rows)
    run(train_rm, *words, "--resume")
    assert is_trained(tmp_path / "rm")


@pytest.mark.slow
def test_a_training_that_is_killed_ends_as_one_that_is_not(tiny, tmp_path):
    words = sampled_words(tiny, tmp_path / "whole", 24, save_every=1)
    run(train_rm, *words)
    steps, words = len(read(tmp_path / "whole/metrics.jsonl")), list(map(str, words))
    words[words.index(str(tmp_path / "whole"))] = str(tmp_path / "rm")
    for step in (steps // 4, steps // 2, None):
        argv = [sys.executable, "train_rm.py", *words, "--resume"]
        process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if step:
            wait_for_steps(process, tmp_path / "rm", step)
            process.kill()
        said = process.communicate()[0]
    assert process.returncode == 0, said
    whole, killed = (files_of(tmp_path / name) for name in ("whole", "rm"))
    assert whole.keys() == killed.keys()
    assert [name for name in whole if whole[name] != killed[name]] == ["args.json"]


def test_the_labs_reward_model_goes_on_where_it_was_stopped(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(default, "FOLDER", tmp_path / "lab")
    shutil.copytree(tiny / "policy", tmp_path / "lab/policy")
    for name in default.PROBLEMS:
        prompts = [EASY["prompt"].replace("xs", f"xs, k={i}") for i in range(12)]
        rows = [EASY | {"task_id": f"{name}/{i}", "prompt": p} for i, p in enumerate(prompts)]
        write_rows(tmp_path / f"lab/{name}.jsonl", rows)
    asked = SimpleNamespace(reward_model="lab", policy="lab")
    lab.resolve(asked)

    def make():
        ranks = fsdp.init_ranks("cpu")
        try:
            lab.make(asked, ranks, train_rm.make_for_lab)
        finally:
            torch.distributed.destroy_process_group()

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        stop_in(patch, "step", 1, ask)
        make()
    assert stopped.value.code == 0 and not is_trained(tmp_path / "lab/reward_model")
    monkeypatch.setattr(pairs, "Examiner", pytest.fail)
    make()
    read_classifier(tmp_path / "lab/reward_model")
    assert read(tmp_path / "lab/reward_model/metrics.jsonl")[-1]["held_out_accuracy"] is not None
    monkeypatch.setattr(train_rm, "main", pytest.fail)
    make()  # it is there
