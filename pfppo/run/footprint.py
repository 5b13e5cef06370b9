"""What comes and goes in memory: forward passes, backward passes and sampling, rehearsed.

Activations, logits and the KV cache are not computed by formulas that know one architecture: the
very model runs on fake tensors, which have shapes and no numbers, and a counter follows the
storages that are alive. So what a block keeps for the backward pass, what it needs while it runs,
whether attention makes its scores, and what gradient checkpointing saves are all as torch has them.

Weights and their gradients do not count here: fsdp.py holds them in units of its own (memory.py).

Not covered: fragmentation of the allocator, and what kernels use for themselves. Attention is that
of torch's CPU kernels, which like the fused ones of a GPU keep no L x L scores; where a GPU has no
fused kernel for a model (heads of unusual width), it needs more than is said here.
"""

import contextlib
import copy
import functools
import logging
from dataclasses import dataclass

from pfppo.config import UserError, reason
from pfppo.fsdp import find_blocks, recompute_blocks
from pfppo.model import (
    Policy,
    ScalarModel,
    causal_lm_config,
    classifier_config,
    positions_of,
)
from pfppo.sampler import RoomLayer, draw_tokens

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, masking_utils
from transformers.cache_utils import Cache


class Living(TorchDispatchMode):
    """Counts bytes of storages that are born inside and alive; those of `outside` are free."""

    def __init__(self, outside=()):
        super().__init__()
        self.known, self.now, self.peak = {}, 0, 0
        for tensor in outside:
            self._count(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._count(storage, storage.nbytes())
        if self.now > self.peak:  # the dead are looked for only where they could matter
            self._bury()
            self.peak = max(self.peak, self.now)
        return out

    def _count(self, storage, size):
        # A weak reference of torch's own: its address is not used again while we have it.
        if storage._cdata not in self.known:
            self.known[storage._cdata] = StorageWeakRef(storage), size
            self.now += size

    def _bury(self):
        for key in [key for key, (storage, _) in self.known.items() if storage.expired()]:
            self.now -= self.known.pop(key)[1]

    def lap(self):
        """The peak since the last lap."""
        self._bury()
        peak, self.peak = self.peak, self.now
        return peak


class NotRehearsed(UserError):
    """An architecture that runs on real tensors only."""


@contextlib.contextmanager
def _told(path):
    """NotRehearsed for whatever fails inside."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    # transformers asks position ids whether several sequences are packed in a row. Ours never are,
    # and fake ones have no answer: it would make an L x L mask.
    packed = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # an operator without a fake kernel fails in its own way
        raise NotRehearsed(
            f"{path}: memory cannot be told, its operators need real tensors: {reason(error)}"
        ) from error
    finally:
        masking_utils.find_packed_sequence_indices = packed
        log.setLevel(level)


@dataclass(frozen=True)
class Units:
    """Numbers in a model, and in the units that FSDP gathers: the root and the largest block."""

    all: int
    root: int
    block: int
    head: int  # of the root: what has its gradient before the blocks have theirs
    largest: int  # parameter

    @classmethod
    def of(cls, model):
        blocks = [sum(p.numel() for p in block.parameters()) for block in find_blocks(model)]
        sizes = [parameter.numel() for parameter in model.parameters()]  # tied ones once
        head = model.lm.get_output_embeddings().weight.numel() if isinstance(model, Policy) else 0
        return cls(sum(sizes), sum(sizes) - sum(blocks), max(blocks), head, max(sizes))


@dataclass(frozen=True)
class Backward:
    """Peaks in bytes of a forward pass with gradients and of the backward pass after it."""

    forward: int
    head: int  # backward, from the loss to the last hidden state
    blocks: int  # backward, the rest


@dataclass(frozen=True)
class Sampling:
    """Bytes while rows decode together: parts, and the peak of everything."""

    cache: int
    logits: int
    peak: int


class Rehearsal:
    """Policy and scalar model ("policy", "scalar") of a command line, on fake tensors.

    dtype: of forward passes; prompt: tokens of the longest prompt. Only config.json is read of the
    models' folders. Raises UserError where there is none.
    """

    def __init__(self, args, dtype, prompt):
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.prompt, self.width = prompt, args.max_new_tokens
        config = causal_lm_config(args.policy)
        self.paths = {"policy": args.policy, "scalar": args.reward_model or args.policy}
        scalar = classifier_config(args.reward_model) if args.reward_model else config
        scalar = copy.deepcopy(scalar)
        scalar.num_labels = 1
        with _told(args.policy), self.mode:
            lm = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            classifier = AutoModelForSequenceClassification.from_config(scalar, dtype=dtype).eval()
        self.models = {"policy": Policy(lm), "scalar": ScalarModel(classifier)}
        self.units = {kind: Units.of(model) for kind, model in self.models.items()}
        for model in self.models.values():
            if args.gradient_checkpointing:
                recompute_blocks(model)
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    @contextlib.contextmanager
    def _living(self, kind):
        model = self.models[kind]
        with _told(self.paths[kind]), self.mode:
            with Living([*model.parameters(), *model.buffers()]) as living:
                yield living

    def _run(self, kind, rows):
        ids = torch.zeros(rows, self.prompt + self.width, dtype=torch.long)
        columns = torch.zeros(rows, self.width, dtype=torch.long)
        model = self.models[kind]
        if kind == "scalar":
            return model(ids, columns)
        # `Policy.forward`, but for its mask: which states it picks depends on numbers.
        hidden = model.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
        states = positions_of(hidden, columns).flatten(0, 1).clone()
        return model.of_states(states, columns.flatten(), 1.0)[0]

    @functools.cache  # noqa: B019
    def forward(self, kind, rows):
        """Peak bytes of a forward pass over `rows` rows without gradient."""
        with torch.no_grad(), self._living(kind) as living:
            self._run(kind, rows)
            return living.lap()

    @functools.cache  # noqa: B019
    def backward(self, kind, rows):
        """Forward and backward pass over one microbatch of `rows` rows."""
        peaks = []
        ((_, inner),) = self.models[kind].named_children()
        with self._living(kind) as living:

            def tell(_):
                peaks.append(living.lap())

            hook = inner.base_model.register_forward_hook(
                lambda module, inputs, out: out.last_hidden_state.register_hook(tell) and None
            )
            result = self._run(kind, rows).sum()
            peaks.append(living.lap())
            result.backward()
            peaks.append(living.lap())
            hook.remove()
        return Backward(*peaks)

    @functools.cache  # noqa: B019
    def sampling(self, rows, samples):
        """`rows` responses, `samples` of each prompt, prefilled and decoded to their last token."""
        lm, prompts = self.models["policy"].lm, max(1, rows // samples)
        rows, length = prompts * samples, self.prompt + self.width
        with torch.no_grad(), self._living("policy") as living:
            mask = torch.ones(rows, length, dtype=torch.long)
            ids = torch.zeros(prompts, self.prompt, dtype=torch.long)
            out = lm(
                input_ids=ids,
                attention_mask=mask[:prompts, : self.prompt],
                position_ids=ids,
                use_cache=True,
                logits_to_keep=1,
            )
            prefilled = out.past_key_values
            layers = [RoomLayer(layer, samples, self.width) for layer in prefilled.layers]
            cache = [of for layer in layers for of in (layer.keys, layer.values)]
            cache = sum(of.untyped_storage().nbytes() for of in cache)
            del out, prefilled
            for layer in layers:
                layer.length += self.width - 1
            logits = lm(
                input_ids=ids.new_zeros(rows, 1),
                attention_mask=mask,
                position_ids=ids.new_zeros(rows, 1),
                past_key_values=Cache(layers=layers),
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            peak = living.lap()
            before = living.now - logits.untyped_storage().nbytes()
            draw_tokens(logits, torch.zeros(rows))
            last = living.lap()
        return Sampling(cache, last - before, max(peak, last))
