"""Checkpoints: complete state after N steps, written while training goes on, whole or not at all.

    checkpoints/step_N/sharded/      weights and optimizer states, one file per rank
    checkpoints/step_N/state.json    what else the run knows: KL coefficient, best step, counts
    checkpoints/step_N/manifest.json all files and their sizes

The slices are copied to host memory, and a thread writes them under a temporary name while the next
steps are made. When all ranks have written, the folder is listed in the manifest, flushed and
renamed; so a folder named step_N is complete unless somebody damaged it, and then the manifest
tells, where a size has changed. There is no random state to save: every draw of a run is a function
of (seed, step), see data.py and sampler.py.

Nor does a checkpoint depend on the number of ranks: torch.distributed.checkpoint puts the slices of
any number together and cuts them anew. The numbers of a run resumed on other ranks are those of an
uninterrupted one up to the order of sums.

Not covered: copies on other machines.
"""

import json
import os
import shutil

from pfppo.config import UserError, reason
from pfppo.files import rewrite_jsonl, whole_lines, write_json
from pfppo.fsdp import on_main

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

SHARDED = "sharded"
BEST = "best.json"  # in policy/: the step that it is from, and its pass rate on validation


def _state(trained):
    found = {}
    for name, (model, optimizer) in trained.items():
        weights, moments = get_state_dict(model, optimizer)
        found[name] = {"model": weights, "optimizer": moments}
    return found


class Saver:
    """Writes checkpoints of one run, one at a time. Every method is a collective.

    All raise UserError where a checkpoint cannot be written; earlier ones are then untouched.
    """

    def __init__(self, run, ranks, keep, newest=None):
        self.run, self.ranks, self.keep = run, ranks, keep
        self.newest = newest  # the newest step that is saved, or being saved
        self.pending = None  # (step, state, future) of what is being written
        # The thread talks to its peers while training does: it needs a group of its own.
        self.group = dist.new_group(backend="gloo")

    def start(self, trained, state):
        """Begin to write checkpoints/step_N; what is written is the state of this moment.

        trained: {name: (sharded model, optimizer)}; state: a JSON-serialisable dict with "step",
        equal on all ranks.
        """
        self.finish()
        step = state["step"]
        temporary = self._temporary(step)
        try:
            on_main(self.ranks, _clear, temporary)
            future = dcp.async_save(
                _state(trained), checkpoint_id=temporary / SHARDED, process_group=self.group
            )
        except (OSError, dcp.api.CheckpointException) as error:
            self._fail(step, error)
        self.newest = step
        self.pending = step, dict(state), future

    def poll(self):
        """Complete the checkpoint if all ranks have written their slices."""
        if self.pending:
            done = torch.tensor(float(self.pending[2].done()), device=self.ranks.device)
            dist.all_reduce(done, dist.ReduceOp.MIN)
            if done.item():
                self.finish()

    def finish(self):
        """Wait for the checkpoint that is being written, and complete it."""
        if not self.pending:
            return
        (step, state, future), self.pending = self.pending, None
        folder = self.run / "checkpoints"
        target, temporary = folder / f"step_{step}", self._temporary(step)

        def complete_it():
            _seal(temporary, state)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
            _sync(folder)
            for old in complete(self.run)[0][self.keep :]:
                shutil.rmtree(old)

        try:
            future.result()
            on_main(self.ranks, complete_it)
        except (OSError, dcp.api.CheckpointException) as error:
            self._fail(step, error)

    def _temporary(self, step):
        return self.run / "checkpoints" / f"step_{step}.tmp"

    def _fail(self, step, error):
        left = shutil.disk_usage(self.run).free // 2**20  # torch's own message is not about it
        shutil.rmtree(self._temporary(step), ignore_errors=True)
        last = (complete(self.run)[0] or ["none"])[0]
        raise UserError(
            f"{self.run / 'checkpoints'}/step_{step}: cannot save with {left} MiB left on the disk "
            f"({_reason(error)}); last complete one: {last}"
        ) from error


def _clear(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _reason(error):
    inner = list(getattr(error, "failures", {}).values())
    error = inner[0][0] if inner else error
    return reason(error)


def _seal(folder, state):
    write_json(folder / "state.json", state)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    write_json(folder / "manifest.json", sizes)
    for inner in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        _sync(inner)


def _sync(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def complete(run):
    """(complete checkpoints, damaged ones), newest first."""
    folders = [
        path
        for path in (run / "checkpoints").glob("step_*")
        if path.name.removeprefix("step_").isdigit()
    ]
    folders.sort(key=lambda path: int(path.name.removeprefix("step_")), reverse=True)
    whole = [path for path in folders if is_whole(path)]
    return whole, [path for path in folders if path not in whole]


def is_whole(folder):
    """Whether a checkpoint has all its files in their sizes."""
    try:
        sizes = json.loads((folder / "manifest.json").read_text())
        json.loads((folder / "state.json").read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def load(run, trained, ranks):
    """Restore the newest complete checkpoint in place; returns its state, or None. A collective.

    Any number of ranks may have written it. Damaged checkpoints are named, skipped and removed, and
    the JSONL files cut back. Raises UserError where its slices cannot be read.
    """
    newest, damaged = on_main(ranks, _newest, run)
    for path in damaged:
        ranks.say(f"{path}: incomplete, falling back to {newest or 'the start of the run'}")
    state = json.loads((newest / "state.json").read_text()) if newest else None
    if newest:
        loaded = _state(trained)
        try:
            dcp.load(loaded, checkpoint_id=newest / SHARDED)
        except dcp.api.CheckpointException as error:  # of any rank, on all of them
            raise UserError(
                f"{newest}: damaged, or of another model ({_reason(error)}); remove it to go on "
                "from the one before"
            ) from error
        for name, (model, optimizer) in trained.items():
            part = loaded[name]
            weights = {"model_state_dict": part["model"], "optim_state_dict": part["optimizer"]}
            set_state_dict(model, optimizer, **weights)
    later = on_main(ranks, _cut_back, run, state["step"] if state else 0)
    if state and later.get("best_step", 0) > state["step"]:
        state |= later  # exported after the checkpoint was saved, and still the best there was
    return state


def _newest(run):
    """(newest complete checkpoint or None, newer ones that are damaged, which are removed)."""
    whole, damaged = complete(run)
    newer = [path for path in damaged if not whole or _number(path) > _number(whole[0])]
    for path in newer:
        shutil.rmtree(path)
    return whole[0] if whole else None, newer


def _cut_back(run, step):
    """Drop what the files have of later steps. Returns what policy/ says of itself."""
    for path in (run / "metrics.jsonl", run / "samples.jsonl"):
        rewrite_jsonl(path, [row for row in whole_lines(path) if row["step"] <= step])
    policy, previous = run / "policy", run / "policy.old"
    if previous.exists() and not policy.exists():  # killed between the renames of `export`
        previous.rename(policy)
    return json.loads((policy / BEST).read_text()) if (policy / BEST).exists() else {}


def _number(path):
    return int(path.name.removeprefix("step_"))
