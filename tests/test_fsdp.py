"""Sharded networks equal whole ones, and two ranks equal one.

All checks at two ranks run in one torchrun launch of this file (`main` at the bottom); it writes
what it finds, and the tests below look at that, or compare it with the same lines at one rank.
"""

import json
import sys
from pathlib import Path

from pfppo.config import UserError
from pfppo.fsdp import (
    agreed,
    clip_gradients,
    compute_dtype,
    find_blocks,
    from_main,
    full_state,
    gather_lists,
    gather_rows,
    gathered,
    init_ranks,
    recompute_blocks,
    shard,
    sum_over_ranks,
)
from pfppo.model import Policy, ScalarModel, empty_causal_lm, empty_classifier
from pfppo.sampler import draw_uniforms, sample

import pytest
import torch
from conftest import ARCHITECTURES, ragged, run_ranks, tiny_classifier, tiny_config, tiny_lm
from pfppo.batch import collate, minibatch_plan, owned, rows_of
from pfppo.weights import Whole
from torch import nn

KINDS = [*ARCHITECTURES, "llama tied"]
WORLDS = (1, 2)


def lm_of(kind, seed=0):
    """A causal LM; "llama tied" has one matrix for embedding and head (so has GPT-2)."""
    architecture, *tied = kind.split()
    return tiny_lm(architecture, seed, **({"tie_word_embeddings": True} if tied else {}))


def sharded_policy(kind, ranks, **options):
    """(sharded policy, the full one). Ranks other than 0 have none to read from, as in a run."""
    full = lm_of(kind)
    source = Whole(Policy(full) if ranks.is_main else None)
    return shard(Policy(empty_causal_lm(full.config)), source, ranks, **options), full


def data():
    """Eight rows, two prompts' samples each; lengths differ."""
    prompts = [p for p in ragged([3, 7, 1, 5]) for _ in range(2)]
    rows = collate(prompts, ragged([6, 2, 1, 9, 4, 4, 8, 3], seed=1), pad_id=0)
    rows.weights = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 0.3, 1.0, 1.0])
    return rows


def log_probs(policy, rows):
    return policy(rows.ids, rows.states, rows.responses, rows.mask)[0]


# ----------------------------------------------------- what is run at one rank and at two ranks


def sharding(kind, ranks):
    """Distances between a sharded model and the full one, and what can silently go wrong."""
    rows = data()
    policy, full = sharded_policy(kind, ranks)
    classifier = tiny_classifier(kind.split()[0])
    scalar = shard(
        ScalarModel(empty_classifier(classifier.config), 0.5, 2.0),
        Whole(ScalarModel(classifier) if ranks.is_main else None),
        ranks,
    )
    buffers = dict(Policy(full).named_buffers())
    with torch.no_grad():
        wanted, found = log_probs(Policy(full), rows), log_probs(policy, rows)
        wanted_scores = ScalarModel(classifier, 0.5, 2.0)(rows.ids, rows.states)
        scores = scalar(rows.ids, rows.states)
    inputs, outputs = policy.lm.get_input_embeddings(), policy.lm.get_output_embeddings()
    whole = dict(Policy(full).named_parameters()) if ranks.is_main else {}
    state = full_state(policy)
    return {
        "log_probs": (found - wanted).abs().max().item(),
        "scores": (scores - wanted_scores).abs().max().item(),
        "tied": [inputs.weight is outputs.weight, full.config.tie_word_embeddings],
        "buffers": {
            name: [b.device.type, torch.equal(b, buffers[name])]
            for name, b in policy.named_buffers()
        },
        "names_and_values": whole.keys() == state.keys()
        and all(torch.equal(value, whole[name]) for name, value in state.items()),
        "training": any(module.training for module in policy.lm.modules()),
        "units": sum(isinstance(m, torch.distributed.fsdp.FSDPModule) for m in policy.modules()),
        "largest_share": max(p.to_local().numel() / p.numel() for p in policy.parameters()),
    }


