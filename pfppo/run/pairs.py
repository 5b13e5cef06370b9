"""Preference pairs, for train_rm.py: of a file, or out of executed samples, which are drawn once
and kept; their split; and what a reward model says of them.

    samples.jsonl    all N samples of every prompt: task_id, sample, prompt, response, passed, ids
                     (tokens, EOS included where there is one), and pair: chosen, rejected or null

It is written part by part, before anything is trained, and what is there is not sampled again. So a
sampling that was stopped loses a part at most, and a training goes on with the very same token ids.

The paper takes, of five samples of the SFT policy, the two of maximum edit distance. How it decides
which one is chosen is not stated; here the tests decide: the pair is the passing and the failing
sample of maximum edit distance, counted in tokens.

Not here: sampling and verdicts (answers.py).
"""

import math
from functools import partial

from pfppo import data, fsdp, loading
from pfppo.answers import Examiner
from pfppo.config import require
from pfppo.files import append_jsonl, rewrite_jsonl, whole_lines
from pfppo.fsdp import gather_lists
from pfppo.model import empty_classifier, position_limits, read_config
from pfppo.problems import load_pairs, load_verifier, prompt_text
from pfppo.reward import bradley_terry_loss
from pfppo.rollout import collate, seeded
from pfppo.run.fitting import rows_at_once
from pfppo.run.folder import open_folder
from pfppo.run.memory import RewardPlan
from pfppo.run.proofs import prove_policy

import numpy as np
import torch
from tqdm import tqdm

FILE = "samples.jsonl"
PARTS, LEAST = 20, 64  # parts of the prompts at most, samples that each has for a rank at least
FIELDS = {"task_id", "sample", "prompt", "response", "passed", "pair", "ids"}


def edit_distance(a, b):
    """Levenshtein distance of two sequences: insertions, deletions, substitutions."""
    b, places = np.array(list(b)), np.arange(len(b) + 1)
    row = places
    for i, x in enumerate(a, 1):
        row = np.concatenate([[i], np.minimum(row[1:] + 1, row[:-1] + (b != x))])
        row = np.minimum.accumulate(row - places) + places  # insertions, one after the other
    return int(row[-1])


def read_pairs(path, tokens, say=print):
    """Pairs (prompt, chosen, rejected) of a JSONL file: as token ids, and as the file says them.
    Those that are too long are left out, which is said; UserError where all are."""
    pairs, texts, long, said = [], [], [], load_pairs(path, say)
    limits = position_limits(read_config(tokens.policy, "policy"))
    most = min(limits.values(), default=math.inf)
    asked = [(f"{path}, line {line}", triple[0]) for line, triple in said]
    for ids, (place, _), (_, triple) in zip(tokens.rendered(asked, say), asked, said, strict=True):
        if not ids:
            continue
        chosen, rejected = (tokens.response(ids, text, place) for text in triple[1:])
        size = len(ids) + max(len(chosen), len(rejected))
        if size > most:
            long.append(f"{place}: row of {size} tokens")
        else:
            pairs.append((ids, chosen, rejected))
            texts.append(triple)
    if long:
        expected = f"expected at most {most}, the positions of --policy {tokens.policy}"
        left_out = f"{long[0]}, {expected}; {len(long)} of {len(said)} are longer"
        require(pairs, left_out)
        say(f"left out: {left_out}")
    return pairs, texts


def farthest_pair(responses, passed):
    """Indices (chosen, rejected) of the passing and the failing response of maximum edit distance.

    responses: token ids of one prompt's samples. None where all pass or all fail. The first wins a
    tie.
    """
    pairs = [
        (edit_distance(responses[good], responses[bad]), good, bad)
        for good in range(len(responses))
        for bad in range(len(responses))
        if passed[good] and not passed[bad]
    ]
    return max(pairs, key=lambda pair: pair[0])[1:] if pairs else None


