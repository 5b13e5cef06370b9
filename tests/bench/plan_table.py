"""What `train_ppo.py --plan` says for DeepSeek-Coder at three sizes, as one Markdown table.

    python tests/bench/plan_table.py                   # half an hour; neither weights nor a GPU
    python tests/bench/plan_table.py --only 1.3B

The folders hold nothing but a config.json of the published shapes. Sizes are the paper's: N = 5,
prompts of 1024 and responses of 2048 tokens, minibatch 256, bf16 forward passes, gradient
checkpointing; 256 prompts per step, so that they divide over 64 ranks. Where a run does not fit
into 92 % of 80 GB, the column beside it offloads reference, reward model, weights and optimizer to
the host; the microbatch and the sampling batch of a column are the largest that fit, or the
smallest where none does.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from pfppo.run import fitting  # noqa: E402
from train_ppo import Args  # noqa: E402

from transformers import LlamaConfig  # noqa: E402

SHAPES = {  # width, inner width, blocks, heads, heads of keys and values
    "1.3B": (2048, 5504, 24, 16, 16),
    "6.7B": (4096, 11008, 32, 32, 32),
    "33B": (7168, 19200, 62, 56, 8),
}
WORLDS, MEMORY = (1, 8, 64), 80
OFFLOAD = {"offload_ref": True, "offload_reward": True, "offload_optimizer": True}


def write_configs(folder, name):
    """policy/ and reward_model/ with a config.json each; returns their paths as arguments."""
    width, inner, blocks, heads, key_heads = SHAPES[name]
    config = LlamaConfig(
        vocab_size=32256,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=16384,
    )
    paths = {}
    for kind, made in (("policy", "ForCausalLM"), ("reward_model", "ForSequenceClassification")):
        config.architectures = [f"Llama{made}"]
        config.num_labels = 1
        config.save_pretrained(folder / name / kind)
        paths[kind] = str(folder / name / kind)
    return paths


def plan(paths, world, options):
    """{row: text} that `--plan` prints."""
    sizes = {"prompts_per_step": 256, "samples_per_prompt": 5, "minibatch": 256}
    sizes |= {"max_prompt_tokens": 1024, "max_new_tokens": 2048, "gradient_checkpointing": True}
    sizes |= {"param_dtype": "bfloat16", "prompts": "", "validation": "", "test": ""}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        fitting.show(Args(**paths | sizes | options, world_size=world))
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("    ")]
    return {line[:31].strip(): line[31:].strip() for line in lines}


def column(paths, world, options):
    """The plan with the largest sizes that fit, or with the smallest where none does."""
    smallest = {"microbatch": 1, "sampling_batch": 5}
    rows = plan(paths, world, options | smallest | {"device_memory": MEMORY})
    last = {name: rows[f"largest {name.replace('_', ' ')}"] for name in smallest}
    chosen = smallest | {name: int(size) for name, size in last.items() if size != "none"}
    rows = plan(paths, world, options | chosen)
    rows["fits"] = "yes" if float(rows["peak"]) <= fitting.USABLE * MEMORY else "no"
    return rows | last


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(SHAPES))
    args = parser.parse_args()
    columns = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only.split(","):
            paths = write_configs(Path(folder), name)
            for world in WORLDS:
                for label, options in (("", {}), (", offloading", OFFLOAD)):
                    rows = columns[f"{name}, {world} GPU{label}"] = column(paths, world, options)
                    print(f"{name} {world}{label}: {rows['fits']}", file=sys.stderr, flush=True)
                    if rows["fits"] == "yes":
                        break
    titles = list(columns)
    names = list(dict.fromkeys(name for rows in columns.values() for name in rows))
    print("| GB per GPU | " + " | ".join(titles) + " |")
    print("|---" * (len(titles) + 1) + "|")
    for name in names:
        print(f"| {name} | " + " | ".join(columns[title].get(name, "-") for title in titles) + " |")


if __name__ == "__main__":
    main()
