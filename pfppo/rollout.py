"""Rows of prompt and response: ids, lengths, masks; what is kept of them; minibatches.

Legend of shapes, used in all files:

    P prompts per step    N samples per prompt    B rows    T response tokens (columns)
    L prompt + response tokens    V vocabulary    D width    W ranks    K some of the rows

Reward: what is learned from (the RM's word). Score: the truth, by tests. Never one for the other.

One row, prompt of 3 tokens, response of 4 whose last is the end-of-sequence token E:

    position            0   1   2   3   4   5   6   7   8
    ids [B, L]          p0  p1  p2  y0  y1  y2  E   pad pad
    states [B, T]               s0  s1  s2  s3              positions of the states *before* token j
    ends [B, 1]                                 E           where the RM's score stands

    column j            0   1   2   3   4   5
    responses [B, T]    y0  y1  y2  E   pad pad
    mask [B, T]         1   1   1   1   0   0               of log-probs, values, losses

Masks come from lengths, never from `ids == pad`, so pad may equal EOS. A truncated response has no
EOS; tokens are never edited.

Ranks. Rank r of W owns the prompts r, r + W, r + 2W, ... of a step and all N samples of each, so a
group never straddles ranks. With W = 2, P = 4, N = 3, a filter that keeps x, and minibatches of 4
rows, cut from the kept samples of all ranks in the order of the prompts:

    prompt       0     1     2     3        minibatch 0      minibatch 1
    weights     x.x   xx.   xxx   x..       prompts 0, 1     prompts 2, 3
    rank 0      012         345             rows 0, 2        rows 3, 4, 5
    rank 1            012         345       rows 0, 1        rows 3, s*, s*

Collectives must match, so where ranks have unequally many rows of a minibatch, the others fill up
with the shortest of their rows at weight 0 (s*). It costs what any row of its length costs in steps
4 and 6, and changes no number: whatever is summed over rows is multiplied by their weights.

Microbatches are cut from a rank's rows of a minibatch in the order of their lengths, so that rows
stand beside others of their length and little is padded (`order`).
"""

import hashlib
import math
from dataclasses import dataclass

from pfppo.config import divisors, near, require
from pfppo.fsdp import bar

import torch
from torch.nn.functional import pad


def hashed(purpose, *key):
    """128 bits of a purpose and its key, such as "filter", seed, step."""
    return int.from_bytes(hashlib.blake2b(repr((purpose, *key)).encode(), digest_size=16).digest())


def seeded(purpose, *key):
    """A generator of torch for one purpose and key. All randomness of a run comes from these (32
    bits of the key count on a CPU) and from `sampler.draw_uniforms` (where all do)."""
    return torch.Generator().manual_seed(hashed(purpose, *key) % 2**64)


