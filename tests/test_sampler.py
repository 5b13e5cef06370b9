"""Sampling: equal to `generate`, exact log-probs, independent of how rows are batched."""

import contextlib

from pfppo import sampler, slots
from pfppo.model import Policy
from pfppo.rollout import collate
from pfppo.sampler import draw_tokens, draw_uniforms, sample

import pytest
import torch
from conftest import ARCHITECTURES, EOS, VOCABULARY, quick, ragged, tiny_lm

WIDTH = 14
LENGTHS = (9, 1, 4, 12, 1, 7)
PROMPTS = ragged(LENGTHS)
NEVER = [VOCABULARY + 1]  # a stop id that no model gives
SOMETIMES = list(range(1, 8))  # seven of the 61 tokens stop a row: they end at different times


@pytest.fixture
def llama(lms):
    return lms["llama"]


def generate(model, prompt, width=WIDTH):
    """Greedy continuation by transformers that never stops, one prompt at a time."""
    ids = torch.tensor([prompt])
    how = {"do_sample": False, "max_new_tokens": width, "eos_token_id": NEVER, "pad_token_id": 0}
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    return whole[0, len(prompt) :].tolist()


def cut(row, stop):
    """A continuation up to the first stop id."""
    return row[: next((i for i, token in enumerate(row, 1) if token in stop), len(row))]


@pytest.fixture(scope="module")
def free(lms):
    """What llama continues the prompts with, if nothing stops it."""
    return [generate(lms["llama"], prompt) for prompt in PROMPTS]


def greedy(model, prompts, stop, width=WIDTH, **options):
    rows = len(prompts) * options.get("samples_per_prompt", 1)
    return sample(model, prompts, torch.zeros(rows, width), stop=stop, temperature=0, **options)


def uniforms_of(prompts, repeats, seed=5):
    keys = [(i, j) for i in range(len(prompts)) for j in range(repeats)]
    return draw_uniforms(seed, 0, keys, WIDTH)


def drawn(model, repeats=4, seed=5, **options):
    uniforms = uniforms_of(PROMPTS, repeats, seed)
    return sample(model, PROMPTS, uniforms, stop=SOMETIMES, samples_per_prompt=repeats, **options)


@contextlib.contextmanager
def passes(model):
    """[(rows, columns)] of the forward passes inside."""
    shapes = []

    def note(module, args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))

    with model.register_forward_pre_hook(note, with_kwargs=True):
        yield shapes


# ------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma2", "gemma3_text", "mistral"])
def test_greedy_equals_generate_on_ragged_prompts_with_several_eos_ids(lms, architecture):
    # gemmas and mistral: a sliding window of 5 tokens, shorter than the rows
    model = lms.get(architecture) or tiny_lm(architecture)
    rows = [generate(model, prompt) for prompt in PROMPTS]
    assert len({token for row in rows for token in row}) > 5  # not a trivial model
    stop = [rows[0][3], rows[1][6]]  # two rows at least stop before the end
    expected = [cut(row, stop) for row in rows for _ in range(2)]
    found = greedy(model, PROMPTS, stop, samples_per_prompt=2)
    assert found.ids == expected
    assert found.finished == [row[-1] in stop for row in expected]
    assert [len(row) for row in found.logp] == [len(row) for row in expected]


def test_eos_at_the_first_step_gives_a_response_of_one_token(llama, free):
    first = free[0][0]
    found = greedy(llama, PROMPTS, [first])
    assert found.ids[0] == [first] and found.finished[0] and len(found.logp[0]) == 1
    with passes(llama) as shapes:
        assert greedy(llama, PROMPTS[:1], [first]).ids == [[first]]
    assert shapes == [(1, LENGTHS[0])]  # the prefill alone


def test_eos_as_the_last_token_that_fits_is_finished(llama):
    long = generate(llama, PROMPTS[2], 30)
    width = next(n for n in range(3, 30) if long[n - 1] not in long[: n - 1])
    found = greedy(llama, [PROMPTS[2]], [long[width - 1]], width)
    assert found.ids == [long[:width]] and found.finished == [True]


@pytest.mark.parametrize("number, width", [(1, WIDTH), (5, WIDTH), (2, 1)])
def test_a_batch_of_one_row_works_and_room_for_a_single_token(llama, free, number, width):
    assert greedy(llama, [PROMPTS[number]], NEVER, width).ids == [free[number][:width]]


# ------------------------------------------------------------------- log-probs, independence


@pytest.mark.parametrize(
    "architecture, temperature", [("llama", 1.0), *((name, 0.7) for name in ARCHITECTURES)]
)
def test_sampled_logp_equals_a_full_forward(lms, architecture, temperature):
    model = lms[architecture]
    found = drawn(model, temperature=temperature)
    assert len({len(row) for row in found.ids}) > 4  # so rows were compacted
    rows = collate([p for p in PROMPTS for _ in range(4)], found.ids, pad_id=0)
    with torch.no_grad():
        logp, _ = Policy(model)(rows.ids, rows.states, rows.responses, rows.mask, temperature)
    flat = torch.tensor([value for row in found.logp for value in row])
    assert (logp[rows.mask > 0] - flat).abs().max() < 1e-4


