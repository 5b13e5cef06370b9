"""`Session`: what surrounds the loop of train_ppo.py and is no part of the algorithm.

Its folder and its checkpoints, the choice of the best policy by validation, the lines of its logs,
and its end, regular, by SIGTERM or by Ctrl-C. It never calls the script: the order of steps is the
script's.
"""

import contextlib
import os
import signal
import sys
from collections import deque
from dataclasses import asdict, dataclass, field
from functools import partial

from pfppo import fsdp, metrics
from pfppo.config import UserError, require
from pfppo.files import append_jsonl, whole_lines
from pfppo.reward import try_reward
from pfppo.run import checkpoint, export
from pfppo.run.fitting import rows_at_once
from pfppo.run.folder import claim, open_folder
from pfppo.run.memory import Plan
from pfppo.run.proofs import apart
from pfppo.run.stopping import NAMES, Stop, Stopped


@dataclass
class State:
    """What a checkpoint holds besides weights and optimizers, equal on all ranks."""

    step: int  # how many are done
    kl_coef: float  # beta of the next one
    best: float | None = None  # the highest pass rate on validation
    best_step: int = 0  # and the step of the policy that had it
    empty_steps: int = 0  # in which nothing was kept
    skipped_updates: int = 0  # whose gradient was not finite
    normaliser: list = field(default_factory=list)  # mean and sd of the RM, where it has no card
    scale: list = field(default_factory=list)  # mean and sd of any other reward

    @property
    def chosen(self):
        """How the policy in policy/ was."""
        return "exported" if self.best is None else "best on validation"


