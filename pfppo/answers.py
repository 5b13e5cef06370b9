"""Answers and their verdicts: responses sampled, tests executed, the files of an evaluation.

`Examiner` is what validation, pair building and the RM's normaliser have in common; PPO's own
rollouts are in train_ppo.py, and share `execute`. `samples_of` and `results_of` fill the two files
of eval_code.py, samples.jsonl and results.jsonl, chunk by chunk: while one chunk's tests run in a
thread, the next chunk is sampled. Rows are in the order of the input and written as soon as they
are known, so a run that was stopped goes on from what is there: nothing is sampled twice, nothing
executed twice but the chunk that was under way.

Not here: code out of responses, checks out of problems (problems/), verdicts (sandbox/).
"""

import contextlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pfppo import files
from pfppo.fsdp import gather_lists, on_main
from pfppo.loading import read_causal_lm
from pfppo.problems import assemble, check_of, pass_at_k_interval, sample_row
from pfppo.reward import Answers, load_card, model_rewards, spread_of
from pfppo.rollout import collate
from pfppo.sampler import draw_uniforms, sample
from pfppo.sandbox import Sandbox, Verdict

import torch
from tqdm import tqdm

PROBE = 256  # answers of the SFT policy from which an RM's normaliser is measured


@dataclass(frozen=True)
class Answer:
    """One response. `verdict` is None where its problem has no tests."""

    ids: list[int]  # EOS included where there is one
    text: str
    verdict: Verdict | None

    @property
    def passed(self):
        return self.verdict is not None and self.verdict.passed


class Examiner(contextlib.AbstractContextManager):
    """Asks models and runs tests, with what stays the same in a script. A context.

    args: seed, max_new_tokens, temperature, sampling_batch; workers, timeout, allow_weak_isolation.
    """

    def __init__(self, tokens, args, ranks):
        self.tokens, self.args, self.ranks = tokens, args, ranks
        self.sandbox = open_sandbox(args, ranks)

    def __exit__(self, *_):
        self.sandbox.close()

    def draw(self, model, prompts, tag, temperature, samples=1, first=0, longest=0, **how):
        """Sample from `model`, for this rank's share of the prompts (token ids), no collective.

        tag, and the prompt's number counted from `first`, say which draw this is: they are hashed
        with the seed. longest: another limit than --max_new_tokens; how: top_k, top_p, progress.
        Returns sampler.Samples and (prompt, sample) of its rows.
        """
        args, mine = self.args, range(self.ranks.rank, len(prompts), self.ranks.world)
        keys = [(i, j) for i in mine for j in range(samples)]
        named = [(first + i, j) for i, j in keys]
        drawn = sample(
            model,
            [prompts[i] for i in mine],
            draw_uniforms(args.seed, tag, named, longest or args.max_new_tokens),
            stop=self.tokens.stop,
            never=self.tokens.never,
            samples_per_prompt=samples,
            temperature=temperature,
            batch=args.sampling_batch,
            **how,
        )
        return drawn, keys

    def answers(self, model, asked, tag, temperature, samples=1, bars=False):
        """`samples` answers to each problem of a ProblemSet, on all ranks: [[Answer] * samples].
        bars: show progress on rank 0; the rest as in `draw`."""
        mine = range(self.ranks.rank, len(asked), self.ranks.world)
        hidden = not (bars and self.ranks.is_main)
        bar = {"total": len(mine) * samples, "mininterval": 1, "disable": hidden}
        with tqdm(desc="samples", **bar) as shown:
            how = {"samples": samples, "progress": shown.update}
            drawn, keys = self.draw(model, asked.prompts, tag, temperature, **how)
        texts = self.tokens.decode([asked.prompts[i] for i, _ in keys], drawn.ids)
        with tqdm(desc="tests", **bar) as shown:
            problems = [asked.problems[i] for i, _ in keys]
            verdicts = execute(problems, texts, self.sandbox, shown.update)
        answers = list(map(Answer, drawn.ids, texts, verdicts))
        groups = [answers[i : i + samples] for i in range(0, len(answers), samples)]
        return gather_lists(groups, self.ranks)

    def run_tests(self, problems, texts):
        """Actual scores [B] of responses: 1 passed, 0 failed, NaN without tests."""
        return torch.tensor(list(map(score_of, execute(problems, texts, self.sandbox))))

    def passed(self, model, asked, temperature):
        """[0.0 or 1.0] for one answer to each problem of a ProblemSet."""
        answers = self.answers(model, asked, f"evaluation {temperature}", temperature)
        return [float(answer.passed) for (answer,) in answers]

    def greedy(self, models, asked):
        """The policy's pass rate, greedy, on a ProblemSet; None of an empty one. A collective."""
        if not len(asked):
            return None
        with models.gathered(models.policy) as model:
            return sum(self.passed(model, asked, 0.0)) / len(asked)

    def probe(self, models, asked):
        """Answers of the SFT policy, one to each of the first problems of a ProblemSet, the same on
        all ranks: what rewards are normalised by. A collective."""
        asked = type(asked)(asked.problems[:PROBE], asked.prompts[:PROBE])
        with models.gathered(models.reference) as model:
            answers = sum(self.answers(model, asked, "rows", self.args.temperature), [])
        scores = torch.tensor([score_of(answer.verdict) for answer in answers])
        ids = [answer.ids for answer in answers]
        rows = collate(asked.prompts, ids, self.tokens.pad, self.ranks.device)
        finished = torch.tensor([y[-1] in self.tokens.stop for y in ids])
        how = {"seed": self.args.seed, "reward_model": models.reward_model}
        how |= {"finished": finished, "rows": rows, "microbatch": self.args.microbatch}
        return Answers(asked.problems, [answer.text for answer in answers], scores, **how)

    def compare(self, models, folder, asked, state):
        """Pass rates, greedy and sampled, of the policy before, the chosen one in the run's folder,
        and the last one, on a ProblemSet: as a table, and in result.json. A collective."""
        if not len(asked):
            return
        rates, ranks = {}, self.ranks
        ranks.say(f"test: before, best and last on {len(asked)} problems")
        best = read_causal_lm(folder / "policy", dtype=models.unsharded.dtype).to(ranks.device)
        for name, opened in {
            "before": models.gathered(models.reference),
            f"{state.chosen}, step {state.best_step}": contextlib.nullcontext(best),
            f"last, step {state.step}": models.gathered(models.policy),
        }.items():
            with opened as model:
                rates[name] = {
                    kind: pass_rate(self.passed(model, asked, temperature))
                    for kind, temperature in (("greedy", 0.0), ("sampled", self.args.temperature))
                }
        ranks.say(table(rates, len(asked)))
        if ranks.is_main:
            files.write_json(folder / "result.json", {"problems": len(asked), "rates": rates})


