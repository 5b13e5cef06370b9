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

import contextlib
import itertools
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


class Saver:
    """Writes checkpoints of one run, one at a time. Methods are collectives, and raise UserError
    where one cannot be written; earlier ones are then untouched."""

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
        with self._writing(step) as temporary:
            on_main(self.ranks, _clear, temporary)
            where = {"checkpoint_id": temporary / SHARDED, "process_group": self.group}
            self.pending = step, dict(state), dcp.async_save(_state_of(trained), **where)
        self.newest = step

    def poll(self):
        """Complete the checkpoint if all ranks have written their slices."""
        if self.pending:
            done = torch.tensor(float(self.pending[2].done()), device=self.ranks.device)
            dist.all_reduce(done, dist.ReduceOp.MIN)
            if done.item():
                self.finish()

    def finish(self):
        """Wait for the checkpoint that is being written, and complete it."""
        if self.pending:
            (step, state, future), self.pending = self.pending, None
            with self._writing(step) as temporary:
                future.result()
                on_main(self.ranks, self._complete, temporary, state)

    @contextlib.contextmanager
    def _writing(self, step):
        """The temporary folder of a checkpoint; what fails inside is one UserError."""
        temporary = self.run / "checkpoints" / f"step_{step}.tmp"
        try:
            yield temporary
        except (OSError, dcp.api.CheckpointException) as error:
            free = shutil.disk_usage(self.run).free // 2**20  # torch's own message is not about it
            shutil.rmtree(temporary, ignore_errors=True)
            last = next(iter(complete(self.run)), "none")
            why = f"cannot save with {free} MiB left on the disk ({_reason(error)})"
            final = temporary.with_suffix("")
            raise UserError(f"{final}: {why}; last complete one: {last}") from error

    def _complete(self, temporary, state):
        write_json(temporary / "state.json", state)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in files}
        write_json(temporary / "manifest.json", sizes)
        _flush(temporary / SHARDED)
        _flush(temporary)
        target = temporary.with_suffix("")
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        _flush(target.parent)
        for old in complete(self.run)[self.keep :]:
            shutil.rmtree(old)


def _clear(folder):
    shutil.rmtree(folder, ignore_errors=True)  # what a kill has left
    folder.mkdir(parents=True)


def _flush(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _state_of(trained):
    pairs = {name: get_state_dict(*pair) for name, pair in trained.items()}
    return {name: {"model": weights, "optimizer": m} for name, (weights, m) in pairs.items()}


def _reason(error):
    """What went wrong on the first rank that failed."""
    failures = list(getattr(error, "failures", {}).values())  # (exception, its traceback)
    return reason(failures[0][0] if failures else error)


def _folders(run):
    """All checkpoints/step_N, newest first."""
    steps = [path.name.removeprefix("step_") for path in (run / "checkpoints").glob("step_*")]
    steps = sorted((int(step) for step in steps if step.isdigit()), reverse=True)
    return [run / "checkpoints" / f"step_{step}" for step in steps]


def complete(run):
    """The complete checkpoints of a run, newest first."""
    return [folder for folder in _folders(run) if is_whole(folder)]


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
    state = {"step": 0}
    if newest:
        loaded = _state_of(trained)
        try:
            dcp.load(loaded, checkpoint_id=newest / SHARDED)
        except dcp.api.CheckpointException as error:  # of any rank, on all of them
            for failure, _ in error.failures.values():
                if not isinstance(failure, Exception):  # Ctrl-C, SIGTERM: nothing is damaged
                    raise failure from None
            why = f"damaged, or of another model ({_reason(error)})"
            raise UserError(f"{newest}: {why}; remove it to go on from the one before") from error
        for name, pair in trained.items():
            weights, moments = loaded[name].values()
            set_state_dict(*pair, model_state_dict=weights, optim_state_dict=moments)
        state = json.loads((newest / "state.json").read_text())
    exported = on_main(ranks, _cut_back, run, state["step"])
    if exported.get("best_step", 0) > state["step"]:
        state |= exported  # after the checkpoint was saved, and still the best there was
    return state if newest else None


def _newest(run):
    """(newest complete checkpoint or None, damaged ones after it, which are removed)."""
    folders = _folders(run)
    damaged = list(itertools.takewhile(lambda folder: not is_whole(folder), folders))
    for folder in damaged:
        shutil.rmtree(folder)
    return next(iter(folders[len(damaged) :]), None), damaged


def _cut_back(run, step):
    """Drop what the files have of later steps. Returns what policy/ says of itself."""
    for path in (run / "metrics.jsonl", run / "samples.jsonl"):
        # The samples that a reward model's pairs come from belong to no step.
        rewrite_jsonl(path, [row for row in whole_lines(path) if row.get("step", 0) <= step])
    policy, previous = run / "policy", run / "policy.old"
    if previous.exists() and not policy.exists():  # killed between the renames of `export`
        previous.rename(policy)
    return json.loads((policy / BEST).read_text()) if (policy / BEST).exists() else {}
