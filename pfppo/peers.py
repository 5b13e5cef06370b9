"""Several nodes: they end together, and see the same files.

A collective whose partner's machine is gone waits for its timeout (`fsdp.TIMEOUT`, 30 minutes).
So, where torchrun runs on more than one node ("agent": the torchrun process of a node):

    die_with_agent()   a worker dies with its agent: no orphan goes on training (Linux)
    watch()            a thread in each rank counts up its node's heartbeat in torchrun's store
                       every PERIOD, and reads the others'; one that stands still for SILENCE, or a
                       store that does not answer, ends this process with status 1
    together(main)     tells the others how `main` ended: a regular end is no death, an exception
                       is one at once, and a collective's "connection reset" waits for the reason

Each node says why in one line on standard error, from its local rank 0. With one node nothing of
this runs but `die_with_agent`.

Not covered: a rank that lives and hangs (the timeout ends it); a node that fails before the process
group stands (the others wait for it, up to the timeout); an agent that dies in the seconds in which
its workers import torch; launchers other than torchrun, which have no store of their own.
"""

import functools
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from datetime import timedelta
from pathlib import Path

from pfppo.config import UserError, reason, require
from pfppo.isolation import PR_SET_PDEATHSIG, call

import torch.distributed as dist

PERIOD = 5.0  # seconds between heartbeats
SILENCE = 30.0  # seconds without one after which a node is taken for dead
VISIBLE = 10.0  # seconds that a network file system may take to show a new file
AGAIN = " (start all nodes again, with --resume)"
LOST = re.compile(r"(closed|reset) by peer|Broken pipe|Connection refused|[Rr]emote process exited")

_watch = None  # this process's Watch, where there are several nodes


def nodes():
    """How many nodes torchrun runs on; 1 without torchrun."""
    return int(os.environ.get("GROUP_WORLD_SIZE", 1))


def die_with_agent():
    """Be killed when the torchrun process that started this one dies. Linux only, else nothing."""
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call, which then comes too late
        os._exit(1)


class Watch(threading.Thread):
    """Heartbeat of this node and ear for the others, in keys of the store below peers/RUN:

    beat/N  a counter that all ranks of node N count up    name/N  its host
    left/N  "yes" once N has ended regularly               failed  "N: why", of the first to fail
    """

    def __init__(self):
        super().__init__(name="peers", daemon=True)
        self.node, self.local_rank = (int(os.environ[n]) for n in ("GROUP_RANK", "LOCAL_RANK"))
        self.others = [node for node in range(nodes()) if node != self.node]
        self.leaving = threading.Event()
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: another thread may wait for an answer on torch's for minutes.
        options = {"is_master": False, "wait_for_workers": False}
        store = dist.TCPStore(*address, timeout=timedelta(seconds=SILENCE), **options)
        box = [uuid.uuid4().hex]  # a store outlives torchrun's restarts: new keys for every start
        dist.broadcast_object_list(box, 0)
        self.store = dist.PrefixStore(f"peers/{box[0]}", store)
        if dist.get_rank() == 0:  # so that no key is ever waited for
            for node in range(nodes()):
                self.store.set(f"left/{node}", "")
                self.store.add(f"beat/{node}", 0)
            self.store.set("failed", "")
        names = [None] * dist.get_world_size()
        dist.all_gather_object(names, (self.node, socket.gethostname()))
        self.names = dict(names)

    def run(self):
        heard, beats = dict.fromkeys(self.others, time.monotonic()), {}
        keys = ["failed", *(f"{what}/{n}" for n in self.others for what in ("beat", "left"))]
        while not self.leaving.wait(PERIOD):
            what = f"the store of {self._host_of(0)} does not answer"
            alarm = threading.Timer(SILENCE, self.end, [what + AGAIN])
            alarm.daemon = True  # it rings where no answer comes, not even an error
            alarm.start()
            try:
                self.store.add(f"beat/{self.node}", 1)
                failed, *values = (value.decode() for value in self.store.multi_get(keys))
            except RuntimeError:
                self.end(f"{what}: it has ended or cannot be reached{AGAIN}")
                return
            finally:
                alarm.cancel()
            if failed:
                node, _, why = failed.partition(": ")
                if not self.leaving.wait(PERIOD):  # this rank may have the same to say by itself
                    self.end(f"{self._host_of(int(node))} has ended: {why}")
                return
            now = time.monotonic()
            for node, beat, left in zip(self.others, values[::2], values[1::2], strict=True):
                if left or beat != beats.get(node):
                    heard[node], beats[node] = now, beat
                if now - heard[node] > SILENCE:
                    self.end(f"{self._host_of(node)} has been silent for {SILENCE:.0f} s{AGAIN}")
                    return

    def _host_of(self, node):
        return f"node {node} ({self.names[node]})"

    def end(self, why):
        """Say why on the node's local rank 0, and end this process with status 1."""
        if self.leaving.is_set():  # it is ending by itself
            return
        if self.local_rank:  # torchrun ends a node at its first failed rank: let rank 0 speak first
            time.sleep(2 * PERIOD)
        else:
            script = os.path.basename(sys.argv[0])
            too = f"node {self.node} of {nodes()} nodes ends too"
            print(f"{script}: error: {why}; {too}", file=sys.stderr, flush=True)
        os._exit(1)

    def leave(self, failure):
        """Stop watching, and tell the others that this rank ends: why, or None if regularly."""
        self.leaving.set()
        self.join(PERIOD)  # an interpreter that ends under a thread inside the store aborts
        try:
            if not self.is_alive() and failure:
                self.store.compare_set("failed", "", f"{self.node}: {failure}")
            elif not self.is_alive() and self.local_rank == 0:
                self.store.set(f"left/{self.node}", "yes")
        except RuntimeError:  # no store, nobody to tell
            pass


