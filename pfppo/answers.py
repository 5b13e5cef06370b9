"""Answers and their verdicts: responses sampled and verified, the files of an evaluation.

`Examiner` is what validation, pair building and the RM's normaliser have in common; PPO's own
rollouts are in train_ppo.py, and are scored by it. `samples_of` and `results_of` fill the two files
of eval_code.py, samples.jsonl and results.jsonl, chunk by chunk: while one chunk's tests run in a
thread, the next chunk is sampled. Rows are in the order of the input and written as soon as they
are known, so a run that was stopped goes on from what is there: nothing is sampled twice, nothing
executed twice but the chunk that was under way.

Not here: what is right (problems/verifiers.py), code out of responses (problems/), sandbox/.
"""

import contextlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from pfppo import files, fsdp
from pfppo.fsdp import agreed, gather_lists, on_main
from pfppo.loading import read_causal_lm
from pfppo.problems import Stops, load_verifier, pass_at_k_interval, sample_row
from pfppo.reward import Answers, model_rewards
from pfppo.rollout import collate
from pfppo.sampler import draw_uniforms, sample

import torch

MUCH = 0.1  # share of answers that are cut off, from which on tables speak of it
NO_STOPS = Stops()
CHUNK = 256  # rows of an evaluation that a rank samples before they are written
JUDGED = 32  # rows that a reward model judges together there
PROBE = 256  # answers of the SFT policy from which an RM's normaliser is measured


@dataclass(frozen=True)
class Answer:
    """One response. `verdict` is None where nobody knows what is right."""

    ids: list[int]  # EOS included where there is one
    text: str
    verdict: object  # with `passed`, `outcome`, `seconds`: of problems/verifiers.py
    finished: bool  # ends with EOS
    logp: list[float] = ()  # of each token, by the sampler

    @property
    def passed(self):
        return self.verdict is not None and self.verdict.passed


