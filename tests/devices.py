"""A GPU that is not there: CPU tensors that carry the tag of a device, and torch's rules for it.

Inside `pretended()` torch seems to have CUDA. What is made with device="cuda" is a CPU tensor whose
storage is tagged; `.device`, `.is_cuda` and what follows from them say "cuda". Two modes watch all
that runs, forward, backward and inside FSDP:

    Functions    what torch answers before it computes: `.device`, `.to`, `.numpy`, `torch.tensor`
    Operators    every operator: its results are where its operands are, and operands that are at
                 two places fail as in torch, unless it is a copy, a CPU scalar beside tensors of
                 the device (elementwise only), or an index on the CPU into a tensor of the device

Numbers are those of the CPU, so a run here equals a run there. FSDP2, DTensor, checkpoints and the
collectives are the real ones, on a mesh of "cuda" whose group is gloo. Each group remembers which
backend was asked for: nccl takes tensors of the device only, gloo those of the CPU. Slices
of sharded tensors, which could meet by gloo too, from host to host, must meet on the device.

Not covered: streams (all run in order, so no race is found), kernels and their numbers, memory,
operators that a GPU lacks, gradients that cross devices (they raise), `grad` set to a tensor of
another device, generators of it, sparse and pickled tensors, a process with two devices.
"""

import contextlib
import warnings
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CPU, PLAIN = torch.device("cpu"), (torch.Tensor, nn.Parameter)
device_of = torch.Tensor.device.__get__
ATEN = torch.ops.aten
COPIES = {ATEN.copy_, ATEN._to_copy, ATEN._foreach_copy_, ATEN._foreach_copy}
INDEXED = {ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_, ATEN._unsafe_index}
MASKED = {ATEN.masked_fill, ATEN.masked_fill_}
FILLS = {ATEN.fill, ATEN.fill_, ATEN.index_fill, ATEN.index_fill_}  # with a scalar from anywhere
TWO = "Expected all tensors to be on the same device, but found at least two devices"


def tensors_in(values):
    """The tensors among values, and in lists among them."""
    for x in values:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from tensors_in(x)


class Tags:
    """Where the storages are. One that nobody has tagged is in host memory."""

    def __init__(self):
        self.known, self.device, self.moving = {}, torch.device("cuda", 0), False
        self.inside = False  # a function of torch that was given tensors of the device, and no name

    def put(self, tensor, kind="cuda"):
        """Tag a tensor's storage as "cuda" or, in host memory, as "pinned". Returns the tensor."""
        if len(self.known) > 20_000:
            self.known = {key: x for key, x in self.known.items() if not x[0].expired()}
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        self.known[storage._cdata] = StorageWeakRef(storage), kind  # keeps the address from reuse
        return tensor

    def kind(self, tensor):
        reference, kind = self.known.get(tensor.untyped_storage()._cdata, (None, None))
        return kind if reference and not reference.expired() else None

    def of(self, tensor):
        """The torch.device that a tensor says it is on."""
        if type(tensor) not in PLAIN:
            if isinstance(tensor, FakeTensor):
                return tensor.device
            tensor = getattr(tensor, "_local_tensor", tensor)
        real = device_of(tensor)
        return self.device if real == CPU and self.kind(tensor) == "cuda" else real


