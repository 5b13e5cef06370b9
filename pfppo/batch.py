"""Rows of prompt and response: ids, lengths, masks; select, pad, minibatches.

Legend of shapes, used in all files:

    P prompts per step    N samples per prompt    B rows    T response tokens (columns)
    L prompt + response tokens    V vocabulary    D width

One row, prompt of 3 tokens, response of 4 whose last is the end-of-sequence token E:

    position                   0   1   2   3   4   5   6   7   8
    ids [B, L]                 p0  p1  p2  y0  y1  y2  E   pad pad
    state_positions [B, T]             s0  s1  s2  s3              state *before* token j
    last_positions [B, 1]                              E           where the RM's score stands

    column j                   0   1   2   3   4   5
    responses [B, T]           y0  y1  y2  E   pad pad
    response_mask [B, T]       1   1   1   1   0   0               also the mask of values

Masks come from lengths, never from `ids == pad`, so pad may equal EOS. A truncated response has no
EOS; tokens are never edited. A rank's rows are its prompts' in order, the N samples of a prompt
together.

Ranks: rank r of W owns the prompts r, r + W, r + 2W, ...: a group never straddles ranks, and any
run of prompts is spread evenly.
"""

from dataclasses import dataclass, fields

from pfppo.config import require

import torch
from torch.nn.functional import pad


def response_mask(lengths, width):
    """[B] -> [B, width] float: 1 where column j < length."""
    columns = torch.arange(width, device=lengths.device)
    return (columns < lengths[:, None]).float()


def state_positions(prompt_lengths, width):
    """[B] -> [B, width]: position in `ids` of the state before response token j."""
    return prompt_lengths[:, None] - 1 + torch.arange(width, device=prompt_lengths.device)


def last_positions(prompt_lengths, lengths):
    """[B], [B] -> [B, 1]: position in `ids` of the last response token."""
    return (prompt_lengths + lengths - 1)[:, None]


@dataclass
class Rollout:
    """B rows on one rank. Tensors that are not there yet are None."""

    ids: torch.Tensor  # [B, L] int64, padded on the right
    prompt_lengths: torch.Tensor  # [B]
    lengths: torch.Tensor  # [B] response tokens, EOS included
    rewards: torch.Tensor | None = None  # [B] normalised reward, before KL
    weights: torch.Tensor | None = None  # [B] from the filter
    old_logp: torch.Tensor | None = None  # [B, T]
    ref_logp: torch.Tensor | None = None  # [B, T]
    old_values: torch.Tensor | None = None  # [B, T]
    adv: torch.Tensor | None = None  # [B, T]
    returns: torch.Tensor | None = None  # [B, T]

    def __len__(self):
        return len(self.ids)

    @property
    def width(self):
        """T: columns of the response-aligned tensors."""
        return int(self.lengths.max())

    @property
    def mask(self):
        """[B, T]"""
        return response_mask(self.lengths, self.width)

    @property
    def responses(self):
        """[B, T] response tokens; off the mask whatever stands there."""
        return self.ids.gather(1, (self.states + 1).clamp(max=self.ids.shape[1] - 1))

    @property
    def states(self):
        """[B, T] positions in `ids` of the states before each response token."""
        return state_positions(self.prompt_lengths, self.width)

    @property
    def ends(self):
        """[B, 1] positions in `ids` of the last response tokens."""
        return last_positions(self.prompt_lengths, self.lengths)

    @property
    def token_weights(self):
        """[B, T] the filter's weight on response tokens."""
        return self.mask * self.weights[:, None]

    def select(self, rows):
        """The given rows, cut to their own longest row and longest response.

        rows: int64 indices [K]; a row may stand there twice. A rank never selects nothing: it pads.
        """
        lengths = self.lengths[rows]
        ends = int((self.prompt_lengths[rows] + lengths).max())
        width = int(lengths.max())
        chosen = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                value = value[rows]
                if value.ndim == 2:
                    value = value[:, : ends if field.name == "ids" else width]
            chosen[field.name] = value
        return Rollout(**chosen)

    def padded_select(self, rows, size):
        """`select(rows)` filled up to `size` rows with row 0 at weight 0, so that ranks match."""
        filled = torch.zeros(size, dtype=torch.long)
        filled[: len(rows)] = rows
        chosen = self.select(filled.to(self.ids.device))
        chosen.weights[len(rows) :] = 0
        return chosen

    def microbatches(self, size):
        """Consecutive slices of at most `size` rows."""
        rows = torch.arange(len(self), device=self.ids.device)
        return [self.select(part) for part in rows.split(size)]


