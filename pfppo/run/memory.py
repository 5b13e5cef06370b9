"""The memory that a run needs, estimated: whether it fits is fitting.py's to say.

What a rank of train_ppo.py holds is arithmetic. With n_p and n_s parameters of policy and scalar
model, sharded over S ranks, and c bytes of a number in forward passes:

    parameters       4 (2 n_p + 2 n_s) / S    policy, reference, critic, reward model, in fp32
    gradients        4 (n_p + n_s) / S        in the update
    optimizer        8 (n_p + n_s) / S        Adam's two moments
    gathered copy    c n_p                    the policy while it samples

Activations, logits and KV cache come from no formula that knows one architecture: the very model
runs on fake tensors, which have shapes and no numbers, and a counter follows the storages that are
alive.

Not covered: what kernels use for themselves; L x L scores of attention, which fused kernels do not
keep, where a GPU has none for a model (heads of unusual width). Responses count at full length.
"""

import contextlib
import functools
import logging
import os
from bisect import bisect_right
from pathlib import Path
from unittest.mock import patch

from pfppo import fsdp, model, sampler
from pfppo.answers import CHUNK, JUDGED, PROBE
from pfppo.config import UserError, divisors, parts, reason
from pfppo.reward import load_card
from pfppo.slots import RoomLayer, Slots

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

FULL = 4  # bytes of a master weight, of a gradient, of each of Adam's moments
NEAR = 0.97  # of the most rows that fit: as good as the most
MOST = 1024  # rows that decode together: beyond them matrix products gain nothing


class NoEstimate(UserError):
    """A model's memory cannot be estimated: its operators need numbers."""


