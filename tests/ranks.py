"""Refusals, and ranks without a launch, for tests of several rooms.

A test on several ranks is a function of `ranks` under `ranked`. The ranks are forks of this process
and have imported all that it has, where every worker of torchrun imports torch anew. A process that
has a process group must not fork: such a test asks for no fixture `ranks`, nor does one before it
in its file.
"""

import gc
import inspect
import os
import socket
import tempfile
from pathlib import Path

# A fork of a process whose backward pass knows a GPU cannot run backward.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from pfppo.config import UserError  # noqa: E402
from pfppo.fsdp import init_ranks  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402 (what an optimizer imports at its first step)
import torch.distributed as dist  # noqa: E402
from torch.multiprocessing import start_processes  # noqa: E402


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
    assert not dist.is_initialized()
    gc.collect()  # what is left of process groups would wait for threads that no child has
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        job = work, {"minutes": 5.0} | options, address | {"WORLD_SIZE": str(world)}, Path(folder)
        try:
            start_processes(_rank, job, world, start_method="fork")
        finally:
            gc.unfreeze()
        files = [Path(folder) / f"{rank}.pt" for rank in range(world)]
        return [torch.load(file, weights_only=False) for file in files]


def _rank(rank, work, options, names, folder):
    os.environ |= names | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    result = work(init_ranks("cpu", **options))
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()
