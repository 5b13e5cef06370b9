"""A run directory survives kills, damage and full disks, and what is exported loads elsewhere.

The checks at two ranks run in one torchrun launch of this file (`main` at the bottom).
"""

import contextlib
import dataclasses
import errno
import json
import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from pfppo import checkpoint
from pfppo.batch import collate
from pfppo.checkpoint import (
    append_jsonl,
    check_run,
    cut_jsonl,
    export,
    open_run,
    unused,
    write_json,
)
from pfppo.config import UserError
from pfppo.data import template_hash, vocabulary_hash
from pfppo.fsdp import full_state, init_ranks, shard
from pfppo.loading import load_policies
from pfppo.model import Policy, ScalarModel, empty_causal_lm, empty_classifier
from pfppo.reward import RewardCard, load_card
from pfppo.sampler import stop_ids
from pfppo.weights import Whole

import pytest
import torch
from conftest import (
    ARCHITECTURES,
    EOS,
    PAD,
    ragged,
    run_ranks,
    tiny_classifier,
    tiny_lm,
    tiny_tokenizer,
    write_model,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedTokenizerFast,
)


def policy_of(lm, ranks):
    return shard(Policy(empty_causal_lm(lm.config)), Whole(Policy(lm)), ranks)


def scalar_of(classifier, ranks):
    empty = ScalarModel(empty_classifier(classifier.config))
    return shard(empty, Whole(ScalarModel(classifier)), ranks)


def trained_pair(ranks, seed=0):
    """{name: (model, optimizer)} as train_ppo.py has them: an actor and a critic."""
    actor = policy_of(tiny_lm("llama", seed, tie_word_embeddings=True), ranks)
    critic = scalar_of(tiny_classifier("llama", seed), ranks)
    return {
        name: (model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True))
        for name, model in (("actor", actor), ("critic", critic))
    }


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


def files_of(folder):
    """{relative path: contents} of everything below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@contextlib.contextmanager
def full_disk(size=100):
    """No file of this process can grow beyond `size` bytes: writes raise OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """(a run with checkpoints after steps 1 and 2, everything after 1, after 2, and after 3)"""
    run, trained, after = tmp_path_factory.mktemp("run"), trained_pair(ranks), {}
    for step in (1, 2):
        train(trained, step)
        after[step] = everything_of(trained)
        state = {"kl_coef": 0.1 * step, "best": None}
        checkpoint.save(run, step, trained, state | {"step": step}, ranks, keep=2)
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
        checkpoint.export_best(lm, run, twin, tokenizer, ranks, exported)
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
    path = next((run / "checkpoints/step_2/actor").glob("*.distcp"))
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match="step_2: damaged .*remove it") as error:
        checkpoint.load(run, trained_pair(ranks), ranks)
    assert "\n" not in str(error.value)


def test_saving_changes_nothing_in_the_models(ranks, tmp_path):
    plain, saving = trained_pair(ranks), trained_pair(ranks)
    for step in (1, 2):
        train(plain, step)
        train(saving, step)
        checkpoint.save(tmp_path, step, saving, {}, ranks, keep=1)
    assert same(everything_of(plain), everything_of(saving))


def test_there_is_nothing_to_load_in_a_fresh_run(ranks, tmp_path):
    trained = trained_pair(ranks)
    before = everything_of(trained)
    assert checkpoint.load(tmp_path, trained, ranks) is None
    assert same(everything_of(trained), before)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_checkpoints_stay(ranks, tmp_path, keep):
    for step in (8, 9, 10, 11):  # 10 is newer than 9, though not in the alphabet
        checkpoint.save(tmp_path, step, {}, {}, ranks, keep)
    folders = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert folders == {f"step_{step}" for step in range(12 - keep, 12)}
    assert checkpoint.load(tmp_path, {}, ranks)["step"] == 11


def test_saving_a_step_again_replaces_it(run, ranks):
    trained = trained_pair(ranks, seed=4)
    checkpoint.save(run, 2, trained, {"again": True}, ranks, keep=2)
    fresh = trained_pair(ranks)
    assert checkpoint.load(run, fresh, ranks)["again"]
    assert same(everything_of(fresh), everything_of(trained))


# ------------------------------------------------------------------------------------- damage