class LiveBytes(TorchDispatchMode):
    """Counts bytes of storages that are born inside and alive; those of `outside` are free."""

    def __init__(self, outside, start=0):
        super().__init__()
        self.now = self.peak = start
        storages = [tensor.untyped_storage() for tensor in outside]
        # Weak references of torch's own: an address is not used again while we have one.
        self.known = {storage._cdata: (StorageWeakRef(storage), 0) for storage in storages}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = (leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
        for storage in map(torch.Tensor.untyped_storage, tensors):
            if storage._cdata not in self.known:
                self.known[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.add(storage.nbytes())
        return out

    def add(self, size):
        """Count `size` bytes besides, or no longer if it is negative."""
        self.now += size
        if self.now > self.peak:  # the dead are looked for only where they could matter
            dead = [key for key, (storage, _) in self.known.items() if storage.expired()]
            self.now -= sum(self.known.pop(key)[1] for key in dead)
        self.peak = max(self.peak, self.now)


class FakeModel:
    """A policy or scalar model (`net`, on meta) on fake tensors. All sizes are bytes.

    Passes count what FSDP gathers: the root all the time, blocks in turn (two where there are
    several `shards`), a unit's whole gradients. NoEstimate where the model needs numbers.
    """

    def __init__(self, net, path, prompt, new, shards=1, recompute=False):
        self.net, self.path, self.prompt, self.new, self.how = net, path, prompt, new, {}
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            net.to_empty(device="cpu")
            next(net.children()).tie_weights()
        if recompute:
            fsdp.recompute_blocks(net)
        blocks, size = fsdp.find_blocks(net), next(net.parameters()).itemsize
        counts = [sum(p.numel() for p in block.parameters()) for block in blocks]
        self.count = sum(p.numel() for p in net.parameters())  # tied ones once
        root, block = self.count - sum(counts), size * max(counts) * (1 + (shards > 1))
        self.copy, self.root = size * self.count, size * root
        matrices = [p for p in net.parameters() if p.ndim > 1]  # [a, b], of experts [n, a, b]
        self.width = sum(p.numel() // p.shape[-1] + p.numel() // p.shape[-2] for p in matrices)
        self.end = self.root + FULL * (root + root // shards)  # its gradients, and their sum

        def release(module, *_):
            module.zero_grad()
            self.live.add(-block)

        for module in blocks:
            module.register_forward_pre_hook(lambda *_: self.live.add(block))
            module.register_forward_hook(release)
            module.register_full_backward_pre_hook(lambda *_: self.live.add(block))
            module.register_full_backward_hook(release)

    @contextlib.contextmanager
    def _counted(self, start=0):
        """LiveBytes of what runs on fake tensors inside."""
        # transformers asks position ids whether several sequences are packed in a row. Ours never
        # are, and fake ones have no answer: it would make an L x L mask.
        unpacked = patch.object(masking_utils, "find_packed_sequence_indices", lambda ids: None)
        silent = patch.object(logging.getLogger("torch._subclasses.fake_tensor"), "disabled", True)
        weights = [*self.net.parameters(), *self.net.buffers()]
        try:
            with self.mode, unpacked, silent, LiveBytes(weights, start) as self.live:
                yield self.live
        except Exception as error:  # an operator without a fake kernel fails in its own way
            why = f"no estimate of memory, its operators need real tensors: {reason(error)}"
            raise NoEstimate(f"{self.path}: {why}") from error

    @functools.cache  # noqa: B019
    def passes(self, rows, train):
        """Peak of a forward pass over so many rows and, to train, of the backward pass."""
        with torch.set_grad_enabled(train), self._counted(self.root) as live:
            ids = torch.zeros(rows, self.prompt + self.new, dtype=torch.long)
            columns = torch.zeros(rows, self.new, dtype=torch.long)
            if isinstance(self.net, model.ScalarModel):
                out = self.net(ids, columns)
            else:  # `Policy.forward`, but for its mask: which states it picks depends on numbers
                hidden = self.net.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
                states = model.positions_of(hidden, columns).flatten(0, 1).clone()
                out, _ = self.net.of_states(states, columns.flatten(), 1.0)
                del hidden, states
            if train:
                out.sum().backward()
                self.net.zero_grad()
        return live.peak

    @functools.cache  # noqa: B019
    def sampling(self, rows, samples, total=0):
        """(peak, KV cache, logits and their copies) of `rows` slots at their last token, for
        `total` responses (0: as many), `samples` of each prompt. Of a policy."""
        lm = self.net.lm
        prompts = min(-(-rows // samples), max(1, sampler.READ // self.prompt))

        def prefill():  # `sampler.prefill`, but for its lengths: they depend on numbers
            ids = torch.zeros(prompts, self.prompt, dtype=torch.long)
            mask = ids + 1 if prompts > 1 else None  # one alone is not padded, and needs none
            given = {"input_ids": ids, "attention_mask": mask, "position_ids": ids}
            return lm(**given, use_cache=True, logits_to_keep=1).past_key_values.layers

        with torch.no_grad(), self._counted() as live:
            slots = Slots(total or rows, rows, self.prompt, self.new, [0], "cpu")
            for past in (layers := prefill()):
                slots.layers.append(layer := RoomLayer(past, rows, slots.columns))
                layer.put(past, slots.row, torch.arange(rows))
                layer.column = slots.columns - 1
            del layers, past
            waiting = prefill() if prompts * samples < rows or rows < total else None
            if waiting:  # read beside the block, and there until the last of their rows has a slot
                slots.layers[0].rewind(0)
            logits = sampler.decode_one(lm, slots)
            with LiveBytes([logits]) as drawing:
                sampler.draw_tokens(logits, torch.zeros(rows), never=[0], **self.how)
        cache = sum(kept.nbytes for layer in slots.layers for kept in (layer.keys, layer.values))
        return live.peak, cache, logits.nbytes + drawing.peak


def fake_policy(path, dtype, *sizes):
    """FakeModel of a folder's causal LM; sizes: its prompt, new, shards, recompute."""
    lm = model.empty_causal_lm(model.causal_lm_config(path), dtype)
    return FakeModel(model.Policy(lm), path, *sizes)


def fake_scalar(reward_model, policy, dtype, *sizes):
    """FakeModel of a reward model's folder, or where that is "" of one on a policy's backbone."""
    config = model.classifier_config(reward_model) if reward_model else None
    classifier = model.empty_classifier(config or model.causal_lm_config(policy)).to(dtype)
    return FakeModel(model.ScalarModel(classifier), reward_model or policy, *sizes)


class Needs:
    """Bytes per rank that a script needs, phase by phase. A subclass says of what it holds, of
    `draws` and of `training`.

    device: {what is held: bytes}; draws: {phase of sampling: (bytes held in it, rows that a rank
    draws, samples of each prompt)}; microbatch: rows of training, 0: there is none.
    """

    policy, scalar, device, draws, microbatch = None, None, {}, {}, 0
    size = staticmethod(int)  # slots for so many rows: fsdp.rounded with --compile
    others = "or take a device with more memory", "or use more ranks"  # help drawing, and training

    @property
    def rows(self):
        """The most rows that a phase draws, from 1 on."""
        return max([1, *(rows for _, rows, _ in self.draws.values())])

    def drawing(self, rows):
        """{phase: bytes} of sampling where so many rows decode together."""
        phases = {}
        for phase, (held, total, samples) in self.draws.items():
            slots = min(rows, self.size(total))
            peak, _, _ = self.policy.sampling(slots, samples, max(slots, total))
            phases[phase] = held + 8 * total * self.policy.new + peak  # it draws with fp64
        return phases

    def training(self):
        """{phase: bytes} of what does not sample, where it takes most."""
        return {}

    def at_most(self, rows):
        """Bytes beyond all that a phase could need, without passes: tiny models are no question. A
        product with a matrix [a, b] has a + b numbers of a token; what is around it has more."""
        rows = max(rows, 2 * self.microbatch, JUDGED)
        size = sum(20 * total * self.policy.new for _, total, _ in self.draws.values())
        for fake in filter(None, (self.policy, self.scalar)):
            tokens = rows * (fake.prompt + fake.new)
            size += FULL * (10 * fake.count + 16 * fake.width * tokens)
        return size

    def rows_within(self, limit):
        """How many rows can decode together in `limit` bytes, at most MOST; 0: not even one.
        Estimates take their time: few sizes are tried, each NEAR the next."""

        def size(rows):
            return max(self.drawing(rows).values(), default=0)

        if size(most := min(MOST, self.rows)) <= limit:
            return most
        sizes = sorted({max(1, round(most * NEAR**i)) for i in range(250)})
        return [0, *sizes][bisect_right(sizes, limit, key=size)]


class Plan(Needs):
    """What train_ppo.py needs on `world` ranks, with forward passes in `dtype`. prompt: tokens of
    the longest prompt, None: --max_prompt_tokens. Raises UserError."""

    others = ("offload, or use more ranks; --plan says what would fit",) * 2

    def __init__(self, args, world, dtype, prompt=None):
        self.args, self.world, shards = args, world, args.shard_group_size or world
        self.share = args.minibatch // world  # rows per rank of a minibatch
        self.microbatch = min(args.microbatch, self.share)
        sizes = prompt or args.max_prompt_tokens, args.max_new_tokens
        how, paths = (*sizes, shards, args.gradient_checkpointing), parts(args.reward_model)
        self.policy = fake_policy(args.policy, dtype, *how)
        self.scalar = fake_scalar(paths[0] if paths else "", args.policy, dtype, *how)

        policy, scalar, judges = self.policy.count, self.scalar.count, len(paths)  # of one size
        trained, frozen = policy + scalar, policy + scalar * judges
        offloaded = policy * args.offload_ref + scalar * judges * args.offload_reward
        here = 0 if args.offload_optimizer else trained
        held = {"parameters": here + frozen - offloaded, "gradients": here, "optimizer": 2 * here}
        self.device = {name: FULL * n // shards for name, n in held.items()}
        # With a copy of weights and moments, which is written as a checkpoint.
        self.host = FULL * (offloaded + 4 * (trained - here) + 3 * trained) // shards
        self.held = self.device["parameters"] + self.device["optimizer"]
        self.draws = self._draws()
        self.sampling_batch = min(args.sampling_batch or CHUNK, self.rows)

    def _draws(self):
        args, copy, N = self.args, self.policy.copy, self.args.samples_per_prompt
        held = self.held + copy
        draws = {"sampling": (held, args.prompts_per_step * N // self.world, N)}
        rest = {}  # one response per problem
        for name in ("prompts", "validation", "test"):
            if os.path.isfile(file := getattr(args, name)):
                rest[name] = len(Path(file).read_bytes().splitlines())
        probe = min(PROBE, rest.pop("prompts", PROBE))
        paths = parts(args.reward_model)
        if args.reward != "model" or len(paths) != 1 or load_card(paths[0]) is None:
            rest = {"normaliser": probe} | rest
        for name, problems in rest.items():  # the test has the best policy beside another
            draws[name] = held + copy * (name == "test"), -(-problems // self.world), 1
        return draws

    def training(self, microbatch=0):
        """0: the command line's. What passes without gradient take is less."""
        policy, scalar, held = self.policy, self.scalar, self.held
        rows, gradients = microbatch or self.microbatch, self.device["gradients"]
        made = [gradients] * 3  # before the actor's pass, before the critic's, and after it
        if rows == self.share:  # a single microbatch: they come as activations go
            made = [0, gradients * policy.count // (policy.count + scalar.count), gradients]
        actor = max(made[0] + policy.passes(rows, True), made[1] + policy.end)
        critic = max(made[1] + scalar.passes(rows, True), made[2] + scalar.end)
        return {"update": held + max(actor, critic)}

    def phases(self, rows=0):
        """{phase: bytes} where so many rows decode together; 0: as the command line says."""
        phases = {"load": self.device["parameters"]} | self.drawing(rows or self.sampling_batch)
        policy, scalar = (x.passes(self.microbatch, False) for x in (self.policy, self.scalar))
        if self.args.reward_model:
            phases["rewards"] = self.held + scalar
        phases["log-probs"] = self.held + max(policy, scalar)
        return phases | self.training()

    def microbatch_within(self, limit):
        """The largest that fits into `limit` bytes, a divisor of a rank's rows of a minibatch; 0
        where none does."""
        sizes = divisors(self.share)
        fitting = bisect_right(sizes, limit, key=lambda n: self.training(n)["update"])
        return [0, *sizes][fitting]


class RewardPlan(Needs):
    """What train_rm.py needs. prompt, new: tokens of the longest prompt and response; prompts:
    how many of them are sampled from, 0: none."""

    def __init__(self, args, world, dtype, prompt, new, prompts=0):
        N, pairs = args.samples_per_prompt, -(-args.batch // world)
        shards = args.shard_group_size or world
        self.microbatch = min(args.microbatch, pairs)
        self.whole = self.microbatch == pairs  # gradients come as activations go
        sizes = prompt + new - 1, 1, shards, args.gradient_checkpointing  # one score at the end
        self.scalar = fake_scalar("", args.policy, dtype, *sizes)
        held = {"parameters": 1, "gradients": 1, "optimizer": 2}
        self.device = {name: n * FULL * self.scalar.count // shards for name, n in held.items()}
        if prompts:
            self.policy = fake_policy(args.policy, dtype, prompt, new)
            self.draws = {"sampling": (self.policy.copy, -(-prompts // world) * N, N)}

    def training(self):
        held, gradients = sum(self.device.values()), self.device["gradients"]
        passes = self.scalar.passes(2 * self.microbatch, True) - self.whole * gradients
        return {"training": held + max(passes, self.scalar.end)}


class AnswerPlan(Needs):
    """What eval_code.py needs. prompt: tokens of the longest of so many prompts."""

    def __init__(self, args, world, dtype, prompt, prompts):
        N, sizes = args.samples_per_problem, (prompt, args.max_new_tokens)
        self.policy = fake_policy(args.policy, dtype, *sizes)
        self.policy.how = {"top_k": args.top_k, "top_p": args.top_p}  # which sort
        if paths := parts(args.reward_model):
            self.scalar = fake_scalar(paths[0], "", dtype, *sizes, world)
            self.device = {"reward models": FULL * self.scalar.count * len(paths) // world}
        self.held = self.policy.copy + sum(self.device.values())
        rows = min(-(-prompts // world), max(1, CHUNK // N)) * N
        self.draws = {"sampling": (self.held, rows, N)}

    def training(self):
        return {"rewards": self.held + self.scalar.passes(JUDGED, False)} if self.device else {}
