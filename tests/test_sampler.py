"""Sampling: equal to `generate`, exact log-probs, independent of how rows are batched."""

from pfppo import sampler
from pfppo.config import UserError
from pfppo.model import Policy
from pfppo.sampler import check_cache, draw_tokens, draw_uniforms, sample, stop_ids

import pytest
import torch
from conftest import (
    ARCHITECTURES,
    EOS,
    VOCABULARY,
    ragged,
    tiny_config,
    tiny_lm,
    tiny_tokenizer,
)
from pfppo.batch import collate
from transformers import AutoConfig, GenerationConfig

WIDTH = 14
LENGTHS = (9, 1, 4, 12, 1, 7)
NEVER = [VOCABULARY + 1]  # a stop id that no model gives


@pytest.fixture
def llama(lms):
    return lms["llama"]


def generate(model, prompt, stop, width=WIDTH):
    """Greedy continuation by transformers, one prompt at a time."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=width,
        eos_token_id=stop,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def greedy(model, prompts, stop, width=WIDTH, **options):
    rows = len(prompts) * options.get("samples_per_prompt", 1)
    return sample(model, prompts, torch.zeros(rows, width), stop=stop, temperature=0, **options)


def keys_of(prompts, repeats):
    return [(i, j) for i in range(len(prompts)) for j in range(repeats)]


def drawn(model, prompts, repeats=4, stop=tuple(range(1, 8)), **options):
    """Samples that end at different times: seven of the 61 tokens stop a row."""
    uniforms = draw_uniforms(5, 0, keys_of(prompts, repeats), WIDTH)
    return sample(model, prompts, uniforms, stop=list(stop), samples_per_prompt=repeats, **options)


# ------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma2", "gemma3_text", "mistral"])
def test_greedy_equals_generate_on_ragged_prompts_with_several_eos_ids(lms, architecture):
    # gemmas and mistral: a sliding window of 5 tokens, shorter than the rows
    model = lms.get(architecture) or tiny_lm(architecture)
    prompts = ragged(LENGTHS)
    free = [generate(model, prompt, NEVER) for prompt in prompts]
    stop = [free[0][3], free[1][6]]  # two rows at least stop before the end
    expected = [generate(model, prompt, stop) for prompt in prompts]
    assert len({token for row in free for token in row}) > 5  # not a trivial model
    found = greedy(model, prompts, stop)
    assert found.ids == expected
    assert found.finished == [row[-1] in stop for row in expected]
    assert [len(row) for row in found.logp] == [len(row) for row in expected]


def test_greedy_samples_of_one_prompt_are_all_alike_and_in_order(llama):
    prompts = ragged(LENGTHS)
    expected = [generate(llama, prompt, NEVER) for prompt in prompts]
    found = greedy(llama, prompts, NEVER, samples_per_prompt=3)
    assert found.ids == [row for row in expected for _ in range(3)]


def test_eos_at_the_first_step_gives_a_response_of_one_token(llama):
    prompts = ragged(LENGTHS)
    first = generate(llama, prompts[0], NEVER)[0]
    found = greedy(llama, prompts, [first])
    assert found.ids[0] == [first] and found.finished[0] and len(found.logp[0]) == 1
    alone = greedy(llama, prompts[:1], [first])
    assert alone.ids == [[first]] and alone.decode_steps == alone.row_steps == 0


def test_without_eos_every_row_reaches_the_limit_and_is_unfinished(llama):
    found = greedy(llama, ragged(LENGTHS), NEVER)
    assert [len(row) for row in found.ids] == [WIDTH] * len(LENGTHS)
    assert not any(found.finished)
    assert found.decode_steps == WIDTH - 1  # the first token comes from the prefill


def test_eos_as_the_last_token_that_fits_is_finished(llama):
    (prompt,) = ragged([5])
    free = generate(llama, prompt, NEVER, 30)
    width = next(n for n in range(3, 30) if free[n - 1] not in free[: n - 1])
    found = greedy(llama, [prompt], [free[width - 1]], width)
    assert found.ids == [free[:width]] and found.finished == [True]


@pytest.mark.parametrize("length", [1, 6])
def test_a_batch_of_one_row_works(llama, length):
    (prompt,) = ragged([length])
    assert greedy(llama, [prompt], NEVER).ids == [generate(llama, prompt, NEVER)]


def test_room_for_a_single_token_works(llama):
    (prompt,) = ragged([3])
    assert greedy(llama, [prompt], NEVER, 1).ids == [generate(llama, prompt, NEVER, 1)]


# ---------------------------------------------------------------------------------- log-probs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampled_logp_equals_a_full_forward(lms, architecture, temperature):
    model, prompts = lms[architecture], ragged(LENGTHS)
    found = drawn(model, prompts, temperature=temperature)
    assert len({len(row) for row in found.ids}) > 4  # so rows were compacted
    rows = collate([p for p in prompts for _ in range(4)], found.ids, pad_id=0)
    with torch.no_grad():
        logp, _ = Policy(model)(rows.ids, rows.states, rows.responses, rows.mask, temperature)
    flat = torch.tensor([value for row in found.logp for value in row])
    assert (logp[rows.mask > 0] - flat).abs().max() < 1e-4


# ------------------------------------------------------------------------------- independence


def test_samples_do_not_depend_on_the_sampling_batch(llama):
    prompts = ragged(LENGTHS)
    expected = drawn(llama, prompts)
    for batch in (1, 8, 13):
        found = drawn(llama, prompts, batch=batch)
        assert (found.ids, found.finished) == (expected.ids, expected.finished)


def test_samples_do_not_depend_on_neighbours_or_order(llama):
    prompts, stop = ragged(LENGTHS), list(range(1, 8))
    expected = drawn(llama, prompts)
    uniforms = draw_uniforms(5, 0, keys_of(prompts, 4), WIDTH)
    for i, prompt in enumerate(prompts):
        mine = slice(4 * i, 4 * i + 4)
        alone = sample(llama, [prompt], uniforms[mine], stop=stop, samples_per_prompt=4)
        assert alone.ids == expected.ids[mine]
    back = [4 * i + j for i in reversed(range(len(prompts))) for j in range(4)]
    found = sample(llama, prompts[::-1], uniforms[back], stop=stop, samples_per_prompt=4)
    assert found.ids == [expected.ids[row] for row in back]


def test_a_sample_does_not_depend_on_the_number_of_samples(llama):
    prompts = ragged(LENGTHS)
    one, four = drawn(llama, prompts, 1), drawn(llama, prompts, 4)
    assert one.ids == four.ids[::4]


@pytest.mark.parametrize("room", [0.0, 0.5, 2.0])  # at once, late, never
def test_compaction_changes_no_sample(llama, monkeypatch, room):
    prompts = ragged(LENGTHS)
    expected = drawn(llama, prompts)
    monkeypatch.setattr(sampler, "ROOM", room)
    found = drawn(llama, prompts)
    assert found.ids == expected.ids and found.finished == expected.finished


def test_same_uniforms_same_samples_other_uniforms_other_samples(llama):
    prompts = ragged(LENGTHS)
    uniforms = [draw_uniforms(seed, 0, keys_of(prompts, 1), WIDTH) for seed in (1, 1, 2)]
    first, again, other = (sample(llama, prompts, u, stop=NEVER).ids for u in uniforms)
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_global_random_state_is_neither_used_nor_changed(llama):
    torch.manual_seed(0)
    first, state = drawn(llama, ragged(LENGTHS)).ids, torch.get_rng_state()
    torch.manual_seed(1)
    assert drawn(llama, ragged(LENGTHS)).ids == first
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


# --------------------------------------------------------------------------------------- work


def test_each_prompt_is_prefilled_once_and_finished_rows_leave(llama):
    shapes = []

    def note(module, args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))

    prompts = ragged(LENGTHS)
    hook = llama.register_forward_pre_hook(note, with_kwargs=True)
    try:
        found = drawn(llama, prompts, batch=12)  # 2 batches of 3 prompts x 4 samples
    finally:
        hook.remove()
    prefills = [shape for shape in shapes if shape[1] > 1]
    decodes = [rows for rows, columns in shapes if columns == 1]
    assert prefills == [(3, max(LENGTHS[:3])), (3, max(LENGTHS[3:]))]
    assert (found.decode_steps, found.row_steps) == (len(decodes), sum(decodes))
    tokens = sum(len(row) - 1 for row in found.ids)  # the first token needs no decode step
    assert tokens <= found.row_steps < 1.1 * tokens + found.decode_steps
    assert found.row_steps < 12 * found.decode_steps


def test_progress_counts_every_row_once_and_is_called_at_every_token(llama):
    seen = []
    samples = drawn(llama, ragged(LENGTHS), batch=8, progress=seen.append)
    assert sum(seen) == len(samples.ids) and len(seen) >= samples.decode_steps


def test_sampling_can_be_given_up_at_any_token(llama):
    class Enough(Exception):
        pass

    def progress(_):
        seen.append(1)
        if len(seen) == 3:
            raise Enough

    seen = []
    with pytest.raises(Enough):
        drawn(llama, ragged(LENGTHS), batch=8, progress=progress)
    assert len(seen) == 3


def test_a_wrong_number_of_uniforms_is_refused(llama):
    prompts = ragged([3, 4])
    for rows in (3, 5, 2):
        with pytest.raises(ValueError, match=f"2 x 2 rows, found {rows}"):
            sample(llama, prompts, torch.rand(rows, 4), stop=[EOS], samples_per_prompt=2)


# ----------------------------------------------------------------------------------- a single draw


def strata(count):
    """Evenly spread uniforms: counts of draws are then exact to within one."""
    return (torch.arange(count) + 0.5) / count


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_have_the_probabilities_of_the_distribution(temperature):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.0])
    wanted = (logits / temperature).softmax(-1)
    tokens, logp = draw_tokens(logits.expand(10_000, -1), strata(10_000), temperature)
    counts = torch.bincount(tokens, minlength=5)
    assert (counts - 10_000 * wanted).abs().max() < 2
    assert torch.allclose(logp, wanted.log()[tokens], atol=1e-6)


def test_draws_at_temperature_0_are_the_likeliest_token_with_logp_at_1():
    logits = torch.tensor([[0.3, 2.0, -1.0], [5.0, 0.0, 1.0]])
    tokens, logp = draw_tokens(logits, torch.tensor([0.99, 0.99]), 0)
    assert tokens.tolist() == [1, 0]
    assert torch.allclose(logp, logits.log_softmax(-1).max(-1).values)


@pytest.mark.parametrize("size", [4, 1000, 50_000])
def test_no_uniform_picks_a_token_of_probability_zero(size):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size))
    logits[: size // 4] = -torch.inf
    logits[-size // 4 :] = -torch.inf
    ends = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-23, 1 - 2.0**-24, 1.0])
    tokens, logp = draw_tokens(logits.expand(len(ends), -1), ends)
    assert torch.isfinite(logp).all() and tokens.max() < size
    assert torch.isfinite(logits[tokens]).all()


@pytest.mark.parametrize("top_k", [1, 3])
def test_top_k_draws_from_the_k_likeliest_only(top_k):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.0])
    kept = logits.topk(top_k).indices
    wanted = torch.zeros(5).scatter(0, kept, logits[kept].softmax(-1))
    tokens, logp = draw_tokens(logits.expand(10_000, -1), strata(10_000), top_k=top_k)
    assert (torch.bincount(tokens, minlength=5) - 10_000 * wanted).abs().max() < 2
    assert torch.allclose(logp, logits.log_softmax(-1)[tokens])  # of the whole distribution


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.1, [2]), (0.45, [2]), (0.55, [2, 4]), (0.8, [2, 4]), (0.95, [0, 2, 4])]
)
def test_top_p_draws_from_the_smallest_set_that_reaches_p(top_p, kept):
    probabilities = torch.tensor([0.15, 0.04, 0.5, 0.01, 0.3])
    wanted = torch.zeros(5).scatter(0, torch.tensor(kept), probabilities[kept])
    rows = probabilities.log().expand(10_000, -1)
    tokens, _ = draw_tokens(rows, strata(10_000), top_p=top_p)
    counts = torch.bincount(tokens, minlength=5)
    assert (counts - 10_000 * wanted / wanted.sum()).abs().max() < 2


def test_top_k_and_top_p_reach_the_sampler(llama):
    prompts = ragged(LENGTHS)
    uniforms = draw_uniforms(1, 0, keys_of(prompts, 1), WIDTH)
    likeliest = greedy(llama, prompts, NEVER).ids
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        assert sample(llama, prompts, uniforms, stop=NEVER, **narrow).ids == likeliest
    assert sample(llama, prompts, uniforms, stop=NEVER).ids != likeliest


# ----------------------------------------------------------------------------- uniforms, stop ids


def test_uniforms_depend_on_seed_step_prompt_and_sample_and_on_nothing_else():
    base = draw_uniforms(1, 2, [(3, 4)], 8)
    others = [
        draw_uniforms(9, 2, [(3, 4)], 8),
        draw_uniforms(1, 9, [(3, 4)], 8),
        draw_uniforms(1, 2, [(9, 4)], 8),
        draw_uniforms(1, 2, [(3, 9)], 8),
        draw_uniforms(1, 2, [(4, 3)], 8),
    ]
    assert all((other != base).all() for other in others)
    torch.manual_seed(99)
    among = draw_uniforms(1, 2, [(7, 0), (3, 4), (7, 1)], 8)
    assert torch.equal(among[1:2], base)


def test_uniforms_are_uniform():
    drawn = draw_uniforms(0, 0, [(i, j) for i in range(100) for j in range(5)], 40)
    assert drawn.min() >= 0 and drawn.max() < 1
    share = torch.histc(drawn, 10, 0, 1) / drawn.numel()
    assert (share - 0.1).abs().max() < 0.01  # 4 standard deviations
    first = drawn[:, 0]  # across rows too: the seeds of neighbours are not related
    assert abs(first.mean() - 0.5) < 0.06 and abs(first.var() - 1 / 12) < 0.02


@pytest.mark.parametrize(
    ("config", "expected"), [([7, 5], [EOS, 5, 7]), (9, [EOS, 9]), (None, [EOS]), (EOS, [EOS])]
)
def test_stop_ids_are_those_of_the_generation_config_and_the_tokenizer(tmp_path, config, expected):
    GenerationConfig(eos_token_id=config).save_pretrained(tmp_path)
    assert stop_ids(tmp_path, tiny_tokenizer()) == expected


def test_stop_ids_without_a_generation_config_are_the_config_s_and_the_tokenizer_s(tmp_path):
    tiny_lm("llama").config.__class__(eos_token_id=[5, 9]).save_pretrained(tmp_path)
    assert stop_ids(tmp_path, tiny_tokenizer()) == sorted({EOS, 5, 9})


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("mamba", {}),
        ("jamba", {}),
        ("t5", {}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    ],
)
def test_a_model_without_a_plain_cache_is_refused_by_name(tmp_path, kind, changes):
    AutoConfig.for_model(kind, num_hidden_layers=2, **changes).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"--policy {tmp_path}: {kind} is .*expected a decoder"):
        check_cache(tmp_path)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma2", "mistral", "gemma3_text"])
def test_a_plain_cache_is_accepted(tmp_path, architecture):
    tiny_config(architecture).save_pretrained(tmp_path)
    check_cache(tmp_path)
