"""The folder of a run, what is exported into it, and nodes that share it."""

import dataclasses
import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from pfppo.files import append_jsonl, write_json
from pfppo.model import empty_causal_lm, empty_classifier, stop_ids
from pfppo.reward import RewardCard, load_card
from pfppo.rollout import collate
from pfppo.run import export
from pfppo.run import folder as run_folder
from pfppo.run.folder import check_shared, claim, numbered, open_folder

import conftest
import pytest
import torch
import torch.distributed as dist
from conftest import EOS, PAD, files_of, full_disk, ragged, tiny_lm, tiny_tokenizer
from ranks import find_free_port, ranked, refused
from running import numbers, options, started, wait_for_steps
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

# ------------------------------------------------------------------------------------- two ranks


@ranked(2)
def test_a_folder_that_nodes_do_not_share_is_refused_on_all_of_them(ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setattr(run_folder, "VISIBLE", 1.0)
    own = tmp_path / f"node_{ranks.rank}"
    own.mkdir()
    monkeypatch.chdir(tmp_path)
    check_shared("runs/x", "--run_dir runs/x", ranks)
    monkeypatch.chdir(own)
    message = refused(check_shared, "runs/x", "--run_dir runs/x", ranks)
    assert message.startswith("--run_dir runs/x: ") and "node_1 of " in message
    assert message.endswith("expected a file system that all nodes share")
    dist.barrier()
    assert not list(tmp_path.rglob(".shared-*"))


def test_one_node_shares_its_folders_with_itself(monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    check_shared("/there/is/no/such/folder", "--run_dir x", None)  # asks no process group


# ----------------------------------------------------------------------------------- run directory


@dataclass
class Args:
    run_dir: str
    seed: int = 1
    filter: str = "best_random"
    data: str = ""
    note: str = ""
    steps: int = 40
    resume: bool = False

    FREE = ("steps", "resume")


def start(folder, ranks, **changes):
    """Check, then make a run directory, as train_ppo.py does."""
    args = Args(str(folder), **changes)
    open_folder(claim(args, ranks, "runs/x"), args, ranks)


def test_a_fresh_run_directory_holds_its_arguments(ranks, tmp_path):
    folder = tmp_path / "new" / "run"
    assert claim(Args(str(folder)), ranks, "runs/x") == folder
    assert not list(tmp_path.iterdir())  # claiming writes nothing
    start(folder, ranks, seed=3, resume=True)
    known = dataclasses.asdict(Args(str(folder), seed=3, resume=True))
    assert json.loads((folder / "args.json").read_text()) == known
    assert [path.name for path in folder.iterdir()] == ["args.json"]


def test_a_file_that_has_changed_is_told_and_told_once(ranks, tmp_path, capsys):
    own, data = tmp_path / "own.py", tmp_path / "rows.jsonl"
    own.write_text("one"), data.write_text("rows")
    for changed, told in ((None, []), (None, []), (own, [own]), (None, []), (data, [data])):
        if changed:
            changed.write_text("another")
        args = Args(str(tmp_path / "run"), filter=f"{own}:f", data=str(data), resume=True)
        args.note = "no file, and too long to be the name of one" * 9
        open_folder(claim(args, ranks, "runs/x"), args, ranks)
        said = capsys.readouterr().out.splitlines()
        assert [line.split(": has changed since")[0] for line in said] == list(map(str, told))


def test_an_empty_folder_and_one_of_a_killed_start_are_fresh_runs(ranks, tmp_path):
    claim(Args(str(tmp_path)), ranks, "runs/x")
    (tmp_path / "args.json.tmp").write_text('{"se')
    start(tmp_path, ranks)
    assert json.loads((tmp_path / "args.json").read_text())["seed"] == 1


def test_a_run_with_the_same_arguments_needs_resume_and_may_be_longer_or_moved(ranks, tmp_path):
    start(tmp_path / "old", ranks)
    assert "give --resume" in refused(start, tmp_path / "old", ranks)
    (tmp_path / "old").rename(tmp_path / "new")
    start(tmp_path / "new", ranks, resume=True, steps=80)
    known = json.loads((tmp_path / "new" / "args.json").read_text())  # what it goes on with
    assert known == dataclasses.asdict(Args(str(tmp_path / "new"), resume=True, steps=80))


def test_a_folder_written_before_an_option_was_there_goes_on_with_its_default(ranks, tmp_path):
    start(tmp_path, ranks)
    known = json.loads((tmp_path / "args.json").read_text())
    del known["filter"]
    write_json(tmp_path / "args.json", known)
    message = refused(start, tmp_path, ranks, resume=True, filter="none")
    assert "(filter 'best_random' there, 'none' here)" in message
    start(tmp_path, ranks, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_what_is_another_run_s_or_nobody_s_is_refused_and_left_alone(ranks, tmp_path, resume):
    start(tmp_path / "run", ranks, seed=1)
    (tmp_path / "thesis.tex").write_text("all of it")
    before = files_of(tmp_path)
    message = refused(start, tmp_path / "run", ranks, seed=2, filter="none", steps=9, resume=resume)
    assert message.startswith(f"--run_dir {tmp_path / 'run'}: ")
    assert "(seed 1 there, 2 here; filter 'best_random' there, 'none' here)" in message
    assert "not empty and holds no run" in refused(start, tmp_path, ranks, resume=resume)
    for folder in (tmp_path / "thesis.tex", tmp_path / "thesis.tex" / "run"):
        assert refused(start, folder, ranks).startswith(f"--run_dir {folder}: ")
    assert files_of(tmp_path) == before


def test_a_script_that_cannot_resume_is_told_of_its_own_files_only(ranks, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    args = SimpleNamespace(out=str(tmp_path))
    assert claim(args, ranks, "", option="out", files=["results.jsonl"]) == tmp_path
    message = refused(claim, args, ranks, "", option="out")
    assert message == f"--out {tmp_path}: is not empty, choose another name"


def test_a_full_disk_at_the_start_is_one_line_and_leaves_nothing_in_the_way(ranks, tmp_path):
    with full_disk(10):
        message = refused(start, tmp_path, ranks)
    assert message == f"{tmp_path}: cannot be written: File too large"
    start(tmp_path, ranks)


def test_names_are_the_first_free_one_or_with_resume_the_last_one_taken(ranks, tmp_path):
    run = tmp_path / "run"
    assert numbered(run) == numbered(run, last=True) == run
    run.mkdir()
    assert numbered(run, last=True) == run
    (tmp_path / "run-2").mkdir()
    for resume, name in ((False, "run-3"), (True, "run-2")):
        args = Args("", resume=resume)
        assert claim(args, ranks, run) == tmp_path / name and args.run_dir == str(tmp_path / name)


def test_json_files_are_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "x.json", {"old": 1})
    with full_disk(20), pytest.raises(OSError):
        write_json(tmp_path / "x.json", {"new": "n" * 100})
    assert json.loads((tmp_path / "x.json").read_text()) == {"old": 1}
    message = refused(append_jsonl, Path("/dev/full"), [{"step": 1}])
    assert message == "/dev/full: cannot be written: No space left on device"


# ------------------------------------------------------------------------------------------ export


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor(ragged([9, 9]))).logits


def write_lm(ranks, folder, lm, extra=(), dtype=torch.float32):
    empty, tokenizer = empty_causal_lm(lm.config, dtype), tiny_tokenizer()
    empty.generation_config = lm.generation_config
    sharded = conftest.policy_of(lm, ranks).lm
    export.write(sharded, folder, empty, tokenizer, ranks, extra)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize(
    "architecture, tied, dtype", [("gpt2", True, torch.float32), ("llama", False, torch.bfloat16)]
)
def test_an_exported_policy_loads_in_transformers_with_equal_logits_and_stops(
    ranks, tmp_path, architecture, tied, dtype
):
    """And as fp32, whatever the type of its structure, which is that of forward passes."""
    lm = tiny_lm(architecture, tie_word_embeddings=tied)
    lm.generation_config = GenerationConfig(eos_token_id=[EOS, 9, 7])
    folder, wanted = tmp_path / "policy", logits_of(lm)
    loaded = write_lm(ranks, folder, lm, dtype=dtype)
    assert loaded.dtype == torch.float32 and type(loaded) is type(lm)
    assert torch.equal(logits_of(loaded), wanted)
    assert loaded.config.tie_word_embeddings == tied
    tokenizer = type(tiny_tokenizer()).from_pretrained(folder)
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert stop_ids(folder, tokenizer) == [EOS, 7, 9]
    assert {path.name for path in tmp_path.iterdir()} == {"policy"}


def test_an_exported_reward_model_loads_as_a_classifier_with_equal_scores_and_its_card(
    ranks, tmp_path
):
    model = conftest.scalar_of(conftest.tiny_classifier("llama"), ranks)
    config, card = model.classifier.config, RewardCard(0.25, 1.5, "template", "vocabulary")
    config.pad_token_id, folder = PAD, tmp_path / "rm"
    rest = empty_classifier(config), tiny_tokenizer(), ranks, [card.save]
    export.write(model.classifier, folder, *rest)
    loaded = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert loaded.config.num_labels == 1 and load_card(folder) == card
    rows = collate(ragged([2, 6, 4]), ragged([5, 1, 3], seed=1), pad_id=PAD)
    columns = torch.arange(rows.ids.shape[1])
    with torch.no_grad():
        scores = loaded(rows.ids, attention_mask=(columns <= rows.ends).long()).logits
        assert torch.allclose(model(rows.ids, rows.ends)[:, 0], scores, atol=1e-6)


def test_a_failed_export_leaves_the_old_one(ranks, tmp_path):
    folder, other = tmp_path / "policy", tiny_lm("llama", 1)
    write_lm(ranks, folder, tiny_lm("llama"))
    before = files_of(tmp_path)
    with full_disk(5000):
        early = refused(write_lm, ranks, folder, other)
    late = refused(write_lm, ranks, folder, other, [conftest.out_of_space])
    for message in (early, late):
        assert message.startswith(f"{folder}: cannot be written: ")
    assert files_of(tmp_path) == before


def test_an_export_replaces_the_old_one_and_what_a_killed_one_left_whole(ranks, tmp_path):
    for name in ("policy", "policy.tmp", "policy.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
        (tmp_path / name / "notes.txt").write_text("old")
    loaded = write_lm(ranks, tmp_path / "policy", tiny_lm("llama", 1))
    assert torch.equal(logits_of(loaded), logits_of(tiny_lm("llama", 1)))
    assert not (tmp_path / "policy/notes.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"policy"}


# ------------------------------------------------------------------------------------------- nodes

LONG = {"steps": 100_000, "warmup": 0, "eval_every": 1000, "test": "", "validation": ""}


@pytest.fixture(scope="module")
def on_one_node(tiny, tmp_path_factory):
    """The metrics of three steps by two ranks of one node."""
    folder = tmp_path_factory.mktemp("one") / "run"
    process = started("train_ppo.py", tiny, folder, ranks=2, **LONG | {"steps": 3})
    assert process.wait(150) == 0, process.communicate()[0]
    return numbers(folder)


def start_nodes(folder, elastic, words):
    """Two agents of torchrun on this machine, with one rank each; they print into FOLDER/N.txt."""
    agents, port = [], find_free_port()
    for node in range(2):
        meet = ["--master_addr", "127.0.0.1", "--master_port", port, "--node_rank", node]
        if elastic:
            meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}"]
        launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, *meet]
        with open(folder / f"{node}.txt", "w") as out:
            command = list(map(str, [*launch, conftest.ROOT / "train_ppo.py", *words]))
            agents.append(subprocess.Popen(command, cwd=folder, stdout=out, stderr=out))
    return agents


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("elastic, killed", [(False, None), (False, 0), (True, 1)])
def test_two_nodes_train_as_two_ranks_of_one_and_where_one_dies_the_other_ends(
    tiny, on_one_node, tmp_path, elastic, killed
):
    steps = {"steps": 3} if killed is None else {}
    words = options(tiny, tmp_path / "run", **LONG | steps, collective_timeout=0.5)
    agents = start_nodes(tmp_path, elastic, words)
    try:
        wait_for_steps(agents[1], tmp_path / "run", 3)
        tasks = [Path(f"/proc/{agent.pid}/task/{agent.pid}/children") for agent in agents]
        workers = sum((task.read_text().split() for task in tasks if task.exists()), [])
        if killed is not None:
            agents[killed].send_signal(signal.SIGKILL)
        ended = [agent.wait(120) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    said = "".join((tmp_path / f"{node}.txt").read_text() for node in range(2))
    assert ended == [0, 0] if killed is None else ended[1 - killed] > 0, said
    assert numbers(tmp_path / "run")[:3] == on_one_node
    assert not any(map(alive, workers))