def pairs_by_tests(args, tokens, folder, ranks):
    """Pairs by executing tests. Returns (pairs as token ids, as text, all samples as rows). A
    collective; raises UserError, also where no prompt has a pair."""
    asked, path = data.read_problems(args, "prompts", tokens, say=ranks.say), folder / FILE
    empty_classifier(read_config(args.policy, "policy"))  # better it fails now than after sampling
    samples = fsdp.on_main(ranks, _known, path, asked, N := args.samples_per_prompt)
    left = len(asked) - len(samples) // N
    how = {"prompt": asked.longest, "new": args.max_new_tokens}
    size = max(-(-LEAST * ranks.world // N), -(-len(asked) // PARTS))  # prompts of a part
    needs = partial(RewardPlan, args, **how, prompts=min(left, size))
    slots = rows_at_once(args, ranks, needs)
    if samples:
        ranks.say(f"{path}: {len(samples)} samples are there, {left * N} are left to draw")
    if left:
        open_folder(folder, args, ranks)
        _draw(args, tokens, asked, samples, slots, size, path, ranks)
    pairs, texts = [], []
    groups = [samples[i : i + N] for i in range(0, len(samples), N)]
    for prompt, group in zip(asked.prompts, groups, strict=True):
        marked = {sample["pair"]: sample for sample in group}
        if "chosen" in marked:
            two = marked["chosen"], marked["rejected"]
            pairs.append((prompt, *(sample["ids"] for sample in two)))
            texts.append((two[0]["prompt"], *(sample["response"] for sample in two)))
    cut = sum(sample["ids"][-1] not in tokens.stop for sample in samples)
    empty = sum(not sample["response"].strip() for sample in samples)
    require(pairs, _no_pairs(args, groups, cut, path))
    passed = sum(sample["passed"] for sample in samples) / len(samples)
    truth = load_verifier(args.verify)
    ranks.say(
        f"pairs: {len(pairs)} of {len(asked)} prompts have {truth.both} sample; the SFT policy "
        f"{truth.is_good} {passed:.3f} of {len(samples)} samples, {cut} are cut off"
        + (f", {empty} are empty" if empty else "")
    )
    prompts = [prompt for prompt in asked.prompts for _ in range(N)]
    rows = [(prompt, sample["ids"]) for prompt, sample in zip(prompts, samples, strict=True)]
    return pairs, texts, rows


def _known(path, asked, N):
    """The samples that are there, of whole prompts. Raises UserError where they are not those of
    the first of these prompts."""
    rows = whole_lines(path)
    rows = rows[: len(rows) // N * N]
    tasks = [problem.task_id for problem in asked.problems for _ in range(N)]
    fits = [row.get("task_id") for row in rows] == tasks[: len(rows)] and all(
        row.keys() >= FIELDS for row in rows
    )
    other = f"not the {N} samples of each of the {len(asked)} prompts: remove it to draw them anew"
    require(fits, f"{path}: {other}")
    rewrite_jsonl(path, rows)
    return rows


def _draw(args, tokens, asked, samples, slots, size, path, ranks):
    """Sample, execute, pair, what `samples` lack; they are extended, and the file, by parts of
    `size` prompts. A collective."""
    N = args.samples_per_prompt
    bar = fsdp.bar("samples, verdicts", total=len(asked) * N, stay=True)
    with Examiner(tokens, args, ranks, slots=slots) as examiner, bar:
        dtype = fsdp.compute_dtype(args.param_dtype, ranks)
        lm = loading.read_causal_lm(args.policy, dtype=dtype).to(ranks.device)
        prove_policy(lm, tokens)
        how = {"samples": N, "progress": lambda rows: bar.update(rows * ranks.world / 2)}
        bar.initial = len(samples)
        while (first := len(samples) // N) < len(asked):
            bar.n = len(samples)  # what was told of this rank's rows was about right
            part = slice(first, first + size)
            some = data.ProblemSet(asked.problems[part], asked.prompts[part])
            groups = examiner.answers(lm, some, "pairs", args.temperature, first=first, **how)
            new = _rows(some.problems, groups, tokens.style, ranks)
            if ranks.is_main:
                append_jsonl(path, new)
            samples += new
        bar.n = len(samples)


def _rows(problems, groups, style, ranks):
    """Lines of samples.jsonl, with the pair of each group [Answer]. A collective."""
    mine = groups[ranks.rank :: ranks.world]
    found = [farthest_pair([a.ids for a in g], [a.passed for a in g]) for g in mine]
    rows = []
    for problem, group, pair in zip(problems, groups, gather_lists(found, ranks), strict=True):
        marks = dict(zip(pair or (), ("chosen", "rejected"), strict=False))
        for i, answer in enumerate(group):
            row = {"task_id": problem.task_id, "sample": i, "prompt": prompt_text(problem, style)}
            row |= {"response": answer.text, "passed": answer.passed}
            rows.append(row | {"pair": marks.get(i), "ids": answer.ids})
    return rows


def _no_pairs(args, groups, cut, path):
    """What there is where no prompt has both a passing and a failing sample, and what to do."""
    passing = sum(all(sample["passed"] for sample in group) for group in groups)
    alike = sum(len({sample["response"] for sample in group}) == 1 for group in groups)
    N, failing = args.samples_per_prompt, len(groups) - passing
    advice = ["more --samples_per_prompt", "another --temperature"]
    advice += ["harder prompts" if passing > failing else "easier prompts"]
    if 2 * cut > len(groups) * N:
        advice.insert(0, "a larger --max_new_tokens")
    return (
        f"--prompts {args.prompts}: no prompt has both {load_verifier(args.verify).both} sample. "
        f"Of {len(groups)} prompts x {N} samples all pass in {passing} and all fail in {failing}; "
        f"{alike} prompts have no two distinct responses, and {cut} of {len(groups) * N} samples "
        f"are cut off at --max_new_tokens {args.max_new_tokens} (see {path}). "
        f"Try {', '.join(advice)}, with another --run_dir"
    )


def rows_of(pairs):
    """Pairs (prompt, chosen, rejected) -> [(prompt, response)], chosen ones at even places."""
    return [(prompt, ids) for prompt, *responses in pairs for ids in responses]


def split_by_prompt(pairs, share, seed):
    """(training, held out): a prompt's pairs are all held out, or all trained on; those of one
    prompt at least are trained on."""
    of_prompt = {}
    for pair in pairs:
        of_prompt.setdefault(tuple(pair[0]), []).append(pair)
    groups = list(of_prompt.values())
    order = torch.randperm(len(groups), generator=seeded("held out", seed)).tolist()
    cut = min(round(len(groups) * share), len(groups) - 1)
    return tuple(sum((groups[i] for i in part), []) for part in (order[cut:], order[:cut]))


def by_length(rows):
    """The order of rows, or pairs, of lists of ids in which neighbours need little padding."""
    return sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))


def shares(rows, size, ranks):
    """[(rows, weight)]: this rank's every W-th of `rows`, at most `size` together.

    All ranks get equally many such parts, whatever the number of rows, as a sharded model must run
    everywhere at once: a rank that has none left gets one row of weight 0, else the weight is 1.
    """
    mine = rows[ranks.rank :: ranks.world]
    starts = range(0, math.ceil(len(rows) / ranks.world), size)
    return [(mine[i : i + size] or rows[:1], float(i < len(mine))) for i in starts]


@torch.no_grad()
def raw_scores(model, rows, pad_id, microbatch, ranks, bar=""):
    """Raw scores [rows], fp64, of (prompt ids, response ids), spread over ranks. bar: the name of a
    bar that rank 0 shows. A collective."""
    found, hidden = [], not (bar and ranks.is_main)
    order = by_length(rows)
    parts = shares([rows[i] for i in order], 2 * microbatch, ranks)
    for some, weight in tqdm(parts, bar, mininterval=1, disable=hidden):
        batch = collate(*zip(*some, strict=True), pad_id, ranks.device)
        mine = model(batch.ids, batch.ends).flatten().tolist()  # of weight 0 too: a collective
        found += mine if weight else []
    scores = torch.empty(len(rows), dtype=torch.float64)
    scores[order] = torch.tensor(gather_lists(found, ranks), dtype=torch.float64)
    return scores


def pair_metrics(model, pairs, *how):
    """{"loss", "accuracy"}: means over pairs; None of no pairs. how: as `raw_scores`, and like it a
    collective."""
    if not pairs:
        return {"loss": None, "accuracy": None}
    _, metrics = bradley_terry_loss(*raw_scores(model, rows_of(pairs), *how).view(-1, 2).T)
    return {name: total.item() / len(pairs) for name, total in metrics.items()}