SIX = [*ARCHITECTURES, "gemma2", "mistral"]


@pytest.mark.parametrize("architecture", quick(["llama"], SIX))
def test_samples_do_not_depend_on_the_number_of_slots(lms, monkeypatch, architecture):
    model = lms.get(architecture) or tiny_lm(architecture)
    for seed in range(5):
        expected = drawn(model, seed=seed)
        for batch in (1, 3, 8, 13):
            found = drawn(model, seed=seed, batch=batch)
            assert (found.ids, found.finished) == (expected.ids, expected.finished)
    # and where the block is moved and compacted whenever it can be
    monkeypatch.setattr(sampler, "FREE_SHARE", 0.0)
    monkeypatch.setattr(slots, "MASKED_SHARE", 0.0)
    assert drawn(model, seed=seed, batch=8).ids == expected.ids


def test_a_block_that_is_full_is_moved_and_changes_nothing(llama, monkeypatch):
    """Rows that live on and on beside short ones: columns run out several times."""
    moved, rewind = [], slots.RoomLayer.rewind
    monkeypatch.setattr(slots.RoomLayer, "rewind", lambda *a: moved.append(a) or rewind(*a))
    expected = drawn(llama, repeats=20)
    assert not moved  # all rows are there from the start
    assert drawn(llama, repeats=20, batch=4).ids == expected.ids
    assert len(moved) > 2 * 5  # of the two layers


def test_prompts_are_read_in_passes_of_bounded_size_and_their_rows_start_at_once(
    llama, monkeypatch
):
    """So memory is bounded, and a bar moves before all prompts are read."""
    expected, sizes, told = drawn(llama), [], []
    monkeypatch.setattr(sampler, "READ", most := 2 * max(LENGTHS))
    read = sampler.prefill

    def reading(model, prompts):
        sizes.append(len(prompts) * max(map(len, prompts)))
        return read(model, prompts)

    monkeypatch.setattr(sampler, "prefill", reading)
    how = {"stop": SOMETIMES, "samples_per_prompt": 4}
    how["progress"] = lambda rows: told.append(len(sizes))
    found = sample(llama, PROMPTS, uniforms_of(PROMPTS, 4), **how)
    assert (found.ids, found.finished) == (expected.ids, expected.finished)
    assert len(sizes) > 1 and max(sizes) <= most
    reads = range(1, len(sizes) + 1)  # each is told, and the first tokens that come of it
    assert told[: 2 * len(sizes)] == [number for number in reads for _ in range(2)]
    monkeypatch.setattr(sampler, "READ", 1)  # a prompt alone may be longer
    assert drawn(llama).ids == expected.ids


def test_samples_do_not_depend_on_neighbours_their_number_or_order(llama):
    expected, uniforms = drawn(llama), uniforms_of(PROMPTS, 4)
    how = {"stop": SOMETIMES, "samples_per_prompt": 4}
    for i, prompt in enumerate(PROMPTS):
        mine, one = slice(4 * i, 4 * i + 4), slice(4 * i, 4 * i + 1)
        assert sample(llama, [prompt], uniforms[mine], **how).ids == expected.ids[mine]
        assert sample(llama, [prompt], uniforms[one], stop=SOMETIMES).ids == expected.ids[one]
    back = [4 * i + j for i in reversed(range(len(PROMPTS))) for j in range(4)]
    found = sample(llama, PROMPTS[::-1], uniforms[back], **how)
    assert found.ids == [expected.ids[row] for row in back]


def test_samples_follow_the_uniforms_and_neither_use_nor_change_global_random_state(llama):
    samples = []
    for seed in (1, 1, 2):
        state = torch.manual_seed(len(samples)).get_state()
        samples.append(sample(llama, PROMPTS, uniforms_of(PROMPTS, 1, seed), stop=NEVER).ids)
        assert torch.equal(torch.get_rng_state(), state)
    first, again, other = samples
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


# --------------------------------------------------------------------------------------- work


def test_progress_counts_every_row_once_and_is_called_at_every_token(llama):
    counts = []
    with passes(llama) as shapes:
        samples = drawn(llama, batch=8, progress=counts.append)
    assert len(samples.ids) * (1 - 1e-6) < sum(counts) <= len(samples.ids) and min(counts) > 0
    assert len(counts) >= len(shapes)


def test_sampling_can_be_given_up_at_any_token(llama):
    with passes(llama) as shapes, pytest.raises(ZeroDivisionError):
        drawn(llama, batch=8, progress=lambda _: 1 / (len(shapes) - 3))
    assert len(shapes) == 3


def nines(row, ids, new):
    """Ends a row with its first id that 9 divides."""
    assert 0 < new <= max(sampler.ASKED, len(ids))
    return next((i for i, token in enumerate(ids, 1) if token % 9 == 0), None)


