"""Weights from safetensors into sharded models: each rank reads its own slices, nobody all of them.

A model is made without weights (`without_weights`: parameters on the meta device, buffers real,
since rotary frequencies and the like stand in no checkpoint), sharded, and filled from one of two
sources:

    Slices    every rank reads the rows that it owns from the files, one parameter at a time
    Whole     rank 0 has the whole model in memory and scatters it, one parameter at a time

`Slices` is taken where every parameter stands in the files under its own name and in its own shape.
Some families of transformers are stored under other names or in other pieces (GPT-NeoX's head,
experts of mixtures); and missing or mismatched weights are told best by transformers itself. These
are read whole, on rank 0.

Not covered: pickled checkpoints, quantised ones.
"""

import contextlib
import json
from pathlib import Path

from pfppo.config import UserError, reason, require

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@contextlib.contextmanager
def without_weights():
    """Modules built inside have their parameters on the meta device; buffers are real."""
    original = nn.Module.register_parameter

    def register(module, name, parameter):
        if parameter is not None and not parameter.is_meta:  # a tied one comes a second time
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        original(module, name, parameter)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = original


def stored_tensors(folder, option):
    """{name: file} of all tensors in a folder's safetensors, whose headers are read.

    Raises UserError naming the file that is missing, cut short or damaged.
    """
    folder = Path(folder)
    names = [SINGLE]
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_text())["weight_map"]
            names = sorted(set(index.values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"--{option} {folder / INDEX}: damaged: {reason(error)}") from error
    found = {}
    for path in (folder / name for name in names):
        require(path.is_file(), f"--{option} {folder}: there is no file {path.name}")
        try:
            with safe_open(path, "pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        except Exception as error:  # safetensors has an exception of its own
            raise UserError(
                f"--{option} {path}: damaged or cut short, {path.stat().st_size} bytes: "
                f"{reason(error)}"
            ) from error
    return found


def _stored_names(model, tensors, new):
    """{parameter: its name in the files}, or None where some are not there as they are.

    model: Policy or ScalarModel, around one model of transformers.
    """
    ((wrapper, inner),) = model.named_children()
    if any(isinstance(step, WeightConverter) for step in get_model_conversion_mapping(inner)):
        return None
    prefix, names = f"{inner.base_model_prefix}.", {}
    for name, parameter in inner.named_parameters():
        if f"{wrapper}.{name}" in new:
            continue
        other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
        stored = next((key for key in (name, other) if key in tensors), None)
        if stored is None:
            return None
        with safe_open(tensors[stored], "pt") as file:
            if file.get_slice(stored).get_shape() != list(parameter.shape):
                return None
        names[f"{wrapper}.{name}"] = stored
    return names


class Slices:
    """Rows of the files, read by the rank that owns them; `new` are whole tensors that every rank
    has."""

    def __init__(self, tensors, names, new):
        self.tensors, self.names, self.new = tensors, names, new

    def local(self, name, parameter):
        """This rank's part of a DTensor parameter, on the CPU."""
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        part = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
        if name in self.new:
            return self.new[name][part]
        if 0 in shape:  # more ranks than rows
            return torch.empty(shape)
        stored = self.names[name]
        # Opened anew for each parameter: the pages that were read are let go with the file.
        with safe_open(self.tensors[stored], "pt") as file:
            return file.get_slice(stored)[part]


class Whole:
    """A model that rank 0 has and the others wait for (model None)."""

    def __init__(self, model):
        self.parameters = dict(model.named_parameters()) if model is not None else {}

    def local(self, name, parameter):
        """This rank's part of a DTensor parameter, on its device. A collective."""
        value = self.parameters.get(name)
        value = torch.empty(parameter.shape) if value is None else value.detach().float()
        value = value.to(parameter.device_mesh.device_type)
        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(value, mesh, placements, src_data_rank=0).to_local()


def source_of(model, path, option, read_whole, new=None):
    """Where the weights of an empty Policy or ScalarModel come from: Slices, or Whole.

    read_whole() -> the same with its weights; called on all ranks, it returns None on all but rank
    0. new: {parameter: whole tensor} that is not looked for in the files. Raises UserError on files
    that are cut short.
    """
    new = new or {}
    if (Path(path) / INDEX).is_file() or (Path(path) / SINGLE).is_file():
        tensors = stored_tensors(path, option)
        names = _stored_names(model, tensors, new)
        if names is not None:
            return Slices(tensors, names, new)
    return Whole(read_whole())
