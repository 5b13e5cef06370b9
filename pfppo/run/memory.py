"""Memory, told before it is spent: `train_ppo.py --plan`, and the check before a run loads.

What stays is arithmetic: n_p and n_s parameters of policy and scalar model, S ranks that a model is
sharded over, c bytes of a number in forward passes:

    parameters       4 (2 n_p + 2 n_s) / S       policy, reference, critic, reward model, fp32
    gradients        4 (n_p + n_s) / S
    optimizer        8 (n_p + n_s) / S           Adam's two moments
    gathered copy    c n_p                       the policy while it samples

What comes and goes is rehearsed (footprint.py): activations, logits, KV cache. Around them FSDP
holds whole units; the root has R numbers (H of them in the head), the largest block b; g is 1, or 0
where S = 1 and nothing is gathered:

    forward          c (R + (1 + g) b)           a block in use, and the buffer that gathers one
    head, backward   c (R + g b)
    blocks, backward c (R + H + (2 + g) b) + 4 b (1 + 1/S)     + gradients: of head, of block, and
                                                 the fp32 buffer that sums them over ranks
    end              max(c (2 R + H), c R + 4 R (1 + 1/S))     the root's own gradients

A phase needs what stays and what comes and goes in it; the peak is the largest phase.

Not covered: fragmentation, and the libraries' own memory (a GPU's context takes about 1 GB).
Responses are counted at their full length.
"""

import os
from dataclasses import dataclass

from pfppo import filters, rollout
from pfppo.config import require
from pfppo.fsdp import agreed, compute_dtype
from pfppo.run.footprint import NotRehearsed, Rehearsal

import torch

GB = 1e9
FULL = 4  # bytes of a master weight, of a gradient, of each of Adam's moments
NODE = 8  # ranks that share a host's memory, where torchrun does not say


@dataclass(frozen=True)
class Plan:
    """Bytes per rank: `stays` and `comes` are parts, `phases` sums of what lives in them; `host` is
    a rank's share of host memory, in parts."""

    stays: dict
    comes: dict
    phases: dict
    host: dict

    @property
    def peak(self):
        """(bytes, phase) of the largest phase."""
        return max((size, phase) for phase, size in self.phases.items())