@pytest.mark.parametrize("asked", [1, 4, 8, 50])
@pytest.mark.parametrize("batch", [1, 5, 24])
def test_rows_that_end_by_what_they_say_do_not_depend_on_when_they_are_asked(
    llama, monkeypatch, asked, batch
):
    """Whether EOS, the limit or nothing came before they were asked."""
    monkeypatch.setattr(sampler, "ASKED", asked)
    free, counts = drawn(llama), []
    with passes(llama) as shapes:
        found = drawn(llama, batch=batch, ended=nines, progress=counts.append)
    kept = [nines(0, ids, len(ids)) for ids in free.ids]
    assert 5 < sum(n is not None for n in kept) < 24
    assert found.ids == [ids[:n] for ids, n in zip(free.ids, kept, strict=True)]
    assert list(map(len, found.logp)) == list(map(len, found.ids))
    ends = [done or n is not None for done, n in zip(free.finished, kept, strict=True)]
    assert found.finished == ends
    assert 24 * (1 - 1e-6) < sum(counts) <= 24 and min(counts) >= 0
    with passes(llama) as before:
        drawn(llama, batch=batch)
    steps = [sum(rows for rows, columns in part if columns == 1) for part in (shapes, before)]
    assert steps[0] < steps[1] or asked > 4  # slots pass to others
    if asked == batch == 1:
        assert steps[0] == sum(map(len, found.ids)) - 24 + LENGTHS.count(1)  # prompts of one token


@pytest.mark.parametrize("rows", [2, 3, 5])
def test_a_wrong_number_of_uniforms_is_refused(llama, rows):
    with pytest.raises(ValueError, match=f"2 x 2 rows, found {rows}"):
        sample(llama, PROMPTS[:2], torch.rand(rows, 4), stop=[EOS], samples_per_prompt=2)


# ----------------------------------------------------------------------------------- a single draw

ALL = range(5)
DRAWS = [({"temperature": temperature}, ALL) for temperature in (1.0, 0.5, 2.0)]
DRAWS += [({"top_k": 1}, [2]), ({"top_k": 3}, [0, 2, 4]), ({"top_k": 9}, ALL)]
DRAWS += [({"top_p": 0.1}, [2]), ({"top_p": 0.45}, [2]), ({"top_p": 0.55}, [2, 4])]
DRAWS += [({"top_p": 0.8}, [2, 4]), ({"top_p": 0.95}, [0, 2, 4])]


@pytest.mark.parametrize("options, kept", DRAWS)
def test_draws_have_the_probabilities_of_what_top_k_and_top_p_leave(options, kept):
    """top-k: the k likeliest tokens; top-p: the smallest set that reaches p."""
    logits = torch.tensor([0.15, 0.04, 0.5, 0.01, 0.3]).log()
    whole = (logits / options.get("temperature", 1.0)).softmax(-1)
    wanted = torch.zeros(5).index_copy(0, torch.tensor(kept), whole[kept]) / whole[kept].sum()
    strata = (torch.arange(10_000) + 0.5) / 10_000  # counts are then exact to within one
    tokens, logp = draw_tokens(logits.expand(10_000, -1), strata, **options)
    assert (torch.bincount(tokens, minlength=5) - 10_000 * wanted).abs().max() < 2
    assert torch.allclose(logp, whole.log()[tokens], atol=1e-6)  # before top-k and top-p


def test_of_150_000_tokens_each_is_drawn_by_the_uniforms_that_are_its_own():
    """Sums in fp32 are off by some tokens here."""
    tokens = torch.arange(0, 150_000, 997)
    uniforms = (tokens.double() + 0.5) / 150_000
    assert draw_tokens(torch.zeros(len(tokens), 150_000), uniforms)[0].equal(tokens)


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


def test_top_k_and_top_p_reach_the_sampler(llama, free):
    uniforms = uniforms_of(PROMPTS, 1)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        assert sample(llama, PROMPTS, uniforms, stop=NEVER, **narrow).ids == free
    assert sample(llama, PROMPTS, uniforms, stop=NEVER).ids != free


def test_uniforms_depend_on_seed_step_prompt_and_sample_and_on_nothing_else():
    base = draw_uniforms(1, 2, [(3, 4)], 8)
    for seed, step, key in ((9, 2, (3, 4)), (1, 9, (3, 4)), (1, 2, (9, 4)), (1, 2, (3, 9))):
        assert (draw_uniforms(seed, step, [key], 8) != base).all()
    assert (draw_uniforms(1, 2, [(4, 3)], 8) != base).all()
    torch.manual_seed(99)
    among = draw_uniforms(1, 2, [(7, 0), (3, 4), (7, 1)], 8)
    assert torch.equal(among[1:2], base)


def test_uniforms_are_uniform():
    numbers = draw_uniforms(0, 0, [(i, j) for i in range(100) for j in range(5)], 40)
    assert numbers.min() >= 0 and numbers.max() < 1
    share = torch.histc(numbers, 10, 0, 1) / numbers.numel()
    assert (share - 0.1).abs().max() < 0.01  # 4 standard deviations
    first = numbers[:, 0]  # across rows too: the seeds of neighbours are not related
    assert abs(first.mean() - 0.5) < 0.06 and abs(first.var() - 1 / 12) < 0.02