def open_sandbox(args, ranks):
    """The sandbox of a command line; says what this machine grants it."""
    sandbox = Sandbox(args.workers, args.timeout, allow_weak_isolation=args.allow_weak_isolation)
    ranks.say(f"sandbox: {sandbox.mode}")
    return sandbox


def execute(problems, texts, sandbox, progress=None):
    """Verdicts of the responses `texts` to `problems`; None where a problem has no tests."""
    tested = [i for i, problem in enumerate(problems) if problem.test]
    checks = [assemble(problems[i], texts[i]) for i in tested]
    verdicts = dict(zip(tested, sandbox.run(checks, progress) if checks else [], strict=True))
    return [verdicts.get(i) for i in range(len(texts))]


def score_of(verdict):
    """The actual score: 1 passed, 0 failed, NaN without tests."""
    return float("nan") if verdict is None else float(verdict.passed)


def pass_rate(passed):
    """[0 or 1] of one answer per problem -> mean with its 95 % bootstrap interval over problems."""
    value, low, high = pass_at_k_interval([(1, int(p)) for p in passed], 1)
    return {"pass@1": value, "low": low, "high": high}


def table(rates, count):
    """{row: {column: pass_rate}} as the last lines of a run."""
    columns = list(next(iter(rates.values())))
    width = max(len(name) for name in rates)
    title = f"pass@1 on {count} test problems, with 95 % intervals"
    lines = ["", title, f"{'':{width}}  " + "  ".join(f"{column:22}" for column in columns)]
    for name, row in rates.items():
        cells = ("{pass@1:.3f} [{low:.3f}, {high:.3f}]".format(**row[c]) for c in columns)
        lines.append(f"{name:{width}}  " + "  ".join(f"{cell:22}" for cell in cells))
    return "\n".join([*lines, ""])


# ---- the files of an evaluation ------------------------------------------------------------------


