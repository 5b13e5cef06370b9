"""SIGTERM (preemption, end of a time slot): a run saves what it has and leaves with exit status 0.

A step changes models only in its last phase. So a run that is told to end while it samples or
scores gives the step up: what it has to save is the state before the step. In the update it goes on
to the end of the step. All ranks decide together (`agreed`), whichever was told first. Before
training begins and after the last checkpoint there is nothing to save, and a process leaves at
once.

Whoever sends SIGTERM sends SIGKILL some time later; so a run that has not saved within
`--grace_seconds` ends by itself, with exit status 1. The last complete checkpoint is what it then
has.

Not covered: other signals; Ctrl-C ends a run as it is.
"""

import contextlib
import os
import signal
import sys
import threading

import torch
import torch.distributed as dist


class Stopped(Exception):
    """Raised inside a phase that can be given up."""


class Stop:
    """The wish to end a run. Create it in the main thread."""

    def __init__(self, ranks, grace):
        self.ranks, self.grace = ranks, grace
        self.asked = False  # this rank has been
        self.holding = False  # there is something to save
        self.timer = threading.Timer(grace, self._give_up)
        self.timer.daemon = True
        self.before = signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_):
        if not self.holding:
            self.ranks.say("SIGTERM: nothing to save, ending")
            sys.exit(0)
        if not self.asked:
            self.asked = True
            self.timer.start()

    def _give_up(self):
        late = f"SIGTERM, and not saved within --grace_seconds {self.grace:g}: ending"
        left = "the last complete checkpoint is what there is"
        print(f"rank {self.ranks.rank}: {late}; {left}", file=sys.stderr, flush=True)
        os._exit(1)

    def check(self):
        """Raise Stopped if this rank has been asked."""
        if self.asked:
            raise Stopped

    def giving_up(self):
        """A context in which Stopped ends the block and nothing else."""
        return contextlib.suppress(Stopped)

    def agreed(self):
        """Whether any rank has been asked. A collective."""
        asked = torch.tensor(float(self.asked), device=self.ranks.device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return bool(asked)

    def release(self):
        """Everything is saved: from now on leave at once, now if it was asked meanwhile."""
        self.holding = False
        if self.asked:
            sys.exit(0)

    def close(self):
        """Handle SIGTERM as before; all that was to be saved is."""
        self.timer.cancel()
        signal.signal(signal.SIGTERM, self.before)
