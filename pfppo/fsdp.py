"""Ranks and sharding: process group, `fully_shard` by plan, whole-phase gathering, reductions.

One to many ranks run the same lines, started by torchrun or, as a single rank, by plain python.
Models without weights are sharded by blocks, then filled (loading.py). Parameters and optimizer
states stay fp32 (master weights); on GPU forward and backward run in bf16 with fp32 reductions.
Sampling would gather every block at every token: the policy is gathered once for a whole phase.

FSDP averages gradients over ranks. Our losses are sums over a global denominator, so each rank's
loss is multiplied by the number of ranks before backward (`train_ppo.py`, `train_rm.py`).

Not covered: tensor and pipeline parallelism.
"""

import contextlib
import ctypes
import datetime
import functools
import math
import os
import signal
import sys
import time
from dataclasses import dataclass

from pfppo.config import UserError, divisors, near, require

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    local: int  # among the ranks of this node
    world: int
    device: torch.device
    mesh: DeviceMesh
    store: dist.Store  # where ranks meet that may wait longer

    @property
    def is_main(self):
        return self.rank == 0

    def say(self, text):
        """Print on rank 0."""
        if self.is_main:
            print(text, flush=True)


def bar(what, items=None, total=None, stay=False):
    """tqdm over `items`, or of `total`, on rank 0, for a phase inside a step: on a terminal only,
    once that has taken a second, and gone at its end; or it may `stay`, and be seen in a log."""
    hidden = True if os.environ.get("RANK", "0") != "0" else False if stay else None
    how = {"disable": hidden, "leave": stay, "delay": 0 if stay else 1, "mininterval": 1}
    how["smoothing"] = 0  # the mean rate so far: rows end in bursts, which say nothing of the rest
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}]"
    return tqdm(items, what, total, bar_format=form, **how)


def _die_with_agent():
    """Be killed when the torchrun process that started this one dies (on Linux): no orphans."""
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call, which then comes too late
        os._exit(1)


def init_ranks(device="auto", shard_group_size=0, minutes=10.0):
    """Join the process group that torchrun describes, or be a world of one. Raises UserError.

    shard_group_size: weights are sharded within groups of this many neighbouring ranks (a node's)
    and replicated across groups; 0: over all ranks. minutes: that a collective may wait for a rank.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    none = "--device cuda: torch finds no CUDA device here, expected --device cpu or auto"
    require(device != "cuda" or torch.cuda.is_available(), none)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    store, rank, world = dist.HashStore(), 0, 1
    patience = datetime.timedelta(minutes=minutes)
    if "RANK" in os.environ:
        _die_with_agent()
        store, rank, world = next(dist.rendezvous("env://", timeout=patience))
        # After a restart torchrun's store still has the addresses of the workers before.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        torch.cuda.set_device(local)
    # cuDNN's attention, torch's first choice on Hopper, makes a plan for every length, so at every
    # token that is sampled, and has given wrong results under some masks.
    torch.backends.cuda.enable_cudnn_sdp(False)
    size = shard_group_size or world
    divides = f"--shard_group_size {size}: does not divide the {world} ranks there are"
    require(world % size == 0, divides + near(size, divisors(world)))
    shape, names = ((world,), ("shard",))
    if size < world:
        shape, names = (world // size, size), ("replicate", "shard")
    mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    index = local if device == "cuda" else None
    return Ranks(rank, local, world, torch.device(device, index), mesh, store)


def find_blocks(model):
    """The transformer blocks: of all lists of equal modules, the one with most parameters."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    lists = [blocks for blocks in lists if len({type(block) for block in blocks}) == 1]
    require(lists, f"{type(model).__name__}: no list of transformer blocks found to shard")
    return list(max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters())))


def compute_dtype(param_dtype, ranks):
    """The torch dtype of forward passes: `--param_dtype`; auto is bf16 on GPU and fp32 on CPU."""
    if param_dtype == "auto":
        param_dtype = "bfloat16" if ranks.device.type == "cuda" else "float32"
    return getattr(torch, param_dtype)