@dataclass
class Rollout:
    """B rows on one rank. Tensors that are not there yet are None."""

    ids: torch.Tensor  # [B, L] int64, padded on the right
    prompt_lengths: torch.Tensor  # [B]
    lengths: torch.Tensor  # [B] response tokens, EOS included
    rewards: torch.Tensor | None = None  # [B] normalised reward, before KL
    weights: torch.Tensor | None = None  # [B] from the filter
    sampled_logp: torch.Tensor | None = None  # [B, T] the sampler's
    old_logp: torch.Tensor | None = None  # [B, T]
    entropy: torch.Tensor | None = None  # [B, T]
    ref_logp: torch.Tensor | None = None  # [B, T]
    old_values: torch.Tensor | None = None  # [B, T]
    adv: torch.Tensor | None = None  # [B, T]
    returns: torch.Tensor | None = None  # [B, T]
    coefficients: torch.Tensor | None = None  # [B, T] of the losses, ppo.loss_coefficients
    parts: tuple[int, ...] | None = None  # rows of each minibatch; None, as of a selection: one

    def __len__(self):
        return len(self.ids)

    @property
    def tensors(self):
        """{name: tensor} of those that are there."""
        return {n: x for n, x in vars(self).items() if isinstance(x, torch.Tensor)}

    def __add__(self, other):
        """The rows of both, with the tensors that both have."""
        both = {}
        for name in self.tensors.keys() & other.tensors.keys():
            pair = [getattr(self, name), getattr(other, name)]
            if pair[0].ndim == 2:
                longest = max(x.shape[1] for x in pair)
                pair = [pad(x, (0, longest - x.shape[1])) for x in pair]
            both[name] = torch.cat(pair)
        return Rollout(**both)

    def one_of_each(self, rewards, ranks, generator):
        """One random row of each of this rank's prompts; rewards [P, N] of all ranks."""
        P, N = rewards.shape
        chosen = torch.randint(N, (P,), generator=generator)[ranks.rank :: ranks.world]
        return self.select(torch.arange(len(chosen)) * N + chosen)

    @property
    def width(self):
        """T: columns of the response-aligned tensors."""
        return int(self.lengths.max()) if len(self) else 0

    @property
    def mask(self):
        """[B, T] float: 1 where column j < length."""
        columns = torch.arange(self.width, device=self.lengths.device)
        return (columns < self.lengths[:, None]).float()

    @property
    def states(self):
        """[B, T] positions in `ids` of the states before each response token."""
        columns = torch.arange(self.width, device=self.lengths.device)
        return self.prompt_lengths[:, None] - 1 + columns

    @property
    def responses(self):
        """[B, T] response tokens; off the mask whatever stands there."""
        return self.ids.gather(1, (self.states + 1).clamp(max=self.ids.shape[1] - 1))

    @property
    def ends(self):
        """[B, 1] positions in `ids` of the last response tokens."""
        return (self.prompt_lengths + self.lengths - 1)[:, None]

    def select(self, rows):
        """The rows of these indices [K] int64, which may repeat, cut to their own longest row and
        longest response."""
        rows = rows.to(self.ids.device)
        chosen = Rollout(**{name: x[rows] for name, x in self.tensors.items()})
        length, width = int(chosen.ends.max()) + 1 if len(rows) else 0, chosen.width
        for name, x in chosen.tensors.items():
            if x.ndim == 2:
                setattr(chosen, name, x[:, : length if name == "ids" else width])
        return chosen

    def kept(self, weights, minibatch, ranks):
        """This rank's survivors of the filter, one minibatch behind the other: see the picture.

        weights [P, N], the filter's for all ranks. What all keep is cut into as few runs of at most
        `minibatch` as there can be, of lengths as equal as possible: so minibatches do not depend
        on the number of ranks. The prompts were shuffled when they were drawn. Nothing kept on any
        rank: no rows, no minibatch.
        """
        W, N = ranks.world, weights.shape[1]
        groups, samples = weights.nonzero(as_tuple=True)  # [K] whose prompt, and which sample
        if not len(groups):
            return self.select(groups)
        runs = math.ceil(len(groups) / minibatch)
        owners, places = groups % W, groups // W * N + samples  # whose row it is, and which
        rows, parts = [], []
        for owner, place in zip(owners.tensor_split(runs), places.tensor_split(runs), strict=True):
            mine, size = place[owner == ranks.rank], int(owner.bincount().max())
            rows.append(pad(mine, (0, size - len(mine)), value=-1))  # -1: the shortest fills up
            parts.append(size)
        rows = torch.cat(rows)
        real, rows = rows >= 0, rows.where(rows >= 0, self.ends.argmin().cpu())
        chosen = self.select(rows)
        chosen.weights = (weights[ranks.rank :: W].flatten()[rows] * real).to(self.ids.device)
        chosen.parts = tuple(parts)
        return chosen

    def minibatches(self, generator):
        """The minibatches in random order, one for each optimizer step. None of no rows."""
        if not len(self):
            return []
        cut = torch.arange(len(self)).split(self.parts or [len(self)])
        return [self.select(cut[i]) for i in torch.randperm(len(cut), generator=generator)]

    def order(self, size):
        """The rows of each microbatch: at most `size` [K] of a minibatch, of about one length."""
        lengths = self.ends[:, 0].cpu()
        cut = torch.arange(len(self)).split(self.parts or [len(self)])
        runs = (rows[lengths[rows].argsort(stable=True)] for rows in cut)
        return [part for run in runs for part in run.split(size)]

    def microbatches(self, size, what="update"):
        """The rows in slices of at most `size`, each within a minibatch, with a bar of `what` they
        are for."""
        return bar(what, [self.select(part) for part in self.order(size)])

    def evaluate(self, forward, model, args):
        """forward(model, rows, args) -> [b, t] (or several), for all rows, without gradient.

        It sees args.microbatch rows at a time, the same together as the losses later: so the first
        ratio is exactly 1. Returns [B, T] (or several).
        """
        what = getattr(forward, "__name__", "evaluate").replace("_", " ")
        with torch.no_grad():
            rows = self.microbatches(args.microbatch, what)
            outputs = [forward(model, mb, args) for mb in rows]
        one = isinstance(outputs[0], torch.Tensor)
        columns = [outputs] if one else zip(*outputs, strict=True)
        places = torch.cat(self.order(args.microbatch)).argsort()
        whole = [
            torch.cat([pad(part, (0, self.width - part.shape[1])) for part in column])[places]
            for column in columns
        ]
        return whole[0] if one else whole


