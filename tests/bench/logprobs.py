"""Peak memory and time of chunked log-probs against a plain `log_softmax` over all logits.

    python tests/bench/logprobs.py                    # 2048 positions, vocabularies of 32k and 150k

Forward and backward of `Policy` on a Llama of one small layer, so that what is measured is the
head: once as it is, in chunks that are recomputed in the backward pass, and once as
`log_softmax` of all logits. Extra memory is the peak above what was held before. Runs take turns;
figures are medians. The chunked side gives entropies as well. Prints a table and one line of JSON.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from pfppo.model import Policy, head_logits, positions_of  # noqa: E402

import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

ROWS, PROMPT, RESPONSE, WIDTH = 16, 16, 128, 256


class Peak:
    """`bytes`: peak memory inside the block above that at its start."""

    def __init__(self, device):
        self.device = device

    def __enter__(self):
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is held
            self.before = self.status("VmHWM")
        return self

    def __exit__(self, *_):
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self.before
        else:
            self.bytes = self.status("VmHWM") - self.before

    @staticmethod
    def status(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def naive(policy, ids, positions, targets):
    hidden = policy.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = head_logits(policy.lm, positions_of(hidden, positions)).float()
    return logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


def chunked(policy, ids, positions, targets):
    return policy(ids, positions, targets, torch.ones_like(targets))[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocabularies", default="32000,150000")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    found = {}
    for vocabulary in map(int, args.vocabularies.split(",")):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
        policy = Policy(LlamaForCausalLM(config)).to(device)
        ids = torch.randint(0, vocabulary, (ROWS, PROMPT + RESPONSE), device=device)
        positions = torch.arange(PROMPT - 1, PROMPT + RESPONSE - 1, device=device)
        positions = positions.expand(ROWS, RESPONSE)
        targets = ids[:, PROMPT:]
        measured, values, gradients = {}, {}, {}
        for _ in range(args.rounds + 1):  # the first round warms up
            for side in (chunked, naive):
                start = time.perf_counter()
                with Peak(device) as peak:
                    logp = side(policy, ids, positions, targets)
                    logp.sum().backward()
                seconds = time.perf_counter() - start
                measured.setdefault(side.__name__, []).append((peak.bytes, seconds))
                values[side] = logp.detach()
                gradients[side] = policy.lm.model.embed_tokens.weight.grad.clone()
                policy.zero_grad(set_to_none=False)
                del logp
        torch.testing.assert_close(values[chunked], values[naive], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(gradients[chunked], gradients[naive], atol=1e-3, rtol=1e-3)
        row = {}
        for name, pairs in measured.items():
            sizes, seconds = zip(*pairs[1:], strict=True)
            row[name] = statistics.median(sizes) / 2**20, statistics.median(seconds)
        memory, duration = (row["chunked"][i] / row["naive"][i] for i in (0, 1))
        found[vocabulary] = {"memory": round(memory, 3), "time": round(duration, 2)}
        ours, plain = (f"{size:.0f} MiB and {seconds:.2f} s" for size, seconds in row.values())
        print(
            f"vocabulary {vocabulary:7,}: {ours} against {plain}:"
            f" {memory:.2f} x memory, {duration:.2f} x time",
            flush=True,
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
