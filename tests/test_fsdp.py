"""Sharded networks equal whole ones, and two ranks equal one; steps, collectives, ends of ranks.

Not here: torchrun itself (test_scripts), weights from files (test_loading), offloading and
checkpoints (test_checkpoint).
"""

import contextlib
import io
import math
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
from pfppo.fsdp import adamw, find_blocks, full_state, gathered, init_ranks, shard, sum_over_ranks
from pfppo.loading import Whole
from pfppo.model import Policy, ScalarModel, empty_causal_lm, empty_classifier
from pfppo.ppo import loss_coefficients
from pfppo.rollout import collate

import pytest
import torch
import torch.distributed as dist
from conftest import ARCHITECTURES, ROOT, ragged, tiny_classifier, tiny_lm
from devices import pretended
from ranks import forked, ranked, refused
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = [*ARCHITECTURES, "llama tied"]
ATTENTION = ("self_attn", "attn", "attention")  # what a block has


@pytest.fixture(scope="module", autouse=True)
def imported(lms):
    """What transformers imports when a model is first made, before this process forks."""


def lm_of(kind):
    """A causal LM; "llama tied" has one matrix for embedding and head (so has GPT-2)."""
    architecture, *tied = kind.split()
    return tiny_lm(architecture, **({"tie_word_embeddings": True} if tied else {}))


def sharded_policy(kind, ranks, **options):
    """(sharded policy, the full one). Ranks other than 0 have none to read from, as in a run."""
    full = lm_of(kind)
    source = Whole(Policy(full) if ranks.is_main else None)
    return shard(Policy(empty_causal_lm(full.config)), source, ranks, **options), full


def data():
    """Eight rows, two prompts' samples each; lengths differ."""
    prompts = [p for p in ragged([3, 7, 1, 5]) for _ in range(2)]
    return collate(prompts, ragged([6, 2, 1, 9, 4, 4, 8, 3], seed=1), pad_id=0)


def log_probs(policy, rows=None):
    rows = rows or data()
    return policy(rows.ids, rows.states, rows.responses, rows.mask)[0]


def distance(a, b):
    return (a - b).abs().max().item()


@ranked(1, 2)
@torch.no_grad()
def test_sharded_models_give_what_whole_ones_give_and_keep_what_is_tied(ranks):
    rows = data()
    for kind in KINDS:
        policy, full = sharded_policy(kind, ranks)
        assert distance(log_probs(policy), log_probs(Policy(full))) < 1e-5
        whole = ScalarModel(tiny_classifier(kind.split()[0]), 0.5, 2.0)
        empty = ScalarModel(empty_classifier(whole.classifier.config), 0.5, 2.0)
        scalar = shard(empty, Whole(whole if ranks.is_main else None), ranks)
        assert distance(scalar(rows.ids, rows.states), whole(rows.ids, rows.states)) < 1e-5

        for model in (policy, scalar):
            root, *units = (m for m in model.modules() if isinstance(m, FSDPModule))
            blocks = [m for m in units if any(hasattr(m, name) for name in ATTENTION)]
            assert root is model and len(blocks) == 2, kind
            heads = [m for m in units if m not in blocks]  # a scalar's is in fp32, by itself
            assert len(heads) == (model is scalar) and all(hasattr(m, "weight") for m in heads)
        inputs, outputs = policy.lm.get_input_embeddings(), policy.lm.get_output_embeddings()
        tied = inputs.weight is outputs.weight
        assert tied == full.config.tie_word_embeddings == (kind in ("gpt2", "llama tied"))
        assert not any(module.training for module in policy.lm.modules())


@ranked(1, 2)
def test_the_gathered_copy_equals_the_whole_model_until_it_is_emptied(ranks):
    """And an update does not reach it until the policy is gathered again."""
    for kind in ("llama tied", "gpt_neox"):
        policy, full = sharded_policy(kind, ranks)
        copy, optimizer = empty_causal_lm(full.config), adamw(policy, 0.1)
        with gathered(policy.lm, copy) as model:
            with torch.no_grad():
                for _ in range(1 + 2 * ranks.rank):  # no collectives: ranks may differ in work
                    inside = log_probs(Policy(model))
                assert distance(inside, log_probs(Policy(full))) < 1e-5
            log_probs(policy).sum().backward()
            optimizer.step()
            assert torch.equal(log_probs(Policy(model)), inside)
            inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
            assert (inputs.weight is outputs.weight) == (kind == "llama tied")
        assert {p.device.type for p in [*copy.parameters(), *copy.buffers()]} == {"meta"}
        with torch.no_grad():
            trained = log_probs(policy)
            assert distance(trained, inside) > 0.1
            with gathered(policy.lm, copy) as model:
                assert distance(log_probs(Policy(model)), trained) < 1e-5
            with contextlib.suppress(ZeroDivisionError), gathered(policy.lm, copy):
                raise ZeroDivisionError
            assert {p.device.type for p in copy.parameters()} == {"meta"}
            assert torch.equal(log_probs(policy), trained)  # emptying it did no harm