def watch():
    """Start to beat and to watch, where there are several nodes. A collective."""
    global _watch
    if nodes() > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        _watch = Watch()
        _watch.start()


def _is_lost(error):
    """Whether an exception, or one that it came from, is of a connection to another rank."""
    while error is not None:
        lost = isinstance(error, RuntimeError) and LOST.search(str(error))
        if lost or isinstance(error, dist.DistError):
            return True
        error = error.__cause__ or error.__context__
    return False


def together(main):
    """A script's `main(args)` that ends the process group (its threads can abort an interpreter
    that leaves before them) and, where there are several nodes, tells them how it ended.

    What it raises stays as it is. But where a collective lost its connection, the watch is given
    time to find out which node is gone, and ends the process with its line.
    """

    @functools.wraps(main)
    def run(*args):
        failure = None
        try:
            main(*args)
        except SystemExit as error:
            failure = f"exit status {error.code}" if error.code else None
            raise
        except BaseException as error:
            if _watch and _is_lost(error):
                _watch.join(2 * SILENCE + 2 * PERIOD)  # torchrun may take SILENCE to end the others
            failure = str(error) if isinstance(error, UserError) else reason(error)
            raise
        finally:
            if _watch:
                _watch.leave(failure)
            if failure is None and dist.is_initialized():
                dist.destroy_process_group()

    return run


def check_shared(folder, what):
    """Raise UserError, on all ranks, unless `folder` is the same one on all nodes. A collective.

    It need not exist: the nearest of rank 0's parents that does is looked at. what: names it in the
    message, as "--run_dir runs/x".
    """
    if nodes() == 1:
        return
    places = (Path(folder).absolute(), *Path(folder).absolute().parents)
    box = [None]
    if dist.get_rank() == 0:
        level = next(level for level, path in enumerate(places) if path.exists())
        try:
            descriptor, token = tempfile.mkstemp(prefix=".shared-", dir=places[level])
            os.close(descriptor)
            box = [(level, os.path.basename(token))]
        except OSError as error:
            box = [f"{what}: cannot be written: {reason(error)}"]
    dist.broadcast_object_list(box, 0)
    require(not isinstance(box[0], str), box[0])
    level, name = box[0]
    token = places[min(level, len(places) - 1)] / name
    deadline = time.monotonic() + VISIBLE
    while not (seen := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    views = [None] * dist.get_world_size()
    dist.all_gather_object(views, (seen, socket.gethostname(), str(token.parent)))
    if dist.get_rank() == 0:
        token.unlink()
    blind = [f"{place} of {host}" for seen, host, place in views if not seen]
    require(
        not blind,
        f"{what}: {blind and blind[0]} is another folder than {views[0][2]} of {views[0][1]}, "
        "expected a file system that all nodes share",
    )
