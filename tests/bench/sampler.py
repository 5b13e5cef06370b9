"""Tokens per second of the sampler against transformers' `generate`, at the same lengths, and
against the machine: the matrix products of its passes alone.

    python tests/bench/sampler.py                       # both settings, all kinds of lengths
    python tests/bench/sampler.py --only s1 --pairs 9
    python tests/bench/sampler.py --only real --kinds full,uniform

S1: Llama of 1.2 M parameters (4 layers, width 128, vocabulary 512), 64 prompts of 64 tokens x 5
samples, 64 new tokens. Real: the shape of SmolLM2-135M (30 layers, width 576, 9 heads for 3 of keys
and values, vocabulary 49,152), 4 prompts of 128 x 5, 64 new. Random weights, fp32. Lengths are
imposed on both sides from one table: full, uniform over 1..most, or geometric with a mean of a
quarter of it: a row ends at its length.
The three run in turn; the ratio is the median over the rounds, and so are the shares of our time in
prefill, decode (the model's forward), sampling (`draw_tokens`) and bookkeeping (the rest). `limit`
is the share of our time that the products of the same passes take alone: those of linear layers and
of attention, back to back, over weights, keys and values where a model's lie. Prints a table, how
far the sampler's log-probs are from the training forward's, and one line of JSON.
"""

import argparse
import json
import os
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

from pfppo import sampler  # noqa: E402
from pfppo.model import Policy  # noqa: E402
from pfppo.rollout import collate  # noqa: E402
from pfppo.sampler import draw_uniforms, sample  # noqa: E402

import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.generation import LogitsProcessor, LogitsProcessorList  # noqa: E402

SETTINGS = {
    "s1": {"prompts": 64, "prompt": 64, "new": 64, "layers": 4, "width": 128, "vocabulary": 512},
    "real": {"prompts": 4, "prompt": 128, "new": 64, "layers": 30, "width": 576}
    | {"vocabulary": 49152, "heads": 9, "shared": 3, "mlp": 1536},
}
N, EOS = 5, 0
KINDS = ("full", "uniform", "geometric")


