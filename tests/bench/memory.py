"""What `--plan` says beside what a run really takes, phase by phase, in several settings.

    python tests/bench/memory.py                       # makes its own models, some minutes on a CPU
    python tests/bench/memory.py --only microbatch_4   # one setting

Writes random models (Llama, 6 layers, width 256, vocabulary 8,192, untied) and prompts of 192
tokens, runs `train_ppo.main` for two steps with responses of 64 tokens, and reads the greatest
number of bytes that torch's allocator had handed out in each phase: on a CPU from the memory events
of torch's profiler, on a GPU from `torch.cuda.max_memory_allocated`. Every setting is a process of
its own. Prints a table and one line of JSON.
"""

import argparse
import bisect
import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

PROMPTS = 8
SCALES = {  # vocabulary, blocks, width, prompt tokens, response tokens
    "large": (8192, 6, 256, 192, 64),
    "small": (2048, 3, 128, 96, 16),  # for a test
}
SETTINGS = {
    "microbatch_1": {"microbatch": 1},
    "microbatch_4": {"microbatch": 4},
    "microbatch_8": {},
    "none": {"filter": "none"},
    "checkpointing_1": {"microbatch": 1, "gradient_checkpointing": True},
    "checkpointing_8": {"gradient_checkpointing": True},
    "bfloat16": {"param_dtype": "bfloat16", "microbatch": 4},
    "bfloat16_checkpointing": {"param_dtype": "bfloat16", "gradient_checkpointing": True},
    "sampling_batch_10": {"sampling_batch": 10, "microbatch": 1},
    "offload": {
        "microbatch": 4,
        "offload_ref": True,
        "offload_reward": True,
        "offload_optimizer": True,
    },
    "two_ranks_1": {"microbatch": 1, "ranks": 2},
    "two_ranks": {"microbatch": 4, "ranks": 2},
    "two_ranks_checkpointing": {"gradient_checkpointing": True, "microbatch": 4, "ranks": 2},
    "two_ranks_bfloat16": {"param_dtype": "bfloat16", "microbatch": 2, "ranks": 2},
}


