"""Slots: the rows that decode together, and their keys and values in one block.

A slot is a row of the block, which is allocated once. All slots write into the same column, so a
row ends at that column, wherever it began; what stands on its left is masked:

    column   0 1 2 3 4 5 6 7            p prompt, r response, . masked
    slot 0   . p p p r r r r            the longest row that lives
    slot 1   . . . . . p p r            a row that took the place of one that had ended
    slot 2   . . p p p p r r

`Slots.refill` puts rows into free slots, `Slots.take` notes what they draw, `Slots.rewind` moves
what lives to the front where the block is full or mostly masked, and `Slots.compact` lets rows that
have ended leave where nothing waits any more.

Not here: the model's passes and the draws (sampler.py).
"""

from dataclasses import dataclass

from pfppo.fsdp import rounded

import torch
from transformers.cache_utils import DynamicLayer

MASKED_SHARE = 1 / 8  # share of masked columns at which it is worth to move the others
FEWER = 16  # a block of fixed shapes is halved down to this part: five shapes, long tails included


@dataclass
class Samples:
    """B responses; `ids` and `logp` are lists of rows without padding."""

    ids: list[list[int]]  # EOS included where there is one
    logp: list[list[float]]  # of each token, under the sampling temperature (1 if greedy)
    finished: list[bool]  # ends with EOS, or has `ended` otherwise


class RoomLayer(DynamicLayer):
    """Keys and values [slots, heads, columns, D/heads] allocated once, written in place."""

    def __init__(self, past, slots, columns):
        """past: a layer of prompts, whose shapes and last column are taken over."""
        super().__init__()
        self.column, self.is_initialized = past.keys.shape[2], True
        self.dtype, self.device = past.keys.dtype, past.keys.device
        for name in ("keys", "values"):
            like = getattr(past, name)
            setattr(self, name, like.new_zeros(slots, like.shape[1], columns, like.shape[3]))

    def put(self, past, sources, targets):
        """Copy rows `sources` of prompts into slots `targets`, so that they end at the column."""
        columns = slice(self.column - past.keys.shape[2], self.column)
        self.keys[targets, :, columns] = past.keys[sources]
        self.values[targets, :, columns] = past.values[sources]

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys[:, :, self.column] = key_states[:, :, 0]
        self.values[:, :, self.column] = value_states[:, :, 0]
        self.column += 1
        return self.keys[:, :, : self.column], self.values[:, :, : self.column]

    def get_mask_sizes(self, query_length):
        return self.column + query_length, 0

    def get_seq_length(self):
        return self.column

    def rewind(self, shift):
        """Drop the first `shift` columns."""
        for x in (self.keys, self.values):
            x[:, :, : self.column - shift] = x[:, :, shift : self.column].clone()
        self.column -= shift

    def move(self, sources, targets, slots):
        """Copy slots over others, and keep the first `slots`."""
        for x in (self.keys, self.values):
            x[targets, :, : self.column] = x[sources, :, : self.column]
        self.keys, self.values = self.keys[:slots], self.values[:slots]


class FixedLayer(RoomLayer):
    """The same for a model that sees all columns at every step, and a column that is a tensor: the
    step's shapes stay, and no number is read on the host, so it can be compiled or captured."""

    is_compileable = True

    def __init__(self, past, slots, columns):
        super().__init__(past, slots, columns)
        self.column = torch.tensor(self.column, device=self.device)

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys.index_copy_(2, self.column[None], key_states)
        self.values.index_copy_(2, self.column[None], value_states)
        self.column += 1  # in place
        return self.keys, self.values

    def get_mask_sizes(self, query_length):
        return self.keys.shape[2], 0


