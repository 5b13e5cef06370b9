"""Seconds of a whole PPO step against TRL's PPO trainer, on the same models, prompts and lengths.

    python -m venv trl && trl/bin/pip install trl==1.12.0       # the last release that has it
    OMP_NUM_THREADS=1 python tests/bench/against_trl.py --trl trl/bin/python

Policy, reference, critic and reward model: Llamas of 4 layers, width 128, vocabulary 512, random,
fp32. 64 prompts of 64 tokens x 5 samples of 64 new tokens; end of sequence is all but impossible.
4 epochs of 4 minibatches over what is kept: 80 rows for TRL and for `none`, 32 for `best_random`.
TRL has no N: it gets each prompt 5 times. One step of each in a fresh process, without start-up,
round by round; ratios to TRL are medians of the rounds'. Prints a table and one line of JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
P, N, PROMPT, NEW, VOCABULARY, EOS = 64, 5, 64, 64, 512, 0
KEPT = {"none": 5, "best_random": 2}
EPOCHS = MINIBATCHES = 4


def make(folder):
    """The models and the prompts, as files that both sides read."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    words = {"end" if i == EOS else f"w{i}": i for i in range(VOCABULARY)}
    plain = Tokenizer(models.WordLevel(words, unk_token="end"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="end", pad_token="end")
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 512}
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 512}
    sizes |= {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS}
    policy = LlamaForCausalLM(LlamaConfig(**sizes))
    with torch.no_grad():
        policy.lm_head.weight.mul_(20)  # logits far apart,
        policy.lm_head.weight[EOS] = 0.0  # and this one never near the top
    reward_model = LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=1))
    for name, model in (("policy", policy), ("reward_model", reward_model)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    ids = torch.randint(1, VOCABULARY, (P, PROMPT)).tolist()
    with open(folder / "prompts.jsonl", "w") as file:
        for number, row in enumerate(ids):
            prompt = " ".join(f"w{i}" for i in row)
            file.write(json.dumps({"task_id": str(number), "prompt": prompt}) + "\n")


def theirs(folder):
    """Runs in TRL's environment. Prints the seconds of one update."""
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class Watch(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            self.seconds = time.perf_counter() - self.start

    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    lines = (folder / "prompts.jsonl").read_text().splitlines()
    ids = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]
    assert [len(row) for row in ids] == [PROMPT] * P
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "policy") for _ in range(2))
    reward_model, critic = (
        AutoModelForSequenceClassification.from_pretrained(folder / "reward_model", num_labels=1)
        for _ in range(2)
    )
    watch = Watch()
    trainer = PPOTrainer(
        PPOConfig(
            output_dir=str(folder / "trl"),
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            num_sample_generations=0,
            total_episodes=P * N,
            per_device_train_batch_size=P * N,  # of a whole step: TRL cuts it into minibatches
            num_mini_batches=MINIBATCHES,
            num_ppo_epochs=EPOCHS,
            local_rollout_forward_batch_size=P * N,
            response_length=NEW,
            temperature=1.0,
            learning_rate=1e-9,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward_model,
        value_model=critic,
        train_dataset=Dataset.from_dict({"input_ids": [row for row in ids for _ in range(N)]}),
        callbacks=[watch],
    )
    trainer.train()
    print(json.dumps({"total": watch.seconds}))


def ours(folder, name, run_dir):
    rows = P * KEPT[name]
    options = {
        "policy": folder / "policy",
        "reward_model": folder / "reward_model",
        "prompts": folder / "prompts.jsonl",
        "run_dir": run_dir,
        "filter": name,
        "steps": 1,
        "prompts_per_step": P,
        "samples_per_prompt": N,
        "minibatch": rows // MINIBATCHES,
        "microbatch": rows // MINIBATCHES,
        "ppo_epochs": EPOCHS,
        "max_new_tokens": NEW,
        "sampling_batch": P * N,
        "actor_lr": 1e-9,
        "critic_lr": 1e-9,
    }
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([sys.executable, ROOT / "train_ppo.py", *words], check=True, **quiet)
    row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert row["response_length"] > NEW - 1, row["response_length"]
    found = {phase: row[f"seconds_{phase}"] for phase in ("sample", "score", "update")}
    return found | {"total": sum(found.values())}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trl", help="the Python interpreter of TRL's environment")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--theirs", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.theirs:
        return theirs(args.theirs)
    measured = {name: [] for name in ("TRL", *KEPT)}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make(folder)
        for number in range(args.rounds):
            command = [args.trl, __file__, "--theirs", folder]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            measured["TRL"].append(json.loads(out.splitlines()[-1]))
            for name in KEPT:
                measured[name].append(ours(folder, name, folder / f"{name}-{number}"))
            for name, rows in measured.items():
                print(f"round {number + 1} {name:12} {rows[-1]}", flush=True)
    result = {}
    for name, rows in measured.items():
        seconds = statistics.median(row["total"] for row in rows)
        pairs = zip(rows, measured["TRL"], strict=True)
        ratio = statistics.median(a["total"] / b["total"] for a, b in pairs)
        result[name] = {"seconds": round(seconds, 1), "ratio": round(ratio, 3)}
        print(f"{name:12} {seconds:6.1f} s  {ratio:.2f} x TRL")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
