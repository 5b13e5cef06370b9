"""Collectives: what they give, their order at rank 0 of 64, how long they wait; ends of ranks."""

import contextlib
import io
import multiprocessing
import os
import re
import select
import signal
import subprocess
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import train_ppo
from pfppo import fsdp
from pfppo.config import UserError, require
from pfppo.fsdp import adamw, init_ranks, shard, sum_over_ranks
from pfppo.loading import Whole
from pfppo.model import ScalarModel, empty_classifier

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, tiny_classifier
from ranks import forked, ranked, refused
from test_fsdp import data, sharded_policy
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode


@ranked(1, 2)
def test_gathered_rows_and_lists_interleave_and_sums_leave_their_input(ranks):
    rank, world = ranks.rank, ranks.world
    assert fsdp.gather_rows(torch.arange(6)[rank::world], ranks).tolist() == list(range(6))
    matrix = fsdp.gather_rows(torch.full((2, 3), rank), ranks)
    assert matrix.tolist() == [[i] * 3 for i in range(world)] * 2
    items = [f"item {i}" for i in range(5)]  # two ranks have unequally many
    assert fsdp.gather_lists(items[rank::world], ranks) == items
    own = torch.tensor([1.0, rank + 2.0])
    assert sum_over_ranks(own).tolist() == ([1.0, 2.0] if world == 1 else [2.0, 5.0])
    assert own.tolist() == [1.0, rank + 2.0]
    assert fsdp.from_main({"rank": rank}, ranks) == {"rank": 0}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        ranks.say("once")
    assert printed.getvalue() == ("once\n" if rank == 0 else "")
    assert ranks.is_main == (rank == 0) and ranks.local == rank


@ranked(1, 2)
def test_what_one_rank_finds_wrong_or_rank_0_does_for_all_is_known_to_all(ranks):
    last = ranks.world - 1
    for failing, expected in (((), None), ((0,), 0), ((last,), last), (range(2), 0)):
        message = None
        try:
            with fsdp.agreed(ranks):
                require(ranks.rank not in failing, f"rank {ranks.rank} failed")
        except UserError as error:
            message = str(error)
        assert message == (None if expected is None else f"rank {expected} failed")
    assert fsdp.on_main(ranks, lambda x: (x, ranks.rank), "x") == ("x", 0)
    failed = f"rank {ranks.rank} failed"
    assert refused(fsdp.on_main, ranks, require, False, failed) == "rank 0 failed"
    with pytest.raises(FileNotFoundError):
        fsdp.on_main(ranks, os.stat, f"/there/is/no/{ranks.rank}")


def rows_to_learn_from():
    """Eight rows with all that the losses look at."""
    rows = data()
    rows.old_logp = rows.old_values = rows.returns = torch.zeros_like(rows.mask)
    rows.adv, rows.coefficients = rows.mask, rows.mask / rows.mask.sum()
    return rows


LETTERS = {"allgather_base": "G", "reduce_scatter_base": "S", "allreduce": "A", "all_reduce": "A"}


