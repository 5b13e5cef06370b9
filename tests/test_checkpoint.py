"""A run directory survives kills, damage and full disks, and what is exported loads elsewhere.

The checks at two ranks run in one torchrun launch of this file (`main` at the bottom).
"""

import contextlib
import errno
import json
import shutil
import sys
from concurrent.futures import Future
from pathlib import Path

from pfppo.config import UserError
from pfppo.fsdp import full_state, init_ranks
from pfppo.model import empty_causal_lm
from pfppo.run import checkpoint, export
from pfppo.run.folder import append_jsonl

import pytest
import torch
from conftest import (
    files_of,
    full_disk,
    out_of_space,
    policy_of,
    ragged,
    run_ranks,
    scalar_of,
    tiny_classifier,
    tiny_lm,
    tiny_tokenizer,
)
from pfppo.batch import collate
from transformers import (
    AutoModelForCausalLM,
)


def trained_pair(ranks, seed=0):
    """{name: (model, optimizer)} as train_ppo.py has them: an actor and a critic."""
    actor = policy_of(tiny_lm("llama", seed, tie_word_embeddings=True), ranks)
    critic = scalar_of(tiny_classifier("llama", seed), ranks)
    return {
        name: (model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True))
        for name, model in (("actor", actor), ("critic", critic))
    }


def save(run, step, trained, state, ranks, keep):
    """Write a checkpoint and wait for it."""
    saver = checkpoint.Saver(run, ranks, keep)
    saver.start(step, trained, state)
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
    found = {}
    for name, (model, optimizer) in trained.items():
        found |= {f"{name} {n}": value.clone() for n, value in full_state(model).items()}
        for n, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                value = value.full_tensor() if hasattr(value, "full_tensor") else value
                found[f"{name} {n} {key}"] = value.clone()
    return found


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """(a run with checkpoints after steps 1 and 2, everything after 1, after 2, and after 3)"""
    run, trained, after = tmp_path_factory.mktemp("run"), trained_pair(ranks), {}
    for step in (1, 2):
        train(trained, step)
        after[step] = everything_of(trained)
        state = {"kl_coef": 0.1 * step, "best": None}
        save(run, step, trained, state | {"step": step}, ranks, keep=2)
    train(trained, 3)
    after[3] = everything_of(trained)
    for name in ("metrics.jsonl", "samples.jsonl"):
        append_jsonl(run / name, [{"step": step, "x": 0.5} for step in (1, 1, 2, 3)])
    return run, after


@pytest.fixture
def run(saved, tmp_path):
    """A copy of that run, to be damaged."""
    return Path(shutil.copytree(saved[0], tmp_path / "run"))


# --------------------------------------------------------------------------------- round trip


def test_a_loaded_checkpoint_is_bit_equal_and_so_is_the_next_step(run, saved, ranks):
    after, trained = saved[1], trained_pair(ranks, seed=7)
    assert not same(everything_of(trained), after[2])
    state = checkpoint.load(run, trained, ranks)
    assert state == {"step": 2, "kl_coef": 0.2, "best": None}
    assert same(everything_of(trained), after[2])
    train(trained, 3)
    assert same(everything_of(trained), after[3])
    assert any("exp_avg_sq" in name for name in after[3])  # the moments are compared too


def test_a_policy_exported_after_the_checkpoint_stays_the_best_there_is(run, saved, ranks):
    """A run killed between the export of step 3 and its checkpoint: policy/ is step 3's."""
    lm, tokenizer = policy_of(tiny_lm("llama"), ranks).lm, tiny_tokenizer()
    for best, step in ((0.25, 1), (0.75, 3)):
        twin = empty_causal_lm(tiny_lm("llama").config)
        exported = {"best": best, "best_step": step, "kl_coef": 9.0}
        export.write_best(lm, run, twin, tokenizer, ranks, exported)
        state = checkpoint.load(run, trained_pair(ranks), ranks)
        assert state["step"] == 2 and state["kl_coef"] == 0.2
        assert (state["best"], state.get("best_step")) == ((0.75, 3) if step == 3 else (None, None))