class Planner:
    """Plans of one command line on `world` ranks, forward passes in `dtype`.

    prompt: tokens of the longest prompt, None: --max_prompt_tokens; rehearsal: another Planner's,
    of the same models and lengths. Raises UserError where sizes do not divide or a model's
    config.json cannot be read.
    """

    def __init__(self, args, world, dtype, prompt=None, rehearsal=None):
        self.args, self.world, self.size = args, world, dtype.itemsize
        N = args.samples_per_prompt
        kept = filters.kept_per_prompt(filters.load_filter(args.filter, N), N)
        self.sizes = rollout.check_sizes(args, kept, world)
        self.shards = args.shard_group_size or world
        require(
            world % self.shards == 0,
            f"--shard_group_size {self.shards}: does not divide the {world} ranks there are",
        )
        self.rehearsal = rehearsal or Rehearsal(args, dtype, prompt or args.max_prompt_tokens)
        self.policy, self.scalar = (self.rehearsal.units[kind] for kind in ("policy", "scalar"))
        self.share = args.minibatch // world  # rows per rank of a minibatch
        self.kept = args.prompts_per_step * (kept or N) // world
        self.sampled = args.prompts_per_step * N // world
        self.microbatch = min(args.microbatch, self.share)
        self.sampling_batch = min(args.sampling_batch, self.sampled)

    def plan(self, microbatch=None, sampling_batch=None):
        """The Plan with these sizes; by default the command line's."""
        microbatch = microbatch or self.microbatch
        stays, host = self._stays()
        passes = {kind: self.rehearsal.backward(kind, microbatch) for kind in ("policy", "scalar")}
        rows = sampling_batch or self.sampling_batch
        sampling = self.rehearsal.sampling(rows, self.args.samples_per_prompt)
        comes = {
            "gathered copy": self.size * self.policy.all,
            "KV cache": sampling.cache,
            "logits": sampling.logits,
            "activations": max(max(p.forward, p.head, p.blocks) for p in passes.values()),
        }
        base = stays["parameters"] + stays["optimizer"]
        phases = {"load": stays["parameters"]} | self._sampling(base, rows)
        base += self._rollout()
        whole = {
            kind: self.rehearsal.forward(kind, microbatch) + self._unit_bytes(kind)["forward"]
            for kind in ("policy", "scalar")
        }
        if self.args.reward_model:
            phases["rewards"] = base + whole["scalar"]
        phases["log-probs"] = base + max(whole.values())
        phases["update"] = base + self._update(stays["gradients"], passes, microbatch)
        return Plan(stays, comes, phases, host)

    def _stays(self):
        """{part: bytes} on the device, and on the host."""
        args, policy, scalar = self.args, self.policy.all, self.scalar.all
        judge = scalar if args.reward_model else 0
        trained, frozen = policy + scalar, policy + judge
        waits = policy * args.offload_ref + judge * args.offload_reward
        numbers = {"parameters": trained, "gradients": trained, "optimizer": 2 * trained}
        away = dict.fromkeys(numbers, 0)
        if args.offload_optimizer:
            numbers, away = away, numbers
        numbers["parameters"] += frozen - waits
        away["parameters"] += waits
        away = {f"offloaded {name}": n for name, n in away.items()}
        away["copy for a checkpoint"] = 3 * trained  # weights and moments
        return (
            {name: FULL * n // self.shards for name, n in part.items()} for part in (numbers, away)
        )

    def _sampling(self, base, rows):
        """Phases in which the policy is gathered. One fp32 parameter is whole while it is cast."""
        args, copy = self.args, self.size * self.policy.all
        cast = FULL * self.policy.largest * (self.shards > 1)
        found = self.rehearsal.sampling(rows, args.samples_per_prompt).peak
        phases = {"sampling": base + copy + max(cast, found)}
        for name in ("validation", "test"):  # one response per problem
            problems = _lines(getattr(args, name))
            rows = min(args.sampling_batch, -(-problems // self.world))
            if rows:
                copies = copy * (2 if name == "test" else 1)  # the best policy beside another
                found = self.rehearsal.sampling(rows, 1).peak
                phases[name] = base + copies + max(cast, found)
        return phases

    def _rollout(self):
        """Token ids of all samples, and ids and 8 numbers per token of those that are kept."""
        length, width = self.rehearsal.prompt + self.rehearsal.width, self.rehearsal.width
        return self.sampled * length * 8 + self.kept * (length * 8 + width * FULL * 8)

    def _unit_bytes(self, kind):
        """{moment: bytes that FSDP holds for a model around what was rehearsed}."""
        units, size, several = self.rehearsal.units[kind], self.size, self.shards > 1
        root, block, head = units.root, units.block, units.head
        found = {
            "forward": size * (root + (1 + several) * block),
            "head": size * (root + several * block),
            "blocks": size * (root + head + (2 + several) * block)
            + FULL * (block + block // self.shards),
            "end": max(size * (2 * root + head), size * root + FULL * (root + root // self.shards)),
        }
        if self.args.offload_optimizer:  # a slice is on the device before it is cast and gathered
            found = {moment: n + FULL * block // self.shards for moment, n in found.items()}
        return found

    def _update(self, gradients, passes, microbatch):
        """Peak over both models, one after the other, and over the moments of a backward pass."""
        peaks = [gradients]  # of the optimizer's step
        for kind, found in passes.items():
            held, own = gradients, 0  # of earlier microbatches
            if microbatch == self.share:  # the only one: gradients are made as activations go
                own = gradients * self.rehearsal.units[kind].all
                own //= self.policy.all + self.scalar.all
                held = 0 if kind == "policy" else gradients - own
            units = self._unit_bytes(kind)
            peaks += [held + units[name] + getattr(found, name) for name in ("forward", "head")]
            peaks += [held + units["blocks"] + found.blocks, held + units["end"] + own]
        return max(peaks)

    def largest(self, limit):
        """(microbatch, sampling batch) that fit into `limit` bytes; 0 where none does.

        Microbatches are divisors of a rank's rows of a minibatch, sampling batches multiples of the
        samples per prompt.
        """
        N = self.args.samples_per_prompt

        def fits(microbatch, sampling_batch, names):
            phases = self.plan(microbatch, sampling_batch).phases
            return all(phases[name] <= limit for name in names if name in phases)

        microbatches = [rows for rows in range(1, self.share + 1) if self.share % rows == 0]
        passes = ("rewards", "log-probs", "update")
        return (
            _last(microbatches, lambda rows: fits(rows, N, passes)),
            _last(range(N, self.sampled + 1, N), lambda rows: fits(1, rows, ("sampling",))),
        )


def _last(values, fits):
    """The last of ascending values that fits, 0 if none does."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(values[middle]) else (low, middle)
    return values[low - 1] if low else 0


def _lines(path):
    """Problems in a JSONL file, 0 where there is none."""
    if not path or not os.path.isfile(path):
        return 0
    with open(path, "rb") as file:
        return sum(bool(line.strip()) for line in file)


def rows_of(planner, limit):
    """[(name, text)] of all that is said; limit: bytes of a device, 0 where that is not known."""
    plan = planner.plan()
    peak, _ = plan.peak
    named = [*plan.stays.items(), *plan.comes.items()]
    named += [(f"phase {name}", size) for name, size in plan.phases.items()]
    named += [("peak", peak)]
    host = sum(plan.host.values())
    named += [("host memory", host), ("host memory of a node", host * ranks_of_node(planner.world))]
    rows = [(name, f"{size / GB:.3f}") for name, size in named]
    if limit:
        microbatch, sampling_batch = planner.largest(limit)
        rows.append((f"fits into {limit / GB:.4g} GB", "yes" if peak <= limit else "no"))
        rows.append(("largest microbatch", str(microbatch or "none")))
        rows.append(("largest sampling batch", str(sampling_batch or "none")))
    return rows


def ranks_of_node(world):
    """As torchrun says, or all up to 8."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", min(world, NODE)))


def show(args):
    """`--plan`: print what a run on --world_size ranks would need. No ranks, no weights."""
    if int(os.environ.get("RANK", 0)):
        return
    world = args.world_size or int(os.environ.get("WORLD_SIZE", 1))
    cpu = args.device == "cpu" or (args.device == "auto" and not args.device_memory and _no_gpu())
    dtype = {"auto": "float32" if cpu else "bfloat16"}.get(args.param_dtype, args.param_dtype)
    planner = Planner(args, world, getattr(torch, dtype))
    print(planner.sizes)
    print(
        f"memory: GB per rank, {world} ranks, sharded over {planner.shards}, {dtype} in forward "
        f"passes; policy {planner.policy.all / GB:.3f} G parameters, reward model and critic "
        f"{planner.scalar.all / GB:.3f} G; rows of {args.max_prompt_tokens} + "
        f"{args.max_new_tokens} tokens, {planner.sampling_batch} of them decode together; a node "
        f"has {ranks_of_node(world)} ranks"
    )
    for name, text in rows_of(planner, device_bytes(args)):
        print(f"    {name:26} {text:>10}")


def _no_gpu():
    return not torch.cuda.is_available()


def device_bytes(args):
    """Memory of a device: --device_memory, or what the GPU has, or 0 where that is not known."""
    if args.device_memory or args.device == "cpu" or _no_gpu():
        return args.device_memory * GB
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def require_fits(args, ranks, prompt=None):
    """Raise UserError if a run cannot fit into its devices, or what it offloads into host memory.

    prompt: tokens of the longest prompt. Nothing is rehearsed where no limit is known: on a CPU
    without --device_memory and without offloading. A collective.
    """
    limit = device_bytes(args)
    offloads = args.offload_ref or args.offload_reward or args.offload_optimizer
    if not (limit or offloads):
        return
    with agreed(ranks):
        if ranks.local == 0:
            dtype = compute_dtype(args.param_dtype, ranks)
            try:
                _check(Planner(args, ranks.world, dtype, prompt), limit, offloads)
            except NotRehearsed as error:  # no reason not to run
                ranks.say(str(error))


def _check(planner, limit, offloads):
    args, plan = planner.args, planner.plan()
    peak, phase = plan.peak
    where = f"--device_memory {args.device_memory:g}" if args.device_memory else "this GPU"
    parts = ", ".join(f"{name} {size / GB:.3g}" for name, size in plan.stays.items())
    require(
        not limit or peak <= limit,
        f"{where}: {phase} needs {peak / GB:.3g} GB per rank (of it {parts}), found "
        f"{limit / GB:.3g}, with --microbatch {planner.microbatch} and --sampling_batch "
        f"{planner.sampling_batch}: lower these, give --gradient_checkpointing, offload, or use "
        "more ranks; --plan says what would fit",
    )
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    here = sum(plan.host.values()) * ranks_of_node(1)
    require(
        not offloads or here <= there,
        f"offloading: the ranks of this node need {here / GB:.3g} GB of host memory, found "
        f"{there / GB:.3g}: offload less, or use more nodes",
    )
