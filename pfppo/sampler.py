"""KV-cached sampling in slots, written by hand over any decoder of transformers with a plain cache.

Rows decode together in the slots of one block of keys and values (the picture: slots.py):

1. `prefill`: some prompts of like length run once, left-padded, whatever samples each one gets.
2. `Slots.refill`: waiting samples of these prompts take free slots, their keys and values copied.
3. `decode_one`: one token per slot and step; only the last position's logits are made.
4. `Slots.rewind`, where the block is full or mostly masked: what lives moves to its front.
5. `Slots.compact`, where nothing waits any more: rows that have ended leave.

The randomness is an argument: `uniforms` [rows, max_new_tokens], one number per token. A token is
drawn by inverse CDF, the first whose cumulative probability exceeds u. So what a row gets does not
depend on the number of slots, on its neighbours or on the number of ranks (up to the last bits of
a matrix product).

Temperature divides the logits; 0 is greedy. Top-k and top-p are for evaluation only: PPO's ratio
would be wrong under them. Nothing is read from the model's generation config but the stop ids
(`model.stop_ids`).

With `compiled` the pass of `decode_one` is compiled. Its shapes must be few for that: the model
sees the whole block at every step, and `Slots.compact` does no more than halve it.

Not covered: encoder-decoder, recurrent and hybrid models (refused: `model.check_cache`),
speculative decoding.
"""

import itertools
from collections import deque
from dataclasses import dataclass

from pfppo.fsdp import compiled_once
from pfppo.model import LEAST
from pfppo.rollout import hashed
from pfppo.slots import Slots

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

FREE_SHARE = 0.05  # share of free slots at which prompts are read, or the block is compacted
READ = 4096  # tokens of prompts in a pass: more hardly fill a device better, and take memory
ASKED = 8  # steps after which rows that live are asked whether they have `ended`


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
    ended=None,
    compiled=False,
):
    """Sample N responses to each of `prompts` (lists of token ids, not empty) from a causal LM.

    uniforms [P * N, max_new_tokens], the N rows of a prompt together; `stop` end-of-sequence ids;
    `never` ids of probability 0; `batch` slots; `progress(rows)` is called at every pass with the
    rows that are done since, of one that goes on the share that these tokens are of its own and of
    its prompt's, and may raise to give the sampling up. `ended(row, ids, new)`: how many of its ids
    a row keeps, as what they say has ended (the last `new` were not there when it was asked
    before), or None. It must be a function of the ids alone: it is asked now and then, and of all
    rows in the end.
    compiled: so is the pass of every decode step; it changes no number by more than rounding.
    """
    P, N = len(prompts), samples_per_prompt
    if len(uniforms) != P * N:
        raise ValueError(f"expected uniforms for {P} x {N} rows, found {len(uniforms)}")
    device = next(model.parameters()).device
    uniforms = uniforms.to(device)
    never = torch.tensor(list(never), dtype=torch.long, device=device)
    # Longest first: a prompt that waits is then no longer than the rows that live.
    waiting = deque(sorted(range(P), key=lambda i: -len(prompts[i])))
    longest, width = max(map(len, prompts), default=0), uniforms.shape[1]
    slots, ready = Slots(P * N, batch, longest, width, stop, device, compiled), None
    # Rows that a token is; a prompt is read once, and rounded shares must not exceed all rows.
    share = (1 - 1e-9) * P * N / max(1, sum(map(len, prompts)) + P * N * width)
    for step in itertools.count(1):
        free = len(slots) - slots.live
        if ready is None and waiting and free >= max(1, FREE_SHARE * len(slots)):
            most = max(1, READ // len(prompts[waiting[0]]))
            chosen = [waiting.popleft() for _ in range(min(len(waiting), -(-free // N), most))]
            ready = prefill(model, [prompts[i] for i in chosen])
            progress(share * int(ready.lengths.sum()))
            rows = deque((i * N + j, source) for source, i in enumerate(chosen) for j in range(N))
        if ready and free:
            who, logits = slots.refill(ready, [rows.popleft() for _ in range(min(free, len(rows)))])
            ready = ready if rows else None
        elif slots.live:
            if not waiting:
                slots.compact(FREE_SHARE)
            logits, who = decode_one(model, slots), slots.alive.nonzero()[:, 0]
            logits = logits if len(who) == len(slots) else logits[who]
        else:
            return slots.samples(ended)
        numbers = uniforms[slots.row[who], slots.count[who]]
        drawn = draw_tokens(logits, numbers, temperature, top_k, top_p, never)
        progress(share * slots.take(who, *drawn))
        if ended and step % ASKED == 0:
            progress(share * slots.let_go(ended, ASKED))


@dataclass
class Prompts:
    """R prompts that have been read, left-padded to L."""

    layers: list[DynamicLayer]  # keys and values [R, heads, L, D/heads]
    logits: torch.Tensor  # [R, V] behind them
    lengths: torch.Tensor  # [R]


def prefill(model, prompts):
    """Run prompts (lists of token ids) once, left-padded. Returns Prompts."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    longest = int(lengths.max())
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.arange(longest, device=device) >= longest - lengths[:, None]  # [R, L]
    out = model(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=Cache(layer_class_to_replicate=DynamicLayer),
        use_cache=True,
        logits_to_keep=1,
    )
    return Prompts(out.past_key_values.layers, out.logits[:, -1], lengths)


def decode_one(model, slots):
    """Append every slot's last token to its row. Returns the logits [slots, V] behind them."""
    mask, positions = slots.view()
    step = compiled_once(next_logits) if slots.fixed else next_logits
    return step(model, slots.token[:, None], mask, positions, Cache(layers=slots.layers))


def next_logits(model, ids, mask, positions, cache):
    """The pass of a decode step. ids, positions [slots, 1], mask [slots, columns] -> [slots, V]"""
    how = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, **how).logits[:, -1]


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
