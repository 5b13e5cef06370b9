"""The day there is a GPU: what was only simulated, checked and timed in one go. Prints one JSON.

    python tests/gpu.py > gpu.json              # one GPU of 40 GB or more, under 8 minutes
    python tests/gpu.py --device cpu --small    # the same lines at sizes for a CPU, seconds

Needs torch, transformers, safetensors, numpy and tqdm; models are random, nothing is downloaded.
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

import train_ppo  # noqa: E402
from pfppo import fsdp  # noqa: E402
from pfppo.model import Policy, empty_causal_lm  # noqa: E402
from pfppo.rollout import collate  # noqa: E402
from pfppo.run.memory import Plan  # noqa: E402
from pfppo.run.proofs import apart  # noqa: E402
from pfppo.sampler import decode_one, draw_uniforms, next_logits, prefill, sample  # noqa: E402
from pfppo.slots import Slots  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import Cache  # noqa: E402

#             width, layers, heads, MLP, vocabulary
SHAPES = {
    "tiny": (32, 2, 4, 64, 128),  # in fp32 on a CPU within a moment
    "small": (576, 30, 9, 1536, 49152),  # 135M, of the checks of whole runs
    "mid": (2048, 22, 16, 5632, 32000),  # 1.2B, of the times
}
NEVER = [1 << 30]  # an end-of-sequence id that no token has
WARM = 3  # steps before one is captured
OFFLOADS = ("offload_ref", "offload_reward", "offload_optimizer")


def config_of(shape):
    width, layers, heads, mlp, vocabulary = SHAPES[shape]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
        initializer_range=0.2 if shape == "tiny" else 0.02,  # so that its logits differ
        tie_word_embeddings=False,
        max_position_embeddings=2048,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )


def prompts_of(count, length, vocabulary):
    drawn = torch.randint(
        2, vocabulary, (count, length), generator=torch.Generator().manual_seed(0)
    )
    return [row[: length - i % 3].tolist() for i, row in enumerate(drawn)]


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


# ------------------------------------------------------------------------------------------ checks


def log_probs_and_gradient(lm, rows):
    """([tokens], the gradients' norm), on the CPU, of a causal LM where it is."""
    policy = Policy(lm)
    logp, _ = policy(rows.ids, rows.states, rows.responses, rows.mask)
    logp.sum().backward()
    norm = torch.stack([p.grad.float().norm() for p in lm.parameters()]).norm()
    lm.zero_grad()
    return logp[rows.mask > 0].detach().cpu(), norm.item()


def check_parity(report, device, shape):
    """One model here and on the CPU: training's log-probs and gradients, the sampler's tokens."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.float32).eval()
    prompts = prompts_of(8, 12, SHAPES[shape][-1])
    how = {"stop": NEVER, "samples_per_prompt": 2, "batch": 5}
    uniforms = draw_uniforms(1, 0, [(i, j) for i in range(8) for j in range(2)], 16)
    drawn = sample(lm, prompts, uniforms, **how)
    asked = [prompt for prompt in prompts for _ in range(2)]
    rows = {d: collate(asked, drawn.ids, 0, d, drawn.logp) for d in (torch.device("cpu"), device)}
    expected, norm = log_probs_and_gradient(lm, rows[torch.device("cpu")])
    for dtype in (torch.float32, torch.bfloat16):
        lm, name = lm.to(device, dtype), str(dtype).removeprefix("torch.")
        logp, here = log_probs_and_gradient(lm, rows[device])
        difference, limit = apart(logp, expected, dtype)
        report.check(f"log-probs as on the CPU, {name}", difference <= limit, difference, limit)
        share, limit = abs(here / norm - 1), 1e-3 if dtype == torch.float32 else 0.05
        report.check(f"gradient's norm as on the CPU, {name}", share <= limit, share, limit)
        again = sample(lm, prompts, uniforms, **how)
        rows_again = collate(asked, again.ids, 0, device, again.logp)
        logp, _ = log_probs_and_gradient(lm, rows_again)
        sampled = rows_again.sampled_logp[rows_again.mask > 0].cpu()
        difference, limit = apart(sampled, logp, dtype)
        report.check(f"sampler and training, {name}", difference <= limit, difference, limit)
        if dtype == torch.float32:
            same = sum(a == b for a, b in zip(again.ids, drawn.ids, strict=True)) / len(drawn.ids)
            report.check("rows that are sampled as on the CPU, share", same >= 0.9, same, 0.9)


def write_folders(folder, shape):
    """policy/, reward_model/ and prompts.jsonl of a run."""
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(SHAPES[shape][-1] - 2))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    config = config_of(shape)
    torch.manual_seed(0)
    kinds = {"policy": AutoModelForCausalLM, "reward_model": AutoModelForSequenceClassification}
    for name, kind in kinds.items():
        config.num_labels = 1
        kind.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    prompts = prompts_of(16, 24, SHAPES[shape][-1])
    lines = [{"prompt": " ".join(words[i] for i in ids)} for ids in prompts]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def arguments(folder, device, small, **changed):
    """Those of train_ppo.py for these folders."""
    names = {name: str(folder / name) for name in ("policy", "reward_model")}
    sizes = {"steps": 2, "eval_every": 2, "prompts_per_step": 8, "samples_per_prompt": 4}
    sizes |= {"filter": "none", "minibatch": 16, "microbatch": 8, "max_new_tokens": 16}
    if small:
        sizes |= {"prompts_per_step": 2, "minibatch": 4, "microbatch": 4, "max_new_tokens": 4}
        sizes |= {"samples_per_prompt": 2}
    sizes |= {"validation": "", "test": "", "save_every": 2, "allow_weak_isolation": True}
    names |= {"prompts": str(folder / "prompts.jsonl"), "run_dir": tempfile.mkdtemp(dir=folder)}
    args = train_ppo.Args(**names | sizes | {"device": device.type} | changed)
    args.run_dir += "/run"
    return args


def run(folder, device, small, **changed):
    """train_ppo.main: (its status, the last line of its metrics)."""
    args = arguments(folder, device, small, **changed)
    try:
        status = train_ppo.main(args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    file = Path(args.run_dir) / "metrics.jsonl"
    return status, json.loads(file.read_text().splitlines()[-1]) if file.exists() else None


def check_runs(report, device, small, folder):
    """--selfcheck, a plain run and its times, every offload."""
    write_folders(folder, "tiny" if small else "small")
    for dtype in ("float32", "bfloat16")[small:]:
        status, _ = run(folder, device, small, selfcheck=True, param_dtype=dtype)
        report.check(f"train_ppo.py --selfcheck, {dtype}", status == 0, status, 0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    _, plain = run(folder, device, small, steps=2 - small)
    report.times["step"] = {n: v for n, v in plain.items() if "second" in n and v is not None}
    if device.type == "cuda":
        plan = Plan(arguments(folder, device, small), 1, torch.bfloat16, 24)
        share = torch.cuda.max_memory_allocated() / max(plan.phases().values())
        report.check("peak memory of a run, share of --plan", share <= 1.1, share, 1.1)
    for chosen in [OFFLOADS] if small else [*((name,) for name in OFFLOADS), OFFLOADS]:
        _, row = run(folder, device, small, steps=2 - small, **dict.fromkeys(chosen, True))
        names = ("reward_all", "grad_norm_actor", "grad_norm_critic")
        share = max(abs(row[n] - plain[n]) / max(abs(plain[n]), 1e-6) for n in names)
        report.check(f"{' '.join(chosen)} as without", share <= 0.05, share, 0.05)


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
