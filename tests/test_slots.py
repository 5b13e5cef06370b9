"""Fixed shapes: decode steps and blocks that are compiled give the numbers of plain ones, and are
compiled for few shapes. Slots are filled again; what is sampled in them: test_sampler.py."""

import contextlib
from unittest import mock

from pfppo import fsdp, sampler, slots
from pfppo.rollout import collate
from pfppo.sampler import sample

import pytest
import torch
from conftest import EOS, policy_of, ragged, scalar_of, tiny_classifier, tiny_lm
from test_sampler import PROMPTS, SIX, drawn, passes

INDUCTOR = pytest.param("inductor", marks=pytest.mark.slow)  # makes and compiles C++, takes minutes
CASES = [("llama", "eager"), *(pytest.param(n, "eager", marks=pytest.mark.slow) for n in SIX[1:])]
CASES += [pytest.param("llama", "inductor", marks=pytest.mark.slow)]


@contextlib.contextmanager
def counted(backend="eager"):
    """The graphs that are compiled inside: a call says how many there are by now. Fails if one has
    been broken into parts."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fsdp.compiled_once.cache_clear()
    with mock.patch.object(fsdp, "BACKEND", backend):
        yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert not torch._dynamo.utils.counters["graph_break"]
    fsdp.compiled_once.cache_clear()


def test_rounded_sizes_are_few_and_at_most_a_quarter_more():
    sizes = [fsdp.rounded(n) for n in range(1, 4097)]
    assert all(n <= size <= 1.25 * n for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) == 4 * 10 + 4 and fsdp.rounded(48) == 48


@pytest.mark.parametrize("architecture, backend", CASES)
def test_compiled_steps_draw_the_same_tokens_and_are_compiled_once(lms, architecture, backend):
    model = lms.get(architecture) or tiny_lm(architecture)
    expected, other = drawn(model), drawn(model, seed=6)
    with counted(backend) as graphs:
        found = drawn(model, batch=5, compiled=True)
        assert graphs() == 3  # of 5 slots, and when nothing waits of 2 and 1
        assert drawn(model, seed=6, batch=5, compiled=True).ids == other.ids and graphs() == 3
        short = [prompt[:4] for prompt in PROMPTS]
        sampler.sample(model, short, torch.zeros(6, 13), stop=[1], batch=5, compiled=True)
        assert graphs() == 5  # the block has fewer columns: of 5 slots, and of 1
    assert (found.ids, found.finished) == (expected.ids, expected.finished)
    logp, plain = (torch.tensor(sum(x.logp, [])) for x in (found, expected))
    assert (logp - plain).abs().max() < 1e-5


def test_a_fixed_block_that_is_full_is_moved_and_changes_nothing(lms):
    """Uncompiled, as a captured graph runs it."""
    moved, rewind = [], slots.RoomLayer.rewind
    with (
        mock.patch.object(sampler, "compiled_once", lambda function: function),
        mock.patch.object(slots.RoomLayer, "rewind", lambda *a: moved.append(a) or rewind(*a)),
    ):
        found = drawn(lms["llama"], repeats=20, batch=4, compiled=True)
    assert len(moved) > 2 * 5 and found.ids == drawn(lms["llama"], repeats=20).ids


def gradients(net):
    return torch.cat([p.grad.to_local().flatten() for p in net.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "architecture, recompute, backend",
    [
        *(("llama", False, "eager"), ("gpt2", True, "eager")),
        pytest.param("llama", True, "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_give_log_probs_scalars_and_gradients(
    ranks, lms, architecture, recompute, backend
):
    """Of rows of several shapes, which two stand for: 3 and 4 rows of 64 tokens (gpt2: of the 18
    that it can read). Policy and scalar model have the same blocks."""
    how = {"n_positions": 18} if architecture == "gpt2" else {}
    kinds = (policy_of, tiny_lm), (scalar_of, tiny_classifier)
    rows = collate(ragged((9, 4, 12, 7, 5)), ragged((3, 6, 5, 8, 4), 1), 0)
    with counted(backend) as graphs:
        for shard, tiny in kinds:
            plain, net = (shard(tiny(architecture, **how), ranks) for _ in range(2))
            fsdp.compile_blocks(net, how.get("n_positions", 128))
            if recompute:
                fsdp.recompute_blocks(net)
            for part in ([0, 1, 2], [2, 3, 4], [1, 2, 3], [0, 2, 3, 4]):
                mb, found = rows.select(torch.tensor(part)), []
                for model in (plain, net):
                    given = (mb.responses, mb.mask) if shard is policy_of else ()
                    out = model(mb.ids, mb.states, *given)
                    out = out[0] if given else out.squeeze(-1) * mb.mask
                    out.sum().backward()
                    found.append((out.detach(), gradients(model)))
                    model.zero_grad()
                (out, grad), (expected, plain_grad) = found[1], found[0]
                assert (out - expected).abs().max() < 1e-5
                assert (grad - plain_grad).abs().max() < 1e-5 * plain_grad.abs().max()
        assert graphs() == 2


def scheduled(model, lengths, prompts, repeats, batch, **options):
    """The forward passes of `sample` for rows that end at these lengths: (prefills, decodes)."""
    uniforms = torch.zeros(len(lengths), int(lengths.max()))
    uniforms[torch.arange(len(lengths)), lengths - 1] = 2.0  # the sign for EOS

    def draw(logits, numbers, *options):
        return torch.where(numbers > 1, EOS, 5), numbers

    with mock.patch.object(sampler, "draw_tokens", draw), passes(model) as shapes:
        how = {"stop": [EOS], "samples_per_prompt": repeats, "batch": batch}
        samples = sample(model, prompts, uniforms, **how, **options)
    assert [len(row) for row in samples.ids] == lengths.tolist()
    prefills = [shape for shape in shapes if shape[1] > 1]
    return prefills, [rows for rows, columns in shapes if columns == 1]


LAB = torch.randn(240, generator=torch.Generator().manual_seed(1)) * 8 + 22  # tokens of a response
TAIL = (torch.randn(240, generator=torch.Generator().manual_seed(2)) + 2.6).exp()


@pytest.mark.parametrize("batch", [16, 48, 96, 256])
@pytest.mark.parametrize("lengths", [LAB, TAIL], ids=["lab", "long tail"])
def test_slots_are_filled_again_and_hardly_one_is_idle(lengths, batch):
    """48 prompts x 5 against batches that wait for their longest row. Each prompt is read once."""
    model = tiny_lm("llama", max_position_embeddings=4096)
    lengths, generator = lengths.long().clamp(1, 80), torch.Generator().manual_seed(3)
    prompts = ragged(torch.randint(5, 40, (48,), generator=generator).tolist())
    prefills, decodes = scheduled(model, lengths, prompts, 5, batch)
    assert sum(rows for rows, _ in prefills) == 48
    assert sum(rows * columns for rows, columns in prefills) < 1.1 * sum(map(len, prompts)) + 800
    useful = int(lengths.sum()) - len(lengths)  # the first token needs no decode step
    assert useful >= 0.98 * sum(decodes)
    waiting = sum(int(part.max()) - 1 for part in lengths.split(batch // 5 * 5))
    assert len(decodes) <= (1 if batch == 256 else 0.7) * waiting


@pytest.mark.parametrize("lengths, least", [(LAB, 0.75), (TAIL, 0.7)], ids=["lab", "long tail"])
def test_a_fixed_block_is_halved_when_nothing_waits(lengths, least):
    """Of 240 rows that all start at once; it has five sizes at most."""
    lengths, done = lengths.long().clamp(1, 80), []
    how = {"compiled": True, "progress": done.append}
    with mock.patch.object(sampler, "compiled_once", lambda function: function):
        _, decodes = scheduled(tiny_lm("llama"), lengths, PROMPTS[:1], 240, 256, **how)
    assert set(decodes) <= {256, 128, 64, 32, 16} and len(set(decodes)) == 5
    assert int(lengths.sum()) - len(lengths) >= least * sum(decodes)
    assert 240 * (1 - 1e-6) < sum(done) <= 240  # a row that moves is in one slot