def model_of(setting):
    torch.manual_seed(0)
    width = setting["width"]
    config = LlamaConfig(
        vocab_size=setting["vocabulary"],
        hidden_size=width,
        intermediate_size=setting.get("mlp", 4 * width if width < 256 else 2048),
        num_hidden_layers=setting["layers"],
        num_attention_heads=setting.get("heads", width // (32 if width < 256 else 64)),
        num_key_value_heads=setting.get("shared"),
        max_position_embeddings=1024,
        tie_word_embeddings=width >= 256,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    return LlamaForCausalLM(config).eval()


def lengths_of(kind, rows, most):
    """[rows] tokens that each row gets, its EOS included."""
    generator = torch.Generator().manual_seed(1)
    if kind == "full":
        return torch.full((rows,), most)
    if kind == "uniform":
        return torch.randint(1, most + 1, (rows,), generator=generator)
    drawn = torch.rand(rows, generator=generator).log() / torch.tensor(1 - 4 / most).log()
    return drawn.long().clamp(0, most - 1) + 1


def scheduled(logits, step, lengths):
    """EOS, surely, where a row's last token is due, and never before."""
    logits[:, EOS] = float("-inf")
    due = lengths == step + 1
    logits[due] = float("-inf")
    logits[due, EOS] = 0.0
    return logits


class Schedule(LogitsProcessor):
    """The table of lengths, for `generate`, whose rows stay where they are."""

    def __init__(self, lengths, prompt):
        self.lengths, self.prompt = lengths, prompt

    def __call__(self, ids, scores):
        return scheduled(scores, ids.shape[1] - self.prompt, self.lengths)


PARTS = ("prefill", "decode", "sampling", "bookkeeping")


def ours(model, prompts, lengths, setting):
    """(seconds, tokens, useful share of row-steps, share of the seconds in each of PARTS, the
    passes: [(rows, tokens of each, columns that they look at)])."""
    uniforms = draw_uniforms(0, 0, [(i, j) for i in range(len(prompts)) for j in range(N)], 1)
    uniforms = uniforms.expand(-1, setting["new"]).clone()
    original, spent = sampler.draw_tokens, dict.fromkeys(PARTS, 0.0)
    table = lengths[:, None] == torch.arange(1, setting["new"] + 1)  # [rows, new]: EOS is due
    uniforms[table] = 2.0  # no random number: `draw` below takes it as the sign

    def draw(logits, numbers, *how):
        due = numbers > 1
        logits = logits.clone()
        logits[:, EOS] = float("-inf")
        tokens, logp = original(logits, numbers.clamp(max=0.999), *how)
        return tokens.masked_fill(due, EOS), logp

    def timed(part, function):
        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.perf_counter() - start

        return call

    decode, read, passes = sampler.decode_one, sampler.prefill, []

    def decode_one(model, slots):
        passes.append((len(slots), 1, slots.column + 1))
        return decode(model, slots)

    def prefill(model, prompts):
        longest = max(map(len, prompts))
        passes.append((len(prompts), longest, longest))
        return read(model, prompts)

    with ExitStack() as stack:
        for owner, name, part, function in (
            (sampler, "prefill", "prefill", prefill),
            (sampler, "decode_one", "decode", decode_one),
            (sampler, "draw_tokens", "sampling", draw),
        ):
            stack.enter_context(mock.patch.object(owner, name, timed(part, function)))
        start = time.perf_counter()
        done = sample(model, prompts, uniforms, stop=[EOS], samples_per_prompt=N, batch=10**6)
        seconds = time.perf_counter() - start
    spent["bookkeeping"] = seconds - sum(spent.values())
    tokens = sum(map(len, done.ids))
    assert [len(ids) for ids in done.ids] == lengths.tolist()
    # What the last decoding pass gives is not fed back, nor is a row's last token.
    steps = sum(rows for rows, length, _ in passes if length == 1)
    useful = (tokens - len(lengths)) / max(1, steps)
    return seconds, tokens, useful, [spent[part] / seconds for part in PARTS], passes


@torch.no_grad()
def products(model, passes):
    """Seconds of the matrix products of these passes alone."""
    config, head = model.config, model.lm_head
    blocks = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    heads, width = config.num_attention_heads, config.head_dim
    groups = heads // config.num_key_value_heads
    shape = max(p[0] for p in passes), config.num_key_value_heads, max(p[2] for p in passes), width
    caches = [(torch.randn(shape), torch.randn(shape)) for _ in range(config.num_hidden_layers)]
    inputs = {
        m.in_features: torch.randn(max(r * n for r, n, _ in passes), m.in_features)
        for m in (*blocks, head)
    }
    start = time.perf_counter()
    for rows, length, columns in passes:
        for linear in blocks:
            torch.nn.functional.linear(inputs[linear.in_features][: rows * length], linear.weight)
        queries = torch.ones(rows, shape[1], groups * length, width)
        for keys, values in caches:
            scores = queries @ keys[:rows, :, :columns].transpose(2, 3)
            scores @ values[:rows, :, :columns]
        torch.nn.functional.linear(inputs[head.in_features][:rows], head.weight)
    return time.perf_counter() - start


def theirs(model, prompts, lengths, setting):
    ids = torch.tensor(prompts)
    start = time.perf_counter()
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            num_return_sequences=N,
            max_new_tokens=setting["new"],
            logits_processor=LogitsProcessorList([Schedule(lengths, ids.shape[1])]),
            pad_token_id=EOS,
            eos_token_id=EOS,
        )
    seconds = time.perf_counter() - start
    made = out[:, ids.shape[1] :]
    assert torch.equal((made != EOS).sum(1) + (lengths < setting["new"] + 1), lengths)
    return seconds


def gaps(model, prompts):
    """(mean, largest) |difference| of the sampler's log-probs to those of the training forward."""
    uniforms = draw_uniforms(0, 0, [(i, j) for i in range(len(prompts)) for j in range(N)], 64)
    done = sample(model, prompts, uniforms, stop=[EOS], samples_per_prompt=N)
    rows = collate([prompt for prompt in prompts for _ in range(N)], done.ids, pad_id=EOS)
    with torch.no_grad():
        logp, _ = Policy(model)(rows.ids, rows.states, rows.responses, rows.mask, 1.0)
    sampled = torch.tensor([value for row in done.logp for value in row])
    gap = (logp[rows.mask > 0] - sampled).abs()
    return gap.mean().item(), gap.max().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=list(SETTINGS), default=None)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    found = {}
    for name in [args.only] if args.only else SETTINGS:
        setting = SETTINGS[name]
        model = model_of(setting)
        size = sum(p.numel() for p in model.parameters())
        generator = torch.Generator().manual_seed(0)
        shape = (setting["prompts"], setting["prompt"])
        prompts = torch.randint(1, setting["vocabulary"], shape, generator=generator).tolist()
        for kind in args.kinds.split(","):
            lengths = lengths_of(kind, len(prompts) * N, setting["new"])
            rows = []
            for _ in range(args.pairs):
                mine, tokens, useful, shares, passes = ours(model, prompts, lengths, setting)
                alone = products(model, passes)
                other = theirs(model, prompts, lengths, setting)
                rows.append((other / mine, alone / mine, tokens / mine, *shares))
            middle = (statistics.median(column) for column in zip(*rows, strict=True))
            ratio, limit, rate, *shares = middle
            found[f"{name} {kind}"] = {
                "ratio": round(ratio, 2),
                "limit": round(limit, 3),
                "ratios": [round(row[0], 2) for row in rows],
                "tokens_per_second": round(rate),
                "useful": round(useful, 3),
                **{part: round(share, 3) for part, share in zip(PARTS, shares, strict=True)},
            }
            split = ", ".join(f"{part} {found[f'{name} {kind}'][part]:.0%}" for part in PARTS)
            print(
                f"{name} ({size / 1e6:.1f} M) {kind:10} {ratio:5.2f} x generate  "
                f"products alone {limit:.0%}  "
                f"{rate:8.0f} tokens/s  useful row-steps {useful:.1%}  {split}",
                flush=True,
            )
    for dtype in (torch.float32, torch.bfloat16):
        mean, largest = gaps(model.to(dtype), prompts[:8])
        found[f"{name} {dtype} log-prob gap"] = {"mean": mean, "largest": largest}
        print(f"{name} {dtype}: log-probs differ by {mean:.1e} on average, {largest:.1e} at most")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