class Examiner(contextlib.AbstractContextManager):
    """Asks models and verifies what they say, with what stays the same in a script. A context.

    args: seed, max_new_tokens, temperature; verify, and for its sandbox workers, timeout,
    allow_weak_isolation. verifier: one that others use too, and open. slots: rows that decode
    together.
    """

    def __init__(self, tokens, args, ranks, verifier=None, slots=CHUNK):
        self.tokens, self.args, self.ranks, self.slots = tokens, args, ranks, slots
        self.verifier = verifier or load_verifier(args.verify).open(args, ranks.say)

    def __exit__(self, *_):
        self.verifier.close()

    def draw(
        self, model, prompts, tag, temperature, samples=1, first=0, longest=0, ended=None, **how
    ):
        """Sample from `model`, for this rank's share of the prompts (token ids), no collective.

        tag, and the prompt's number counted from `first`, say which draw this is: they are hashed
        with the seed. longest: another limit than --max_new_tokens; ended: as the sampler's, asked
        with the prompt's number; how: top_k, top_p, progress.
        Returns slots.Samples and (prompt, sample) of its rows.
        """
        args, mine = self.args, range(self.ranks.rank, len(prompts), self.ranks.world)
        keys = [(i, j) for i in mine for j in range(samples)]
        named = [(first + i, j) for i, j in keys]
        if ended:
            how["ended"] = lambda row, ids, new: ended(keys[row][0], ids, new)
        drawn = sample(
            model,
            [prompts[i] for i in mine],
            draw_uniforms(args.seed, tag, named, longest or args.max_new_tokens),
            stop=self.tokens.stop,
            never=self.tokens.never,
            samples_per_prompt=samples,
            temperature=temperature,
            batch=self.slots,
            compiled=args.compile,
            **how,
        )
        return drawn, keys

    def answers(self, model, asked, tag, temperature, samples=1, first=0, progress=None):
        """`samples` answers to each problem of a ProblemSet, on all ranks: [[Answer] * samples].
        progress: told of rows when they are sampled and again when they are verified, in place of
        bars; the rest as in `draw`."""
        mine = range(self.ranks.rank, len(asked), self.ranks.world)
        rows = len(mine) * samples
        with fsdp.bar("samples", total=rows) as shown:
            how = {"samples": samples, "first": first, "progress": progress or shown.update}
            drawn, keys = self.draw(model, asked.prompts, tag, temperature, **how)
        texts = self.tokens.decode([asked.prompts[i] for i, _ in keys], drawn.ids)
        with fsdp.bar("verdicts", total=rows) as shown, agreed(self.ranks):
            of_keys = [asked.problems[i] for i, _ in keys]
            verdicts = self.verifier(of_keys, texts, progress or shown.update)
        answers = list(map(Answer, drawn.ids, texts, verdicts, drawn.finished, drawn.logp))
        groups = [answers[i : i + samples] for i in range(0, len(answers), samples)]
        return gather_lists(groups, self.ranks)

    def scores(self, problems, texts):
        """Actual scores [B] of responses: 1 right, 0 wrong, NaN: nobody knows. A collective."""
        # A user's verifier may fail on one rank.
        with fsdp.bar("verdicts", total=len(texts)) as shown, agreed(self.ranks):
            verdicts = self.verifier(problems, texts, shown.update)
        return torch.tensor(list(map(score_of, verdicts)))

    def one_each(self, model, asked, temperature):
        """[Answer], one to each problem of a ProblemSet."""
        return sum(self.answers(model, asked, f"evaluation {temperature}", temperature), [])

    def greedy(self, models, asked):
        """The share that the policy gets right, greedy, of a ProblemSet, and the share of the
        answers that are cut off; None and None of an empty one. A collective."""
        if not len(asked):
            return None, None
        with models.gathered(models.policy) as model:
            answers = self.one_each(model, asked, 0.0)
        passed, cut = (sum(a.passed for a in answers), sum(not a.finished for a in answers))
        return passed / len(asked), cut / len(asked)

    def probe(self, models, asked):
        """Answers of the SFT policy, one to each of the first problems of a ProblemSet, the same on
        all ranks: what rewards are normalised by. A collective."""
        asked = type(asked)(asked.problems[:PROBE], asked.prompts[:PROBE])
        with models.gathered(models.reference) as model:
            answers = sum(self.answers(model, asked, "rows", self.args.temperature), [])
        scores = torch.tensor([score_of(answer.verdict) for answer in answers])
        ids, logp = ([getattr(answer, name) for answer in answers] for name in ("ids", "logp"))
        rows = collate(asked.prompts, ids, self.tokens.pad, self.ranks.device, logp)
        finished = torch.tensor([y[-1] in self.tokens.stop for y in ids])
        how = {"seed": self.args.seed, "reward_models": models.reward_models}
        how |= {"finished": finished, "rows": rows, "microbatch": self.args.microbatch}
        return Answers(asked.problems, [answer.text for answer in answers], scores, **how)

    def compare(self, models, folder, asked, state):
        """Shares of right answers, greedy and sampled, of the policy before, the chosen one in the
        run's folder, and the last one, on a ProblemSet: as a table, and in result.json. A
        collective."""
        if not len(asked):
            return
        rates, cut, ranks = {}, {}, self.ranks
        ranks.say(f"test: before, best and last on {len(asked)} problems")
        best = read_causal_lm(folder / "policy", dtype=models.unsharded.dtype).to(ranks.device)
        for name, opened in {
            "before": models.gathered(models.reference),
            f"{state.chosen}, step {state.best_step}": contextlib.nullcontext(best),
            f"last, step {state.step}": models.gathered(models.policy),
        }.items():
            rates[name] = {}
            with opened as model:
                for kind, heat in (("greedy", 0.0), ("sampled", self.args.temperature)):
                    answers = self.one_each(model, asked, heat)
                    rates[name][kind] = pass_rate([answer.passed for answer in answers])
                    if sum(not answer.finished for answer in answers) >= MUCH * len(answers):
                        cut[f"{name}, {kind}"] = cut_off(answers, self.args.max_new_tokens)
        ranks.say(table(rates, len(asked), self.verifier.rate))
        for name, said in cut.items():
            ranks.say(f"{name}: {said}")
        if ranks.is_main:
            known = {"problems": len(asked), "verify": self.args.verify, "rates": rates}
            files.write_json(folder / "result.json", known)


def score_of(verdict):
    """The actual score: 1 right, 0 wrong, NaN where nobody knows."""
    return float("nan") if verdict is None else float(verdict.passed)


def cut_off(answers, limit):
    """What is said of [Answer], or of rows of samples.jsonl, that have no EOS or no code in them;
    "" where there are none. Rows of an older version, without `finished`, are left out."""
    if answers and isinstance(answers[0], Answer):
        known = [(answer.finished, answer.text) for answer in answers]
    else:
        known = [(row["finished"], row["completion"]) for row in answers if "finished" in row]
    cut, empty = sum(not ended for ended, _ in known), sum(not code.strip() for _, code in known)
    said = f"{cut} of {len(known)} responses reached --max_new_tokens {limit}"
    return said + (f", {empty} are empty" if empty else "") if cut or empty else ""


def pass_rate(passed):
    """[0 or 1] of one answer per problem -> mean with its 95 % bootstrap interval over problems."""
    value, low, high = pass_at_k_interval([(1, int(p)) for p in passed], 1)
    return {"pass@1": value, "low": low, "high": high}


