"""Sharded networks equal whole ones, and two ranks equal one; types, steps, copies.

Not here: collectives (test_collectives.py), weights from files (test_loading.py), offloading and
checkpoints (test_checkpoint.py).
"""

import contextlib
import math
import os
from types import SimpleNamespace

from pfppo import fsdp
from pfppo.fsdp import adamw, find_blocks, full_state, gathered, init_ranks, shard, sum_over_ranks
from pfppo.loading import Whole
from pfppo.model import Policy, ScalarModel, empty_causal_lm, empty_classifier
from pfppo.ppo import loss_coefficients
from pfppo.rollout import collate

import pytest
import torch
import torch.distributed as dist
from conftest import ARCHITECTURES, ragged, tiny_classifier, tiny_lm
from devices import pretended
from ranks import forked, ranked, refused
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule

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


@ranked(pytest.param(4, marks=pytest.mark.slow), shard_group_size=2)
def test_groups_of_ranks_shard_and_are_copies_of_each_other(ranks):
    policy, full = sharded_policy("llama", ranks)
    assert distance(log_probs(policy), log_probs(Policy(full))) < 1e-5
    assert max(p.to_local().numel() / p.numel() for p in policy.parameters()) < 0.6


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