def shards(folder):
    return sorted(path for path in folder.rglob("*.distcp"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "a deleted file": lambda folder: shards(folder)[0].unlink(),
    "a truncated file": lambda folder: cut(shards(folder)[-1]),
    "an empty file": lambda folder: (folder / "actor" / ".metadata").write_bytes(b""),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: (folder / "manifest.json").write_text('{"state.js'),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "half a state": lambda folder: (folder / "state.json").write_text('{"step'),
    "a lost model": lambda folder: shutil.rmtree(folder / "critic"),
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
    checkpoint.save(run, 3, trained_pair(ranks), {}, ranks, keep=2)  # and is in nobody's way
    assert {path.name for path in folder.iterdir()} == {"step_2", "step_3"}


def test_an_older_damaged_checkpoint_does_not_matter(run, ranks, capsys):
    DAMAGES["a deleted file"](run / "checkpoints" / "step_1")
    assert checkpoint.load(run, trained_pair(ranks), ranks)["step"] == 2
    assert capsys.readouterr().out == ""


# -------------------------------------------------------------------------------------- JSONL


def test_resuming_drops_the_rows_after_the_checkpoint(run, ranks):
    checkpoint.load(run, trained_pair(ranks), ranks)
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 1, 2]


@pytest.mark.parametrize("tail", ["", '{"step": 2, "x"', '{"step": 2}', '{"step": 3}\n{"st'])
def test_cutting_drops_later_rows_and_a_half_written_line(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, [{"step": 1, "text": "a\u2028b\n"}])  # a row is a line, whatever it holds
    append_jsonl(path, [{"step": 2, "text": "ü"}])
    whole = path.read_text()
    path.write_text(whole + tail)
    cut_jsonl(path, 2)
    assert path.read_text() == whole
    cut_jsonl(path, 2)  # once more changes nothing
    assert path.read_text() == whole and [p.name for p in tmp_path.iterdir()] == [path.name]
    cut_jsonl(path, 0)
    assert path.read_text() == ""


def test_a_file_that_does_not_exist_is_not_cut(tmp_path):
    cut_jsonl(tmp_path / "metrics.jsonl", 3)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_under_a_jsonl_file_is_one_line():
    with pytest.raises(UserError, match="^/dev/full: cannot be written: No space left on device$"):
        append_jsonl(Path("/dev/full"), [{"step": 1}])


# ------------------------------------------------------------------------------ run directory


@dataclass
class Args:
    run_dir: str
    seed: int = 1
    filter: str = "best_random"
    steps: int = 40
    resume: bool = False


def start(folder, ranks, **changes):
    """Check, then make a run directory, as train_ppo.py does."""
    args = Args(str(folder), **changes)
    assert check_run(args, ranks) == Path(folder)
    open_run(args, ranks)


def test_a_fresh_run_directory_holds_its_arguments(ranks, tmp_path):
    folder = tmp_path / "new" / "run"
    assert check_run(Args(str(folder)), ranks) == folder
    assert not list(tmp_path.iterdir())  # checking writes nothing
    start(folder, ranks, seed=3)
    there = dataclasses.asdict(Args(str(folder), seed=3))
    assert json.loads((folder / "args.json").read_text()) == there
    assert [path.name for path in folder.iterdir()] == ["args.json"]


def test_an_existing_empty_folder_and_resume_without_a_run_are_fresh_runs(ranks, tmp_path):
    start(tmp_path, ranks, resume=True)
    assert (tmp_path / "args.json").exists()


def test_a_run_with_the_same_arguments_needs_resume(ranks, tmp_path):
    start(tmp_path, ranks)
    with pytest.raises(UserError, match="--run_dir .*give --resume"):
        start(tmp_path, ranks)
    before = files_of(tmp_path)
    start(tmp_path, ranks, resume=True)
    start(tmp_path, ranks, resume=True, steps=80)  # a run may be made longer
    assert files_of(tmp_path) == before


def test_a_run_directory_may_be_moved_or_named_in_another_way(ranks, tmp_path):
    start(tmp_path / "old", ranks)
    (tmp_path / "old").rename(tmp_path / "new")
    start(tmp_path / "new", ranks, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_with_other_arguments_is_refused_by_name_and_both_values(ranks, tmp_path, resume):
    start(tmp_path, ranks, seed=1)
    before = files_of(tmp_path)
    with pytest.raises(UserError) as error:
        start(tmp_path, ranks, seed=2, filter="none", resume=resume)
    message = str(error.value)
    assert f"--run_dir {tmp_path}: " in message and "\n" not in message
    assert "seed 1 there, 2 here" in message
    assert "filter 'best_random' there, 'none' here" in message and "steps" not in message
    assert files_of(tmp_path) == before


def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(ranks, tmp_path):
    (tmp_path / "thesis.tex").write_text("all of it")
    for resume in (False, True):
        with pytest.raises(UserError, match="not empty and holds no run"):
            start(tmp_path, ranks, resume=resume)
    assert files_of(tmp_path) == {"thesis.tex": b"all of it"}


def test_a_run_directory_that_is_or_is_below_a_file_is_one_line(ranks, tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"^--run_dir {folder}: "):
            start(folder, ranks)


def test_a_run_killed_while_its_arguments_were_written_can_start(ranks, tmp_path):
    (tmp_path / "args.json.tmp").write_text('{"se')
    start(tmp_path, ranks)
    assert json.loads((tmp_path / "args.json").read_text())["seed"] == 1


def test_a_full_disk_at_the_start_is_one_line_and_leaves_nothing_in_the_way(ranks, tmp_path):
    with full_disk(10), pytest.raises(UserError, match=f"--run_dir {tmp_path}: .*File too large"):
        start(tmp_path, ranks)
    start(tmp_path, ranks)


def test_unused_names_do_not_exist(tmp_path):
    assert unused(tmp_path / "run") == tmp_path / "run"
    (tmp_path / "run").mkdir()
    (tmp_path / "run-2").mkdir()
    assert unused(tmp_path / "run") == tmp_path / "run-3"


def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "x.json", {"old": 1})
    with full_disk(20), pytest.raises(OSError):
        write_json(tmp_path / "x.json", {"new": "n" * 100})
    assert json.loads((tmp_path / "x.json").read_text()) == {"old": 1}


# ---------------------------------------------------------------------------- a full disk, saving


def out_of_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["dcp.save", "_seal", "dcp.save later", "a real limit"])
def test_a_full_disk_while_saving_leaves_the_previous_checkpoint(
    run, saved, ranks, monkeypatch, where
):
    before, trained = files_of(run), trained_pair(ranks, seed=3)
    reason = "File too large" if where == "a real limit" else "No space left on device"
    if where == "dcp.save":
        monkeypatch.setattr(checkpoint.dcp, "save", out_of_space)
    elif where == "_seal":
        monkeypatch.setattr(checkpoint, "_seal", out_of_space)
    elif where == "dcp.save later":  # the actor's part is written, the critic's is not
        write = checkpoint.dcp.save
        calls = iter((write, out_of_space))
        monkeypatch.setattr(checkpoint.dcp, "save", lambda *a, **k: next(calls)(*a, **k))
    limit = full_disk() if where == "a real limit" else contextlib.nullcontext()
    with limit, pytest.raises(UserError) as error:
        checkpoint.save(run, 3, trained, {}, ranks, keep=2)
    message = str(error.value)
    assert reason in message and "step_3" in message and "\n" not in message
    assert message.endswith(str(run / "checkpoints" / "step_2"))  # the last complete one
    assert files_of(run) == before
    assert not (run / "checkpoints" / "step_3.tmp").exists()
    monkeypatch.undo()
    assert checkpoint.load(run, trained, ranks)["step"] == 2
    assert same(everything_of(trained), saved[1][2])