def table(rates, count, rate="pass"):
    """{row: {column: pass_rate}} as the last lines of a run. rate: another word for pass."""
    columns = list(next(iter(rates.values())))
    width = max(len(name) for name in rates)
    title = f"{rate}@1 on {count} test problems, with 95 % intervals"
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


def samples_of(examiner, model, reward_models, asked, first, last, progress, stops=NO_STOPS):
    """Rows of samples.jsonl for the problems first to last of a ProblemSet, on all ranks; with
    reward models they have the mean of their rewards, normalised where they have a card, and if
    there are several the rewards of each, `members`. progress: as the sampler's; stops: of
    problems.load_stops. A collective."""
    args, ranks, tokens = examiner.args, examiner.ranks, examiner.tokens
    prompts, N = asked.prompts[first:last], args.samples_per_problem
    some = asked.problems[first:last]

    def ended(i, ids, new):
        return stops.kept(tokens, prompts[i], some[i], ids, new)

    how = {"samples": N, "top_k": args.top_k, "top_p": args.top_p, "first": first}
    how |= {"progress": progress, "ended": ended if stops else None}
    drawn, keys = examiner.draw(model, prompts, "eval", args.temperature, **how)
    whole = tokens.decode([prompts[i] for i, _ in keys], drawn.ids)
    texts = [stops.cut(text, some[i]) for (i, _), text in zip(keys, whole, strict=True)]
    rows = [
        sample_row(some[i], j, text) | {"finished": f, "length": len(p), "logp": round(sum(p), 4)}
        for (i, j), text, f, p in zip(keys, texts, drawn.finished, drawn.logp, strict=True)
    ]
    if reward_models:
        share = -(-len(prompts) // ranks.world)  # equal on all ranks: padded where need be
        mine = []
        for (i, _), ids, text, all_of_it in zip(keys, drawn.ids, texts, whole, strict=True):
            is_cut = text != all_of_it  # what is left ends as other answers do
            ids = tokens.response(prompts[i], text, "a sample") if is_cut else ids
            mine.append((prompts[i], ids))
        mine += [(prompts[0], [tokens.pad])] * (share * N - len(mine))
        batch = collate(*zip(*mine, strict=True), tokens.pad, ranks.device)
        members = torch.stack([model_rewards(one, batch, JUDGED) for one in reward_models], 1)
        for row, values in zip(rows, members, strict=False):
            row["reward"] = values.mean().item()
            row |= {"members": values.tolist()} if len(values) > 1 else {}
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


def results_of(out, problems, rows, answer, group, slots, verifier, ranks):
    """Verify all samples; rows of results.jsonl in their order. A collective.

    rows: the samples that are there, extended in place by answer(first, last, progress), those of
    more problems, `group` each; answer is None where `rows` are all. A chunk is at most about CHUNK
    rows for each rank, and four times its `slots`, so that those are filled again.
    """
    known = {problem.task_id: problem for problem in problems}
    total = len(problems) * group if answer else len(rows)
    size = max(1, min(CHUNK, 4 * slots) // group) * group * ranks.world
    results = left(out / "results.jsonl", group, ranks)
    bar = fsdp.bar("samples, verdicts" if answer else "verdicts", total=total, stay=True)
    share = ranks.world / (2 if answer else 1)  # sampled is half of the way

    def progress(count):
        bar.update(count * share)  # about right, until the chunk is complete

    def note_done():
        bar.n = (len(rows) + len(results)) / 2 if answer else len(results)
        bar.refresh()

    draw = answer and partial(answer, progress=progress)
    chunks = chunks_of(rows, out, len(results), total, group, size, draw, ranks)
    note_done()
    bar.initial = bar.n
    with ThreadPoolExecutor(1) as pool, bar:
        try:
            running = None  # (chunk, what gives its verdicts)
            for chunk in itertools.chain(chunks, [None]):
                before, running = running, None
                if chunk:
                    mine = chunk[ranks.rank :: ranks.world]
                    asked = [known[row["task_id"]] for row in mine]
                    verify = partial(verifier.of_rows, asked, mine, progress)
                    running = chunk, pool.submit(verify).result if verifier.apart else verify
                if before:
                    with agreed(ranks):
                        verdicts = before[1]()
                    verdicts = gather_lists(verdicts, ranks)
                    new = [
                        {"task_id": row["task_id"], "sample": row["sample"], "passed": v.passed}
                        | {"outcome": v.outcome, "seconds": round(v.seconds, 4)}
                        for row, v in zip(before[0], verdicts, strict=True)
                    ]
                    results += new
                    if ranks.is_main:
                        files.append_jsonl(out / "results.jsonl", new)
                    note_done()
        except BaseException:
            verifier.close()  # the tests under way would hold up an error or a Ctrl-C
            raise
    return results