@pytest.mark.parametrize("line", ["{broken", "7", "\x00\x00"])
def test_a_damaged_line_in_the_metrics_is_named(run, ranks, line):
    path = run / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=f"^{path}, line 2: damaged"):
        checkpoint.load(run, trained_pair(ranks), ranks)


def test_a_checkpoint_whose_bytes_changed_is_named(run, ranks):
    path = next((run / "checkpoints/step_2/sharded").glob("*.distcp"))
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match="step_2: damaged, .*remove it") as error:
        checkpoint.load(run, trained_pair(ranks), ranks)
    assert "\n" not in str(error.value)


def test_saving_changes_nothing_in_the_models(ranks, tmp_path):
    plain, saving = trained_pair(ranks), trained_pair(ranks)
    for step in (1, 2):
        train(plain, step)
        train(saving, step)
        save(tmp_path, step, saving, {}, ranks, keep=1)
    assert same(everything_of(plain), everything_of(saving))


def test_there_is_nothing_to_load_in_a_fresh_run(ranks, tmp_path):
    trained = trained_pair(ranks)
    before = everything_of(trained)
    assert checkpoint.load(tmp_path, trained, ranks) is None
    assert same(everything_of(trained), before)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_checkpoints_stay(ranks, tmp_path, keep):
    for step in (8, 9, 10, 11):  # 10 is newer than 9, though not in the alphabet
        save(tmp_path, step, {}, {}, ranks, keep)
    folders = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert folders == {f"step_{step}" for step in range(12 - keep, 12)}
    assert checkpoint.load(tmp_path, {}, ranks)["step"] == 11


def test_saving_a_step_again_replaces_it(run, ranks):
    trained = trained_pair(ranks, seed=4)
    save(run, 2, trained, {"again": True}, ranks, keep=2)
    fresh = trained_pair(ranks)
    assert checkpoint.load(run, fresh, ranks)["again"]
    assert same(everything_of(fresh), everything_of(trained))


def test_training_goes_on_while_a_checkpoint_is_written(ranks, tmp_path):
    trained = trained_pair(ranks)
    train(trained, 1)
    saver, before = checkpoint.Saver(tmp_path, ranks, 2), everything_of(trained)
    saver.start(1, trained, {"kl_coef": 0.5})
    train(trained, 2)  # at once, in the tensors that are being written
    while saver.pending:
        saver.poll()
    assert saver.newest == 1
    fresh = trained_pair(ranks, seed=7)
    assert checkpoint.load(tmp_path, fresh, ranks)["kl_coef"] == 0.5
    assert same(everything_of(fresh), before)


def test_a_checkpoint_is_complete_before_the_next_one_begins(ranks, tmp_path):
    trained, saver = trained_pair(ranks), checkpoint.Saver(tmp_path, ranks, keep=5)
    for step in (1, 2, 3):
        saver.start(step, trained, {})
        names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
        assert names == {*(f"step_{s}" for s in range(1, step)), f"step_{step}.tmp"}
    saver.finish()


def test_a_checkpoint_of_another_model_is_named(run, ranks):
    policy = policy_of(tiny_lm("llama", hidden_size=16), ranks)
    actor = policy, torch.optim.AdamW(policy.parameters(), lr=0.01, fused=True)
    with pytest.raises(
        UserError, match="step_2: damaged, or of another model .*Size mismatch"
    ) as error:
        checkpoint.load(run, {"actor": actor}, ranks)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------- damage