def shard(empty, source, ranks, param_dtype="auto", trainable=True, offload=False):
    """Shard a model without weights and fill it from `source` (loading.py): Slices or Whole.

    The plan has two kinds of units: every transformer block, and the root with what is used once,
    before and after them: embedding, last norm, head (tied weights stay tied there); a scalar head
    is a unit of its own, whose forward pass is fp32. offload: the slices (and so gradients and
    optimizer states) live in host memory, and a unit comes to the device when it is used. Returns
    the sharded model.
    """
    dtype = compute_dtype(param_dtype, ranks)
    dtype = None if dtype == torch.float32 else dtype
    precision = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)  # token ids
    how = {"mesh": ranks.mesh, "mp_policy": precision}
    if offload:
        how["offload_policy"] = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda")
    empty.requires_grad_(trainable)
    for block in find_blocks(empty):
        fully_shard(block, **how)
    for module in getattr(empty, "exact", []):
        fully_shard(module, **how | {"mp_policy": MixedPrecisionPolicy(None, torch.float32)})
    fully_shard(empty, reshard_after_forward=True, **how)
    if offload and trainable and ranks.device.type == "cuda":
        _use_cores()  # the optimizer is there
    buffers = {name: buffer.to(ranks.device) for name, buffer in empty.named_buffers()}
    empty.to_empty(device="cpu" if offload else ranks.device)
    with torch.no_grad():
        for name, parameter in empty.named_parameters():
            parameter.to_local().copy_(source.local(name, parameter))
    _set_buffers(empty, buffers)
    return empty


def _use_cores():
    """Compute on the host with this rank's share of the node's cores: one takes 3 s for Adam's step
    over a billion numbers. torchrun has set OMP_NUM_THREADS to 1 where nobody else had; another
    number stays."""
    if os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _set_buffers(model, buffers):
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer)


def recompute_blocks(model):
    """Gradient checkpointing: every block keeps its input only and runs again in the backward pass.

    For a third more time, activations take one block's memory and L inputs instead of L blocks'.
    """
    how = {"use_reentrant": False, "preserve_rng_state": False}  # there is no dropout
    for block in find_blocks(model):
        block.forward = functools.partial(checkpoint, block.forward, **how)


BACKEND = "inductor"  # of torch.compile
FEW = 64  # tokens of a row that it is not worth to compile blocks for
SHAPES = 128  # that a function may be compiled for before it runs as it is; torch's own limit is 8


def compiled(function):
    """`function`, compiled for each of the shapes that it meets, which should be few: `rounded`."""
    torch._dynamo.config.recompile_limit = SHAPES
    return torch.compile(function, dynamic=False, backend=BACKEND)


compiled_once = functools.cache(compiled)  # of what a module defines


