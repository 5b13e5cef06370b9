"""`RewardSession`: what surrounds the loop of train_rm.py and is no part of the algorithm.

    args.json        the arguments
    samples.jsonl    the samples that pairs were made of (pairs.py), where none were given
    pairs.jsonl      the pairs: prompt, chosen, rejected
    metrics.jsonl    one object per optimizer step: step, epoch (from 1), loss (nats per pair) and
                     accuracy over its pairs, grad_norm (before clipping), lr; at the end of an
                     epoch held_out_loss and held_out_accuracy too, else null
    checkpoints/     as of PPO (checkpoint.py), until the end

The model's own files come last, config.json as the very last: until then transformers sees no model
in the folder, and `--resume` goes on. Nothing of the checkpoints is left beside the finished model.
"""

import json
import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pfppo import fsdp
from pfppo.config import require
from pfppo.files import append_jsonl, whole_lines, write_jsonl
from pfppo.model import empty_classifier
from pfppo.run import checkpoint, export
from pfppo.run.fitting import rows_at_once
from pfppo.run.folder import open_folder
from pfppo.run.memory import RewardPlan
from pfppo.run.session import Session

LAST = "config.json"  # without it a folder is no model


def is_trained(folder):
    """Whether a folder of train_rm.py is a reward model: it is one whole, or not yet."""
    return (Path(folder) / LAST).exists()


@dataclass
class Progress:
    """What a checkpoint holds besides weights and optimizer."""

    step: int  # how many are done


class RewardSession(Session):
    """One run of train_rm.py. Methods are collectives; what is not here is as of PPO."""

    def is_finished(self):
        """Whether --resume meets a model that is finished; says so."""
        finished = fsdp.on_main(self.ranks, is_trained, self.folder)
        if finished:
            fsdp.on_main(self.ranks, self._clear)
            self.stop.close()
            self.ranks.say(f"{self.folder}: the reward model is finished, nothing to do")
        return finished

    def check(self, pairs):
        """Raise UserError where training on pairs (token ids) cannot fit into memory."""
        longest = max(len(prompt) + len(y) for prompt, *both in pairs for y in both)
        needs = partial(RewardPlan, self.args, prompt=longest, new=0)
        rows_at_once(self.args, self.ranks, needs)

    def open(self, texts):
        """Make the folder, and write the pairs, before anything is trained. Raises UserError where
        others are there: the file that was named has changed since."""
        open_folder(self.folder, self.args, self.ranks)
        names = ("prompt", "chosen", "rejected")
        pairs = [dict(zip(names, triple, strict=True)) for triple in texts]
        fsdp.on_main(self.ranks, self._write_pairs, self.folder / "pairs.jsonl", pairs)

    def _write_pairs(self, path, pairs):
        known, now = whole_lines(path), self.args.pairs or self.args.prompts
        other = f"{path}: not the pairs that {now} gives now, expected the file as it was"
        require(known in ([], json.loads(json.dumps(pairs))), other)
        write_jsonl(path, pairs)

    def load(self, trained):
        """The Progress of the newest complete checkpoint, put into model and optimizer; or step 0.
        From here on SIGTERM saves before it ends the run. trained: as in `Session.load`."""
        known = checkpoint.load(self.folder, trained, self.ranks)
        state = Progress(**known) if known else Progress(0)
        if state.step:
            self.ranks.say(f"{self.folder}: training goes on after step {state.step}")
        self.saver = checkpoint.Saver(self.folder, self.ranks, self.args.keep, state.step)
        self.stop.holding = True
        return state

    def log(self, row):
        """Append the step to metrics.jsonl; what is not finite is null."""
        known = {n: v if v is not None and math.isfinite(v) else None for n, v in row.items()}
        if self.ranks.is_main:
            append_jsonl(self.folder / "metrics.jsonl", [known])

    def finish(self, model, tokens, card):
        """Put the model's files into the folder, and take the checkpoints out of it."""
        config = model.classifier.config
        config.pad_token_id = tokens.classifier_pad
        unsharded, extra = empty_classifier(config), [card.save]
        part = self.folder / "model.part"
        export.write(model.classifier, part, unsharded, tokens.tokenizer, self.ranks, extra)
        fsdp.on_main(self.ranks, self._lift, part)
        self.stop.close()

    def _lift(self, part):
        for path in sorted(part.iterdir(), key=lambda path: path.name == LAST):
            shutil.rmtree(self.folder / path.name, ignore_errors=True)  # a folder that a kill left
            path.rename(self.folder / path.name)
        self._clear()

    def _clear(self):
        """Remove what a finished model needs no longer."""
        for name in ("model.part", "checkpoints"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