class Operators(TorchDispatchMode):
    _should_skip_dynamo = classmethod(lambda cls: False)  # nothing is compiled here; it is slow

    def __init__(self, tags, backends):
        super().__init__()
        self.tags, self.backends = tags, backends

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if others := [kind for kind in types if kind not in PLAIN]:
            if any(issubclass(kind, FakeTensor) for kind in others):
                return func(*args, **kwargs)
            return NotImplemented  # a DTensor: its local tensors come by
        with torch._C.DisableTorchFunction():
            lists = func.overloadpacket.__name__.startswith("_foreach")
            if lists and len(set(places := [self.tags.of(x) for x in args[0]])) > 1:
                return self.one_by_one(func, types, places, args, kwargs)
            operands = [*tensors_in(args), *tensors_in(kwargs.values())]
            device = self.common(func, args, kwargs, operands)
            if (wanted := kwargs.get("device")) is not None:
                # Formulas of autograd, and functions made of others, name the device that their
                # operands have in truth.
                formula = operands and torch._C._current_graph_task_id() >= 0
                if self.tags.moving or wanted != CPU or not (formula or self.tags.inside):
                    device = wanted
                elif not operands:
                    device = self.tags.device
                kwargs["device"] = CPU if wanted.type == "cuda" else wanted
            pinned = kwargs.get("pin_memory")
            kwargs |= {"pin_memory": False} if pinned else {}
            out = func(*args, **kwargs)
            if pinned or device.type == "cuda":
                shared = {x.untyped_storage()._cdata for x in operands}
                for x in tensors_in([out]):
                    if x.untyped_storage()._cdata not in shared:
                        self.tags.put(x, "pinned" if pinned else "cuda")
            return out

    def one_by_one(self, func, types, places, args, kwargs):
        """An operator over lists whose tensors are in two places: for each apart, as in torch."""
        found = [None] * len(args[0])
        for device in set(places):
            mine = [i for i, place in enumerate(places) if place == device]
            those = [[x[i] for i in mine] if isinstance(x, (list, tuple)) else x for x in args]
            made = self.__torch_dispatch__(func, types, those, kwargs)
            for i, x in zip(mine, made or (), strict=False):
                found[i] = x
        return found if func._schema.returns else None

    def common(self, func, args, kwargs, operands):
        """The device of an operator's results. RuntimeError where its operands are at two."""
        packet = func.overloadpacket
        operands = [*tensors_in(args[:-1])] if packet in FILLS else operands
        where = [self.tags.of(x) for x in operands]
        device = next((x for x in where if x.type == "cuda"), where[0] if where else CPU)
        if generator := kwargs.get("generator"):
            wanted = (kwargs.get("device") or device).type
            if generator.device.type != wanted:
                found = f"for generator but found '{generator.device.type}' in {func}"
                raise RuntimeError(f"Expected a '{wanted}' device type {found}")
        if func.namespace in ("c10d", "_c10d_functional"):
            self.collective(func, args, where)
        if packet in COPIES:
            return where[0] if where else CPU
        if packet in INDEXED and self.tags.of(args[0]) == CPU and device != CPU:
            held = "indices should be either on cpu or on the same device as the indexed tensor"
            raise RuntimeError(f"{held} (cpu), in {func}")
        pointwise = torch.Tag.pointwise in func.tags
        for i, argument in enumerate(func._schema.arguments if len(set(where)) > 1 else []):
            name, given = argument.name, args[i] if i < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            for x in tensors_in([given]):
                scalar, allowed = x.dim() == 0 and not written, False
                if packet in INDEXED:
                    allowed = name == "indices" or (name == "values" and scalar)
                elif packet in MASKED:
                    allowed = name == "value" and scalar
                if self.tags.of(x) != device and not (allowed or (pointwise and scalar)):
                    raise RuntimeError(f"{TWO}, {device} and {self.tags.of(x)}! ({name} of {func})")
        return device

    def collective(self, func, args, where):
        """RuntimeError where a collective's group has no backend for a tensor."""
        names = [x for x in args if isinstance(x, str)]
        for x in (x for x in args if isinstance(x, torch.ScriptObject)):
            with contextlib.suppress(RuntimeError):  # a reduce op is one too
                names.append(dist.ProcessGroup.unbox(x).group_name)
        if func.overloadpacket.__name__ == "all_gather_into_tensor" and CPU in where:
            raise RuntimeError(f"slices of a sharded tensor go from host to host ({func})")
        for asked in (self.backends[name] for name in names if name in self.backends):
            for device in where:
                if f"{device.type}:" not in asked:
                    kind = f"No backend type associated with device type {device.type}"
                    raise RuntimeError(f"{kind} in a group of {asked} ({func})")


class Functions(TorchFunctionMode):
    def __init__(self, tags):
        super().__init__()
        self.tags, T = tags, torch.Tensor
        self.table = {
            T.device.__get__: self.tags.of,
            T.is_cuda.__get__: lambda x: self.tags.of(x).type == "cuda",
            T.is_cpu.__get__: lambda x: self.tags.of(x).type == "cpu",
            T.get_device: lambda x: -1 if self.tags.of(x).index is None else self.tags.of(x).index,
            T.to: self.to,
            T.cpu: lambda x, **how: self.to(x, CPU, **how),
            T.cuda: lambda x, device=None, **how: self.to(x, device or "cuda", **how),
            T.numpy: lambda x, **how: self.host(x).numpy(**how),
            T.__array__: lambda x, *how: self.host(x).__array__(*how),
            T.pin_memory: self.pin,
            T.is_pinned: lambda x, **how: self.tags.kind(x) == "pinned",
            T.new_tensor: lambda x, data, **how: self.make(
                data, **{"device": self.tags.of(x), "dtype": x.dtype} | how
            ),
            T.__deepcopy__: lambda x, memo: self.like(x, T.__deepcopy__(x, memo)),
            torch.tensor: self.make,
            torch.as_tensor: self.as_tensor,
        }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if isinstance(kwargs.get("device"), int):
            kwargs["device"] = torch.device("cuda", kwargs["device"])
        if func in self.table:
            return self.table[func](*args, **kwargs)
        given = tensors_in([*args, *kwargs.values()])
        named = kwargs.get("device") is not None
        inside = not named and any(self.tags.of(x).type == "cuda" for x in given)
        with patch.object(self.tags, "inside", inside):
            return func(*args, **kwargs)

    def to(self, tensor, *args, copy=False, **kwargs):
        args = [torch.device("cuda", x) if type(x) is int else x for x in args]
        if args and isinstance(args[0], torch.Tensor):
            args = (self.tags.of(args[0]), args[0].dtype, *args[1:])
        device, dtype, _, form = torch._C._nn._parse_to(*args, **kwargs)
        how = {"dtype": dtype or tensor.dtype, "memory_format": form or torch.preserve_format}
        if device is None or device.type == self.tags.of(tensor).type:
            return tensor.to(copy=copy, **how)
        if device.type != "meta" and tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("a gradient that crosses devices is not pretended")
        with patch.object(self.tags, "moving", True):
            return ATEN._to_copy.default(tensor, device=device, **how)

    def host(self, tensor):
        if self.tags.of(tensor).type == "cuda":
            use = "Use Tensor.cpu() to copy the tensor to host memory first."
            raise TypeError(f"can't convert {self.tags.device} device type tensor to numpy. {use}")
        return tensor

    def pin(self, tensor, **how):
        if self.tags.of(tensor).type == "cuda":
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU can be pinned")
        return self.tags.put(tensor.clone(), "pinned")

    def like(self, tensor, new):
        return self.tags.put(new) if self.tags.of(tensor).type == "cuda" else new

    def make(self, data, *, device=None, pin_memory=False, **how):
        on = torch.device(device or (self.tags.of(data) if isinstance(data, torch.Tensor) else CPU))
        with warnings.catch_warnings(action="ignore"):  # torch's, which the caller has had
            made = torch.tensor(data, device=None if on.type == "cuda" else on, **how)
        return self.tags.put(made) if on.type == "cuda" else made

    def as_tensor(self, data, dtype=None, device=None):
        if isinstance(data, torch.Tensor):
            return self.to(data, device or self.tags.of(data), dtype=dtype or data.dtype)
        if device is None or torch.device(device).type != "cuda":
            return torch.as_tensor(data, dtype=dtype, device=device)
        return self.make(data, dtype=dtype, device=device)


