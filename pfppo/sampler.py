"""KV-cached sampling, written by hand over any decoder of transformers with a plain cache.

1. `prefill`: each prompt runs once, left-padded, however many samples it gets; its keys and values
   are copied once per sample into preallocated room.
2. `decode_one`: one token per live row and step; only the last position's logits are made.
3. `Live.compact`: rows that have finished leave; live rows from the tail move into their place.

The randomness is an argument: `uniforms` [rows, max_new_tokens], one number per token. A token is
drawn by inverse CDF, the first whose cumulative probability exceeds u. So what a row gets does not
depend on the sampling batch, on its neighbours or on the number of ranks (up to the last bits of a
matrix product).

Temperature divides the logits; 0 is greedy. Top-k and top-p are for evaluation only: PPO's ratio
would be wrong under them. Nothing is read from the model's generation config but the stop ids
(`model.stop_ids`).

Not covered: encoder-decoder, recurrent and hybrid models (refused: `model.check_cache`),
speculative decoding, CUDA graphs.
"""

from dataclasses import dataclass

from pfppo.model import LEAST
from pfppo.rollout import hashed

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

DEAD_SHARE = 0.05  # share of dead rows at which the batch is compacted


@dataclass
class Samples:
    """B responses; `ids` and `logp` are lists of rows without padding."""

    ids: list[list[int]]  # EOS included where there is one
    logp: list[list[float]]  # of each token, under the sampling temperature (1 if greedy)
    finished: list[bool]  # ends with EOS


class RoomLayer(DynamicLayer):
    """Keys and values [rows, heads, room, D/heads] allocated once, written in place."""

    is_compileable = False

    def __init__(self, prefilled, repeats, room):
        super().__init__()
        rows, heads, length, _ = prefilled.keys.shape
        self.length, self.rows, self.is_initialized = length, rows * repeats, True
        self.dtype, self.device = prefilled.keys.dtype, prefilled.keys.device
        for name in ("keys", "values"):
            past = getattr(prefilled, name)
            whole = past.new_empty(rows * repeats, heads, length + room, past.shape[-1])
            whole[:, :, :length] = past.repeat_interleave(repeats, dim=0)
            setattr(self, name, whole)

    def update(self, key_states, value_states, *args, **kwargs):
        new = slice(self.length, self.length + key_states.shape[2])
        self.length = new.stop
        self.keys[: self.rows, :, new] = key_states
        self.values[: self.rows, :, new] = value_states
        return tuple(x[: self.rows, :, : self.length] for x in (self.keys, self.values))

    def get_mask_sizes(self, query_length):
        return self.length + query_length, 0

    def get_seq_length(self):
        return self.length

    def move(self, sources, targets, rows):
        """Copy live rows over dead ones and keep the first `rows`."""
        for x in (self.keys, self.values):
            x[targets, :, : self.length] = x[sources, :, : self.length]
        self.rows = rows


def draw_uniforms(seed, step, rows, width):
    """[len(rows), width] fp64 numbers in [0, 1); `rows` are (prompt index, sample index) pairs."""
    keys = (hashed("sample", seed, step, prompt, sample) for prompt, sample in rows)
    drawn = [np.random.Generator(np.random.Philox(key=key)).random(width) for key in keys]
    return torch.from_numpy(np.array(drawn).reshape(len(rows), width))


