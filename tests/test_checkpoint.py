"""A run directory survives kills, damage and full disks, at one rank and at two.

The tests at two ranks come first: they fork, and a process with a process group must not.
"""

import contextlib
import json
import shutil
from pathlib import Path

from pfppo.files import append_jsonl, write_json
from pfppo.fsdp import adamw, full_state
from pfppo.model import empty_causal_lm
from pfppo.rollout import collate
from pfppo.run import checkpoint, export

import pytest
import torch
import torch.distributed as dist
from conftest import (
    files_of,
    full_disk,
    out_of_space,
    policy_of,
    ragged,
    scalar_of,
    tiny_classifier,
    tiny_lm,
    tiny_tokenizer,
)
from ranks import forked, ranked, refused
from transformers import AutoModelForCausalLM


def trained_pair(ranks, seed=0):
    """{name: (model, optimizer)} as train_ppo.py has them: an actor and a critic."""
    actor = policy_of(tiny_lm("llama", seed, tie_word_embeddings=True), ranks)
    critic = scalar_of(tiny_classifier("llama", seed), ranks)
    models = {"actor": actor, "critic": critic}
    return {name: (model, adamw(model, 1e-2)) for name, model in models.items()}


def save(run, step, trained, ranks, keep=2, **state):
    """Write a checkpoint and wait for it."""
    saver = checkpoint.Saver(run, ranks, keep)
    saver.start(trained, {"step": step} | state)
    saver.finish()


def train(trained, seed):
    """One optimizer step of both models on data drawn from a seed."""
    rows = collate(ragged([3, 5], seed), ragged([4, 2], seed + 50), pad_id=0)
    (actor, _), (critic, _) = trained["actor"], trained["critic"]
    actor(rows.ids, rows.states, rows.responses, rows.mask)[0].mean().backward()
    critic(rows.ids, rows.states).pow(2).mean().backward()
    for _, optimizer in trained.values():
        optimizer.step()
        optimizer.zero_grad()


def everything_of(trained):
    """Every number of both models and optimizers, whole."""
    numbers = {}
    for name, (model, optimizer) in trained.items():
        numbers |= {f"{name} {n}": value.clone() for n, value in full_state(model).items()}
        for n, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                value = value.full_tensor() if hasattr(value, "full_tensor") else value
                numbers[f"{name} {n} {key}"] = value.clone()
    return numbers


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def write_run(run, ranks):
    """Checkpoints after steps 1 and 2. Returns ({step: everything after it}, also of step 3, and
    the trained pair)."""
    trained, after = trained_pair(ranks), {}
    for step in (1, 2, 3):
        train(trained, step)
        after[step] = everything_of(trained)
        if step < 3:
            save(run, step, trained, ranks, kl_coef=0.1 * step, best=None)
    return after, trained


# ----------------------------------------------------------------------- ranks that are forks first


@ranked(1, 2)
def test_a_loaded_checkpoint_is_bit_equal_and_so_is_the_next_step(ranks, tmp_path):
    (after, _), trained = write_run(tmp_path, ranks), trained_pair(ranks, seed=7)
    assert not same(everything_of(trained), after[2])
    state = checkpoint.load(tmp_path, trained, ranks)
    assert state == {"step": 2, "kl_coef": 0.2, "best": None}
    assert same(everything_of(trained), after[2])
    train(trained, 3)
    assert same(everything_of(trained), after[3])
    assert any("exp_avg_sq" in name for name in after[3])  # the moments are compared too