def gathering(kind, ranks):
    """The twin that sampling uses: equal, fresh after updates, untouched by them, empty after."""
    rows = data()
    policy, full = sharded_policy(kind, ranks)
    twin = empty_causal_lm(full.config)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1, fused=True)
    with torch.no_grad():
        first = log_probs(Policy(full), rows)
    with gathered(policy.lm, twin) as model:
        with torch.no_grad():
            for _ in range(1 + 2 * ranks.rank):  # no collectives: ranks may differ in work
                inside = log_probs(Policy(model), rows)
        log_probs(policy, rows).sum().backward()
        optimizer.step()
        with torch.no_grad():
            after_step = log_probs(Policy(model), rows)
            logits = model(rows.ids).logits
            full_logits = full(rows.ids).logits
        embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
        tied = embeddings[0].weight is embeddings[1].weight
    left = {p.device.type for p in [*twin.parameters(), *twin.buffers()]}
    with torch.no_grad():
        trained = log_probs(policy, rows)
    with gathered(policy.lm, twin) as model, torch.no_grad():
        again = log_probs(Policy(model), rows)
    try:
        with gathered(policy.lm, twin):
            raise ZeroDivisionError
    except ZeroDivisionError:
        after_error = {p.device.type for p in twin.parameters()}
    with torch.no_grad():
        sharded_again = log_probs(policy, rows)
    return {
        "inside": (inside - first).abs().max().item(),
        "logits": (logits - full_logits).abs().max().item(),
        "tied": [tied, full.config.tie_word_embeddings],
        "moved_inside": (after_step - inside).abs().max().item(),
        "moved_by_step": (trained - first).abs().max().item(),
        "again": (again - trained).abs().max().item(),
        "sharded_again": (sharded_again - trained).abs().max().item(),
        "left": [sorted(left), sorted(after_error)],
    }


def updates(ranks, weights, recompute=False):
    """Two optimizer steps on the samples that the filter kept; microbatches of one row.

    weights [4, 2]. Returns gradient norms, losses, whole parameters, numbers kept for backward.
    """
    rows, P, N = data(), 4, 2
    policy, _ = sharded_policy("llama tied", ranks)
    if recompute:
        recompute_blocks(policy)
    saved = []

    def save(tensor):
        saved.append(tensor.numel())
        return tensor

    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, eps=1e-4, fused=True)
    here = [i * N + j for i in owned(P, ranks.rank, ranks.world) for j in range(N)]
    mine = rows.select(torch.tensor(here))
    mine.weights = weights.flatten()[here]
    norms, losses, sizes = [], [], []
    for _ in range(2):
        (part,) = minibatch_plan(weights, 8)
        survivors = mine.padded_select(*rows_of(*part, N, ranks.rank, ranks.world))
        sizes.append([len(survivors), int((survivors.weights > 0).sum())])
        total = sum_over_ranks(survivors.token_weights.sum())
        parts = survivors.microbatches(1)
        loss = 0.0
        for number, mb in enumerate(parts, 1):
            with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
                logp = log_probs(policy, mb)
            part_loss = -(logp * mb.token_weights).sum() / total
            policy.set_requires_gradient_sync(number == len(parts))
            (part_loss * ranks.world).backward()
            loss += part_loss.detach()
        losses.append(sum_over_ranks(loss).item())
        norms.append(clip_gradients(policy, 0.5))
        optimizer.step()
        optimizer.zero_grad()
    found = {"norms": norms, "losses": losses, "sizes": sizes, "saved": sum(saved)}
    return found | {"weights": full_state(policy)}


EVEN = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.5, 1.0], [0.0, 1.0]])
ONE_SIDED = torch.tensor([[1.0, 0.5], [0.0, 0.0], [2.0, 0.0], [0.0, 0.0]])  # rank 1 has nothing


def half_precision(ranks):
    """bfloat16 forward and backward, fp32 everything that stays."""
    rows = data()
    policy, full = sharded_policy("llama", ranks, param_dtype="bfloat16")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, fused=True)
    found = log_probs(policy, rows)
    with torch.no_grad():
        wanted = log_probs(Policy(full), rows)
    found.sum().backward()
    gradients = {str(p.grad.dtype) for p in policy.parameters()}
    optimizer.step()
    moments = {str(s["exp_avg"].dtype) for s in optimizer.state.values()}
    with gathered(policy.lm, empty_causal_lm(full.config, torch.bfloat16)) as twin:
        twin_types = {str(p.dtype) for p in twin.parameters()}
    return {
        "types": [{str(p.dtype) for p in policy.parameters()}, gradients, moments, twin_types],
        "result": str(found.dtype),
        "error": (found.detach() - wanted).abs().max().item(),
        "error_mean": (found.detach() - wanted).abs().mean().item(),
    }


def frozen(ranks):
    policy, _ = sharded_policy("llama", ranks, trainable=False)
    return [
        log_probs(policy, data()).requires_grad,
        any(p.requires_grad for p in policy.parameters()),
    ]


def collectives(ranks):
    """Rows and lists of ranks put together; with two ranks the lists have unequal lengths."""
    rank, world = ranks.rank, ranks.world
    place = torch.arange(6).view(6, 1)[rank::world]
    kept = torch.tensor([1.0, rank + 2.0])
    total = sum_over_ranks(kept)
    return {
        "rows": gather_rows(place, ranks).flatten().tolist(),
        "matrix": gather_rows(torch.full((2, 3), float(rank)), ranks).tolist(),
        "list": gather_lists([f"item {i}" for i in range(5)][rank::world], ranks),
        "sum": total.tolist(),
        "own": kept.tolist(),
        "from_main": from_main({"rank": rank}, ranks),
        "is_main": ranks.is_main,
    }