# ------------------------------------------------------------------------------------- export


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor(ragged([9, 9]))).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_exported_policy_loads_in_transformers_with_equal_logits(
    ranks, tmp_path, architecture, tied
):
    lm = tiny_lm(architecture, tie_word_embeddings=tied)
    folder, wanted = tmp_path / "policy", logits_of(lm)
    tokenizer = tiny_tokenizer()
    export(policy_of(lm, ranks).lm, folder, empty_causal_lm(lm.config), tokenizer, ranks)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert loaded.dtype == torch.float32 and type(loaded) is type(lm)
    assert torch.equal(logits_of(loaded), wanted)
    assert loaded.config.tie_word_embeddings == tied
    written = PreTrainedTokenizerFast.from_pretrained(folder)
    assert vocabulary_hash(written) == vocabulary_hash(tokenizer)
    assert {path.name for path in tmp_path.iterdir()} == {"policy"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_exported_reward_model_loads_as_a_classifier_with_equal_scores_and_its_card(
    ranks, tmp_path, architecture
):
    classifier, tokenizer = tiny_classifier(architecture), tiny_tokenizer()
    model = scalar_of(classifier, ranks)
    config = model.classifier.config
    config.pad_token_id = PAD
    card = RewardCard(0.25, 1.5, template_hash(tokenizer, "plain"), vocabulary_hash(tokenizer))
    folder = tmp_path / "rm"
    export(model.classifier, folder, empty_classifier(config), tokenizer, ranks, [card.save])
    loaded = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert loaded.config.num_labels == 1
    rows = collate(ragged([2, 6, 4]), ragged([5, 1, 3], seed=1), pad_id=PAD)
    columns = torch.arange(rows.ids.shape[1])
    with torch.no_grad():
        scores = loaded(rows.ids, attention_mask=(columns <= rows.ends).long()).logits
        assert torch.allclose(model(rows.ids, rows.ends)[:, 0], scores, atol=1e-6)
    assert load_card(folder) == card


def small_export(ranks, folder, seed, extra=()):
    lm = tiny_lm("llama", seed)
    empty, tokenizer = empty_causal_lm(lm.config), tiny_tokenizer()
    export(policy_of(lm, ranks).lm, folder, empty, tokenizer, ranks, extra)


@pytest.mark.parametrize("failure", ["an extra writer", "a full disk"])
def test_a_failed_export_leaves_the_old_one(ranks, tmp_path, failure):
    folder = tmp_path / "policy"
    small_export(ranks, folder, seed=0)
    before = files_of(tmp_path)
    broken = [out_of_space] if failure == "an extra writer" else []
    limit = contextlib.nullcontext() if broken else full_disk(5000)
    with limit, pytest.raises(UserError) as error:
        small_export(ranks, folder, seed=1, extra=broken)
    assert str(error.value).startswith(f"{folder}: cannot be written: ")
    assert "\n" not in str(error.value)
    assert files_of(tmp_path) == before


def test_an_export_replaces_the_old_one_whole(ranks, tmp_path):
    folder = tmp_path / "policy"
    small_export(ranks, folder, 0, [lambda path: (path / "notes.txt").write_text("old")])
    small_export(ranks, folder, 1)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits_of(loaded), logits_of(tiny_lm("llama", 1)))
    assert not (folder / "notes.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"policy"}


def test_what_a_killed_export_left_behind_is_in_nobodys_way(ranks, tmp_path):
    for name in ("policy.tmp", "policy.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    small_export(ranks, tmp_path / "policy", 1)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert torch.equal(logits_of(loaded), logits_of(tiny_lm("llama", 1)))
    assert {path.name for path in tmp_path.iterdir()} == {"policy"}


def test_a_run_killed_between_the_two_renames_of_an_export_has_its_policy_back(run, ranks):
    small_export(ranks, run / "policy", 0)
    (run / "policy").rename(run / "policy.old")
    (run / "policy.tmp").mkdir()
    assert checkpoint.load(run, trained_pair(ranks), ranks)["step"] == 2
    loaded = AutoModelForCausalLM.from_pretrained(run / "policy")
    assert torch.equal(logits_of(loaded), logits_of(tiny_lm("llama", 0)))


def test_an_exported_policy_stops_where_the_one_it_came_from_stops(ranks, tmp_path):
    lm, tokenizer = tiny_lm("llama"), tiny_tokenizer()
    lm.generation_config = GenerationConfig(eos_token_id=[EOS, 9, 7])
    write_model(tmp_path / "sft", lm)
    policy, _, twin = load_policies(str(tmp_path / "sft"), ranks, "float32")
    export(policy.lm, tmp_path / "policy", twin, tokenizer, ranks)
    assert stop_ids(tmp_path / "policy", tokenizer) == stop_ids(tmp_path / "sft", tokenizer)
    assert stop_ids(tmp_path / "policy", tokenizer) == [EOS, 7, 9]


# ---------------------------------------------------------------------------------- two ranks


def main(folder):
    """One of two ranks: save, fail to save, load, go on, export."""
    ranks, run = init_ranks("cpu"), Path(folder) / "run"
    trained, found = trained_pair(ranks), {}
    for step in (1, 2):
        train(trained, step)
        checkpoint.save(run, step, trained, {}, ranks, keep=2)
    at_2 = everything_of(trained)
    train(trained, 3)
    at_3 = everything_of(trained)
    try:  # the disk of rank 1 is full, that of rank 0 is not
        with full_disk() if ranks.rank == 1 else contextlib.nullcontext():
            checkpoint.save(run, 3, trained, {}, ranks, keep=2)
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
    export(lm, Path(folder) / "policy", empty_causal_lm(lm.config), tiny_tokenizer(), ranks)
    if ranks.is_main:
        torch.save(at_2, Path(folder) / "at_2.pt")
        torch.save(at_3, Path(folder) / "at_3.pt")
        checkpoint._seal = out_of_space  # what only rank 0 does fails
    try:
        checkpoint.save(run, 3, trained, {}, ranks, keep=2)
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


def test_what_a_bfloat16_twin_exports_is_read_back_as_fp32(ranks, tmp_path):
    lm = tiny_lm("llama")
    twin = empty_causal_lm(lm.config, torch.bfloat16)
    export(policy_of(lm, ranks).lm, tmp_path / "policy", twin, tiny_tokenizer(), ranks)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    wanted = dict(lm.named_parameters())
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.named_parameters())
    assert twin.dtype == torch.bfloat16