class Collectives(TorchDispatchMode):
    """What runs: a letter of each collective, and {letter: ranks of its groups}."""

    def __init__(self):
        super().__init__()
        self.letters, self.groups = "", {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented
        if letter := LETTERS.get(func.overloadpacket.__name__.strip("_")):
            boxed = [x for x in args if isinstance(x, torch.ScriptObject)][:1]
            group = [_resolve_process_group(x) for x in args if isinstance(x, str) and x.isdigit()]
            (group,) = group or [dist.ProcessGroup.unbox(x) for x in boxed]
            self.letters += letter
            self.groups.setdefault(letter, set()).add(tuple(dist.get_process_group_ranks(group)))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def rank_0_of_64(monkeypatch):
    """A function: shard_group_size -> Ranks of rank 0 of 64, whose collectives only seem to be."""
    init = dist.init_process_group
    monkeypatch.setattr(dist, "init_process_group", lambda _, **how: init("fake", **how))
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(FakeStore(), 0, 64)]))
    monkeypatch.setattr(dist, "PrefixStore", lambda _, store: store)
    monkeypatch.setenv("RANK", "0")
    yield lambda size: init_ranks("cpu", size)
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [0, 8])
def test_rank_0_of_64_makes_the_collectives_of_a_step_in_order(rank_0_of_64, size):
    ranks, shards = rank_0_of_64(size), size or 64
    assert (ranks.rank, ranks.world, ranks.mesh.shape) == (0, 64, (8, 8) if size else (64,))
    policy, _ = sharded_policy("llama", ranks)
    empty = ScalarModel(empty_classifier(tiny_classifier("llama").config))
    critic = shard(empty, Whole(ScalarModel(tiny_classifier("llama"))), ranks)
    for name, p in (*policy.named_parameters(), *critic.named_parameters()):
        rows = -(-p.shape[0] // shards)  # of rank 0, which has the first of each
        assert p.to_local().shape == (min(rows, p.shape[0]), *p.shape[1:]), name

    trained = {"actor": (policy, adamw(policy, 1e-3)), "critic": (critic, adamw(critic, 1e-3))}
    args = SimpleNamespace(microbatch=2, temperature=1.0, clip=0.2, value_clip=0.2)
    with Collectives() as log:
        train_ppo.backward(trained, rows_to_learn_from(), args, ranks)
    # Root and two blocks are gathered, and again in the backward pass, each before the one before
    # it has its gradient summed over the ranks. The critic's head is one more unit.
    actor, critic = "GGG" + "GGGSSS", "GGGG" + "GGGSGSSS"
    last = (actor + critic).replace("S", "SA" if size else "S")  # between the groups at the last
    assert log.letters == 3 * (actor + critic) + last
    node = tuple(range(shards))
    assert log.groups == {"G": {node}, "S": {node}} | (
        {"A": {tuple(range(0, 64, 8))}} if size else {}
    )
    with Collectives() as log:
        for model, optimizer in trained.values():
            fsdp.step(model, optimizer, 1.0, 1.0)
    assert log.letters == "AA" and log.groups == {"A": {node}}  # a norm each


def test_what_takes_one_rank_longer_than_a_collective_may_is_waited_for_where_that_is_said():
    """As a download or the lab's making; and what fails there fails everywhere."""

    def work(ranks, patient, failing=False):
        with fsdp.agreed(ranks, patient=patient):
            if ranks.is_main:
                time.sleep(4)
                require(not failing, "no network")
        return ranks.rank

    limit = {"minutes": 2 / 60}
    assert forked(lambda ranks: [work(ranks, True), work(ranks, True)], **limit) == [[0, 0], [1, 1]]
    with pytest.raises(AssertionError, match="no network"):
        forked(lambda ranks: work(ranks, True, failing=True), **limit)
    with pytest.raises(AssertionError, match="Timed out"):
        forked(lambda ranks: work(ranks, False), **limit)


def test_what_torch_is_told_of_gpus_before_it_meets_one():
    """cuDNN's attention is off on every rank; blocks of memory grow where they are."""

    def told(ranks):
        return torch.backends.cuda.cudnn_sdp_enabled()

    torch.backends.cuda.enable_cudnn_sdp(True)
    assert forked(told, 1) == [False]
    environment = {n: v for n, v in os.environ.items() if n != "PYTORCH_ALLOC_CONF"}
    code = "import pfppo, os; print(os.environ['PYTORCH_ALLOC_CONF'])"
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert said.stdout == "expandable_segments:True\n"


def test_groups_must_divide_the_ranks():
    with pytest.raises(Exception, match="--shard_group_size 3: does not divide the 2 ranks"):
        forked(lambda ranks: None, shard_group_size=3)


@ranked(1, minutes=7.5)
def test_collectives_wait_as_many_minutes_as_they_are_told(ranks):
    backend = dist.distributed_c10d._get_default_group()._get_backend(ranks.device)
    assert backend.options._timeout == timedelta(minutes=7.5)


def test_cuda_asked_for_where_there_is_none_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refused(init_ranks, "cuda")
    assert re.match("--device cuda: .*expected --device cpu or auto", message)


fork = multiprocessing.get_context("fork").Process
linux = pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")


@linux
@pytest.mark.parametrize("environment", [{"TORCHELASTIC_RUN_ID": "x"}, {}])
def test_a_worker_of_torchrun_dies_with_its_agent(environment):
    read, write = os.pipe()

    def work():
        os.environ |= environment
        fsdp._die_with_agent()
        os.write(write, os.getpid().to_bytes(4))
        time.sleep(20)

    agent = fork(target=lambda: (fork(target=work).start(), time.sleep(20)))
    agent.start()
    os.close(write)
    worker = int.from_bytes(os.read(read, 4))
    agent.kill()
    agent.join()
    closed, _, _ = select.select([read], [], [], 10 if environment else 0.3)  # by its last writer
    if not closed:
        os.kill(worker, signal.SIGKILL)
    assert bool(closed) == bool(environment)


@linux
def test_a_worker_that_is_late_for_its_agents_death_ends(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(os, "getppid", iter((7, 1)).__next__)
    late = fork(target=fsdp._die_with_agent)
    late.start()
    late.join()
    assert late.exitcode == 1
