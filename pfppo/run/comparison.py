"""Every filter on one set of judged samples, before training: what it keeps, how well rewards tell
scores there, and what they teach (reliability.py).

    samples.jsonl -> rewards, scores [P, N] -> expected weights of every filter -> table, figure

A judged sample is a line with `task_id`, `reward`, and `score` (or `passed`), and for filters that
ask for it `length`, `finished`, `logp`, `members`: samples.jsonl of eval_code.py and of
train_ppo.py are made of them. A filter that keeps at random counts with the mean of DRAWS of its
draws. The figure is the paper's Fig. 1: mean actual score against mean reward, bin by bin. There
ten responses to each prompt are generated ten times over; here each line is a resample of the
prompts of one generation.
"""

from collections import Counter
from dataclasses import dataclass

from pfppo.config import UserError, parts, require
from pfppo.files import read_jsonl, write_json
from pfppo.filters import FILTERS, load_filter
from pfppo.fsdp import on_main
from pfppo.reliability import (
    Weights,
    alignment,
    auc,
    binned_r2,
    bootstrap_alignment,
    bootstrap_r2,
    resampled_bins,
    spearman,
)
from pfppo.reward import Answers, load_card, spread_of
from pfppo.rollout import seeded
from pfppo.run.folder import claim

import numpy as np
import torch

DRAWS = 2000  # of a filter that keeps at random: its expected weights are known to about 0.01
LARGEST = 1e9  # rewards are squared, in fp32
FIELDS = {  # of samples.jsonl: (what a filter may ask for, as what, what is right, in words)
    "length": ("lengths", torch.int64, lambda x: x >= 0 and x == int(x), "whole number >= 0"),
    "finished": ("finished", torch.bool, lambda x: x in (0, 1), "true or false"),
    "logp": ("logp", torch.float32, lambda x: True, "number"),
    "members": ("members", torch.float32, lambda x: True, "list of as many numbers"),
}
NAMES = {"equal_count": "equal weight", "equal_width": "equal width"}


@dataclass(frozen=True)
class Judged:
    """Samples in groups, a group one prompt's samples in one step, in an order of their own."""

    rewards: np.ndarray  # [P, N]
    scores: np.ndarray  # [P, N]
    prompts: np.ndarray  # [P], numbers; groups of one prompt have one number
    given: dict  # {name: tensor [P, N, ...]} of filters.GIVEN, as far as it is known


def judged(groups, fields):
    """Judged from [(prompt, [[reward, score, numbers of each of `fields` ...]] * N)], whatever
    their order: the samples of a prompt stand where chance puts them, as in training, so that no
    filter reads a reward, or a score, from a place. fields: {one of FIELDS: how many numbers}."""
    groups = sorted((sorted(rows), prompt) for prompt, rows in groups)
    numbers = {}
    prompts = [numbers.setdefault(prompt, len(numbers)) for _, prompt in groups]
    whole = torch.tensor([rows for rows, _ in groups], dtype=torch.float64)  # [P, N, ...]
    places = torch.rand(whole.shape[:2], generator=seeded("places")).argsort(1)
    whole = whole.gather(1, places[..., None].expand_as(whole))
    rewards, scores, *others = whole.split([1, 1, *fields.values()], dim=2)
    given = {"scores": scores[..., 0].float()}
    for field, values in zip(fields, others, strict=True):
        name, kind, *_ = FIELDS[field]
        given[name] = (values if field == "members" else values[..., 0]).to(kind)
    return Judged(rewards[..., 0].numpy(), scores[..., 0].numpy(), np.array(prompts), given)


def judged_rows(rows, group):
    """Judged from rows of samples.jsonl, `group` of each problem together."""
    fields = fields_of([*enumerate(rows, 1)])
    found = [[row["reward"], row["score"], *numbers_of(row, fields)] for row in rows]
    groups = (found[i : i + group] for i in range(0, len(found), group))
    return judged(zip((row["task_id"] for row in rows[::group]), groups, strict=True), fields)