def rounded(size):
    """The next number of three binary digits and zeros (1 to 8, 10, 12, 14, 16, 20, ...): at most a
    quarter more, and four in each power of two."""
    unit = 1 << max(0, size.bit_length() - 3)
    return -(-size // unit) * unit


def compile_blocks(net, most=math.inf):
    """Compile every block of a Policy or ScalarModel. The ids that it is given are padded, so that
    shapes are few: rows below that nobody asks for, and columns on the right that nobody looks back
    at, as far as the model has positions, `most`."""
    for block in find_blocks(net):
        block.forward = compiled(block.forward)

    def padded(net, given):
        ids, *positions = given
        if not positions:  # then the last token counts
            return given
        rows, columns = rounded(len(ids)), min(rounded(max(FEW, ids.shape[1])), most)
        right = max(0, columns - ids.shape[1])
        return nn.functional.pad(ids, (0, right, 0, rows - len(ids))), *positions

    net.register_forward_pre_hook(padded)


def whole_parameters(sharded):
    """(name, whole fp32 tensor on the device) of one parameter after the other, tied ones once. A
    collective, between devices: slices that are offloaded would otherwise go from host to host."""
    for name, parameter in sharded.named_parameters():
        yield name, parameter.detach().to(parameter.device_mesh.device_type).full_tensor()


@contextlib.contextmanager
def gathered(sharded, unsharded):
    """Fill `unsharded`, a copy on the meta device, with the whole weights of `sharded` for a phase,
    cast to the copy's dtype.

    All ranks must enter together; inside there are no collectives, so they may do different amounts
    of work. The copy shares nothing with the optimizer: updating inside has no effect on it.
    """
    # Copied at one rank, where a whole tensor is the optimizer's own.
    how = {"dtype": unsharded.dtype, "copy": dist.get_world_size() == 1}
    whole = {name: tensor.to(**how) for name, tensor in whole_parameters(sharded)}
    unsharded.load_state_dict(whole, strict=False, assign=True)
    _set_buffers(unsharded, dict(sharded.named_buffers()))
    unsharded.tie_weights()
    try:
        yield unsharded
    finally:
        unsharded.to("meta")


def full_state(sharded):
    """{name: whole tensor on the CPU} on rank 0; {} elsewhere, where no more than one parameter at
    a time is whole. A collective."""
    main = dist.get_rank() == 0
    return {name: tensor.cpu() for name, tensor in whole_parameters(sharded) if main}


def sum_over_ranks(tensor):
    """The sum of a tensor over all ranks, on all ranks."""
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def gather_rows(tensor, ranks):
    """[B/W, ...] on each rank -> [B, ...] on all, interleaved: row i came from rank i mod W."""
    parts = [torch.empty_like(tensor) for _ in range(ranks.world)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)


def gather_lists(values, ranks):
    """A list on each rank -> all values on all ranks, interleaved like `gather_rows`."""
    parts = [None] * ranks.world
    dist.all_gather_object(parts, values)
    longest = max(map(len, parts))
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


@contextlib.contextmanager
def agreed(ranks, patient=False):
    """A UserError inside, on whichever rank, is raised on all of them: else the others would wait,
    and rank 0, which prints, would have nothing to say. A collective at its end; a `patient` one
    has no --collective_timeout, for what takes one rank long (a download, the lab's making)."""
    failure = None
    try:
        yield
    except UserError as error:
        failure = str(error)
    if patient:
        here = f"meeting {ranks.store.add(f'meetings of {ranks.rank}', 1)}"
        ranks.store.add(here, 1)
        while ranks.store.add(here, 0) < ranks.world:
            time.sleep(0.2)
    for message in gather_lists([failure], ranks):
        require(message is None, message)


def from_main(value, ranks):
    """Rank 0's value on all ranks."""
    dist.broadcast_object_list(box := [value], 0)
    return box[0]


def on_main(ranks, work, *args):
    """work(*args), done by rank 0, on all ranks; so is a UserError or an OSError. A collective."""
    value, failure = None, None
    if ranks.is_main:
        try:
            value = work(*args)
        except (UserError, OSError) as error:
            failure = error
    value, failure = from_main((value, failure), ranks)
    if failure is not None:
        raise failure
    return value


def accumulate(trained, microbatches):
    """The microbatches of one optimizer step, for a loop that runs each backward. With copies of
    the weights (--shard_group_size) gradients are summed within a group every time, and between
    the groups, over the slow network, at the last microbatch only. trained: {name: (sharded model,
    optimizer)}."""
    for i, microbatch in enumerate(microbatches, 1):
        for model, _ in trained.values():
            model.set_requires_all_reduce(i == len(microbatches))
        yield microbatch


def adamw(model, lr):
    """AdamW over a sharded model; made after sharding, so that its states are sharded too."""
    return torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )


def step(model, optimizer, factor, limit):
    """Clip the gradients to a global norm of at most `limit`, update with `factor` times the
    optimizer's learning rate, clear.

    A gradient that is not finite skips the update. Returns the norm before clipping, a float.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit).full_tensor().item()
    optimizer.param_groups[0]["lr"] = factor * optimizer.defaults["lr"]
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm
