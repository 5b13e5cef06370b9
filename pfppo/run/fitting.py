"""Whether a run fits into memory, told before it loads a model, and how many rows decode together.

    rows_at_once    of train_ppo.py, train_rm.py, eval_code.py, each with its own needs (memory.py)
    show            `train_ppo.py --plan`

A phase may take `USABLE` of a GPU's memory, or of what a CPU's machine has left now, which its
ranks share. Nothing is estimated where that is not known.
"""

import os
from pathlib import Path

from pfppo import filters, fsdp, rollout
from pfppo.answers import CHUNK, JUDGED
from pfppo.config import UserError, divisors, near, require
from pfppo.run.memory import MOST, NoEstimate, Plan

import torch

GB = 1e9
USABLE = 0.92  # share of a device; allocator and context (about 1 GB on a GPU) need the rest
SHARED = 0.5  # of what models leave of a CPU's machine, that rows take unasked: others live there


def ranks_of_node(world):
    """As torchrun says; where it does not, all up to 8."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", min(world, 8)))


def device_bytes(args):
    """Memory of a device: --device_memory, or what the GPU has (less where others use it), or 0
    where that is not known."""
    if args.device_memory or args.device == "cpu" or not torch.cuda.is_available():
        return args.device_memory * GB
    free, total = torch.cuda.mem_get_info()
    return min(total, free / USABLE)


def free_bytes(root="/"):
    """What this machine has left, or the control groups (of a container, of a job) that this
    process is in; 0 where that is not told, as outside of Linux."""
    root = Path(root)
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        free = [1024 * int(line.split()[1])]
    except (OSError, StopIteration):
        return 0
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        own = next(line[3:] for line in groups if line.startswith("0::"))
    except (OSError, StopIteration):
        return free[0]
    folder = Path(own.strip("/"))
    for path in (root / "sys/fs/cgroup" / group for group in (folder, *folder.parents)):
        try:
            limit, used = (int((path / f"memory.{n}").read_text()) for n in ("max", "current"))
            stat = dict(line.split() for line in (path / "memory.stat").read_text().splitlines())
            free.append(limit - used + int(stat["inactive_file"]))  # that cache goes when asked
        except (OSError, ValueError, KeyError):  # "max", or no such limit here
            continue
    return max(0, min(free))


def limit_of(args, ranks):
    """(bytes that a phase may take on a rank, whose, which share); 0 bytes where none are known."""
    memory, share = device_bytes(args), f"{USABLE:.0%}: allocator and context need the rest"
    if args.device_memory:
        return USABLE * memory, f"--device_memory {args.device_memory:g}", share
    if memory:
        return USABLE * memory, "this GPU", share
    free, local = free_bytes(), ranks_of_node(ranks.world)
    share = f"{USABLE:.0%} of what is free" + f", for {local} ranks" * (local > 1)
    return USABLE * free / local, "this machine", share


def rows_at_once(args, ranks, needs):
    """How many rows decode together: --sampling_batch, or as many as fit. The same on all ranks.

    needs: memory's Needs, made by a call with (world, dtype) if they are looked at. Raises
    UserError where a phase does not fit, or what is offloaded not into host memory. A collective.
    """
    found = limit_of(args, ranks), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = fsdp.gather_lists([found], ranks)  # nodes may differ
    limit, installed = (min(part) for part in zip(*found, strict=True))
    return fsdp.on_main(ranks, _resolve, args, ranks, needs, limit, installed)


def _resolve(args, ranks, needs, limit, installed):
    asked, (most_bytes, *said) = args.sampling_batch, limit
    ours = args.device_memory or ranks.device.type == "cuda"
    offloads = [n for n in ("ref", "reward", "optimizer") if getattr(args, f"offload_{n}", False)]
    if not (most_bytes or offloads):
        return asked or CHUNK
    plan = _padded(needs(ranks.world, fsdp.compute_dtype(args.param_dtype, ranks)), args)
    try:
        rows = min(asked or MOST, plan.rows)
        held = min(most_bytes, max((held for held, *_ in plan.draws.values()), default=0))
        room = most_bytes if ours else held + SHARED * (most_bytes - held)
        if most_bytes and plan.at_most(rows) > room:
            rows = rows if asked else plan.rows_within(room) or 1
            _require_phases(plan, rows, most_bytes, *said)
    except NoEstimate as error:  # is no reason not to run
        ranks.say(str(error))
        return asked or CHUNK
    if offloads:
        _require_host(plan, installed)
    if not asked and plan.draws:
        ranks.say(f"sampling: {rows} rows decode together")
    return rows


def _padded(plan, args):
    """A plan of rows as --compile pads them."""
    if args.compile:
        plan.microbatch, plan.size = fsdp.rounded(plan.microbatch), fsdp.rounded
        for fake in filter(None, (plan.policy, plan.scalar)):
            fake.new = fsdp.rounded(fake.prompt + fake.new) - fake.prompt
    return plan


def _parts(plan, phase, rows):
    """{what: bytes} of what is in a phase, beside activations and the like."""
    if phase not in plan.draws:
        return plan.device
    _, total, samples = plan.draws[phase]
    _, cache, _ = plan.policy.sampling(min(rows, total), samples, total)
    return {"the policy": plan.policy.copy, "keys and values": cache}


def _cure(plan, phase, rows, excess):
    """What a phase that is too large by so many bytes was tried with, and what can be done."""
    draws = phase in plan.draws
    if draws and rows == 1 and _parts(plan, phase, 1).get("keys and values", excess) < excess:
        return f"even with a single row of few tokens: {plan.others[0].removeprefix('or ')}"
    if draws and rows > 1:
        less = f"with {rows} rows that decode together: lower --sampling_batch (0: as many as fit)"
    elif draws:
        less = "even with a single row: lower --max_new_tokens"
    elif plan.microbatch:
        less = f"with --microbatch {plan.microbatch}: lower it, give --gradient_checkpointing"
    else:
        less = f"with {JUDGED} rows: lower --max_new_tokens"
    return f"{less}, {plan.others[not draws]}"


def _require_phases(plan, rows, limit, where, share):
    """Raise UserError where a phase needs more than `limit` bytes of `where`."""
    for phases in (lambda: plan.drawing(rows), plan.training):  # estimates take their time
        size, phase = max(((size, phase) for phase, size in phases().items()), default=(0, ""))
        if size > limit:
            parts = _parts(plan, phase, rows).items()
            raise UserError(
                f"{where}: {phase} needs {size / GB:.3g} GB per rank (of it "
                f"{', '.join(f'{name} {part / GB:.3g}' for name, part in parts)}), found "
                f"{limit / GB:.3g} ({share}), {_cure(plan, phase, rows, size - limit)}"
            )


def _require_host(plan, installed):
    host = plan.host * ranks_of_node(1)
    require(
        host <= installed,
        f"offloading: the ranks of this node need {host / GB:.3g} GB of host memory, found "
        f"{installed / GB:.3g}: offload less, or use more nodes",
    )


def show(args):
    """`--plan`: print what a run on --world_size ranks would need. No ranks, no weights."""
    world, N = args.world_size or int(os.environ.get("WORLD_SIZE", 1)), args.samples_per_prompt
    shards, memory = args.shard_group_size or world, device_bytes(args)
    weigh = filters.load_filter(args.filter, N, known=filters.known_to(args.reward_model))
    kept = filters.kept_per_prompt(weigh, N)
    print(rollout.check_sizes(args, kept, world))
    divides = f"--shard_group_size {shards}: does not divide the {world} ranks there are"
    divides += near(shards, divisors(world))
    require(world % shards == 0, divides)
    on_gpu = args.device == "cuda" or (args.device == "auto" and memory)
    dtype = {"auto": "bfloat16" if on_gpu else "float32"}.get(args.param_dtype, args.param_dtype)
    plan, limit = _padded(Plan(args, world, getattr(torch, dtype)), args), USABLE * memory
    if limit and not args.sampling_batch:
        plan.sampling_batch = plan.rows_within(limit) or 1
    print(
        f"memory: GB per rank, {world} ranks ({ranks_of_node(world)} on a node), sharded over "
        f"{shards}, {dtype} in forward passes; policy {plan.policy.count / GB:.3f} G parameters, "
        f"reward model and critic {plan.scalar.count / GB:.3f} G; rows of {args.max_prompt_tokens} "
        f"+ {args.max_new_tokens} tokens, {plan.sampling_batch} of them decode together"
    )
    phases, (_, total, _) = plan.phases(), plan.draws["sampling"]
    _, cache, logits = plan.policy.sampling(min(plan.sampling_batch, total), N, total)
    passes = max(fake.passes(plan.microbatch, True) for fake in (plan.policy, plan.scalar))
    sizes = plan.device | {"gathered copy": plan.policy.copy, "KV cache": cache, "logits": logits}
    sizes |= {"activations": passes} | {f"phase {name}": size for name, size in phases.items()}
    sizes |= {"peak": max(phases.values()), "host memory": plan.host}
    sizes["host memory of a node"] = plan.host * ranks_of_node(world)
    rows = {name: f"{size / GB:.3f}" for name, size in sizes.items()}
    if limit:
        fits = f"fits into {USABLE:.0%} of {memory / GB:.4g} GB"
        rows[fits] = "yes" if sizes["peak"] <= limit else "no"
        rows["largest microbatch"] = plan.microbatch_within(limit) or "none"
        rows["largest sampling batch"] = plan.rows_within(limit) or "none"
    for name, value in rows.items():
        print(f"    {name:26} {value:>10}")
