"""SIGTERM (preemption, end of a time slot) and Ctrl-C: a run saves what it has, and leaves.

A step changes models only in its last phase. So a run that is told to end while it samples or
scores gives the step up, and saves the state before it; in the update it goes on to the end of the
step. All ranks decide together (`agreed`), whichever was told first. Before training begins and
after the last checkpoint there is nothing to save, and a process leaves at once. It leaves with
exit status 0 after SIGTERM and 130 after Ctrl-C, so that a shell starts nothing that was to follow.

A second Ctrl-C ends a process where it is; the last complete checkpoint is what there is. torchrun
passes the first one on, its workers being in sessions of their own, and sends SIGTERM for the
second; so after a Ctrl-C that ends a process too, while SIGTERM after SIGTERM changes nothing.

Whoever sends SIGTERM sends SIGKILL some time later, and so does torchrun after Ctrl-C; so a run
that has not saved within `--grace_seconds` then ends by itself, with exit status 1 and its last
complete checkpoint. At a terminal without torchrun nobody does, and a run takes its time.

The sandbox's processes are in sessions of their own: no Ctrl-C reaches them. Not covered: other
signals; a rank that waits in a collective hears of a signal only when that has ended.
"""

import os
import signal
import sys
import threading

import torch
import torch.distributed as dist

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Stopped(Exception):
    """Raised inside a phase that can be given up: it ends the phase and nothing else."""


class Stop:
    """The wish to end a run. Create it in the main thread."""

    def __init__(self, ranks, grace):
        self.ranks, self.grace = ranks, grace
        self.asked = 0  # the signal by which this rank has been
        self.holding = False  # there is something to save
        self.timer = threading.Timer(grace, self._give_up)
        self.timer.daemon = True
        self.before = {number: signal.signal(number, self._ask) for number in NAMES}

    def _ask(self, number, _):
        if not self.holding:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            self.ranks.say("SIGTERM: ending; --resume goes on from what is in the folder")
            sys.exit(0)
        if self.asked:
            if signal.SIGINT in (number, self.asked):
                self._shout("again: ended at once")
                os._exit(130)
            return
        self.asked = number
        if number == signal.SIGINT:
            self._shout("saving, and then ending; once more ends at once")
        if number == signal.SIGTERM or "TORCHELASTIC_RUN_ID" in os.environ:  # SIGKILL will follow
            self.timer.start()

    def _shout(self, text):
        """Say it on rank 0's standard error, past the buffers: a handler may have interrupted a
        print, or a bar."""
        if self.ranks.is_main:
            os.write(2, f"\n{NAMES[signal.SIGINT]}: {text}\n".encode())

    def _give_up(self):
        name, limit = NAMES[self.asked], f"--grace_seconds {self.grace:g}"
        left = "what there is, is the last complete checkpoint, if any (see --save_every)"
        said = f"{name}, and not saved within {limit}: ending; {left}"
        print(f"rank {self.ranks.rank}: {said}", file=sys.stderr, flush=True)
        os._exit(1)

    def check(self):
        """Raise Stopped if this rank has been asked."""
        if self.asked:
            raise Stopped

    def agreed(self):
        """The name of the signal by which any rank has been asked, or "". A collective."""
        asked = torch.tensor(float(self.asked), device=self.ranks.device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return NAMES.get(int(asked), "")

    def release(self):
        """Everything is saved: from now on leave at once, now if it was asked meanwhile."""
        self.holding = False
        if self.asked:
            sys.exit(0)

    def close(self):
        """Handle signals as before; all that was to be saved is."""
        self.timer.cancel()
        for number, before in self.before.items():
            signal.signal(number, before)