def disagreement(ranks):
    """{rank that fails: what is raised here}; "none" fails nowhere, "all" everywhere."""
    found = {}
    for failing in ("0", "1", "all", "none"):
        try:
            with agreed(ranks):
                if failing in (str(ranks.rank), "all"):
                    raise UserError(f"rank {ranks.rank} failed")
            found[failing] = None
        except UserError as error:
            found[failing] = str(error)
    return found


def sampling(ranks):
    """Two samples of each of seven prompts, every rank its own prompts."""
    prompts = ragged([3, 7, 1, 5, 2, 2, 9])
    mine = owned(len(prompts), ranks.rank, ranks.world)
    policy, full = sharded_policy("gpt2", ranks)
    uniforms = draw_uniforms(3, 0, [(i, j) for i in mine for j in range(2)], 10)
    with gathered(policy.lm, empty_causal_lm(full.config)) as model:
        found = sample(
            model, [prompts[i] for i in mine], uniforms, stop=[5, 6, 7], samples_per_prompt=2
        )
    return gather_lists(list(zip(found.ids[::2], found.ids[1::2], strict=True)), ranks)


def everything(ranks):
    return {
        "sharding": {kind: sharding(kind, ranks) for kind in KINDS},
        "gathering": {kind: gathering(kind, ranks) for kind in ("llama tied", "gpt_neox")},
        "updates": {"even": updates(ranks, EVEN), "one_sided": updates(ranks, ONE_SIDED)},
        "recomputed": updates(ranks, EVEN, recompute=True),
        "half_precision": half_precision(ranks),
        "frozen": frozen(ranks),
        "collectives": collectives(ranks),
        "disagreement": disagreement(ranks),
        "sampling": sampling(ranks),
    }


def main(folder):
    """One of two ranks."""
    ranks = init_ranks("cpu")
    torch.save(everything(ranks), Path(folder) / f"rank_{ranks.rank}.pt")
    ranks.say(json.dumps({"world": ranks.world}))
    torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def results(ranks, tmp_path_factory):
    """{world: what `everything` gave on each rank}"""
    folder = tmp_path_factory.mktemp("ranks")
    printed = run_ranks(__file__, folder)
    assert printed.count('{"world": 2}') == 1  # said on rank 0 only
    two = [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(2)]
    return {1: [everything(ranks)], 2: two}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_policy_and_scalar_model_give_what_whole_ones_give(results, kind, world):
    for found in (result["sharding"][kind] for result in results[world]):
        assert found["log_probs"] < 1e-5 and found["scores"] < 1e-5
        assert found["names_and_values"]  # full_state gives back every parameter, bit for bit


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", KINDS)
def test_sharding_keeps_tied_weights_buffers_and_dropout_off(results, kind, world):
    for found in (result["sharding"][kind] for result in results[world]):
        assert found["tied"][0] == found["tied"][1] == (kind in ("gpt2", "llama tied"))
        assert all(value == ["cpu", True] for value in found["buffers"].values())
        assert found["buffers"] or kind == "gpt2"  # the others have rotary frequencies
        assert not found["training"]


@pytest.mark.parametrize("world", WORLDS)
def test_every_block_is_a_unit_and_every_parameter_is_spread(results, world):
    for found in (results[world][0]["sharding"][kind] for kind in KINDS):
        assert found["units"] == 3  # two blocks and the root
        assert found["largest_share"] < (1.01 if world == 1 else 0.6)  # 61 rows: 31 and 30


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", ["llama tied", "gpt_neox"])
def test_the_gathered_twin_equals_the_full_model_and_is_emptied(results, kind, world):
    for found in (result["gathering"][kind] for result in results[world]):
        assert found["inside"] < 1e-5 and found["logits"] < 1e-4
        assert found["tied"][0] == found["tied"][1] == (kind == "llama tied")
        assert found["left"] == [["meta"], ["meta"]]  # also where the phase raised
        assert found["sharded_again"] == 0  # emptying the twin does no harm to the sharded model


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", ["llama tied", "gpt_neox"])
def test_an_update_does_not_reach_the_twin_until_it_is_gathered_again(results, kind, world):
    for found in (result["gathering"][kind] for result in results[world]):
        assert found["moved_inside"] == 0 and found["moved_by_step"] > 0.1
        assert found["again"] < 1e-5