def fields_of(rows, say=print):
    """{field: how many numbers it is} of those of FIELDS that all rows [(line, row)] have as they
    should be; of others that some have the first line without is said."""
    known = {}
    for name, (*_, words) in FIELDS.items():
        count = len(numbers_of(rows[0][1], [name])) if rows else 0
        line = next((line for line, row in rows if not _fits(row, name, count)), None)
        if line is None:
            known[name] = count
        elif any(row.get(name) is not None for _, row in rows):
            say(f"note: filters cannot ask for {name!r}: no {words} in line {line}")
    return known


def _fits(row, name, count):
    """Whether a row has in this field what it should be."""
    values, right = numbers_of(row, [name]), FIELDS[name][2]
    listed = isinstance(row.get(name), list) == (name == "members")
    return listed and 0 < len(values) == count and all(_is_number(x) and right(x) for x in values)


def numbers_of(row, fields):
    """What a row has in these fields, one value after the other."""
    found = (row.get(name) for name in fields)
    return sum((x if isinstance(x, list) else [x] for x in found), [])


def _is_number(value):
    return isinstance(value, bool | int | float) and abs(value) <= LARGEST  # NaN is not


def judge(args, reward_of, problems, rows, results):
    """Put rewards and actual scores into the rows of all samples. Rewards but those of one RM with
    a normaliser of its own are normalised over these samples."""
    known = {problem.task_id: problem for problem in problems}
    asked = [known[row["task_id"]] for row in rows]
    scores = torch.tensor([float(row["passed"]) for row in results])
    answers = Answers(asked, [row["response"] for row in rows], scores, seed=args.seed)
    if paths := parts(args.reward_model):
        answers.members = torch.tensor([_said(row) for row in rows])
        for values, path in zip(answers.members.T, paths, strict=True):
            if load_card(path) is None:
                mean, std = spread_of(values, f"--reward_model {path}")
                values.sub_(mean).div_(std)
    if len(paths) > 1:
        for row, values in zip(rows, answers.members.tolist(), strict=True):
            row |= {"raw_members": _said(row), "members": values}
    if args.reward != "model" or len(paths) > 1:
        reward_of.measure(answers)
    rewards = reward_of(answers)
    for row, reward, score in zip(rows, rewards.tolist(), scores.tolist(), strict=True):
        if row.get("reward", reward) != reward:
            row.setdefault("raw_reward", row["reward"])
        row |= {"reward": reward, "score": score}


def _said(row):
    """What the reward models themselves said of a sample, however often it has been judged."""
    alone = [row.get("raw_reward", row["reward"])]
    return row.get("raw_members", row.get("members", alone))


def load_filters(names, samples, say, known):
    """{name: filter} of those asked for; of all, those that take so many samples per problem, and
    ask for nothing but what is `known`."""
    chosen = {}
    for name in FILTERS if names == "all" else map(str.strip, names.split(",")):
        try:
            chosen[name] = load_filter(name, samples, "filters", known)
        except UserError as error:  # `single` takes one sample, some others at least two
            if names != "all":
                raise
            say(f"left out: {error}")
    return chosen


def read_judged(path, say=print):
    """Judged from a JSONL file. The samples of one problem (and of one `step`, where there are
    steps) are a group; groups that hold a score null, as without tests, are left out. Raises
    UserError where groups are not equally large."""
    groups, unknown, rows, seen = {}, Counter(), read_jsonl(path), Counter()
    fields = fields_of(rows, say)
    for line, row in rows:
        place = f"{path}, line {line}"
        key = row.get("step"), row.get("task_id")
        named = isinstance(key[1], str | int) and isinstance(key[0], int | None)
        found = f"found step {key[0]!r}, task_id {key[1]!r}"
        require(named, f"{place}: expected a 'task_id', and a number or nothing in 'step', {found}")
        reward = _number(row, ("reward",), place)
        if "score" in row and row["score"] is None:
            unknown[key] += 1
            continue
        score = _number(row, ("score", "passed"), place)
        groups.setdefault(key, []).append([reward, score, *numbers_of(row, fields)])
        seen[(*key, str(row.get("sample", f"line {line}")))] += 1
    untested = sum(some + len(groups.pop(key, ())) for key, some in unknown.items())
    sizes = sorted({len(group) for group in groups.values()})
    require(sizes, f"{path}: expected samples with a score, found none")
    unequal = f"expected equally many samples of each problem, found {sizes[0]} to {sizes[-1]}"
    require(len(sizes) == 1, f"{path}: {unequal}")
    if again := sum(seen.values()) - len(seen):
        say(f"note: {again} samples have the problem and number of another one: both count")
    if untested:
        say(f"left out: {untested} samples of problems without a score for each")
    return judged(((str(task), rows) for (_, task), rows in groups.items()), fields)