@torch.no_grad()
def sample(
    model,
    prompts,
    uniforms,
    *,
    stop,
    samples_per_prompt=1,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    never=(),
    batch=256,
    progress=lambda rows: None,
):
    """Sample N responses to each of `prompts` (lists of token ids, not empty) from a causal LM.

    uniforms [P * N, max_new_tokens], the N rows of a prompt together; `stop` end-of-sequence ids;
    `never` ids of probability 0; `batch` rows decode together; `progress(rows)` is called at every
    token with the rows that are done since, and may raise to give the sampling up.
    """
    P, N = len(prompts), samples_per_prompt
    if len(uniforms) != P * N:
        raise ValueError(f"expected uniforms for {P} x {N} rows, found {len(uniforms)}")
    how = temperature, top_k, top_p, torch.tensor(list(never), dtype=torch.long)
    done = Samples([], [], [])
    size = max(1, batch // N)  # prompts in a batch
    for start in range(0, P, size):
        part, rows = prompts[start : start + size], uniforms[start * N : (start + size) * N]
        _sample_batch(model, part, rows, N, stop, how, done, progress)
    return done


@dataclass
class Live:
    """The rows of a batch that decode. `order` says which row of the batch each one is."""

    layers: list[RoomLayer]
    order: torch.Tensor  # [live]
    alive: torch.Tensor  # [live] bool; dead rows wait to be moved
    positions: torch.Tensor  # [live] of the next token
    mask: torch.Tensor  # [live, L + room] 0 on the left of short prompts

    def compact(self, tokens):
        """Move live rows of the tail over dead ones, if enough are dead. Returns tokens [live]."""
        remaining = int(self.alive.sum())
        if len(self.order) - remaining <= DEAD_SHARE * len(self.order):
            return tokens
        targets = (~self.alive[:remaining]).nonzero().squeeze(1)
        sources = self.alive[remaining:].nonzero().squeeze(1) + remaining
        for layer in self.layers:
            layer.move(sources, targets, remaining)
        for tensor in (self.order, self.positions, self.mask, tokens):
            tensor[targets] = tensor[sources]
        self.order, self.positions = self.order[:remaining], self.positions[:remaining]
        self.mask, self.alive = self.mask[:remaining], torch.ones_like(self.alive[:remaining])
        return tokens[:remaining]


def prefill(model, prompts, repeats, room):
    """Run the prompts, left-padded, with `room` for new tokens. Returns their last logits [B, V]
    and Live, both with `repeats` rows for each prompt."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    longest = int(lengths.max())
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.arange(longest, device=device) >= longest - lengths[:, None]  # [P, L]
    out = model(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=Cache(layer_class_to_replicate=DynamicLayer),
        use_cache=True,
        logits_to_keep=1,
    )
    rows = len(prompts) * repeats
    live = Live(
        layers=[RoomLayer(layer, repeats, room) for layer in out.past_key_values.layers],
        order=torch.arange(rows, device=device),
        alive=torch.ones(rows, dtype=torch.bool, device=device),
        positions=lengths.repeat_interleave(repeats),
        mask=torch.cat([mask.repeat_interleave(repeats, 0), mask.new_ones(rows, room)], 1).long(),
    )
    return out.logits[:, -1].repeat_interleave(repeats, dim=0), live


def decode_one(model, live, tokens):
    """Append tokens [live] to their rows. Returns the logits [live, V] behind them."""
    seen = live.layers[0].get_seq_length() + 1
    logits = model(
        input_ids=tokens[:, None],
        attention_mask=live.mask[:, :seen],
        position_ids=live.positions[:, None],
        past_key_values=Cache(layers=live.layers),
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    live.positions = live.positions + 1
    return logits


def _sample_batch(model, prompts, uniforms, repeats, stop, how, done, progress):
    """Prefill, then decode until every row has stopped; appends to `done` in order."""
    rows, width = uniforms.shape
    logits, live = prefill(model, prompts, repeats, width)
    device = logits.device
    uniforms, stop = uniforms.to(device), torch.tensor(stop, device=device)
    ids = torch.zeros(rows, width, dtype=torch.long, device=device)
    logp = torch.zeros(rows, width, device=device)
    lengths = torch.full((rows,), width, device=device)
    finished = torch.zeros(rows, dtype=torch.bool, device=device)

    remaining = rows
    for t in range(width):
        tokens, token_logp = draw_tokens(logits, uniforms[live.order, t], *how)
        going = live.order[live.alive]
        ids[going, t], logp[going, t] = tokens[live.alive], token_logp[live.alive]
        ended = live.alive & torch.isin(tokens, stop)
        lengths[live.order[ended]] = t + 1
        finished[live.order[ended]] = True
        live.alive = live.alive & ~ended
        before, remaining = remaining, int(live.alive.sum())
        progress(before - remaining)
        if remaining == 0 or t + 1 == width:
            break
        logits = decode_one(model, live, live.compact(tokens))

    progress(remaining)  # those that were cut off
    for row, row_logp, length in zip(ids.tolist(), logp.tolist(), lengths.tolist(), strict=True):
        done.ids.append(row[:length])
        done.logp.append(row_logp[:length])
    done.finished += finished.tolist()


def draw_tokens(logits, uniforms, temperature=1.0, top_k=0, top_p=1.0, never=()):
    """One token per row by inverse CDF. logits [B, V], uniforms [B] -> tokens [B], logp [B].

    logp is that of the whole distribution at this temperature, before top-k and top-p. The CDF is
    summed in fp64: in fp32 150,000 small probabilities would lose what u can tell apart.
    """
    logits = logits.float()
    if len(never):
        logits = logits.index_fill(1, torch.as_tensor(never, device=logits.device), LEAST)
    if temperature == 0:
        tokens = logits.argmax(-1)
        logp = logits.log_softmax(-1)
    else:
        logp = (logits / temperature).log_softmax(-1)
        probabilities = _truncate(logp.double().exp(), top_k, top_p)
        cdf = probabilities.cumsum(-1)
        total = cdf[:, -1:]
        below = torch.nextafter(total, torch.zeros_like(total))  # so that u = 1 finds a token
        thresholds = torch.minimum(uniforms[:, None] * total, below)
        tokens = torch.searchsorted(cdf, thresholds, right=True).squeeze(1)
    return tokens, logp.gather(1, tokens[:, None]).squeeze(1)


def _truncate(probabilities, top_k, top_p):
    """Zero all but the k likeliest tokens, and all but the smallest set that reaches top_p."""
    if 0 < top_k < probabilities.shape[1]:
        least = probabilities.topk(top_k).values[:, -1:]
        probabilities = probabilities * (probabilities >= least)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # mass of likelier tokens
        ordered = ordered * (before < top_p * ordered.sum(-1, keepdim=True))
        probabilities = torch.zeros_like(probabilities).scatter(1, order, ordered)
    return probabilities
