"""Peak memory of rank 0 while a policy is loaded: it falls with the number of ranks.

    python tests/bench/loading.py

A Llama of 125 M parameters (0.5 GB in fp32, in files of 100 MB) is written, and loaded as the
trainable policy, sharded over 1, 2 and 4 ranks. Printed is what the resident set of rank 0 grew by
at its peak, above what it was with libraries imported and ranks joined; beside it the same where
rank 0 reads everything and scatters it (as is done for families whose files have other names).
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def peak():
    """(peak, present) resident MiB of this process."""
    status = Path("/proc/self/status").read_text()
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return tuple(int(lines[name].split()[0]) / 1024 for name in ("VmHWM", "VmRSS"))


def worker(folder, how):
    from pfppo.fsdp import init_ranks, shard
    from pfppo.loading import Whole, read_causal_lm, source_of
    from pfppo.model import Policy, empty_causal_lm, read_config

    import torch
    from transformers import AutoModelForCausalLM

    ranks = init_ranks("cpu")
    warm = Policy(AutoModelForCausalLM.from_config(config(64, 32, 2)))  # what a first time costs
    shard(Policy(empty_causal_lm(config(64, 32, 2))), Whole(warm if ranks.is_main else None), ranks)
    torch.distributed.barrier()
    before = peak()[1]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    empty = Policy(empty_causal_lm(read_config(folder, "policy")))
    if how == "slices":
        source = source_of(empty, folder, "policy", read_causal_lm, ranks)
    else:
        source = Whole(Policy(read_causal_lm(folder)) if ranks.is_main else None)
    shard(empty, source, ranks)
    if ranks.is_main:
        print(f"grew {peak()[0] - before:.0f}")


def config(vocabulary, width, layers):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
    )


def main():
    from transformers import LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        lm = LlamaForCausalLM(config(16384, 768, 14))
        size = sum(p.numel() for p in lm.parameters()) * 4 / 2**20
        lm.save_pretrained(folder, max_shard_size="100MB")
        del lm
        print(f"{size:.0f} MiB of weights\nranks  slices  whole on rank 0   (MiB, rank 0)")
        for world in (1, 2, 4):
            grew = []
            for how in ("slices", "whole"):
                launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
                done = subprocess.run(
                    [*launch, "--nproc_per_node", str(world), __file__, folder, how],
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    capture_output=True,
                    text=True,
                    check=True,
                )
                grew.append(done.stdout.split("grew ")[1].split()[0])
            print(f"{world:5}  {grew[0]:>6}  {grew[1]:>6}", flush=True)


if __name__ == "__main__":
    worker(*sys.argv[1:]) if len(sys.argv) > 1 else main()