def shards(folder):
    return sorted(path for path in folder.rglob("*.distcp"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "a deleted file": lambda folder: shards(folder)[0].unlink(),
    "a truncated file": lambda folder: cut(shards(folder)[-1]),
    "an empty file": lambda folder: (folder / "sharded" / ".metadata").write_bytes(b""),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: (folder / "manifest.json").write_text('{"state.js'),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "half a state": lambda folder: (folder / "state.json").write_text('{"step'),
    "a lost folder": lambda folder: shutil.rmtree(folder / "sharded"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    run, saved, ranks, capsys, damage
):
    newest = run / "checkpoints" / "step_2"
    DAMAGES[damage](newest)
    trained = trained_pair(ranks, seed=7)
    assert checkpoint.load(run, trained, ranks)["step"] == 1
    assert same(everything_of(trained), saved[1][1])
    (said,) = capsys.readouterr().out.splitlines()
    assert str(newest) in said and "falling back to" in said and "step_1" in said
    assert not newest.exists()


def test_without_a_complete_checkpoint_the_run_starts_again(run, ranks, capsys):
    for folder in (run / "checkpoints").iterdir():
        DAMAGES["no manifest"](folder)
    assert checkpoint.load(run, trained_pair(ranks), ranks) is None
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all("the start of the run" in line for line in said)
    assert (run / "metrics.jsonl").read_text() == ""


def test_a_checkpoint_that_was_being_written_is_not_seen(run, ranks, capsys):
    folder = run / "checkpoints"
    shutil.copytree(folder / "step_2", folder / "step_3.tmp")
    assert checkpoint.load(run, trained_pair(ranks), ranks)["step"] == 2
    assert capsys.readouterr().out == ""
    save(run, 3, trained_pair(ranks), {}, ranks, keep=2)  # and is in nobody's way
    assert {path.name for path in folder.iterdir()} == {"step_2", "step_3"}


def test_an_older_damaged_checkpoint_does_not_matter(run, ranks, capsys):
    DAMAGES["a deleted file"](run / "checkpoints" / "step_1")
    assert checkpoint.load(run, trained_pair(ranks), ranks)["step"] == 2
    assert capsys.readouterr().out == ""


def test_resuming_drops_the_rows_after_the_checkpoint(run, ranks):
    checkpoint.load(run, trained_pair(ranks), ranks)
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 1, 2]


def test_a_run_killed_between_the_two_renames_of_an_export_has_its_policy_back(run, ranks):
    lm = tiny_lm("llama", 0)
    empty = empty_causal_lm(lm.config)
    export.write(policy_of(lm, ranks).lm, run / "policy", empty, tiny_tokenizer(), ranks)
    (run / "policy").rename(run / "policy.old")
    (run / "policy.tmp").mkdir()
    assert checkpoint.load(run, trained_pair(ranks), ranks)["step"] == 2
    loaded = AutoModelForCausalLM.from_pretrained(run / "policy")
    loaded = dict(loaded.named_parameters())
    assert all(torch.equal(loaded[name], value) for name, value in lm.named_parameters())


# ---------------------------------------------------------------------------- a full disk, saving


def dcp_error(error):
    return checkpoint.dcp.api.CheckpointException("save", {0: (error, None)})


@pytest.mark.parametrize("where", ["dcp.async_save", "_seal", "the thread", "a real limit"])
def test_a_full_disk_while_saving_leaves_the_previous_checkpoint(
    run, saved, ranks, monkeypatch, where
):
    before, trained = files_of(run), trained_pair(ranks, seed=3)
    reason = "File too large" if where == "a real limit" else "No space left on device"
    if where == "dcp.async_save":
        monkeypatch.setattr(checkpoint.dcp, "async_save", out_of_space)
    elif where == "_seal":
        monkeypatch.setattr(checkpoint, "_seal", out_of_space)
    elif where == "the thread":  # which has begun, and fails while training goes on
        failed = Future()
        failed.set_exception(dcp_error(OSError(errno.ENOSPC, "No space left on device")))
        monkeypatch.setattr(checkpoint.dcp, "async_save", lambda *a, **k: failed)
    limit = full_disk() if where == "a real limit" else contextlib.nullcontext()
    with limit, pytest.raises(UserError) as error:
        save(run, 3, trained, {}, ranks, keep=2)
    message = str(error.value)
    assert reason in message and "step_3" in message and "\n" not in message
    assert message.endswith(str(run / "checkpoints" / "step_2"))  # the last complete one
    assert files_of(run) == before
    assert not (run / "checkpoints" / "step_3.tmp").exists()
    monkeypatch.undo()
    assert checkpoint.load(run, trained, ranks)["step"] == 2
    assert same(everything_of(trained), saved[1][2])


# ---------------------------------------------------------------------------------- two ranks


def main(folder):
    """One of two ranks: save, fail to save, load, go on, export."""
    ranks, run = init_ranks("cpu"), Path(folder) / "run"
    trained, found = trained_pair(ranks), {}
    for step in (1, 2):
        train(trained, step)
        save(run, step, trained, {}, ranks, keep=2)
    at_2 = everything_of(trained)
    train(trained, 3)
    at_3 = everything_of(trained)
    try:  # the disk of rank 1 is full, that of rank 0 is not
        with full_disk() if ranks.rank == 1 else contextlib.nullcontext():
            save(run, 3, trained, {}, ranks, keep=2)
    except UserError as error:
        found["failure"] = str(error)
    torch.distributed.barrier()
    found["folders"] = sorted(path.name for path in (run / "checkpoints").iterdir())
    again = trained_pair(ranks, seed=7)
    found["state"] = checkpoint.load(run, again, ranks)
    found["equal"] = same(everything_of(again), at_2)
    train(again, 3)
    found["next_equal"] = same(everything_of(again), at_3)
    lm = again["actor"][0].lm
    export.write(lm, Path(folder) / "policy", empty_causal_lm(lm.config), tiny_tokenizer(), ranks)
    if ranks.is_main:
        torch.save(at_2, Path(folder) / "at_2.pt")
        torch.save(at_3, Path(folder) / "at_3.pt")
        checkpoint._seal = out_of_space  # what only rank 0 does fails
    try:
        save(run, 3, trained, {}, ranks, keep=2)
    except Exception as error:
        found["failure_on_main"] = [type(error).__name__, str(error)]
    (Path(folder) / f"rank_{ranks.rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(folder, what each of two ranks found)"""
    folder = tmp_path_factory.mktemp("two")
    run_ranks(__file__, folder)
    return folder, [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


def test_at_two_ranks_a_loaded_checkpoint_and_the_next_step_are_bit_equal(two):
    for found in two[1]:
        assert found["state"] == {"step": 2}
        assert found["equal"] and found["next_equal"]


def test_a_full_disk_on_one_rank_is_an_error_on_both_and_nothing_is_left(two):
    for found in two[1]:
        assert "File too large" in found["failure"] and "step_2" in found["failure"]
        assert "\n" not in found["failure"]
        assert found["folders"] == ["step_1", "step_2"]


def test_a_full_disk_under_what_only_rank_0_writes_is_the_same_error_on_both(two):
    for found in two[1]:
        kind, message = found["failure_on_main"]
        assert kind == "UserError" and "No space left on device" in message
        assert message.endswith("step_2") and "\n" not in message


def test_one_rank_goes_on_with_a_checkpoint_of_two(two, ranks):
    trained = trained_pair(ranks, seed=7)
    assert checkpoint.load(two[0] / "run", trained, ranks) == {"step": 2}
    assert same(everything_of(trained), torch.load(two[0] / "at_2.pt"))
    train(trained, 3)
    found, wanted = everything_of(trained), torch.load(two[0] / "at_3.pt")
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)


def test_a_policy_exported_by_two_ranks_is_the_trained_one(two):
    loaded = AutoModelForCausalLM.from_pretrained(two[0] / "policy")
    at_3 = torch.load(two[0] / "at_3.pt")
    for name, value in loaded.named_parameters():
        assert torch.equal(value, at_3[f"actor lm.{name}"]), name


if __name__ == "__main__":
    main(sys.argv[1])