@pytest.mark.parametrize("weights", ["even", "one_sided"])
def test_optimizer_steps_at_two_ranks_equal_those_at_one(results, weights):
    (one,) = (result["updates"][weights] for result in results[1])
    for two in (result["updates"][weights] for result in results[2]):
        assert two["norms"] == pytest.approx(one["norms"], rel=1e-5)
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
        for name, value in two["weights"].items():
            wanted = one["weights"][name]
            assert (value - wanted).norm() / wanted.norm() < 1e-5, name
    assert results[2][0]["updates"][weights]["weights"].keys() == one["weights"].keys()
    assert one["norms"][0] > 0.5 and one["losses"][1] < one["losses"][0]  # clipped, and learned


@pytest.mark.parametrize("world", WORLDS)
def test_recomputed_blocks_change_no_number_and_keep_less(results, world):
    for result in results[world]:
        plain, again = result["updates"]["even"], result["recomputed"]
        assert again["saved"] < 0.5 * plain["saved"]
        assert again["norms"] == plain["norms"] and again["losses"] == plain["losses"]
        for name, wanted in plain["weights"].items():
            assert torch.equal(again["weights"][name], wanted), name


def test_a_rank_without_survivors_runs_as_many_rows_as_the_others(results):
    sizes = [result["updates"]["one_sided"]["sizes"][0] for result in results[2]]
    assert sizes == [[3, 3], [3, 0]]
    sizes = [result["updates"]["even"]["sizes"][0] for result in results[2]]
    assert sizes == [[3, 3], [3, 3]]


@pytest.mark.parametrize("world", WORLDS)
def test_bfloat16_keeps_fp32_weights_gradients_and_moments(results, world):
    for found in (result["half_precision"] for result in results[world]):
        fp32, half = {"torch.float32"}, {"torch.bfloat16"}
        assert found["types"] == [fp32, fp32, fp32, half]
        assert found["result"] == "torch.float32"
        assert 1e-4 < found["error_mean"] < 0.05 and found["error"] < 0.5


@pytest.mark.parametrize("world", WORLDS)
def test_a_frozen_model_has_no_gradients(results, world):
    assert all(result["frozen"] == [False, False] for result in results[world])


def test_gathered_rows_and_lists_interleave_and_sums_leave_their_input(results):
    for rank, found in enumerate(result["collectives"] for result in results[2]):
        assert found["rows"] == list(range(6))
        assert found["matrix"] == [[0.0] * 3, [1.0] * 3, [0.0] * 3, [1.0] * 3]
        assert found["list"] == [f"item {i}" for i in range(5)]
        assert found["sum"] == [2.0, 5.0] and found["own"] == [1.0, rank + 2.0]
        assert found["from_main"] == {"rank": 0} and found["is_main"] == (rank == 0)
    alone = results[1][0]["collectives"]
    assert alone["rows"] == list(range(6)) and len(alone["list"]) == 5
    assert alone["sum"] == alone["own"] == [1.0, 2.0]


def test_what_one_rank_finds_wrong_is_raised_on_all(results):
    wanted = {"0": "rank 0 failed", "1": "rank 1 failed", "all": "rank 0 failed", "none": None}
    assert [result["disagreement"] for result in results[2]] == [wanted, wanted]
    assert results[1][0]["disagreement"] == wanted | {"1": None}


def test_the_type_of_forward_passes_is_fp32_on_the_cpu_unless_asked_otherwise(ranks):
    types = {name: compute_dtype(name, ranks) for name in ("auto", "float32", "bfloat16")}
    assert types == {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}


def test_samples_at_two_ranks_equal_those_at_one(results):
    (one,) = (result["sampling"] for result in results[1])
    assert len(one) == 7 and len({len(row) for pair in one for row in pair}) > 3
    assert [result["sampling"] for result in results[2]] == [one, one]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", [lm_of, lambda kind: tiny_classifier(kind.split()[0])])
def test_find_blocks_finds_the_transformer_blocks(kind, build):
    blocks = find_blocks(build(kind))
    assert len(blocks) == tiny_config(kind.split()[0]).num_hidden_layers == 2
    assert len({type(block) for block in blocks}) == 1
    names = ("self_attn", "attn", "attention")
    assert all(any(hasattr(block, name) for name in names) for block in blocks)


def test_find_blocks_takes_the_largest_list_of_equal_modules():
    model = nn.Module()
    model.small = nn.ModuleList([nn.Linear(2, 2) for _ in range(9)])
    model.blocks = nn.ModuleList([nn.Linear(9, 9) for _ in range(3)])
    model.mixed = nn.ModuleList([nn.Linear(99, 99), nn.LayerNorm(99)])
    model.empty = nn.ModuleList()
    assert find_blocks(model) == list(model.blocks)


def test_a_model_without_blocks_is_refused_by_name():
    with pytest.raises(UserError, match="^Sequential: no list of transformer blocks"):
        find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def test_cuda_asked_for_where_there_is_none_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: .*expected --device cpu or auto"):
        init_ranks("cuda")


if __name__ == "__main__":
    main(sys.argv[1])
