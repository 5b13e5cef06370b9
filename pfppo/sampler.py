"""KV-cached sampling, written by hand over any decoder of transformers with a plain cache.

1. Prefill: each prompt runs once, left-padded, however many samples it gets.
2. The prompts' keys and values are copied once per sample into preallocated room.
3. Decode: one token per live row and step; only the last position's logits are made.
4. Rows that have finished leave the batch: live rows from the tail move into their place.

The randomness is an argument: `uniforms` [rows, max_new_tokens], one number per token. A token is
drawn by inverse CDF, the first whose cumulative probability exceeds u. So what a row gets does not
depend on the sampling batch, on its neighbours or on the number of ranks (up to the last bits of a
matrix product).

Temperature divides the logits; 0 is greedy. Top-k and top-p are for evaluation only: PPO's ratio
would be wrong under them. Nothing is read from the model's generation config except by
`stop_ids`.

Not covered: encoder-decoder, recurrent and hybrid models (refused: `check_cache`), speculative
decoding, CUDA graphs.
"""

import hashlib
from dataclasses import dataclass

from pfppo.config import require
from pfppo.model import read_config, read_generation_config

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 0.05  # share of dead rows at which the batch is compacted


@dataclass
class Samples:
    """B responses; `ids` and `logp` are lists of rows without padding."""

    ids: list[list[int]]  # EOS included where there is one
    logp: list[list[float]]  # of each token, under the sampling temperature (1 if greedy)
    finished: list[bool]  # ends with EOS
    decode_steps: int  # forward passes after the prefills
    row_steps: int  # rows that went through them


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
        seen = slice(self.rows), slice(None), slice(new.stop)
        return self.keys[seen], self.values[seen]

    def get_mask_sizes(self, query_length):
        return self.length + query_length, 0

    def get_seq_length(self):
        return self.length

    def move(self, sources, targets, rows):
        """Copy live rows over dead ones and keep the first `rows`."""
        seen = slice(None), slice(self.length)
        self.keys[(targets, *seen)] = self.keys[(sources, *seen)]
        self.values[(targets, *seen)] = self.values[(sources, *seen)]
        self.rows = rows


def check_cache(path, option="policy"):
    """UserError where a model does not keep plain keys and values: encoder-decoders, recurrent and
    hybrid ones. A sliding window is a mask here, over keys that all stay."""
    config = read_config(path, option)
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or [])
    odd = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    stateful = odd or getattr(kind, "_is_stateful", False)
    found = "an encoder-decoder" if config.is_encoder_decoder else "a recurrent or hybrid model"
    require(
        not config.is_encoder_decoder and not stateful,
        f"--{option} {path}: {config.model_type} is {found}, expected a decoder with plain "
        "keys and values in its cache, as sampling here needs them",
    )


def stop_ids(path, tokenizer):
    """All end-of-sequence ids: those `generate` would stop at, and the tokenizer's."""
    config = read_generation_config(path) or read_config(path, "policy")
    found = config.eos_token_id
    found = found if isinstance(found, list) else [found]
    return sorted({i for i in [*found, tokenizer.eos_token_id] if i is not None})