def over_microbatches(forward, model, rows, size, *args):
    """forward(model, microbatch, *args) -> tensors [b, t], without gradient, over all rows.

    Returns [B, T] tensors. The losses see the same microbatches later: the first ratio is 1.
    """
    with torch.no_grad():
        parts = [forward(model, mb, *args) for mb in rows.microbatches(size)]
    return [
        torch.cat([pad(x, (0, rows.width - x.shape[1])) for x in column])
        for column in zip(*parts, strict=True)
    ]


def flat(minibatches, name):
    """A response-aligned field of several rollouts, response tokens only: [tokens]."""
    return torch.cat([getattr(rows, name)[rows.mask > 0] for rows in minibatches])


def unflat(minibatches, name, values):
    """The reverse of `flat`: set the field of each rollout, 0 off the mask."""
    parts = values.split([int(rows.lengths.sum()) for rows in minibatches])
    for rows, part in zip(minibatches, parts, strict=True):
        setattr(rows, name, torch.zeros_like(rows.mask).masked_scatter(rows.mask > 0, part))


def collate(prompts, responses, pad_id, device="cpu"):
    """Lists of token ids (prompts and responses, B each) -> Rollout."""
    longest = max(len(p) + len(y) for p, y in zip(prompts, responses, strict=True))
    ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    for row, prompt, response in zip(ids, prompts, responses, strict=True):
        row[: len(prompt) + len(response)] = torch.tensor([*prompt, *response])
    prompt_lengths, lengths = (
        torch.tensor([len(tokens) for tokens in part]).to(device) for part in (prompts, responses)
    )
    return Rollout(ids=ids.to(device), prompt_lengths=prompt_lengths, lengths=lengths)


def check_sizes(args, kept_per_prompt, world):
    """One line: prompts x N -> sampled -> kept -> minibatch -> microbatch -> optimizer steps.

    kept_per_prompt is None where the filter's number varies. Raises UserError where sizes do not
    divide, naming both numbers.
    """
    P, N = args.prompts_per_step, args.samples_per_prompt
    require(P % world == 0, f"--prompts_per_step {P}: does not divide over {world} ranks")
    share, left = divmod(args.minibatch, world)
    require(left == 0, f"--minibatch {args.minibatch}: does not divide over {world} ranks")
    require(
        share % min(share, args.microbatch) == 0,
        f"--microbatch {args.microbatch}: does not divide the {share} rows per rank of "
        f"--minibatch {args.minibatch}",
    )
    if kept_per_prompt is None:
        kept = f"what {args.filter} keeps, a number that varies"
        updates = "optimizer steps of about"
    else:
        total = P * kept_per_prompt
        require(
            total % args.minibatch == 0,
            f"--minibatch {args.minibatch}: does not divide the {total} samples that "
            f"--filter {args.filter} keeps of {P} prompts x {N} samples",
        )
        kept = f"{total} kept by {args.filter}"
        updates = f"{total // args.minibatch * args.ppo_epochs} optimizer steps of"
    return (
        f"sizes: {P} prompts x {N} samples -> {P * N} sampled -> {kept} -> {updates} "
        f"{args.minibatch} rows -> {share} per rank -> microbatches of "
        f"{min(share, args.microbatch)}"
    )


def owned(count, rank, world):
    """Indices of the prompts that a rank owns, out of `count`."""
    return range(rank, count, world)


def minibatch_plan(weights, minibatch):
    """Split the kept samples of the global batch into minibatches: [(groups, samples), ...].

    weights [P, N], the filter's, equal on all ranks. The kept samples, prompt by prompt, are cut
    into runs of `minibatch`, or where that does not divide into runs as equal as possible. The
    prompts were shuffled when they were drawn, and the survivors of a prompt stay together.
    Because the plan is global, it does not depend on the number of ranks. Nothing kept, no plan.
    """
    groups, samples = weights.nonzero(as_tuple=True)
    if len(groups) == 0:
        return []
    parts = max(1, round(len(groups) / minibatch))
    return list(zip(groups.tensor_split(parts), samples.tensor_split(parts), strict=True))


def rows_of(groups, samples, samples_per_prompt, rank, world):
    """Where the given samples stand in this rank's rollout, and the rows that each rank must run.

    A rank's rollout has its prompts in order, N rows each. Returns (rows [K], size), K <= size;
    size is the largest K over the ranks, at least 1.
    """
    mine = groups % world == rank
    rows = (groups[mine] // world) * samples_per_prompt + samples[mine]
    counts = torch.bincount(groups % world, minlength=world)
    return rows, max(int(counts.max()), 1)