def _number(row, names, place):
    """The number in one of these fields. Raises UserError."""
    value = next((row[name] for name in names if row.get(name) is not None), None)
    found = f"found {str(value)[:40]!r}"
    if value is None:
        found = "found none: samples are judged by eval_code.py with a reward, or by train_ppo.py"
    require(
        _is_number(value), f"{place}: expected a number in {' or '.join(map(repr, names))}, {found}"
    )
    return float(value)


def reliability_table(
    rewards, scores, weights, bins=10, resamples=500, seed=0, kind="equal_count", prompts=None
):
    """One dict of plain numbers per filter, ready for JSON; None where undefined, `note` says why.

    rewards, scores [P, N]; weights {name: Weights}: of a filter that keeps at random the
    expectation, not one draw. `kept` is the share that has weight, kappa of the alignment.
    `pass_kept` and `pass_dropped` are mean scores weighted by the filter, and of the rest. `_low`
    and `_high` are 95 % intervals over prompts, all filters on the same resamples.
    """
    rows = []
    for name, given in weights.items():
        expected, flat_scores = given.mean, np.ravel(scores)
        flat = np.ravel(expected)
        binned = binned_r2(rewards, scores, expected, bins, kind)
        rng = np.random.default_rng(seed)
        low, high = bootstrap_r2(rewards, scores, expected, bins, resamples, rng, kind, prompts)
        aligned, rng = alignment(rewards, scores, given), np.random.default_rng(seed)
        ends = bootstrap_alignment(rewards, scores, given, resamples, rng, prompts)
        share = np.ravel(given.kept)
        numbers = {
            "kept": share.mean() if share.size else np.nan,
            "pass_kept": _mean(flat_scores, flat),
            "pass_dropped": _mean(flat_scores, 1.0 - share),
            "r2": binned.r2,
            "r2_low": low,
            "r2_high": high,
            "spearman": spearman(rewards, scores, expected),
            "auc": auc(rewards, scores, expected),
            "alpha": aligned.alpha,
            "alpha_low": ends[0],
            "alpha_high": ends[1],
            "at_updates": aligned.at_updates,
            "at_samples": aligned.at_samples,
        }
        numbers = {key: float(x) if np.isfinite(x) else None for key, x in numbers.items()}
        notes = [binned.note, aligned.note and f"alpha: {aligned.note}"]
        notes = notes[: 1 if aligned.note == binned.note else 2]
        rows.append({"filter": name, **numbers, "note": "; ".join(filter(None, notes))})
    return rows


def _mean(values, weights):
    """Weighted mean; NaN where rounding is all the weight there is."""
    return values @ weights / weights.sum() if weights.sum() > 1e-9 * len(weights) else np.nan