@ranked(1, 2)
def test_bfloat16_keeps_fp32_weights_gradients_and_moments(ranks):
    policy, full = sharded_policy("llama", ranks, param_dtype="bfloat16")
    optimizer, fp32 = adamw(policy, 1e-3), {torch.float32}
    found = log_probs(policy)
    found.sum().backward()
    assert {p.dtype for p in policy.parameters()} == fp32
    assert {p.grad.dtype for p in policy.parameters()} == {found.dtype} == fp32
    optimizer.step()
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == fp32
    error = (found - log_probs(Policy(full))).abs()
    assert 1e-4 < error.mean() < 0.05 and error.max() < 0.5
    with gathered(policy.lm, empty_causal_lm(full.config, torch.bfloat16)) as copy:
        assert {p.dtype for p in copy.parameters()} == {torch.bfloat16}


def test_the_type_of_forward_passes_is_bf16_on_a_gpu_unless_asked_otherwise():
    for device, auto in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        ranks = SimpleNamespace(device=torch.device(device))
        wanted = {"auto": auto, "float32": torch.float32, "bfloat16": torch.bfloat16}
        assert {name: fsdp.compute_dtype(name, ranks) for name in wanted} == wanted


def test_find_blocks_takes_the_largest_list_of_equal_modules():
    model = nn.Module()
    model.small = nn.ModuleList([nn.Linear(2, 2) for _ in range(9)])
    model.blocks = nn.ModuleList([nn.Linear(9, 9) for _ in range(3)])
    model.mixed = nn.ModuleList([nn.Linear(99, 99), nn.LayerNorm(99)])
    model.empty = nn.ModuleList()
    assert find_blocks(model) == list(model.blocks)
    message = refused(find_blocks, nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert message.startswith("Sequential: no list of transformer blocks")


# ------------------------------------------------------------------------- two ranks equal one

KEPT = {
    "even": torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.5, 1.0], [0.0, 1.0]]),
    "one-sided": torch.tensor([[1.0, 0.5], [0.0, 0.0], [2.0, 0.0], [0.0, 0.0]]),  # none at rank 1
}


def updates(ranks, weights, recompute=False):
    """Two optimizer steps on what the filter's weights [4, 2] keep; microbatches of two rows."""
    policy, _ = sharded_policy("llama tied", ranks)
    if recompute:
        fsdp.recompute_blocks(policy)
    optimizer = adamw(policy, 1e-2)
    optimizer.param_groups[0]["eps"] = 1e-4  # so that tiny gradients' signs do not matter
    norms, losses, saved = [], [], []  # saved: sizes of what is kept for backward
    mine = [2 * i + j for i in range(ranks.rank, 4, ranks.world) for j in range(2)]
    kept = data().select(torch.tensor(mine)).kept(weights, 8, ranks)
    for _ in range(2):
        how = "token_mean", 1, sum_over_ranks
        kept.coefficients = loss_coefficients(kept.mask, kept.weights, *how)
        loss = torch.zeros(())
        for mb in kept.microbatches(2):
            with saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
                part = -(log_probs(policy, mb) * mb.coefficients).sum()
            (part * ranks.world).backward()
            loss += part.detach()
        losses.append(sum_over_ranks(loss).item())
        norms.append(fsdp.step(policy, optimizer, 1.0, 0.5))
    sizes = [len(kept), int((kept.weights > 0).sum())]
    state = full_state(policy)
    return SimpleNamespace(norms=norms, losses=losses, sizes=sizes, saved=sum(saved), state=state)


def everything(ranks):
    found = {name: updates(ranks, weights) for name, weights in KEPT.items()}
    return found | {"again": updates(ranks, KEPT["even"], True)}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def results(request):
    """What `everything` gives at a single rank, and on each of several."""
    return forked(everything, 1)[0], forked(everything, request.param)