class Session:
    """One run of train_ppo.py. Methods are collectives unless they say otherwise."""

    def __init__(self, args, ranks):
        """Claim --run_dir; raises UserError where it is another run's. Nothing is written yet."""
        self.args, self.ranks, self.checked = args, ranks, False
        self.cut = None  # share of the answers to validation that had no EOS, when last looked at
        self.stop = Stop(ranks, args.grace_seconds)
        # torchrun has started this process again after a failure (`--max-restarts`)
        args.resume |= int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        label = getattr(args, "filter", "reward_model")
        label = label if label.isidentifier() else "own_filter"
        self.folder = claim(args, ranks, f"runs/{label}")

    def check(self, inputs, reward_of):
        """Raise UserError where a user's reward fails, or the run cannot fit into memory; from here
        on `slots` are the rows that decode together."""
        with fsdp.agreed(self.ranks):
            try_reward(self.args.reward, reward_of, inputs.train.problems[:2])
        needs = partial(Plan, self.args, prompt=inputs.longest)
        self.slots = rows_at_once(self.args, self.ranks, needs)

    def load(self, trained):
        """The State of the newest complete checkpoint, models and optimizers put into it; or that
        of step 0. trained: {name: (sharded model, optimizer)}."""
        self.trained, fresh = trained, State(0, self.args.kl_coef)
        if self.args.selfcheck:  # which leaves everything as it is
            return fresh
        known = checkpoint.load(self.folder, trained, self.ranks)
        return State(**known) if known else fresh

    def open(self, models, examiner, validation, state):
        """Make the folder, and look at validation once before training. From here on SIGTERM
        and Ctrl-C save before they end the run."""
        open_folder(self.folder, self.args, self.ranks)
        if self.args.resume and state.step == 0:
            self.ranks.say(f"{self.folder}: no checkpoint to go on from, starting at step 1")
        self.saver = checkpoint.Saver(self.folder, self.ranks, self.args.keep, state.step)
        recent = {}
        for record in whole_lines(self.folder / "samples.jsonl"):
            recent.setdefault(record["step"], []).append(record)
        self.recent = deque(recent.values(), metrics.R2_STEPS)
        if state.step == 0:
            value = self.look(models, examiner, validation, state)
            shown = "-" if value is None else metrics.validation(value, self.cut)
            self.ranks.say(f"validation before training: {shown}")
        self.state, self.stop.holding = state, True

    def look(self, models, examiner, validation, state):
        """The policy's pass rate on validation, greedy; where it is the best so far, or where none
        is known, the policy is exported."""
        value, self.cut = examiner.greedy(models, validation)
        if value is None or state.best is None or value > state.best:
            state.best, state.best_step = value, state.step
            best = {"best": value, "best_step": state.step}
            export.write_best(models, self.folder / "policy", examiner.tokens, self.ranks, best)
        return value

    def check_sampler(self, rows):
        """Raise UserError, in the first step, where the sampler's log-probs are not training's."""
        if self.checked:
            return
        self.checked, tokens = True, rows.mask > 0
        dtype = fsdp.compute_dtype(self.args.param_dtype, self.ranks)
        with fsdp.agreed(self.ranks):
            difference, limit = apart(rows.sampled_logp[tokens], rows.old_logp[tokens], dtype)
            what = f"log-probs of sampler and training differ by {difference:.2g} nats"
            more = f"expected at most {limit:.2g}: --selfcheck says more"
            require(difference <= limit, f"--policy {self.args.policy}: {what}, {more}")

    @contextlib.contextmanager
    def may_give_up(self, rows):
        """A context in which so many rows of this rank are sampled, which changes nothing. What it
        gives is called with the rows that are done since: it moves a bar, and ends the phase early
        if this rank has been asked to end. No collective."""
        with contextlib.suppress(Stopped), fsdp.bar("samples", total=rows) as shown:

            def progress(done):
                shown.update(done)
                self.stop.check()

            yield progress

    @contextlib.contextmanager
    def rescues(self):
        """A context in which nothing changes, and a user's function may fail on any rank: then it
        has failed on all, and what is done so far is saved."""
        try:
            with fsdp.agreed(self.ranks):
                yield
        except UserError as error:
            if self.state.step == 0:
                raise
            self.keep(self.trained, self.state)
            how = f"saved after step {self.state.step}; go on with --run_dir {self.folder} --resume"
            raise UserError(f"{error}; {how}") from error

    def on_main(self, work, *args):
        """`fsdp.on_main`, of a user's function, which may fail."""
        with self.rescues():
            return fsdp.on_main(self.ranks, work, *args)

    def keep(self, trained, state):
        """Save what is not saved yet."""
        if self.saver.newest != state.step:
            self.saver.start(trained, asdict(state))
        self.saver.finish()

    def stops(self):
        """Whether any rank has been asked to end: by what, or ""."""
        return self.stop.agreed()

    def save(self, trained, state, steps=None):
        """A checkpoint every --save_every steps and after the last (of `steps`; else of --steps),
        written beside the next."""
        self.saver.poll()  # what was begun some steps ago may be complete now
        if state.step % self.args.save_every == 0 or state.step == (steps or self.args.steps):
            self.saver.start(trained, asdict(state))

    def log(self, row, answers, weights):
        """Append the step to metrics.jsonl and samples.jsonl, and print its line. weights [B]."""
        N = self.args.samples_per_prompt
        records = metrics.sample_records(row["step"], N, answers, weights)
        self.recent.append(sum(fsdp.gather_lists(records, self.ranks), []))
        cut = self.cut if row.get("validation") is not None else None
        row |= {"validation_truncated": cut}
        row = metrics.complete(row | metrics.rolling_r2(self.recent))
        if self.ranks.is_main:
            append_jsonl(self.folder / "metrics.jsonl", [row])
            append_jsonl(self.folder / "samples.jsonl", self.recent[-1])
        self.ranks.say(metrics.line(row, self.args.steps))

    def close(self, trained, state):
        """Save what is not saved yet. Returns whether the run was told to end."""
        stopped = self.stops()
        if stopped:
            self.keep(trained, state)
        self.saver.finish()
        if stopped := stopped or self.stops():
            self.stop.close()
            how = f"go on with --resume (--run_dir {self.folder} --resume is enough)"
            saved = f"saved after step {state.step}" if state.step else "no step was done"
            self.ranks.say(f"{self.folder}: {stopped}, {saved}; {how}")
            if stopped == NAMES[signal.SIGINT]:  # what a shell would start next is not wanted
                sys.exit(130)
        else:
            self.stop.release()
        return bool(stopped)

    def leave(self, state):
        """Say what there is. No collective."""
        self.stop.close()
        files = f"policy/ ({state.chosen}), metrics.jsonl, samples.jsonl, checkpoints/"
        self.ranks.say(f"{self.folder}: {files}")
        self.ranks.say(f"peak memory of rank 0: {metrics.peak_memory()}")