def format_table(rows):
    """`reliability_table`'s rows as aligned text, the best not singled out; "-" where undefined."""
    head = "filter,kept,score kept,score dropped,R^2,95 %,Spearman,AUC,alpha,95 %,"
    lines = [(head + "at updates,at samples,note").split(",")]
    for row in rows:
        numbers = {key: x for key, x in row.items() if key not in ("filter", "note")}
        shown = {key: "-" if x is None else f"{x:.3f}" for key, x in numbers.items()}
        for name in ("r2", "alpha"):
            low, high = shown[f"{name}_low"], shown.pop(f"{name}_high")
            shown[f"{name}_low"] = low if low == "-" else f"{low} .. {high}"
        lines.append([row["filter"], *shown.values(), row["note"]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for first, *cells, note in lines:
        middle = "  ".join(c.rjust(w) for c, w in zip(cells, widths[1:-1], strict=True))
        text.append(f"{first.ljust(widths[0])}  {middle}  {note}".rstrip())
    return "\n".join(text)


def expected_weights(chosen, samples, seed):
    """{name: Weights} of Judged, expected over the draws of filters that keep at random."""
    expected, rewards = {}, torch.tensor(samples.rewards, dtype=torch.float32)
    for name, weigh in chosen.items():
        generator = seeded("filter", seed)
        draws = [weigh(rewards, generator, samples.given) for _ in range(8)]
        if any(not draw.equal(draws[0]) for draw in draws):
            draws += [weigh(rewards, generator, samples.given) for _ in range(DRAWS - 8)]
        expected[name] = Weights.of(*draws)
    return expected


def compare_filters(args, chosen, samples, out):
    """Print the table, write `reliability.json` and the figure below `out`. samples: Judged; args:
    bins, bin_kind, repetitions, seed."""
    rewards, scores, prompts = samples.rewards, samples.scores, samples.prompts
    (P, N), count = rewards.shape, len(np.unique(prompts))
    spread = f"mean {rewards.mean():.3f}, standard deviation {rewards.std():.3f}"
    what = f"{P} x {N} samples of {count} problems: mean score {scores.mean():.3f}"
    print(f"\n{what}; rewards: {spread}")
    print(f"R^2 over {args.bins} bins of {NAMES[args.bin_kind]}; 95 %: percentiles over resampled ")
    print("prompts, which lie low where bins hold few samples; alpha: alignment of what is taught ")
    print("with what is right, and what it foretells at equal updates and samples (reliability.py)")
    bins = {"bins": args.bins, "kind": args.bin_kind, "prompts": prompts}
    expected = expected_weights(chosen, samples, args.seed)
    rows = reliability_table(rewards, scores, expected, seed=args.seed, **bins)
    print(format_table([row | {"filter": chosen[row["filter"]].label} for row in rows]))
    bins |= {"resamples": args.repetitions, "rng": np.random.default_rng(args.seed)}
    drawn = resampled_bins(rewards, scores, np.ones_like(rewards), **bins)
    lines = [
        {"mean_reward": b.mean_reward.tolist(), "mean_score": b.mean_score.tolist()} for b in drawn
    ]
    known = {"problems": count, "groups": P, "samples_per_problem": N, "bins": args.bins}
    known |= {"bin_kind": args.bin_kind, "filters": rows, "repetitions": lines}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "reliability.json", known)
    print(f"\n{out}: reliability.json; ", end="")
    print(draw_reliability(out / "reliability.png", lines))


def compare_again(args, ranks):
    """--from_samples: the table and the figure of filters, from samples judged before."""
    out = claim(args, ranks, "runs/eval", "out", files=())

    def report():
        samples = read_judged(args.from_samples)
        known = {name: values[0, 0].numel() for name, values in samples.given.items()}
        chosen = load_filters(args.filters, samples.rewards.shape[1], print, known)
        compare_filters(args, chosen, samples, out)

    on_main(ranks, report)


def plotting(draw):
    """draw(plot, ...) as a function that needs no `plot`: matplotlib's pyplot, without a screen. It
    returns a line on what was written, or on what to install."""

    def drawn(*args):
        try:
            import matplotlib
        except ImportError:
            return "no figures: pip install matplotlib, and run the same command again"
        matplotlib.use("Agg")
        from matplotlib import pyplot as plot

        written = draw(plot, *args)
        plot.close("all")
        return written

    return drawn


@plotting
def draw_reliability(plot, path, lines):
    """The paper's Fig. 1. lines: {"mean_reward": [bins], "mean_score": [bins]} of repetitions."""
    figure, axis = plot.subplots(figsize=(6, 5), layout="constrained")
    for line in lines:
        axis.plot(line["mean_reward"], line["mean_score"], marker=".", alpha=0.6, color="tab:blue")
    axis.set(xlabel="mean reward of the bin", ylabel="mean actual score of the bin")
    figure.savefig(path, dpi=120)
    return f"{path.name}, {len(lines)} repetitions"
