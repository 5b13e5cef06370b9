"""The memory of a run, estimated before it is spent: `train_ppo.py --plan`, and the check before a
run loads its models.

What a rank holds is arithmetic. With n_p and n_s parameters of policy and scalar model, sharded
over S ranks, and c bytes of a number in forward passes:

    parameters       4 (2 n_p + 2 n_s) / S    policy, reference, critic, reward model, in fp32
    gradients        4 (n_p + n_s) / S        in the update
    optimizer        8 (n_p + n_s) / S        Adam's two moments
    gathered copy    c n_p                    the policy while it samples

Activations, logits and KV cache come from no formula that knows one architecture: the very model
runs on fake tensors, which have shapes and no numbers, and a counter follows the storages that are
alive. A phase needs what is held and what its passes add; the peak is the largest phase, and may
take `USABLE` of a device's memory: allocator and context (about 1 GB on a GPU) need the rest.

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

from pfppo import filters, fsdp, model, rollout, sampler
from pfppo.config import UserError, reason, require

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

GB = 1e9
USABLE = 0.92  # share of a device's memory
FULL = 4  # bytes of a master weight, of a gradient, of each of Adam's moments


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
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
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

    Passes count what FSDP gathers too: the root all the time, blocks in turn (the next one is on
    its way where there are several `shards`), and a unit's whole gradients. They raise UserError
    naming `path` where the model needs numbers.
    """

    def __init__(self, net, path, args, shards, prompt):
        self.net, self.path, self.prompt, self.new = net, path, prompt, args.max_new_tokens
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            net.to_empty(device="cpu")
            next(net.children()).tie_weights()
        if args.gradient_checkpointing:
            fsdp.recompute_blocks(net)
        blocks, size = fsdp.find_blocks(net), next(net.parameters()).itemsize
        counts = [sum(p.numel() for p in block.parameters()) for block in blocks]
        self.count = sum(p.numel() for p in net.parameters())  # tied ones once
        root, block = self.count - sum(counts), size * max(counts) * (1 + (shards > 1))
        self.copy, self.root = size * self.count, size * root
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
            raise UserError(f"{self.path}: {why}") from error

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
    def sampling(self, rows, samples):
        """(peak, KV cache, logits and their copies) of `rows` responses, `samples` of each prompt,
        at their last token. Of a policy."""
        lm, prompts = self.net.lm, max(1, rows // samples)
        with torch.no_grad(), self._counted() as live:
            # `sampler.prefill`, but for its lengths: they depend on numbers.
            ids = torch.zeros(prompts, self.prompt, dtype=torch.long)
            given = {"input_ids": ids, "attention_mask": ids + 1, "position_ids": ids}
            cache = lm(**given, use_cache=True, logits_to_keep=1).past_key_values
            layers = [sampler.RoomLayer(layer, samples, self.new) for layer in cache.layers]
            del cache
            for layer in layers:
                layer.length += self.new - 1
            tokens = torch.zeros(prompts * samples, dtype=torch.long)
            mask = torch.ones(len(tokens), self.prompt + self.new, dtype=torch.long)
            state = sampler.Live(layers, tokens, tokens, tokens, mask)
            logits = sampler.decode_one(lm, state, tokens)
            with LiveBytes([logits]) as drawing:
                sampler.draw_tokens(logits, torch.zeros(len(tokens)))
        cache = sum(kept.nbytes for layer in layers for kept in (layer.keys, layer.values))
        return live.peak, cache, logits.nbytes + drawing.peak


class Plan:
    """What a command line needs on `world` ranks, with forward passes in `dtype`: bytes per rank.

    prompt: tokens of the longest prompt, None: --max_prompt_tokens. Raises UserError where a
    model's config.json cannot be read.
    """

    def __init__(self, args, world, dtype, prompt=None):
        self.args, self.world, shards = args, world, args.shard_group_size or world
        self.share = args.minibatch // world  # rows per rank of a minibatch
        self.sampled = args.prompts_per_step * args.samples_per_prompt // world
        self.microbatch = min(args.microbatch, self.share)
        self.sampling_batch = min(args.sampling_batch, self.sampled)
        path, rm = args.policy, args.reward_model
        lm = model.empty_causal_lm(model.causal_lm_config(path), dtype)
        config = model.classifier_config(rm) if rm else model.causal_lm_config(path)
        classifier = model.empty_classifier(config).to(dtype)
        rest = args, shards, prompt or args.max_prompt_tokens
        self.policy = FakeModel(model.Policy(lm), path, *rest)
        self.scalar = FakeModel(model.ScalarModel(classifier), rm or path, *rest)

        policy, scalar = self.policy.count, self.scalar.count
        trained, frozen = policy + scalar, policy + scalar * bool(rm)
        offloaded = policy * args.offload_ref + scalar * bool(rm) * args.offload_reward
        here = 0 if args.offload_optimizer else trained
        numbers = {"parameters": here + frozen - offloaded, "gradients": here}
        numbers["optimizer"] = 2 * here
        self.device = {name: FULL * n // shards for name, n in numbers.items()}
        # With a copy of weights and moments, which is written as a checkpoint.
        self.host = FULL * (offloaded + 4 * (trained - here) + 3 * trained) // shards

    def phases(self, microbatch=0, sampling_batch=0):
        """{phase: bytes}; 0: the command line's sizes."""
        args, policy, scalar = self.args, self.policy, self.scalar
        held = self.device["parameters"] + self.device["optimizer"]
        rows, copies = sampling_batch or self.sampling_batch, policy.copy
        peak, *_ = policy.sampling(rows, args.samples_per_prompt)
        phases = {"load": self.device["parameters"], "sampling": held + copies + peak}
        for name in ("validation", "test"):  # one response per problem
            if os.path.isfile(file := getattr(args, name)):
                problems = len(Path(file).read_bytes().splitlines())
                rows = min(args.sampling_batch, -(-problems // self.world))
                phases[name] = held + copies + policy.sampling(rows, 1)[0]
            copies += policy.copy  # the test has the best policy beside another
        rows = microbatch or self.microbatch
        if args.reward_model:
            phases["rewards"] = held + scalar.passes(rows, False)
        phases["log-probs"] = held + max(policy.passes(rows, False), scalar.passes(rows, False))
        gradients = self.device["gradients"]
        made = [gradients] * 3  # before the actor's pass, before the critic's, and after it
        if rows == self.share:  # a single microbatch: they come as activations go
            made = [0, gradients * policy.count // (policy.count + scalar.count), gradients]
        actor = max(made[0] + policy.passes(rows, True), made[1] + policy.end)
        critic = max(made[1] + scalar.passes(rows, True), made[2] + scalar.end)
        return phases | {"update": held + max(actor, critic)}

    def largest(self, limit):
        """(microbatch, sampling batch) that fit into `limit` bytes, 0 where none does: a divisor of
        a rank's rows of a minibatch, a multiple of the samples per prompt."""
        N = self.args.samples_per_prompt
        divisors = [n for n in range(1, self.share + 1) if self.share % n == 0]
        multiples = range(N, self.sampled + 1, N)
        microbatches = bisect_right(divisors, limit, key=lambda n: self.phases(n)["update"])
        batches = bisect_right(multiples, limit, key=lambda n: self.phases(0, n)["sampling"])
        return [0, *divisors][microbatches], [0, *multiples][batches]


def ranks_of_node(world):
    """As torchrun says; where it does not, all up to 8."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", min(world, 8)))


def device_bytes(args):
    """Memory of a device: --device_memory, or what the GPU has, or 0 where that is not known."""
    if args.device_memory or args.device == "cpu" or not torch.cuda.is_available():
        return args.device_memory * GB
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def show(args):
    """`--plan`: print what a run on --world_size ranks would need. No ranks, no weights."""
    if int(os.environ.get("RANK", 0)):
        return
    world, N = args.world_size or int(os.environ.get("WORLD_SIZE", 1)), args.samples_per_prompt
    shards, memory = args.shard_group_size or world, device_bytes(args)
    kept = filters.kept_per_prompt(filters.load_filter(args.filter, N), N)
    print(rollout.check_sizes(args, kept, world))
    message = f"--shard_group_size {shards}: does not divide the {world} ranks there are"
    require(world % shards == 0, message)
    on_gpu = args.device == "cuda" or (args.device == "auto" and memory)
    dtype = {"auto": "bfloat16" if on_gpu else "float32"}.get(args.param_dtype, args.param_dtype)
    plan = Plan(args, world, getattr(torch, dtype))
    print(
        f"memory: GB per rank, {world} ranks ({ranks_of_node(world)} on a node), sharded over "
        f"{shards}, {dtype} in forward passes; policy {plan.policy.count / GB:.3f} G parameters, "
        f"reward model and critic {plan.scalar.count / GB:.3f} G; rows of {args.max_prompt_tokens} "
        f"+ {args.max_new_tokens} tokens, {plan.sampling_batch} of them decode together"
    )
    phases, (_, cache, logits) = plan.phases(), plan.policy.sampling(plan.sampling_batch, N)
    passes = max(fake.passes(plan.microbatch, True) for fake in (plan.policy, plan.scalar))
    sizes = plan.device | {"gathered copy": plan.policy.copy, "KV cache": cache, "logits": logits}
    sizes |= {"activations": passes} | {f"phase {name}": size for name, size in phases.items()}
    sizes |= {"peak": max(phases.values()), "host memory": plan.host}
    sizes |= {"host memory of a node": plan.host * ranks_of_node(world)}
    rows = {name: f"{size / GB:.3f}" for name, size in sizes.items()}
    if limit := USABLE * memory:
        fits = f"fits into {USABLE:.0%} of {memory / GB:.4g} GB"
        rows[fits] = "yes" if sizes["peak"] <= limit else "no"
        microbatch, sampling_batch = plan.largest(limit)
        rows["largest microbatch"] = microbatch or "none"
        rows["largest sampling batch"] = sampling_batch or "none"
    for name, value in rows.items():
        print(f"    {name:26} {value:>10}")


def require_fits(args, ranks, prompt=None):
    """Raise UserError if a run cannot fit into its devices, or what it offloads into host memory.

    prompt: tokens of the longest prompt. Nothing is estimated where no limit is known: on a CPU
    without --device_memory and without offloading. A collective.
    """
    memory = device_bytes(args)
    offloads = args.offload_ref or args.offload_reward or args.offload_optimizer
    with fsdp.agreed(ranks):
        if ranks.local or not (memory or offloads):
            return
        plan = Plan(args, ranks.world, fsdp.compute_dtype(args.param_dtype, ranks), prompt)
        try:
            phases = plan.phases()
        except UserError as error:  # no estimate is no reason not to run
            return ranks.say(str(error))
        where = f"--device_memory {args.device_memory:g}" if args.device_memory else "this GPU"
        peak, phase = max((size, phase) for phase, size in phases.items())
        parts = ", ".join(f"{name} {size / GB:.3g}" for name, size in plan.device.items())
        require(
            not memory or peak <= USABLE * memory,
            f"{where}: {phase} needs {peak / GB:.3g} GB per rank (of it {parts}), found "
            f"{USABLE * memory / GB:.3g} ({USABLE:.0%}: allocator and context need the rest), with "
            f"--microbatch {plan.microbatch} and --sampling_batch {plan.sampling_batch}: lower "
            "these, give --gradient_checkpointing, offload, or use more ranks; --plan says what "
            "would fit",
        )
        host = plan.host * ranks_of_node(1)
        installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        require(
            not offloads or host <= installed,
            f"offloading: the ranks of this node need {host / GB:.3g} GB of host memory, found "
            f"{installed / GB:.3g}: offload less, or use more nodes",
        )