class Slots:
    """The rows that decode together, and what all `rows` rows have drawn so far.

    Of each slot: `row`, which of all rows is in it; `count`, tokens that it has drawn; `token`, the
    last of them; `start`, the column where its prompt begins; `alive`, whether it goes on. [slots]
    """

    def __init__(self, rows, batch, longest, width, stop, device, fixed=False):
        """batch: slots, at most as many as rows; longest: of the prompts; width: tokens of the
        longest response; stop: end-of-sequence ids. fixed: every step has the same shapes, and
        those of other calls are few."""
        size, self.fixed = rounded if fixed else int, fixed
        slots = min(size(rows), max(1, batch))
        self.least = max(1, slots // FEWER)
        self.layers, self.stop = [], torch.tensor(stop, device=device)
        columns = size(longest + width - 1)  # the last token is not fed back
        # Where rows wait, columns are used again: rarely, if there are some more.
        self.columns = columns if slots >= rows else columns + 1 + int(MASKED_SHARE * columns)
        names = ("row", "count", "token", "start")
        for name in names:
            setattr(self, name, torch.zeros(slots, dtype=torch.long, device=device))
        self.alive, self.live = torch.zeros(slots, dtype=torch.bool, device=device), 0
        self.ids = torch.zeros(rows, width, dtype=torch.long, device=device)
        self.logp = torch.zeros(rows, width, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)

    def __len__(self):
        return len(self.row)

    @property
    def column(self):
        """The one that is written next."""
        return int(self.layers[0].column)

    def view(self):
        """What the next step sees: mask [slots, columns], and positions [slots, 1] of its ids."""
        if self.column == self.columns:
            self.rewind(0)
        column = self.column
        columns = torch.arange(self.layers[0].get_mask_sizes(1)[0], device=self.start.device)
        start = self.start.where(self.alive, column)  # one without a row sees its own token only
        mask = (columns >= start[:, None]) & (columns <= column)
        return mask.long(), (column - start)[:, None]

    def refill(self, prompts, rows):
        """Put rows [(row, which of the prompts)] into free slots. Returns (slots [n], the logits
        [n, V] behind their prompts)."""
        who = (~self.alive).nonzero()[: len(rows), 0]
        row, source = torch.tensor(rows, device=who.device).T
        length = prompts.layers[0].keys.shape[2]
        if self.layers:
            self.rewind(length, MASKED_SHARE)
        else:
            kind = FixedLayer if self.fixed else RoomLayer
            self.layers = [kind(past, len(self), self.columns) for past in prompts.layers]
        for layer, past in zip(self.layers, prompts.layers, strict=True):
            layer.put(past, source, who)
        self.row[who], self.count[who] = row, 0
        self.start[who] = self.column - prompts.lengths[source]
        self.alive[who], self.live = True, self.live + len(rows)
        return who, prompts.logits[source]

    def take(self, who, tokens, logp):
        """Note the tokens [n] of slots `who` and their log-probs. Returns how many tokens
        need not be drawn any more: one of a row that goes on, all it had left of one that ends."""
        row, count, width = self.row[who], self.count[who], self.ids.shape[1]
        ended = torch.isin(tokens, self.stop)
        self.ids[row, count], self.logp[row, count] = tokens, logp
        self.finished[row], self.lengths[row] = ended, count + 1
        self.token[who], self.count[who] = tokens, count + 1
        self.alive[who] = goes_on = ~ended & (count + 1 < width)
        done = torch.where(goes_on, 1, width - count).sum()
        done, self.live = torch.stack([done, self.alive.sum()]).tolist()
        return done

    def let_go(self, ended, steps):
        """End the rows that have `ended` in the last `steps`. Returns how many tokens they had
        left."""
        who = self.alive.nonzero()[:, 0]
        row, count = self.row[who], self.count[who]
        asked = zip(row.tolist(), self.ids[row].tolist(), count.tolist(), strict=True)
        over = [ended(i, ids[:n], steps) is not None for i, ids, n in asked]
        who = who[torch.tensor(over, dtype=torch.bool, device=who.device)]
        self.alive[who], self.live = False, self.live - len(who)
        return int((self.ids.shape[1] - self.count[who]).sum())

    def rewind(self, least, share=0.0):
        """Move the rows that live to the front of the block, if this frees a share of its columns;
        at least `least` of them stay on the left of the next one."""
        first = min([self.column - least, *self.start[self.alive].tolist()])
        if first > share * self.column:
            for layer in self.layers:
                layer.rewind(first)
            self.start -= first

    def compact(self, share):
        """Move live rows of the tail over dead ones, if more than a share of the slots are dead. A
        block of fixed shapes is halved, as often as half of it will do."""
        keep = self.live
        if self.fixed:
            keep = len(self)
            while keep // 2 >= max(self.live, self.least):
                keep //= 2
        if len(self) - keep <= share * len(self):
            return
        targets = (~self.alive[: self.live]).nonzero()[:, 0]
        sources = self.alive[self.live :].nonzero()[:, 0] + self.live
        for layer in self.layers:
            layer.move(sources, targets, keep)
        for name in ("row", "count", "token", "start", "alive"):
            tensor = getattr(self, name)
            tensor[targets] = tensor[sources]
            setattr(self, name, tensor[:keep])
        self.alive[self.live :] = False  # whose rows have moved

    def samples(self, ended=None):
        """What all rows have drawn, in their order, up to where they have `ended`."""
        drawn = (x.tolist() for x in (self.ids, self.logp, self.lengths, self.finished))
        found = Samples([], [], [])
        for row, (ids, logp, length, finished) in enumerate(zip(*drawn, strict=True)):
            kept = ended(row, ids[:length], length) if ended else None
            found.ids.append(ids[: kept or length])
            found.logp.append(logp[: kept or length])
            found.finished.append(finished or kept is not None)
        return found