@pytest.mark.parametrize("name", KEPT)
def test_optimizer_steps_of_several_ranks_equal_those_of_one(results, name):
    one, several = results[0][name], [result[name] for result in results[1]]
    assert several[0].state.keys() == one.state.keys()
    assert one.norms[0] > 0.5 and one.losses[1] < one.losses[0]  # clipped, and learned
    for found in several:
        assert found.norms == pytest.approx(one.norms, rel=1e-5)
        assert found.losses == pytest.approx(one.losses, rel=1e-5)
        for key, value in found.state.items():
            assert (value - one.state[key]).norm() / one.state[key].norm() < 1e-5, key


def test_a_rank_without_survivors_runs_as_many_rows_as_the_others(results):
    of_two = {"even": (3, [3, 3]), "one-sided": (3, [3, 0])}
    of_four = {"even": (2, [1, 2, 2, 1]), "one-sided": (2, [2, 0, 1, 0])}
    for name, (rows, kept) in (of_two if len(results[1]) == 2 else of_four).items():
        assert [found[name].sizes for found in results[1]] == [[rows, count] for count in kept]


def test_recomputed_blocks_change_no_number_and_keep_less(results):
    for result in (results[0], *results[1]):
        plain, again = result["even"], result["again"]
        assert again.saved < 0.5 * plain.saved
        assert again.norms == plain.norms and again.losses == plain.losses
        assert all(torch.equal(again.state[key], value) for key, value in plain.state.items())


@ranked(2)
def test_a_step_clips_the_global_norm_and_skips_what_is_not_finite_anywhere(ranks):
    policy, _ = sharded_policy("llama", ranks)
    optimizer = torch.optim.SGD(policy.parameters(), lr=4.0)
    for factor, moved in ((1.0, 1.0), (torch.inf if ranks.rank else 1.0, 0.0)):
        before = [p.to_local().clone() for p in policy.parameters()]
        (log_probs(policy).sum() * factor).backward()
        norm = fsdp.step(policy, optimizer, 0.5, 0.5)  # a learning rate of 0.5 * 4
        assert norm > 5 if moved else not math.isfinite(norm)  # that before clipping
        after = [p.to_local() for p in policy.parameters()]
        square = sum((a - b).square().sum() for a, b in zip(after, before, strict=True))
        assert sum_over_ranks(square).sqrt() == pytest.approx(moved, rel=1e-3)
        assert all(p.grad is None for p in policy.parameters())


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


@ranked(pytest.param(4, marks=pytest.mark.slow), shard_group_size=2)
def test_groups_of_ranks_shard_and_are_copies_of_each_other(ranks):
    policy, full = sharded_policy("llama", ranks)
    assert distance(log_probs(policy), log_probs(Policy(full))) < 1e-5
    assert max(p.to_local().numel() / p.numel() for p in policy.parameters()) < 0.6


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


@ranked(2, shard_group_size=1)
def test_copies_of_the_weights_sum_their_gradients_once(ranks):
    policy, _ = sharded_policy("llama", ranks)
    rows, found = data().select(torch.arange(ranks.rank, 8, 2)), []
    for plan in (lambda _, parts: parts, fsdp.accumulate):
        for mb in plan({"actor": (policy, None)}, rows.microbatches(1)):
            log_probs(policy, mb).sum().backward()
        found.append([p.grad.to_local().clone() for p in policy.parameters()])
        assert all(torch.equal(sum_over_ranks(g), 2 * g) for g in found[-1])  # the same on both
        policy.zero_grad()
    for often, once in zip(*found, strict=True):
        assert often.norm() > 0 and distance(often, once) < 1e-5 * often.abs().max()


def test_adam_of_what_is_offloaded_has_a_share_of_the_cores(monkeypatch):
    counts = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(48))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pretended(), monkeypatch.context() as patch:
        patch.setattr(torch, "set_num_threads", counts.append)
        ranks = init_ranks("cuda")
        for threads in ("3", "1"):
            monkeypatch.setenv("OMP_NUM_THREADS", threads)
            for how in ({}, {"offload": True, "trainable": False}, {"offload": True}):
                sharded_policy("llama", ranks, **how)
        dist.destroy_process_group()
    assert counts == [6]  # where it is the 1 that torchrun sets, and only there


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
