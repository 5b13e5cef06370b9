"""pass@k by execution on the lab, HumanEval, MBPP and LeetCode; R^2 of every filter.

    torchrun eval_code.py                                                       # the lab's policy
    torchrun eval_code.py --policy DIR --benchmark humaneval --problems HumanEval.jsonl.gz
    torchrun eval_code.py --problems FILE --samples samples.jsonl               # without a model
    torchrun eval_code.py --reward_model lab --samples_per_problem 10 --filters all

pass@k is the unbiased estimator of arXiv 2107.03374, eq. 1, with a 95 % bootstrap interval over
problems. With a reward model every sample is scored too, and `reliability.py` says for each filter
how well rewards go with actual scores among what it keeps (PF-PPO, section 4).

The output folder gets `samples.jsonl` (task_id, sample, completion, solution; reward if there is an
RM) and `results.jsonl` (task_id, sample, passed, outcome, seconds), both in the order of the input.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import train_rm
from pfppo import benchmarks, checkpoint, data, fsdp, lab
from pfppo.batch import collate, owned
from pfppo.config import Count, Natural, Positive, Seed, UserError, launch, require
from pfppo.examine import Examiner
from pfppo.filters import FILTERS, load_filter
from pfppo.fsdp import gather_lists
from pfppo.loading import load_scalars
from pfppo.model import check_positions, read_causal_lm
from pfppo.reliability import format_table, reliability_table
from pfppo.reward import model_rewards
from pfppo.sampler import stop_ids
from pfppo.sandbox import Sandbox

import torch
from tqdm import tqdm


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
    prompt_style: Literal["plain", "chat"] = "plain"  # chat: the tokenizer's chat template
    reward_model: str = ""  # score samples with this RM (a folder, or "lab") and print R^2
    filters: str = "all"  # of the R^2 table: all, or comma-separated names
    bins: Count = 10  # of equal weight, for R^2
    out: str = ""  # folder for samples.jsonl and results.jsonl; empty: runs/eval, -2, ...
    timeout: Positive = 3.0  # CPU seconds that one sample's tests may take
    workers: Count = 2  # sandbox processes per rank
    sampling_batch: Count = 256  # rows that decode together; memory only, changes no number
    seed: Seed = 1  # of samples and stochastic filters
    param_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on GPU
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one


def read_samples(path, problems):
    """[(problem, sample number, row)] in the order of the file. Raises UserError."""
    known = {problem.task_id: problem for problem in problems}
    counts, samples = Counter(), []
    for line, row in benchmarks.read_jsonl(path):
        task = row.get("task_id")
        require(task in known, f"{path}, line {line}: task_id {task!r} is in no problem")
        code = row.get("solution", row.get("completion"))
        require(
            isinstance(code, str),
            f"{path}, line {line}: expected a string in 'completion' or 'solution', "
            f"found {sorted(row)}",
        )
        samples.append((known[task], counts[task], row))
        counts[task] += 1
    return samples


def execute_file(args, problems, sandbox, ranks):
    """Verdicts of a samples file, in its order: ([(problem, sample number)], [Verdict])."""
    samples = read_samples(args.samples, problems)
    checks = []
    for problem, _, row in samples:
        program = row.get("solution")
        program = problem.prompt + row["completion"] if program is None else program
        checks.append(benchmarks.check_of(problem, problem.setup + program))
    mine = [checks[i] for i in owned(len(checks), ranks.rank, ranks.world)]
    with tqdm(total=len(mine), desc="tests", mininterval=1, disable=not ranks.is_main) as bar:
        verdicts = gather_lists(sandbox.run(mine, bar.update), ranks)
    return [(problem, number) for problem, number, _ in samples], verdicts


def score_answers(args, tokenizer, prompts, groups, ranks):
    """Normalised rewards [P, N] of the answers, on all ranks."""
    reward_model, _, known = load_scalars(args, tokenizer, ranks, critic=False)
    pad_id = data.pad_id_of(tokenizer)
    rewards = []
    size = -(-len(groups) // ranks.world) * ranks.world  # equal shares: the first group fills up
    for i in range(ranks.rank, size, ranks.world):
        i = i if i < len(groups) else 0
        rows = collate(
            [prompts[i]] * len(groups[i]), [a.ids for a in groups[i]], pad_id, ranks.device
        )
        rewards.append(model_rewards(reward_model, rows, args.sampling_batch))
    rewards = torch.stack(gather_lists(rewards, ranks)[: len(groups)])
    return rewards if known else (rewards - rewards.mean()) / rewards.std()


def compare_filters(args, rewards, scores, ranks):
    """Print how well rewards tell scores, for what each filter keeps (expected weights)."""
    names = list(FILTERS) if args.filters == "all" else args.filters.split(",")
    expected = {}
    for name in names:
        try:
            chosen = load_filter(name, rewards.shape[1])
        except UserError as error:
            require(args.filters == "all", str(error))
            ranks.say(f"left out: {error}")
            continue
        generator = torch.Generator().manual_seed(args.seed)
        draws = [chosen(rewards, generator) for _ in range(200)]
        expected[name] = torch.stack(draws).mean(0).double().numpy()
    rows = reliability_table(
        rewards.double().numpy(), scores.double().numpy(), expected, args.bins, seed=args.seed
    )
    ranks.say(f"\nR^2 over {args.bins} bins of equal weight, 95 % bootstrap over prompts")
    ranks.say(format_table(rows))


def main(args):
    ranks = fsdp.init_ranks(args.device)
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
    args.temperature = (N > 1) * 1.0 if args.temperature < 0 else args.temperature
    if args.samples:
        args.policy = args.reward_model = ""
    out = Path(fsdp.from_main(args.out or str(checkpoint.unused("runs/eval")), ranks))
    checkpoint.check_writable(out, "out")
    taken = [name for name in ("samples.jsonl", "results.jsonl") if (out / name).exists()]
    require(not taken, f"--out {out}: {' and '.join(taken)} exists there, choose another folder")
    form = args.benchmark if args.benchmark in benchmarks.FORMS else "humaneval"
    used = lab.resolve(args)
    if not lab_file:
        problems = benchmarks.load_problems(args.problems, form)
    lab.make(ranks, args, used)
    if "reward_model" in used and not Path(args.reward_model).exists():
        train_rm.main(train_rm.Args(run_dir=args.reward_model), ranks)
    if lab_file:
        problems = benchmarks.load_problems(args.problems, form)
    if form == "mbpp" and not args.samples:
        problems = benchmarks.mbpp_split(problems, "test") or problems

    # Answers and verdicts, in the order of the input
    with Sandbox(args.workers, args.timeout) as sandbox:
        ranks.say(f"sandbox: {sandbox.mode}")
        if args.samples:
            keys, verdicts = execute_file(args, problems, sandbox, ranks)
        else:
            tokenizer = data.load_tokenizer(args.policy)
            data.check_style(tokenizer, args.prompt_style, args.policy)
            prompts = data.render_all(
                problems, tokenizer, args.prompt_style, args.max_prompt_tokens, args.problems
            )
            longest = max(map(len, prompts)) + args.max_new_tokens
            what = "the longest prompt with --max_new_tokens"
            check_positions(args.policy, "policy", longest, what)
            stop = stop_ids(args.policy, tokenizer)
            examiner = Examiner(
                *(tokenizer, stop, sandbox, ranks, args.seed, args.max_new_tokens),
                batch=args.sampling_batch,
            )
            how = {"samples": N, "bars": True, "top_k": args.top_k, "top_p": args.top_p}
            dtype = fsdp.compute_dtype(args.param_dtype, ranks)
            model = read_causal_lm(args.policy, dtype=dtype).to(ranks.device)
            groups = examiner(model, problems, prompts, "eval", args.temperature, **how)
            keys = [(problem, j) for problem in problems for j in range(N)]
            verdicts = [answer.verdict for group in groups for answer in group]
    rewards = None
    if args.reward_model:
        rewards = score_answers(args, tokenizer, prompts, groups, ranks)

    if ranks.is_main:
        out.mkdir(parents=True, exist_ok=True)
        results = [
            {"task_id": problem.task_id, "sample": j, "passed": v.passed}
            | {"outcome": v.outcome, "seconds": round(v.seconds, 4)}
            for (problem, j), v in zip(keys, verdicts, strict=True)
        ]
        checkpoint.append_jsonl(out / "results.jsonl", results)
        if not args.samples:
            answers = [answer for group in groups for answer in group]
            rows = [
                {"task_id": problem.task_id, "sample": j, "completion": answer.text}
                | {"solution": benchmarks.assemble(problem, answer.text).program}
                for (problem, j), answer in zip(keys, answers, strict=True)
            ]
            if rewards is not None:
                for row, value in zip(rows, rewards.flatten().tolist(), strict=True):
                    row["reward"] = value
            checkpoint.append_jsonl(out / "samples.jsonl", rows)

    # Tables
    n, c = Counter(), Counter()
    for (problem, _), verdict in zip(keys, verdicts, strict=True):
        n[problem.task_id] += 1
        c[problem.task_id] += verdict.passed
    ranks.say(f"\n{args.problems}: {len(verdicts)} samples of {len(n)} problems")
    for k in ks:
        counts = [(n[task], c[task]) for task in n if n[task] >= k]
        if counts:
            value, low, high = benchmarks.pass_at_k_interval(counts, k)
            ranks.say(f"pass@{k:<4} {value:.3f} [{low:.3f}, {high:.3f}]  {len(counts)} problems")
        else:
            ranks.say(f"pass@{k:<4} no problem has {k} samples")
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    ranks.say("  ".join(f"{name} {count}" for name, count in outcomes.most_common()))
    if rewards is not None:
        scores = torch.tensor([float(v.passed) for v in verdicts]).view(-1, N)
        compare_filters(args, rewards, scores, ranks)
    ranks.say(f"{out}: results.jsonl" + ("" if args.samples else ", samples.jsonl"))


if __name__ == "__main__":
    launch(main, Args)
