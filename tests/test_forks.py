"""The patches in tests/forks: each applies to the tree as it is, trains, and keeps its invariants.

They show where an ablation goes: four times in at most fifteen lines, LoRA in sixty. The copies of
the tree are imported in forked processes, where torch and transformers have been loaded already.
"""

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, quick
from running import forked, options, read
from safetensors.torch import load_file

PATCHES = sorted((ROOT / "tests" / "forks").glob("*.patch"))
OPTIONS = {  # beside the tiny run's
    "dapo": {"reward": "tests"},  # an untaught policy fails all: every round is drawn, no update
}


def patched(path, folder):
    """The three scripts and the package with the patch applied."""
    shutil.copytree(ROOT / "pfppo", folder / "pfppo")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    done = subprocess.run(["patch", "-p1", "-i", path], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "fuzz" not in done.stdout, done.stdout
    return folder


def script_of(folder):
    """A stand-in for train_ppo.py that imports the copy when it is run, and runs it with each part
    of the command line between two `--`."""

    def main(args):
        for name in list(sys.modules):
            if name.split(".")[0] in ("pfppo", "train_ppo", "train_rm"):
                del sys.modules[name]
        sys.path.insert(0, str(folder))
        import train_ppo
        from pfppo.config import parse

        assert Path(train_ppo.__file__).parent == folder
        words, status = [], 0
        for word in [*sys.argv[1:], "--"]:
            if word == "--":
                status = status or train_ppo.main(parse(train_ppo.Args, words)) or 0
                if torch.distributed.is_initialized():
                    torch.distributed.destroy_process_group()
                words = []
            else:
                words.append(word)
        return status

    args = type("Args", (), {"__init__": lambda self: None})
    return types.SimpleNamespace(__file__=str(folder / "train_ppo.py"), main=main, Args=args)


def words_of(tiny, name, run_dir, **changed):
    chosen = {"test": "", "validation": "", "save_every": 2} | OPTIONS.get(name, {}) | changed
    return options(tiny, run_dir, **chosen)


OFTEN = [path for path in PATCHES if path.stem in ("grpo", "lora")]


@pytest.mark.parametrize("path", quick(OFTEN, PATCHES), ids=lambda path: path.stem)
def test_a_fork_is_small_trains_and_passes_the_selfcheck(tiny, tmp_path, path, monkeypatch):
    lines = path.read_text().splitlines()
    added = sum(line.startswith("+") and not line.startswith("+++") for line in lines)
    assert added <= (60 if path.stem == "lora" else 15) and lines[0].endswith(".")
    script = script_of(patched(path, tmp_path / "tree"))
    monkeypatch.setattr("pfppo.config.parse", lambda cls, argv=None: None)  # the copy parses
    argv = words_of(tiny, path.stem, tmp_path / "run")
    check = (*argv, "--run_dir", tmp_path / "no", "--selfcheck")
    statuses, said = forked(script, *argv, "--", *check, ranks=1)
    assert statuses == [0] and "nothing FAILED" in said, said
    assert not (tmp_path / "no").exists()  # a selfcheck writes nothing
    rows = read(tmp_path / "run/metrics.jsonl")
    assert len(rows) == 2 and rows[0]["ratio_first_minibatch"] in (1.0, None)


@pytest.mark.slow
def test_lora_exports_what_it_sampled_from_and_resumes(tiny, tmp_path, monkeypatch):
    script = script_of(patched(ROOT / "tests/forks/lora.patch", tmp_path / "tree"))
    monkeypatch.setattr("pfppo.config.parse", lambda cls, argv=None: None)
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    words = []
    for folder, steps in ((run_dir, 2), (run_dir, 4), (whole, 4)):
        argv = words_of(tiny, "lora", folder, steps=steps)
        words += [*argv, *(["--resume"] if steps == 4 and folder == run_dir else []), "--"]
    exported, before = tmp_path / "out", load_file(tiny / "policy/model.safetensors")
    words += ["--run_dir", run_dir, "--export", exported]
    statuses, said = forked(script, *words, ranks=1)
    assert statuses == [0], said
    after = load_file(exported / "model.safetensors")
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved and all("proj" in name for name in moved)
    resumed, other = (read(folder / "samples.jsonl")[-1] for folder in (run_dir, whole))
    assert resumed == other
    assert json.loads((exported / "config.json").read_text())["architectures"]
    assert os.path.isdir(exported / "reward_model")
