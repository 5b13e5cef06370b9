"""The day there is a GPU: what was only simulated, checked and timed in one go. Prints one JSON.

    python tests/gpu.py > gpu.json              # one GPU of 40 GB or more, under 8 minutes
    python tests/gpu.py --device cpu --small    # the same lines at sizes for a CPU, seconds

Needs torch, transformers, safetensors, numpy and tqdm; models are random, nothing is downloaded.
All checks but the last are in gpu_checks.py.
What else is said goes to standard error. Exit status 1 if a check failed; a part that raises is a
check that failed, and the others go on.

    checks   log-probs and gradients here and on the CPU, fp32 and bf16; the sampler's log-probs
             against training's; its tokens against the CPU's; train_ppo.py --selfcheck; each
             --offload_* against none; memory against --plan; decode steps that are compiled, and
             that are captured in a CUDA graph (left out on a CPU), against plain ones
    times    one decode step against reading weights, keys and values once (bandwidth is measured
             by a copy), as it is, compiled and captured; an update's share of the rate of a matrix
             product (measured too), plain and compiled; the phases of a step of train_ppo.py
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pfppo import fsdp  # noqa: E402
from pfppo.model import Policy, empty_causal_lm  # noqa: E402
from pfppo.rollout import collate  # noqa: E402
from pfppo.run.proofs import apart  # noqa: E402
from pfppo.sampler import decode_one, draw_uniforms, next_logits, prefill, sample  # noqa: E402
from pfppo.slots import Slots  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from gpu_checks import (  # noqa: E402
    NEVER,
    SHAPES,
    check_parity,
    check_runs,
    config_of,
    prompts_of,
)
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.cache_utils import Cache  # noqa: E402

WARM = 3  # steps before one is captured


def now(device):
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work, device, repeat=3):
    """Of the fastest of some calls, after one that warms up."""
    best = float("inf")
    for i in range(repeat + 1):
        start = now(device)
        work()
        best = min(best, now(device) - start) if i else best
    return best


# ------------------------------------------------------------------------------------------- times


class Drawn:
    """Weights at random, for `fsdp.shard`: made on the device, read from nowhere."""

    def local(self, name, parameter):
        local = parameter.to_local()
        return torch.randn(local.shape, device=local.device) * 0.02


def roofline(device, dtype, small):
    """(bytes per second of a copy, operations per second of a matrix product)."""
    block = torch.zeros(1 << (22 if small else 31), dtype=torch.uint8, device=device)
    other, side = torch.empty_like(block), 128 if small else 8192
    copied = 2 * block.nbytes / seconds(lambda: other.copy_(block), device)
    a = torch.ones(side, side, dtype=dtype, device=device)
    return copied, 2 * side**3 / seconds(lambda: a @ a, device)


def time_decoding(report, lm, device, bandwidth, rows, prompt, new):
    """One decode step, from two runs whose responses differ in length."""
    vocabulary = lm.config.vocab_size
    prompts = prompts_of(rows, prompt, vocabulary)
    found = {}
    for length in (new, new // 2):
        uniforms = draw_uniforms(1, 0, [(i, 0) for i in range(rows)], length)
        how = {"stop": NEVER, "batch": rows}
        found[length] = seconds(lambda u=uniforms, h=how: sample(lm, prompts, u, **h), device, 2)
    step = (found[new] - found[new // 2]) / (new - new // 2)
    weights = sum(p.nbytes for n, p in lm.named_parameters() if "embed_tokens" not in n)
    config = lm.config
    wide = 2 * config.num_hidden_layers * config.hidden_size * lm.dtype.itemsize
    cache = wide * rows * (prompt + 0.75 * new)
    floor = (weights + cache) / bandwidth
    report.times["decode"] = {
        "rows": rows,
        "seconds_per_step": step,
        "floor": floor,
        "floor_by_step": floor / step,
        "tokens_per_second": rows / step,
    }


def plain(lm, slots):
    """A decode step as it is: a function of nothing that returns logits [slots, V]."""
    cache = Cache(layers=slots.layers)
    return lambda: next_logits(lm, slots.token[:, None], *slots.view(), cache)


def compiled(lm, slots):
    return lambda: decode_one(lm, slots)


def captured(lm, slots):
    """The same as a CUDA graph, which reads what a step is given from one place."""
    given, cache = (slots.token[:, None].clone(), *slots.view()), Cache(layers=slots.layers)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are chosen and memory is taken before
        for _ in range(WARM):
            next_logits(lm, *given, cache)
    torch.cuda.current_stream().wait_stream(stream)
    for layer in slots.layers:
        layer.column -= WARM
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = next_logits(lm, *given, cache)

    def step():
        for place, now in zip(given, (slots.token[:, None], *slots.view()), strict=True):
            place.copy_(now)
        graph.replay()
        return logits

    return step


@torch.no_grad()
def time_steps(report, lm, device, rows, prompt, steps):
    """The same decode steps over a fixed block in every way, fed with the tokens of the plain one.
    The first two, which compile, do not count."""
    found, tokens, expected = {"captured": "left out: no GPU"}, [], None
    for way in (plain, compiled, captured)[: 2 + (device.type == "cuda")]:
        slots, logp = Slots(rows, rows, prompt, steps + 1, NEVER, device, fixed=True), []
        prompts = prefill(lm, prompts_of(rows, prompt, lm.config.vocab_size))
        who, logits = slots.refill(prompts, [(i, i) for i in range(rows)])
        slots.take(who, logits.argmax(-1), logits[:, 0].float())
        step = way(lm, slots)
        for i in range(steps):
            if i == 2:
                start = now(device)
            logits = step().float()
            tokens += [logits.argmax(-1)] * (way is plain)
            logp.append(logits.log_softmax(-1).gather(1, tokens[i][:, None])[:, 0])
            slots.take(who, tokens[i], logp[-1])
        found[way.__name__] = (now(device) - start) / (steps - 2)
        logp = torch.stack(logp).cpu()
        expected = logp if way is plain else expected
        difference, limit = apart(logp, expected, lm.dtype)
        if way is not plain:
            name = f"log-probs of {way.__name__} decode steps"
            report.check(name, difference <= limit, difference, limit)
    report.times["seconds of a decode step"] = found


def time_update(report, ranks, shape, peak, rows, length, name="update"):
    """Forward, backward and Adam of a sharded policy on one rank, plain or with compiled blocks."""
    policy = fsdp.shard(Policy(empty_causal_lm(config_of(shape))), Drawn(), ranks, dtype_of(ranks))
    if name != "update":
        fsdp.compile_blocks(policy)
    fsdp.recompute_blocks(policy)
    optimizer = fsdp.adamw(policy, 1e-6)
    vocabulary, half = SHAPES[shape][-1], length // 2
    asked = prompts_of(rows, length, vocabulary)
    batch = collate([r[:half] for r in asked], [r[half:] for r in asked], 0, ranks.device)

    def update():
        policy(batch.ids, batch.states, batch.responses, batch.mask)[0].sum().backward()
        fsdp.step(policy, optimizer, 1.0, 1.0)

    taken = seconds(update, ranks.device)
    count, tokens = sum(p.numel() for p in policy.parameters()), sum(map(len, asked))
    useful = 6 * count * tokens / taken  # recomputed blocks are not counted
    report.times[name] = {
        "parameters": count,
        "tokens": tokens,
        "seconds": taken,
        "flop_per_second": useful,
        "share_of_matrix_product": useful / peak,
    }


def dtype_of(ranks):
    return "bfloat16" if ranks.device.type == "cuda" else "float32"


def time_all(report, device, small):
    ranks, shape = fsdp.init_ranks(device.type), "tiny" if small else "mid"
    dtype = getattr(torch, dtype_of(ranks))
    bandwidth, peak = roofline(device, dtype, small)
    report.times["roofline"] = {"bytes_per_second": bandwidth, "flop_per_second": peak}
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(config_of(shape), dtype=dtype).eval()
    sizes = (4, 8, 8) if small else (128, 256, 256)
    time_decoding(report, lm, device, bandwidth, *sizes)
    time_steps(report, lm, device, *sizes[:2], 6 if small else 64)
    del lm
    for name in ("update", "update, compiled"):
        time_update(report, ranks, shape, peak, *((2, 16) if small else (8, 1024)), name)
    dist.destroy_process_group()


class Report:
    """Checks and times so far."""

    def __init__(self):
        self.checks, self.times, self.started = {}, {}, time.monotonic()

    def check(self, name, ok, found, limit):
        self.checks[name] = {"ok": bool(ok), "found": found, "limit": limit}

    @contextlib.contextmanager
    def part(self, name):
        try:
            yield
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            self.checks[name] = {"ok": False, "error": f"{type(error).__name__}: {error}"[:400]}
            if dist.is_initialized():
                dist.destroy_process_group()


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    options = parser.parse_args(words)
    device = torch.device(options.device, 0 if options.device == "cuda" else None)
    report, said = Report(), sys.stdout
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        with report.part("parity"):
            check_parity(report, device, "tiny")
        with report.part("runs"):
            check_runs(report, device, options.small, Path(folder))
        with report.part("times"):
            time_all(report, device, options.small)
    result = {"device": "cpu", "torch": torch.__version__, "checks": report.checks}
    if options.device == "cuda":
        met = torch.cuda.is_available()
        result["device"] = torch.cuda.get_device_properties(0).name if met else "none was found"
    result |= {"times": report.times, "seconds": time.monotonic() - report.started}
    print(json.dumps(result, indent=1), file=said)
    return int(not all(check["ok"] for check in report.checks.values()))


if __name__ == "__main__":
    sys.exit(main())