def left(path, group, ranks):
    """What an interrupted run has left in a JSONL file, in whole groups of rows, on all ranks."""

    def cut_back():
        rows = files.whole_lines(path)
        files.rewrite_jsonl(path, rows := rows[: len(rows) // group * group])
        return rows

    return on_main(ranks, cut_back)


def samples_of(examiner, model, reward_model, asked, first, last):
    """Rows of samples.jsonl for the problems first to last of a ProblemSet, on all ranks; with a
    reward model they have its rewards, normalised if it has a card. A collective."""
    args, ranks, tokens = examiner.args, examiner.ranks, examiner.tokens
    prompts, N = asked.prompts[first:last], args.samples_per_problem
    how = {"samples": N, "top_k": args.top_k, "top_p": args.top_p}
    drawn, keys = examiner.draw(model, prompts, "eval", args.temperature, first=first, **how)
    texts = tokens.decode([prompts[i] for i, _ in keys], drawn.ids)
    rows = [
        sample_row(asked.problems[first + i], j, text)
        for (i, j), text in zip(keys, texts, strict=True)
    ]
    if reward_model is not None:
        share = -(-len(prompts) // ranks.world)  # equal on all ranks: padded where need be
        mine = [(prompts[i], ids) for (i, _), ids in zip(keys, drawn.ids, strict=True)]
        mine += [(prompts[0], [tokens.pad])] * (share * N - len(mine))
        batch = collate(*zip(*mine, strict=True), tokens.pad, ranks.device)
        rewards = model_rewards(reward_model, batch, args.sampling_batch)
        for row, value in zip(rows, rewards.tolist(), strict=False):
            row["reward"] = value
    groups = [rows[i : i + N] for i in range(0, len(rows), N)]
    return sum(gather_lists(groups, ranks), [])


def chunks_of(rows, out, done, total, group, size, answer, ranks):
    """Chunks of `rows` behind the first `done`, up to `total` rows. Those that are not there yet
    come from answer(first, last), in problems, and are written to samples.jsonl."""
    for start in range(done, total, size):
        stop = min(start + size, total)
        if len(rows) < stop:
            new = answer(len(rows) // group, stop // group)
            rows += new
            if ranks.is_main:
                files.append_jsonl(out / "samples.jsonl", new)
        yield rows[start:stop]


def results_of(out, problems, rows, answer, group, args, sandbox, ranks):
    """Execute all samples; rows of results.jsonl in their order. A collective.

    rows: the samples that are there, extended in place by answer(first, last), those of more
    problems, `group` each; answer is None where `rows` are all. A chunk is about
    args.sampling_batch rows for each rank.
    """
    known = {problem.task_id: problem for problem in problems}
    total = len(problems) * group if answer else len(rows)
    size = max(1, args.sampling_batch // group) * group * ranks.world
    results = left(out / "results.jsonl", group, ranks)
    chunks = chunks_of(rows, out, len(results), total, group, size, answer, ranks)
    bar = tqdm(total=total, desc="samples, tests", mininterval=1, disable=not ranks.is_main)
    bar.update(len(results))

    def progress(count):
        bar.update(count * ranks.world)  # about right, until the chunk is complete

    with ThreadPoolExecutor(1) as pool, bar:
        try:
            running = None  # (chunk, future of its verdicts)
            for chunk in itertools.chain(chunks, [None]):
                before, running = running, None
                if chunk:
                    mine = chunk[ranks.rank :: ranks.world]
                    checks = [check_of(known[row["task_id"]], row["solution"]) for row in mine]
                    running = chunk, pool.submit(sandbox.run, checks, progress)
                if before:
                    verdicts = gather_lists(before[1].result(), ranks)
                    new = [
                        {"task_id": row["task_id"], "sample": row["sample"], "passed": v.passed}
                        | {"outcome": v.outcome, "seconds": round(v.seconds, 4)}
                        for row, v in zip(before[0], verdicts, strict=True)
                    ]
                    results += new
                    if ranks.is_main:
                        files.append_jsonl(out / "results.jsonl", new)
                    bar.n = len(results)
                    bar.refresh()
        except BaseException:
            sandbox.close()  # the tests under way would hold up an error or a Ctrl-C
            raise
    return results


def judge(args, reward_of, problems, rows, results):
    """Put rewards and actual scores into the rows of all samples. Rewards but those of an RM with a
    normaliser of its own are normalised over these samples."""
    known = {problem.task_id: problem for problem in problems}
    asked = [known[row["task_id"]] for row in rows]
    scores = torch.tensor([float(row["passed"]) for row in results])
    answers = Answers(asked, [row["response"] for row in rows], scores, seed=args.seed)
    if args.reward_model:
        answers.by_model = torch.tensor([row.get("raw_reward", row["reward"]) for row in rows])
        if load_card(args.reward_model) is None:
            mean, std = spread_of(answers.by_model, f"--reward_model {args.reward_model}")
            answers.by_model = (answers.by_model - mean) / std
    if args.reward != "model":
        reward_of.measure(answers)
    rewards = reward_of(answers)
    for row, reward, score in zip(rows, rewards.tolist(), scores.tolist(), strict=True):
        if row.get("reward", reward) != reward:
            row.setdefault("raw_reward", row["reward"])
        row |= {"reward": reward, "score": score}
