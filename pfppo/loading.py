"""From a folder to sharded networks: policy and frozen reference, reward model and critic.

The reference is the SFT policy, frozen. The critic starts from the reward model, head included, or
where there is none from the policy's backbone with a new head.

A model is made without weights (`model.without_weights`: parameters on the meta device, buffers
real, since rotary frequencies and the like stand in no checkpoint), sharded, and filled from

    Slices    every rank reads the rows that it owns from the safetensors, one parameter at a time
    Whole     rank 0 has the whole model in memory and scatters it, one parameter at a time

`Slices` is taken where every parameter stands in the files under its own name and in its own shape.
Some families of transformers are stored under other names or in other pieces (GPT-NeoX's head,
experts of mixtures); and missing or mismatched weights are told best by transformers itself. These
are read whole, on rank 0.

Not covered: quantised checkpoints, which are refused.
"""

import contextlib
import math
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pfppo import fsdp
from pfppo.config import UserError, is_hub_id, model_folders, parts, reason, require
from pfppo.data import load_tokenizer
from pfppo.model import (
    Policy,
    ScalarModel,
    causal_lm_config,
    check_folder,
    classifier_config,
    empty_causal_lm,
    empty_classifier,
    position_limits,
    read_config,
    read_generation_config,
    scalar_head,
    stored_tensors,
)
from pfppo.reward import RewardCard, check_agreement, load_card, spread_of
from pfppo.rollout import seeded

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