@ranked(2)
def test_a_checkpoint_that_fails_on_one_rank_is_one_error_on_all_and_leaves_the_others(
    ranks, tmp_path, monkeypatch
):
    """At once, in the thread that writes, or at the manifest, which is rank 0's."""
    _, trained = write_run(tmp_path, ranks)
    dist.barrier()
    before = files_of(tmp_path)
    with full_disk() if ranks.rank == 1 else contextlib.nullcontext():
        messages = [refused(save, tmp_path, 3, trained, ranks)]
    for owner, name in ((checkpoint, "write_json"), (checkpoint.dcp, "async_save")):
        monkeypatch.setattr(owner, name, out_of_space)
        messages.append(refused(save, tmp_path, 3, trained, ranks))
    full = "No space left on device"
    for message, reason in zip(messages, ("File too large", full, full), strict=True):
        assert message.startswith(f"{tmp_path}/checkpoints/step_3: cannot save with ")
        assert reason in message and message.endswith("/step_2")  # the last complete one
    dist.barrier()
    assert files_of(tmp_path) == before and not list(tmp_path.rglob("*.tmp"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(a run of two ranks with an export of its actor, {step: everything after it})"""
    run = tmp_path_factory.mktemp("two") / "run"

    def work(ranks):
        after, trained = write_run(run, ranks)
        lm = trained["actor"][0].lm
        export.write(lm, run / "policy", empty_causal_lm(lm.config), tiny_tokenizer(), ranks)
        return after

    return run, forked(work)[0]


@pytest.fixture(scope="module")
def saved(two, ranks, tmp_path_factory):
    """(a run of one rank, {step: everything after it}); two ranks have been forked before."""
    run = tmp_path_factory.mktemp("one") / "run"
    after, _ = write_run(run, ranks)
    for name in ("metrics.jsonl", "samples.jsonl"):
        append_jsonl(run / name, [{"step": step, "x": 0.5} for step in (1, 1, 2, 3)])
    return run, after


@pytest.fixture
def run(saved, tmp_path):
    """A copy of that run, to be damaged."""
    return Path(shutil.copytree(saved[0], tmp_path / "run"))


def test_one_rank_goes_on_with_a_checkpoint_and_an_export_of_two(two, ranks):
    (run, after), trained = two, trained_pair(ranks, seed=7)
    assert checkpoint.load(run, trained, ranks)["step"] == 2
    assert same(everything_of(trained), after[2])
    train(trained, 3)
    numbers = everything_of(trained)
    assert numbers.keys() == after[3].keys()
    for name, value in numbers.items():
        torch.testing.assert_close(value, after[3][name], rtol=1e-5, atol=1e-6)
    policy = AutoModelForCausalLM.from_pretrained(run / "policy").named_parameters()
    assert all(torch.equal(value, after[3][f"actor lm.{name}"]) for name, value in policy)


@pytest.mark.parametrize("keep", [1, 3])
def test_a_checkpoint_is_complete_before_the_next_begins_and_the_newest_stay(ranks, tmp_path, keep):
    saver = checkpoint.Saver(tmp_path, ranks, keep)
    for step in (8, 9, 10, 11):  # 10 is newer than 9, though not in the alphabet
        saver.start({}, {"step": step})
        names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
        complete = range(max(8, step - keep), step)
        assert names == {*(f"step_{s}" for s in complete), f"step_{step}.tmp"}
    saver.finish()
    assert checkpoint.load(tmp_path, {}, ranks) == {"step": 11}


def test_training_goes_on_while_a_checkpoint_is_written(ranks, tmp_path):
    """What is saved is the state of the moment, and saving changes nothing in the models."""
    trained, plain = trained_pair(ranks), trained_pair(ranks)
    train(trained, 1)
    train(plain, 1)
    saver, before = checkpoint.Saver(tmp_path, ranks, 2), everything_of(trained)
    saver.start(trained, {"step": 1})
    train(trained, 2)  # at once, in the tensors that are being written
    train(plain, 2)
    while saver.pending:
        saver.poll()
    assert saver.newest == 1 and same(everything_of(trained), everything_of(plain))
    assert checkpoint.load(tmp_path, trained, ranks) == {"step": 1}
    assert same(everything_of(trained), before)


# ------------------------------------------------------------------------------------- damage


def shards(folder):
    return sorted(folder.rglob("*.distcp"))


def cut(path, count):
    path.write_bytes(path.read_bytes()[:-count])


def blank(path):
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = {
    "a deleted file": lambda folder: shards(folder)[0].unlink(),
    "a truncated file": lambda folder: cut(shards(folder)[-1], 1),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: cut(folder / "manifest.json", 9),
    "other bytes": lambda folder: blank(folder / "state.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_incomplete(run, damage):
    one, two = (run / "checkpoints" / f"step_{step}" for step in (1, 2))
    assert checkpoint.complete(run) == [two, one]
    DAMAGES[damage](two)
    assert checkpoint.complete(run) == [one]


def test_a_run_falls_back_to_the_checkpoint_before_a_damaged_one_and_says_so(
    run, saved, ranks, capsys
):
    newest, trained = run / "checkpoints" / "step_2", trained_pair(ranks, seed=7)
    DAMAGES["a truncated file"](newest)
    assert checkpoint.load(run, trained, ranks)["step"] == 1
    assert same(everything_of(trained), saved[1][1])
    (said,) = capsys.readouterr().out.splitlines()
    assert said == f"{newest}: incomplete, falling back to {run / 'checkpoints/step_1'}"
    assert not newest.exists()


def test_without_a_complete_checkpoint_the_run_starts_again(run, ranks, capsys):
    for folder in (run / "checkpoints").iterdir():
        DAMAGES["no manifest"](folder)
    trained = trained_pair(ranks)
    before = everything_of(trained)
    assert checkpoint.load(run, trained, ranks) is None
    assert same(everything_of(trained), before)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all("the start of the run" in line for line in said)
    assert (run / "metrics.jsonl").read_text() == ""


def test_neither_half_a_checkpoint_nor_an_older_damaged_one_matters(run, ranks, capsys):
    folder, trained = run / "checkpoints", trained_pair(ranks)
    DAMAGES["a deleted file"](folder / "step_1")
    for step in (2, 3):  # killed while they were written
        shutil.copytree(folder / "step_2", folder / f"step_{step}.tmp")
    assert checkpoint.load(run, trained, ranks)["step"] == 2
    assert capsys.readouterr().out == ""
    for step in (2, 3):  # the first is there already, and is replaced
        train(trained, step)
        save(run, step, trained, ranks, again=True)
        assert checkpoint.load(run, trained_pair(ranks), ranks) == {"step": step, "again": True}
    assert {path.name for path in folder.iterdir()} == {"step_1", "step_2", "step_3"}


@pytest.mark.parametrize("what", ["other bytes", "another model"])
def test_a_checkpoint_that_cannot_be_read_is_named(run, ranks, what):
    trained = trained_pair(ranks)
    if what == "other bytes":
        blank(shards(run / "checkpoints/step_2")[0])
    else:
        policy = policy_of(tiny_lm("llama", hidden_size=16), ranks)
        trained["actor"] = policy, adamw(policy, 0.01)
    message = refused(checkpoint.load, run, trained, ranks)
    assert message.startswith(f"{run / 'checkpoints/step_2'}: damaged, or of another model (")
    assert message.endswith("; remove it to go on from the one before")
    assert what == "other bytes" or "Size mismatch" in message


def test_ctrl_c_while_a_checkpoint_is_read_does_not_call_it_damaged(run, ranks, monkeypatch):
    def pressed(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.dcp.FileSystemReader, "read_data", pressed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.load(run, trained_pair(ranks), ranks)


# ------------------------------------------------------------------------ the files around it


@pytest.mark.parametrize("tail", ["", '{"step": 2, "x"', '{"step": 3}\n{"st'])
def test_resuming_drops_later_rows_and_a_half_written_line(run, ranks, tail):
    path = run / "metrics.jsonl"
    path.unlink()
    append_jsonl(path, [{"step": 1, "text": "a\u2028b\n"}, {"step": 2, "text": "ü"}])
    whole = path.read_text()
    path.write_text(whole + tail)
    checkpoint.load(run, {}, ranks)
    assert path.read_text() == whole
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [1, 1, 2]


def test_a_damaged_line_in_the_metrics_is_named(run, ranks):
    path = run / "metrics.jsonl"
    path.write_text('{"step": 1}\n{broken\n{"step": 2}\n')
    message = refused(checkpoint.load, run, {}, ranks)
    assert message.startswith(f"{path}, line 2: damaged")


@pytest.mark.parametrize("best_step, best", [(1, None), (3, 0.75)])
def test_a_policy_exported_after_the_checkpoint_stays_the_best_there_is(
    run, ranks, best_step, best
):
    """A run killed between the export of step 3 and its checkpoint: policy/ is step 3's."""
    (run / "policy").mkdir()
    write_json(run / "policy" / checkpoint.BEST, {"best": 0.75, "best_step": best_step})
    state = checkpoint.load(run, {}, ranks)
    assert state["step"] == 2 and state["kl_coef"] == 0.2 and state["best"] == best
    assert state.get("best_step") == (3 if best else None)


def test_a_run_killed_between_the_two_renames_of_an_export_has_its_policy_back(run, ranks):
    (run / "policy.old").mkdir()
    (run / "policy.old" / "weights").write_text("all of them")
    (run / "policy.tmp").mkdir()
    assert checkpoint.load(run, {}, ranks)["step"] == 2
    assert (run / "policy" / "weights").read_text() == "all of them"