class Stream:
    """A stream or an event: all happens in order anyway."""

    def __init__(self, *_, **__):
        pass

    def __getattr__(self, name):
        return lambda *_, **__: self  # wait_stream, record_event, synchronize, ...

    def query(self):
        return True


def grouped(tags):
    """torch's own grouping of an optimizer's lists of tensors by device and type, by tags."""

    def group(lists, with_indices=False):
        groups = {}
        for i, first in enumerate(lists[0]):
            empty = [[] for _ in lists], []
            columns, places = groups.setdefault((tags.of(first), first.dtype), empty)
            places.extend([i] * with_indices)
            for column, tensors in zip(columns, lists, strict=True):
                column.extend(tensors[i : i + 1])  # some lists are empty
        return groups

    return group


@contextlib.contextmanager
def pretended(count=8):
    """`count` devices of 80 GB, as far as this process can see. Yields Tags."""
    tags, backends = Tags(), {}
    init, new = dist.init_process_group, dist.distributed_c10d.new_group
    functions, engine = Functions(tags), torch.autograd._engine_run_backward

    def set_device(device):
        tags.device = torch.device("cuda", device if isinstance(device, int) else device.index)

    def init_group(backend=None, **how):
        init(backend.replace("nccl", "gloo"), **how)
        backends[dist.group.WORLD.group_name] = backend

    def new_group(*args, **how):
        asked = how.get("backend") or backends[dist.group.WORLD.group_name]
        group = new(*args, **how | {"backend": asked.replace("nccl", "gloo")})
        if isinstance(group, dist.ProcessGroup):
            backends[group.group_name] = {"gloo": "cpu:gloo", "nccl": "cuda:nccl"}.get(asked, asked)
        return group

    def run_backward(*args, **how):
        with functions:  # for what runs again, and for FSDP's hooks
            return engine(*args, **how)

    def described(x):  # by checkpoint, of what it saves and what comes again
        return {"shape": x.shape, "dtype": x.dtype, "device": tags.of(x)}

    properties = SimpleNamespace(total_memory=80e9, major=9, minor=0, name="pretended")
    cuda = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: count,
        "current_device": lambda: tags.device.index,
        "set_device": set_device,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (9, 0),
        "mem_get_info": lambda *_: (80e9, 80e9),
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "synchronize": lambda *_: None,
        "Stream": Stream,
        "Event": Stream,
        "current_stream": Stream,
        "stream": lambda _: contextlib.nullcontext(),
    }
    with (
        patch.multiple(torch.cuda, **cuda),
        patch.object(torch.accelerator, "current_stream", Stream),
        patch.object(torch._C, "_group_tensors_by_device_and_dtype", grouped(tags)),
        patch.dict(torch.utils.checkpoint._allowed_determinism_checks_to_fns, default=described),
        patch.object(torch.autograd, "_engine_run_backward", run_backward),
        patch.object(dist, "init_process_group", init_group),
        patch.object(dist, "new_group", new_group),
        patch.object(dist.distributed_c10d, "new_group", new_group),
        patch("torch.distributed.device_mesh.new_group", new_group),
        patch("torch._subclasses.fake_tensor.init_gpu_context", lambda *_: None),
        patch.object(torch, "set_num_threads", lambda _: None),  # a process with more cannot fork
        Operators(tags, backends),
        functions,
    ):
        yield tags
