"""Refusals, and ranks without a launch, for tests of several rooms.

A test on several ranks is a function of `ranks` under `ranked`. The ranks are forks of this process
and have imported all that it has, where every worker of torchrun imports torch anew. A process that
has a process group must not fork: such a test asks for no fixture `ranks`, and conftest.py has
those that do come last in their file.
"""

import faulthandler
import gc
import inspect
import os
import signal
import socket
import sys
import tempfile
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# A fork of a process whose backward pass knows a GPU cannot run backward.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from pfppo.config import UserError  # noqa: E402
from pfppo.fsdp import init_ranks  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402 (what an optimizer imports at its first step)
import torch.distributed as dist  # noqa: E402


def refused(call, *args, **options):
    """The one line that a call ends in."""
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def ranked(*worlds, **options):
    """The test runs on every rank of gloo groups of these sizes. Its first argument is `ranks`."""

    def decorate(test):
        def run(world, **arguments):
            forked(lambda ranks: test(ranks, **arguments), world=world, **options)

        _, *names = inspect.signature(test).parameters.values()
        names = [name.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in names]
        world = inspect.Parameter("world", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        run.__signature__ = inspect.Signature([world, *names])
        run.__name__, run.pytestmark = test.__name__, getattr(test, "pytestmark", [])
        return pytest.mark.parametrize("world", worlds)(run)

    return decorate


def forked(work, world=2, **options):
    """[work(ranks) of every rank]; options: those of `init_ranks`."""
    with tempfile.TemporaryDirectory() as folder:

        def save():
            ranks = init_ranks("cpu", **{"minutes": 5.0} | options)
            torch.save(work(ranks), Path(folder) / f"{ranks.rank}.pt")
            dist.destroy_process_group()

        statuses, said = fork(save, world)
        assert not any(statuses), said
        files = [Path(folder) / f"{rank}.pt" for rank in range(world)]
        return [torch.load(file, weights_only=False) for file in files]


def fork(work, world):
    """work() in forks of this process, which are to it as workers of torchrun:
    (exit statuses, what they printed)."""
    assert not dist.is_initialized()
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": find_free_port(), "WORLD_SIZE": world}
    children = []
    gc.collect()  # what is left of process groups would wait for threads that no child has
    gc.freeze()
    with tempfile.TemporaryFile("w+") as output:
        for rank in range(world):
            if child := os.fork():
                children.append(child)
            else:
                names |= {"RANK": rank, "LOCAL_RANK": rank}
                os.environ |= {name: str(value) for name, value in names.items()}
                _end_with(work, output.fileno())
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        gc.unfreeze()
        output.seek(0)
        return statuses, output.read()


def _end_with(work, output):
    """The end of this process after work(), with the status that Python gives it."""
    status = 1
    try:
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        faulthandler.enable(output)  # of a rank that a signal ends: where each thread was
        signal.alarm(240)
        work()
        status = 0
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Peers:
    """Ranks that are threads of this process."""

    def __init__(self, world):
        self.barrier, self.slots = threading.Barrier(world, timeout=20), {}

    def sum(self, x):
        self.slots[threading.get_ident()] = x
        self.barrier.wait()
        total = sum(self.slots.values())
        self.barrier.wait()
        return total

    def run(self, function, *parts):
        """[function(*part, sum over ranks) of each rank]"""
        with ThreadPoolExecutor(len(parts)) as pool:
            return list(pool.map(lambda part: function(*part, self.sum), parts))


def find_free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