def make_models(folder, scale):
    """policy/, reward_model/ and prompts.jsonl with random contents."""
    import random

    from conftest import tiny_classifier, tiny_lm, tiny_tokenizer, write_model

    vocabulary, layers, width, prompt, _ = SCALES[scale]
    words = ["<pad>", "<eos>", "<bos>", *(f"w{i}" for i in range(vocabulary - 3))]
    shape = {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": layers}
    shape |= {
        "intermediate_size": width * 43 // 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    shape |= {"max_position_embeddings": 512, "initializer_range": 0.02}
    tokenizer = tiny_tokenizer(words)
    write_model(folder / "policy", tiny_lm("llama", **shape), tokenizer)
    write_model(folder / "reward_model", tiny_classifier("llama", 1, **shape), tokenizer)
    draw = random.Random(0)
    rows = [{"prompt": " ".join(draw.choices(words[3:], k=prompt))} for _ in range(PROMPTS)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "prompts.jsonl").write_text(lines)


def arguments(folder, run_dir, changes, scale):
    from train_ppo import Args

    paths = {name: str(folder / name) for name in ("policy", "reward_model")}
    paths |= {"prompts": str(folder / "prompts.jsonl"), "run_dir": str(run_dir)}
    sizes = {"prompts_per_step": PROMPTS, "minibatch": 8, "microbatch": 8}
    *_, prompt, new = SCALES[scale]
    sizes |= {
        "max_prompt_tokens": prompt,
        "max_new_tokens": new,
        "steps": 2,
        "validation": "",
        "test": "",
    }
    changes = {name: value for name, value in changes.items() if name != "ranks"}
    return Args(**paths | sizes | changes)


def mark_phases(mark):
    """Let the script's functions run inside `mark(phase)`."""
    import train_ppo
    from pfppo import fsdp, loading, reward, rollout

    def marked(phase, function):
        def inside(*args, **kwargs):
            with mark(phase):
                return function(*args, **kwargs)

        return inside

    @contextlib.contextmanager
    def gathered(*args, original=fsdp.gathered):
        with mark("sampling"), original(*args) as model:
            yield model

    fsdp.gathered = gathered
    for owner, name, phase in (
        (loading, "load_models", "load"),
        (reward, "model_rewards", "rewards"),
        (rollout.Rollout, "evaluate", "log-probs"),
        (train_ppo, "backward", "update"),
        (fsdp, "step", "update"),
    ):
        setattr(owner, name, marked(phase, getattr(owner, name)))


def peaks_on_cpu(run):
    """{phase: bytes} of run() from the memory events of torch's profiler."""
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        mark_phases(lambda phase: record_function(f"phase {phase}"))
        run()
    spans, totals = [], []
    waiting = prof.profiler.kineto_results.experimental_event_tree()
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.name.startswith("phase "):
            spans.append((event.start_time_ns, event.end_time_ns, event.name[len("phase ") :]))
        elif event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            # A running count, which knows of tensors that gloo's threads have let go.
            totals.append((event.start_time_ns, event.extra_fields.total_allocated))
    totals.sort()
    moments, found = [moment for moment, _ in totals], {}
    for start, end, phase in spans:
        inside = totals[bisect.bisect_left(moments, start) : bisect.bisect_right(moments, end)]
        found[phase] = max(found.get(phase, 0), *(total for _, total in inside))
    return found


class Mallinfo(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks")
    _fields_ = [(name, ctypes.c_size_t) for name in (*names, "fordblks", "keepcost")]


def bytes_of_tensors():
    """Of all that Python knows: right when no graph is alive, as after an optimizer's step."""
    import torch
    from torch.distributed.tensor import DTensor

    tensors = [of for of in gc.get_objects() if isinstance(of, torch.Tensor)]
    storages = [of.untyped_storage() for of in tensors if not isinstance(of, DTensor)]
    return sum({of.data_ptr(): of.nbytes() for of in storages if of.device.type == "cpu"}.values())


def peaks_of_heap(run):
    """{phase: bytes} of run() from glibc, asked every half millisecond by a thread.

    With several ranks gloo's threads let go of tensors, which the profiler does not see. What the
    heap holds besides tensors is found after an optimizer's step, and taken off.
    """
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = Mallinfo
    running, found, others, done = [], {}, [0], threading.Event()

    def heap():
        there = ask()
        return there.uordblks + there.hblkhd

    def watch():
        while not done.wait(0.0005):
            now = heap()
            for phase in running[-1:]:
                found[phase] = max(found.get(phase, 0), now)

    @contextlib.contextmanager
    def mark(phase):
        running.append(phase)
        yield
        running.pop()
        if phase == "update":
            others.append(heap() - bytes_of_tensors())

    sys.setswitchinterval(0.0005)
    thread = threading.Thread(target=watch)
    thread.start()
    mark_phases(mark)
    run()
    done.set()
    thread.join()
    return {phase: size - others[-1] for phase, size in found.items() if phase != "load"}


def peaks_on_gpu(run):
    """{phase: bytes} of run() from the allocator of the GPU."""
    import torch

    found = {}

    @contextlib.contextmanager
    def mark(phase):
        torch.cuda.reset_peak_memory_stats()
        yield
        found[phase] = max(found.get(phase, 0), torch.cuda.max_memory_allocated())

    mark_phases(mark)
    run()
    return found


def child(folder, name, scale):
    """One setting in this process: prints {"measured": ..., "estimated": ...} as rank 0."""
    import train_ppo
    from pfppo.run.memory import Plan

    import torch

    changes = SETTINGS[name]
    args = arguments(folder, folder / f"run_{name}", changes, scale)
    measure = peaks_on_cpu if changes.get("ranks", 1) == 1 else peaks_of_heap
    if torch.cuda.is_available():
        measure = peaks_on_gpu
    peaks = measure(lambda: train_ppo.main(args))
    if int(os.environ.get("RANK", 0)) == 0:
        dtype = "float32" if args.param_dtype == "auto" else args.param_dtype
        if not torch.cuda.is_available():  # what is offloaded lies in the same memory
            args.offload_ref = args.offload_reward = args.offload_optimizer = False
        estimated = Plan(args, changes.get("ranks", 1), getattr(torch, dtype)).phases()
        print(json.dumps({"measured": peaks, "estimated": estimated}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(SETTINGS))
    parser.add_argument("--scale", default="large", choices=SCALES)
    parser.add_argument("--folder")
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        return child(Path(args.folder), args.child, args.scale)
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.folder or scratch)
        if not (folder / "policy").exists():
            make_models(folder, args.scale)
        for name in args.only.split(","):
            ranks = SETTINGS[name].get("ranks", 1)
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
            command = [sys.executable, *(torchrun if ranks > 1 else []), __file__]
            command += ["--folder", folder, "--scale", args.scale, "--child", name]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            results[name] = json.loads(done.stdout.strip().splitlines()[-1])
            for phase, measured in results[name]["measured"].items():
                estimated = results[name]["estimated"].get(phase, 0)
                print(
                    f"{name:24} {phase:10} measured {measured / 1e6:8.1f} MB  estimated "
                    f"{estimated / 1e6:8.1f}  {estimated / measured - 1:+.1%}",
                    flush=True,
                )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