# Files of a model on the Hub that nothing here reads: other formats of the same weights.
UNREAD = ("*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "original/*")


def fetch(args, names, ranks):
    """Replace Hub ids (owner/name) among the arguments `names` by folders of the local cache.
    On each node its first rank downloads what the cache lacks. Raises UserError where it cannot, or
    where a folder that is there by now holds no such model."""
    for name in names:
        folders = [_fetched(path, name, ranks) for path in parts(getattr(args, name, ""))]
        setattr(args, name, ",".join(folders))
    with fsdp.agreed(ranks):
        for name, path in model_folders(args):
            if name in names and os.path.isdir(path):
                check_folder(path, name)
                load_card(path)


def _fetched(path, name, ranks):
    """The folder of a Hub id; a folder as it is."""
    folder = path
    for turn in (ranks.local == 0, ranks.local != 0) if is_hub_id(path) else ():
        with fsdp.agreed(ranks, patient=True):
            try:
                if turn:
                    folder = snapshot_download(path, ignore_patterns=[*UNREAD, "*.bin"])
                    if not any(Path(folder).glob("*.safetensors")):  # old: pickles only
                        folder = snapshot_download(path, ignore_patterns=UNREAD)
            except Exception as error:  # no network, no such model, no permission, ...
                hub = f"and the Hugging Face Hub did not give it: {reason(error)}"
                raise UserError(f"--{name} {path}: there is no such folder, {hub}") from error
    return folder


def _stored_names(model, tensors, new):
    """{parameter: its name in the files}, or None where some are not there as they are. model:
    Policy or ScalarModel, around one model of transformers."""
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


def read_causal_lm(path, option="policy", dtype=torch.float32):
    """A causal LM with its weights, on the CPU, dropout off. Raises UserError."""
    causal_lm_config(path, option)
    model, missing = _read(AutoModelForCausalLM, path, option, dtype=dtype)
    _require_weights(missing, path, option)
    return model


def read_classifier(path, option="reward_model"):
    """A sequence classifier with one label, read strictly, fp32, on the CPU. Raises UserError."""
    kinds = ", ".join(classifier_config(path, option).architectures or ["no architecture"])
    model, missing = _read(AutoModelForSequenceClassification, path, option)
    some = ", ".join(sorted(missing)[:3])
    require(not missing, f"--{option} {path}: not a reward model: {kinds} without {some}")
    return model


def classifier_from_causal_lm(path, seed, option="policy"):
    """A classifier whose backbone is a causal LM's and whose head is new (`new_head`). Raises
    UserError where weights of the backbone are missing."""
    model, missing = _read(AutoModelForSequenceClassification, path, option, num_labels=1)
    new = new_head(model, seed)
    _require_weights(set(missing) - set(new), path, option)
    with torch.no_grad():
        for name, value in new.items():
            model.get_parameter(name).copy_(value)
    return model


def new_head(classifier, seed):
    """{name: value} of a classifier's last layer, weights drawn from the seed, bias 0."""
    head, generator = scalar_head(classifier), seeded("head", seed)
    weight = torch.empty(head.weight.shape)
    weight.normal_(std=(head.in_features + 1) ** -0.5, generator=generator)
    names = {parameter: name for name, parameter in classifier.named_parameters()}
    new = {names[head.weight]: weight}
    return new if head.bias is None else new | {names[head.bias]: torch.zeros(head.bias.shape)}


def _require_weights(missing, path, option):
    some = ", ".join(sorted(missing)[:3])
    require(not missing, f"--{option} {path}: {len(missing)} weights are missing: {some}")


def _read(auto, path, option, dtype=torch.float32, **kwargs):
    """(model, names of weights that the folder lacks); weights of another shape are an error."""
    loading = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, report = auto.from_pretrained(path, dtype=dtype, **loading, **kwargs)
    except Exception as error:  # a damaged file fails in a dozen ways
        raise UserError(f"--{option} {path}: cannot read the weights: {reason(error)}") from error
    for name, shape, other in sorted(report["mismatched_keys"], key=str):
        expected = f"expected {list(other)} by config.json"
        raise UserError(f"--{option} {path}: {name} has shape {list(shape)}, {expected}")
    return model.eval(), report["missing_keys"]


class Slices:
    """Rows of the files, read by the rank that owns them; `new` are whole tensors that every rank
    has."""

    def __init__(self, tensors, names, new):
        self.tensors, self.names, self.new = tensors, names, new

    def local(self, name, parameter):
        """This rank's part of a DTensor parameter, on the CPU."""
        where = parameter.device_mesh, parameter.placements
        shape, offset = compute_local_shape_and_global_offset(parameter.shape, *where)
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
        self.parameters = dict(model.named_parameters()) if model else {}

    def local(self, name, parameter):
        """This rank's part of a DTensor parameter, on its device. A collective."""
        mesh, placements = parameter.device_mesh, parameter.placements
        value = self.parameters[name] if self.parameters else torch.empty(parameter.shape)
        value = value.detach().float().to(mesh.device_type)
        return distribute_tensor(value, mesh, placements, src_data_rank=0).to_local()


def source_of(model, path, option, read, ranks, new=None):
    """Where the weights of an empty Policy or ScalarModel come from: Slices, or Whole.

    read(path) -> what it wraps, with weights, called on rank 0; new: {parameter: whole tensor} that
    is not looked for in the files. Raises UserError on files that are cut short. A collective.
    """
    new = new or {}
    with fsdp.agreed(ranks):
        tensors = stored_tensors(path, option)
        plain = all(file.suffix == ".safetensors" for file in tensors.values())
        names = _stored_names(model, tensors, new) if tensors and plain else None
        if names is not None:
            return Slices(tensors, names, new)
        return Whole(type(model)(read(path)) if ranks.is_main else None)


@dataclass
class Models:
    """What a PPO run trains and asks, sharded."""

    policy: Policy
    reference: Policy  # the SFT policy, frozen
    critic: ScalarModel
    reward_models: tuple[ScalarModel, ...]  # of --reward_model; the critic starts from the first
    unsharded: object  # the policy's structure, without weights but in `gathered`
    normalised: bool  # the reward models' folders say mean and standard deviation

    @property
    def reward_model(self):
        """The first, or None."""
        return next(iter(self.reward_models), None)

    def gathered(self, policy):
        """A context that gives the whole of `policy` (or of `reference`) as a plain causal LM."""
        return fsdp.gathered(policy.lm, self.unsharded)

    def normalise(self, state, examiner, train, reward_of):
        """Give reward models and critic their normaliser, [mean, sd], and the reward slot its own:
        that of the RM's card, or one that `state` knows of a checkpoint, or measured over samples
        of the SFT policy. The slot's is 0, 1 for a reward model, which has been normalised by then;
        the mean of several has less spread, and is normalised again.
        """
        args, ranks = examiner.args, examiner.ranks
        measure_model = not self.normalised
        of_one = reward_of.spec == "model" and len(self.reward_models) < 2
        measure_slot = not of_one and args.reward_scale == "sft"
        if (measure_model or measure_slot) and not state.scale:
            probe = examiner.probe(self, train)
            if measure_model:
                pairs = zip(probe.members.T, parts(args.reward_model), strict=True)
                spreads = [spread_of(raw, f"--reward_model {path}") for raw, path in pairs]
                state.normaliser = sum(spreads, [])  # mean, sd of the first, mean, ...
        for i, scalar in enumerate((self.critic, *self.reward_models) if measure_model else ()):
            place = 2 * max(0, i - 1)  # the critic's is that of the first
            scalar.mean, scalar.std = state.normaliser[place : place + 2]
        if measure_slot and not state.scale:
            probe = replace(probe)  # forgets `members`, which are in other units now
            with fsdp.agreed(ranks):
                reward_of.measure(probe)
            state.scale = [reward_of.mean, reward_of.std]
            what = "mean {:.3g}, standard deviation {:.3g}".format(*state.scale)
            what = what if state.scale != [0.0, 1.0] else "no spread, so they stay as they are"
            said = f"rewards of {len(probe.texts)} samples of the SFT policy: {what}"
            ranks.say(f"--reward {reward_of.spec}: {said}")
        state.scale = state.scale or [0.0, 1.0]
        reward_of.mean, reward_of.std = state.scale
        if reward_of.spec != "model" and not measure_slot:
            reward_of.clip = math.inf  # of rewards as they are nobody knows the unit


def sharded(empty, source, args, ranks, offload):
    """A model, filled and sharded. offload: which --offload_* it obeys, "optimizer" if trained."""
    trained, offloads = offload == "optimizer", getattr(args, f"offload_{offload}", False)
    fsdp.shard(empty, source, ranks, args.param_dtype, trained, offloads)
    if args.compile:
        most = position_limits(next(empty.children()).config).values()
        fsdp.compile_blocks(empty, min(most, default=math.inf))
    if trained and args.gradient_checkpointing:
        fsdp.recompute_blocks(empty)
    return empty


def load_models(args, tokens, ranks):
    """Models of --policy and --reward_model. Raises UserError if they do not fit."""
    path, config = args.policy, causal_lm_config(args.policy)
    empty = [Policy(empty_causal_lm(config), tokens.never) for _ in range(2)]
    source = source_of(empty[0], path, "policy", read_causal_lm, ranks)
    policy = sharded(empty[0], source, args, ranks, "optimizer")
    reference = sharded(empty[1], source, args, ranks, "ref")
    unsharded = empty_causal_lm(config, fsdp.compute_dtype(args.param_dtype, ranks))
    unsharded.generation_config = read_generation_config(path) or unsharded.generation_config
    paths, how = parts(args.reward_model), (args, tokens, ranks)
    known = all(load_card(path) is not None for path in paths)
    if paths:
        first, critic = load_scalars(*how, (False, True), paths[0])
        others = (load_scalars(*how, (False,), path) for path in paths[1:])
        reward_models = (first, *sum(others, []))
    else:
        reward_models, critic = (), new_scalar(args, ranks)
    return Models(policy, reference, critic, reward_models, unsharded, known)


def load_scalars(args, tokens, ranks, trainable, path=""):
    """ScalarModels of a --reward_model, one for each of `trainable`: is it a critic, or the RM?
    path: which of several.

    An RM from elsewhere has no card: vocabulary and chat template are those of its tokenizer, its
    normaliser is 0 and 1 until somebody measures it. Raises UserError where policy and RM differ.
    """
    path, theirs = path or args.reward_model, None
    config, card = classifier_config(path), load_card(path)
    if card is None:
        theirs = load_tokenizer(path, "reward_model")
        card = RewardCard(0.0, 1.0, *tokens.hashes(theirs))
        if config.pad_token_id == theirs.eos_token_id:
            ranks.say(
                f"--reward_model {path}: it pads with its end-of-sequence token, so transformers "
                "would read the score one token before it; here it is read there"
            )
    if (card.template, card.vocabulary) != tokens.hashes():
        with contextlib.suppress(UserError):  # there need not be one beside the card
            theirs = theirs or load_tokenizer(path, "reward_model")
        check_agreement(card, tokens, theirs, f"--reward_model {path}", args.policy)
    scalars = [ScalarModel(empty_classifier(config), card.mean, card.std) for _ in trainable]
    source = source_of(scalars[0], path, "reward_model", read_classifier, ranks)
    for scalar, trained in zip(scalars, trainable, strict=True):
        sharded(scalar, source, args, ranks, "optimizer" if trained else "reward")
    return scalars


def new_scalar(args, ranks):
    """A trainable ScalarModel on --policy's backbone with a new head: an RM before training."""
    path, seed = args.policy, args.seed
    empty = ScalarModel(empty_classifier(read_config(path, "policy")))
    new = {f"classifier.{name}": value for name, value in new_head(empty.classifier, seed).items()}
    read = partial(classifier_from_causal_lm, seed=seed)
    source = source_of(empty, path, "policy", read, ranks, new)
    return sharded(empty, source, args, ranks, "optimizer")