def collate(prompts, responses, pad_id, device="cpu", logp=None):
    """Lists of token ids (prompts and responses, B each), and the sampler's logp -> Rollout."""
    longest = max(len(p) + len(y) for p, y in zip(prompts, responses, strict=True))
    ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    for row, prompt, response in zip(ids, prompts, responses, strict=True):
        row[: len(prompt) + len(response)] = torch.tensor([*prompt, *response])
    lengths = torch.tensor([[*map(len, part)] for part in (prompts, responses)], device=device)
    rows = Rollout(ids.to(device), *lengths)
    if logp is not None:
        known = torch.tensor([x for row in logp for x in row], device=device)
        rows.sampled_logp = torch.zeros_like(rows.mask).masked_scatter(rows.mask > 0, known)
    return rows


def require_enough(args, count):
    """Raise UserError unless `count` prompts are enough for a step."""
    P, path = args.prompts_per_step, args.prompts
    require(P <= count, f"--prompts_per_step {P}: more than the {count} prompts of {path}")
    what = f"--refill {args.refill}: more rounds of {P} than {count} prompts of {path} give"
    require(args.refill < count // P, what)


def step_prompts(args, count, step, round=0):
    """Indices [P] of those of `count` prompts that a step (0, 1, ...) asks in a round of it (0, ...
    --refill): other ones than in its other rounds, or in other steps of the epoch.

    Epochs are permutations, and the part of an epoch that does not fill a step is left out, as are
    rounds that no step needs: so what a step sees is a function of (seed, step), and there is no
    cursor to save.
    """
    P, rounds = args.prompts_per_step, 1 + args.refill
    epoch, part = divmod(step, count // (P * rounds))
    start = (part * rounds + round) * P
    order = torch.randperm(count, generator=seeded("prompts", args.seed, epoch))
    return order[start : start + P].tolist()


def rows_per_rank(rows, option, microbatch, world, total=None):
    """(rows of a minibatch per rank, of a microbatch). option: the minibatch's on the command line;
    total: rows that it must divide, if it must. Raises UserError where they do not divide, with
    numbers that do."""
    share, below = rows // world, rows // world * world
    fitting = divisors(total) if total else [below, below + world]
    fitting = [x for x in fitting if x and x % world == 0 and not _left(x // world, microbatch)]
    what = f"--{option} {rows}: does not divide over {world} ranks"
    require(rows % world == 0, what + near(rows, fitting))
    what = f"does not divide the {share} rows per rank of --{option} {rows}"
    what += near(microbatch, divisors(share))
    require(not _left(share, microbatch), f"--microbatch {microbatch}: {what}")
    return share, min(share, microbatch)


def _left(share, microbatch):
    """Rows that microbatches leave over."""
    return share % min(share, microbatch)


def check_sizes(args, kept_per_prompt, world):
    """One line: prompts x N -> sampled -> kept -> minibatch -> microbatch -> optimizer steps.

    kept_per_prompt is None where the filter's number varies. Raises UserError where sizes do not
    divide, naming both numbers, and some that do.
    """
    P, N, minibatch = args.prompts_per_step, args.samples_per_prompt, args.minibatch
    what, below = f"--prompts_per_step {P}: does not divide over {world} ranks", P // world * world
    require(P % world == 0, what + near(P, [x for x in (below, below + world) if x]))
    nothing = f"--filter {args.filter}: keeps none of the samples that it was tried on (rewards of"
    require(kept_per_prompt != 0, f"{nothing} mean 0, standard deviation 1 and 10, and equal ones)")
    total = kept_per_prompt and P * kept_per_prompt
    share, size = rows_per_rank(minibatch, "minibatch", args.microbatch, world, total)
    kept = f"what {args.filter} keeps, a number that varies"
    updates = "optimizer steps of about"
    if kept_per_prompt is not None:
        what = f"the {total} samples that --filter {args.filter} keeps of {P} prompts x {N} samples"
        fitting = [x for x in divisors(total) if x % world == 0]
        fitting = [x for x in fitting if not _left(x // world, args.microbatch)]
        what = f"--minibatch {minibatch}: does not divide {what}"
        require(total % minibatch == 0, what + near(minibatch, fitting))
        kept = f"{total} kept by {args.filter}"
        updates = f"{total // minibatch * args.ppo_epochs} optimizer steps of"
    return (
        f"sizes: {P} prompts x {N} samples -> {P * N} sampled -> {kept} -> {updates} "
        f"{minibatch} rows -> {share} per rank -> microbatches of {size}"
    )