def draw_uniforms(seed, step, rows, width):
    """[len(rows), width] numbers in [0, 1); `rows` are (prompt index, sample index) pairs."""
    drawn = torch.empty(len(rows), width)
    generator = torch.Generator()
    for target, (prompt, sample) in zip(drawn, rows, strict=True):
        key = hashlib.blake2b(f"{seed} {step} {prompt} {sample}".encode(), digest_size=7)
        generator.manual_seed(int.from_bytes(key.digest(), "big"))
        target.uniform_(generator=generator)
    return drawn


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
    batch=256,
    progress=lambda rows: None,
):
    """Sample N responses to each of `prompts` (lists of token ids, not empty) from a causal LM.

    uniforms [P * N, max_new_tokens], the N rows of a prompt together; `stop` end-of-sequence ids;
    `batch` rows decode together; `progress(rows)` is called at every token with the rows that are
    done since, and may raise to give the sampling up.
    """
    if len(uniforms) != len(prompts) * samples_per_prompt:
        raise ValueError(
            f"expected uniforms for {len(prompts)} x {samples_per_prompt} rows, "
            f"found {len(uniforms)}"
        )
    done = Samples([], [], [], 0, 0)
    size = max(1, batch // samples_per_prompt)  # prompts in a batch
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        first = start * samples_per_prompt
        rows = uniforms[first : first + len(part) * samples_per_prompt]
        _sample_batch(
            model, part, rows, samples_per_prompt, stop, (temperature, top_k, top_p), done, progress
        )
    return done


def _prefill(model, prompts, device):
    """Run the prompts, left-padded. Returns last logits [P, V], cache, mask [P, L], lengths [P]."""
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
    return out.logits[:, -1], out.past_key_values, mask, lengths


def _sample_batch(model, prompts, uniforms, repeats, stop, how, done, progress):
    """Prefill, then decode until every row has stopped; appends to `done` in order."""
    device = next(model.parameters()).device
    logits, prefilled, mask, lengths = _prefill(model, prompts, device)
    width = uniforms.shape[1]
    uniforms = uniforms.to(device)
    rows = len(prompts) * repeats
    layers = [RoomLayer(layer, repeats, width) for layer in prefilled.layers]
    cache = Cache(layers=layers)
    del prefilled
    # Everything below is kept for live rows only; `order` says which row of the batch each one is.
    order = torch.arange(rows, device=device)
    logits = logits.repeat_interleave(repeats, dim=0)  # [live, V]
    mask = torch.cat([mask.repeat_interleave(repeats, 0), mask.new_ones(rows, width)], 1).long()
    positions = lengths.repeat_interleave(repeats)  # [live], of the next token
    prompt_width = mask.shape[1] - width
    ids = torch.zeros(rows, width, dtype=torch.long, device=device)
    logp = torch.zeros(rows, width, device=device)
    counts = torch.full((rows,), width, device=device)  # tokens of each row
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    stop = torch.tensor(stop, device=device)
    alive = torch.ones(rows, dtype=torch.bool, device=device)  # [live]; dead rows wait to be moved

    remaining = rows
    for t in range(width):
        tokens, token_logp = draw_tokens(logits, uniforms[order, t], *how)
        live = order[alive]
        ids[live, t], logp[live, t] = tokens[alive], token_logp[alive]
        ended = alive & torch.isin(tokens, stop)
        counts[order[ended]] = t + 1
        finished[order[ended]] = True
        alive = alive & ~ended
        left, remaining = remaining, int(alive.sum())
        progress(left - remaining)
        if remaining == 0 or t + 1 == width:
            break
        if len(order) - remaining > ROOM * len(order):
            targets = (~alive[:remaining]).nonzero().squeeze(1)
            sources = alive[remaining:].nonzero().squeeze(1) + remaining
            for layer in layers:
                layer.move(sources, targets, remaining)
            for tensor in (order, tokens, positions, mask):
                tensor[targets] = tensor[sources]
            order, tokens, positions, mask = (
                tensor[:remaining] for tensor in (order, tokens, positions, mask)
            )
            alive = torch.ones(remaining, dtype=torch.bool, device=device)
        done.decode_steps += 1
        done.row_steps += len(order)
        logits = model(
            input_ids=tokens[:, None],
            attention_mask=mask[:, : prompt_width + t + 1],
            position_ids=positions[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        positions = positions + 1

    progress(remaining)  # those that were cut off
    for row, row_logp, count in zip(ids.tolist(), logp.tolist(), counts.tolist(), strict=True):
        done.ids.append(row[:count])
        done.logp.append(row_logp[:count])
    done.finished += finished.tolist()


def draw_tokens(logits, uniforms, temperature=1.0, top_k=0, top_p=1.0):
    """One token per row by inverse CDF. logits [B, V], uniforms [B] -> tokens [B], logp [B].

    logp is that of the whole distribution at this temperature, before top-k and top-p.
    """
    logits = logits.float()
    if temperature == 0:
        tokens = logits.argmax(-1)
        logp = logits.log_softmax(-1)
    else:
        logp = (logits / temperature).log_softmax(-1)
        probabilities = _truncate(logp.exp(), top_k, top_p)
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
