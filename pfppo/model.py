"""The two kinds of network, a policy that gives token log-probs and a scalar head on a backbone;
and what a model folder says.

`Policy` wraps a causal LM of transformers, `ScalarModel` a sequence classifier with one label: the
reward model (RM) reads it at the last response token, the critic before every token. Both are fed
right-padded rows *without* mask or position ids: attention is causal, so padding on the right
cannot be seen by what stands before it, and the fast causal kernel is taken.

The largest thing in memory would be the logits, B x T x V numbers. So log-probs are computed at
response positions only, `CHUNK` logits at a time, and recomputed in the backward pass. This knob
does not change a number.

Not covered: encoder-decoder models, heads with a bias that depends on the position, several labels.
"""

import contextlib
import json
import re
import zipfile
from pathlib import Path

from pfppo import files
from pfppo.config import UserError, model_folders, reason, require, require_folder

import torch
import transformers
from safetensors import safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

FILES = ("model.safetensors", "model.safetensors.index.json")  # of weights, the first counts
FILES += ("pytorch_model.bin", "pytorch_model.bin.index.json")
LEAST = torch.finfo(torch.float32).min  # logit of an id that is never sampled
CHUNK = 1 << 24  # logits that exist at one time: 64 MiB in fp32, and a few copies of it

transformers.logging.set_verbosity_error()  # its warnings are for other uses than ours
transformers.logging.disable_progress_bar()


def positions_of(hidden, positions):
    """hidden [B, L, D], positions [B, K] -> [B, K, D]; positions off the end are cut to the end."""
    positions = positions.clamp(max=hidden.shape[1] - 1)
    return hidden.gather(1, positions[:, :, None].expand(-1, -1, hidden.shape[-1]))


class Policy(nn.Module):
    """Causal LM. `policy.lm` is the model of transformers. The ids `never` have probability 0, here
    as in the sampler: those that no token has, or that the reward model lacks."""

    def __init__(self, lm, never=()):
        super().__init__()
        self.lm, self.never = lm, list(never)

    def forward(self, ids, positions, targets, mask, temperature=1.0):
        """Log-probs of `targets` [B, T] in the states at `positions` [B, T] of `ids` [B, L].

        Old, new and reference log-probs all come from here: fp32, logits divided by the sampling
        temperature. Returns (logp, entropy), both [B, T], 0 off the mask; entropy has no gradient.
        """
        hidden = self.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [B, L, D]
        there = mask > 0
        states = positions_of(hidden, positions)[there]  # [K, D]
        logp, entropy = self.of_states(states, targets[there], temperature)
        blank = torch.zeros_like(mask, dtype=torch.float32)
        return blank.masked_scatter(there, logp), blank.masked_scatter(there, entropy)

    def of_states(self, states, targets, temperature):
        """Log-probs and entropy [K] of `targets` [K] in hidden states [K, D], chunk by chunk."""
        size = max(1, CHUNK // self.lm.get_output_embeddings().weight.shape[0])
        parts = [
            checkpoint(self._chunk, *part, temperature, use_reentrant=False)
            for part in zip(states.split(size), targets.split(size), strict=True)
        ]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def _chunk(self, states, targets, temperature):
        logits = head_logits(self.lm, states).float() / temperature  # [K, V]
        logits[:, self.never] = LEAST
        logp = logits.log_softmax(-1)
        with torch.no_grad():
            entropy = -(logp.exp() * logp).sum(-1)
        return logp.gather(-1, targets[:, None]).squeeze(-1), entropy


def head_logits(lm, states):
    """Hidden states [..., D] -> logits [..., V], with the scaling that some families add."""
    logits, config = lm.get_output_embeddings()(states), lm.config.get_text_config()
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None) is not None:  # Granite
        logits = logits / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return logits if cap is None else torch.tanh(logits / cap) * cap


class ScalarModel(nn.Module):
    """Reward model and critic: one number per position, in normalised units.

    What comes out is (raw - mean) / std with the normaliser stored beside the RM (reward.py), so
    rewards and values have the same scale, and a critic that starts from the RM starts as its
    prediction of the final reward.
    """

    def __init__(self, classifier, mean=0.0, std=1.0):
        super().__init__()
        self.classifier, self.mean, self.std = classifier, mean, std
        head = scalar_head(classifier)
        head.register_forward_pre_hook(lambda head, given: given[0].float())
        self.exact = [head]  # modules whose weights stay fp32 in forward passes

    def forward(self, ids, positions=None):
        """ids [B, L], positions [B, K] -> scalars [B, K, 1], fp32. Without positions the one that
        the classifier itself gives: [B, 1, 1]."""
        if positions is None:
            raw = self.classifier(input_ids=ids, use_cache=False).logits[:, None]
        else:
            hidden = self.classifier.base_model(input_ids=ids, use_cache=False).last_hidden_state
            raw = scalar_head(self.classifier)(positions_of(hidden, positions))
        return (raw.float() - self.mean) / self.std


def scalar_head(classifier):
    """The last linear layer of a sequence classifier."""
    for name in ("score", "classifier"):
        if isinstance(getattr(classifier, name, None), nn.Linear):
            return getattr(classifier, name)
    raise UserError(f"{type(classifier).__name__}: no linear layer `score` or `classifier` found")


def read_config(path, option):
    """The transformers configuration in a directory. Raises UserError naming the option."""
    require_folder(path, option)
    folder, here = Path(path), f"--{option} {path}: "
    adapter = files.adapter_in(folder)
    require(not adapter, here + adapter)
    if not (folder / "config.json").is_file():
        raise UserError(here + files.no_model(folder, "config.json"))
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a damaged file fails in a dozen ways
        what = "not a model of transformers"
        raise UserError(f"{here}{what}: {reason(error)}") from error
    text = config.get_text_config()
    rows, pad = getattr(text, "vocab_size", None), getattr(text, "pad_token_id", None)
    require(rows, f"{here}{config.model_type} is no language model")
    quantised = "its weights are quantised (quantization_config), expected plain ones"
    require(not getattr(config, "quantization_config", None), here + quantised)
    beyond = f"pad_token_id {pad} of its config.json is beyond the {rows} rows of its embedding: "
    beyond += "name another, or save it after resize_token_embeddings"
    require(pad is None or pad < rows, here + beyond)
    return config


def read_generation_config(path, option="policy"):
    """`generation_config.json` of a directory; None where there is none. Raises UserError."""
    try:
        return transformers.GenerationConfig.from_pretrained(path)
    except Exception as error:
        file = Path(path) / "generation_config.json"
        require(not file.exists(), f"--{option} {path}: damaged {file.name}: {reason(error)}")
        return None


def weight_files(folder, option):
    """The files of a folder's weights, as transformers picks them: what config.json names, else
    safetensors before pickles, and a single file before an index. [] where there are none."""
    folder, named = Path(folder), getattr(read_config(folder, option), "transformers_weights", None)
    first = next(
        (folder / n for n in ([named] if named else FILES) if (folder / n).is_file()), None
    )
    if first is None or first.suffix != ".json":
        return [first] if first else []
    try:
        return [folder / n for n in sorted({*json.loads(first.read_text())["weight_map"].values()})]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"--{option} {first}: damaged: {reason(error)}") from error


def stored_tensors(folder, option):
    """{name: file} of all tensors in a folder's files, by their headers. Raises UserError naming
    the file that is damaged."""
    stored = {}
    for path in weight_files(folder, option):
        require(path.is_file(), f"--{option} {folder}: there is no file {path.name}")
        try:
            stored |= dict.fromkeys(read_tensors(path), path)
        except Exception as error:  # safetensors has an exception of its own
            what = f"damaged or cut short, {path.stat().st_size} bytes: {reason(error)}"
            what = files.is_pointer(path) or what
            raise UserError(f"--{option} {path}: {what}") from error
    return stored


def read_tensors(path, names=()):
    """{name: tensor} of a file of weights, where there are such; without names {name: None}."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return {
                n: file.get_tensor(n) if names else None
                for n in file.keys()
                if n in names or not names
            }
    how = {"map_location": "cpu", "mmap": zipfile.is_zipfile(path), "weights_only": True}
    return {n: x for n, x in torch.load(path, **how).items() if n in names or not names}


def position_limits(config):
    """{name in a configuration: most tokens of a row}"""
    config = config.get_text_config()
    rope = str(getattr(config, "rope_parameters", None))  # one dict, or one for each kind of layer
    limits = {n: getattr(config, n, None) for n in ("max_position_embeddings", "max_seq_len")}
    if "longrope" in rope:  # beyond its first length, padding changes frequencies
        name = "original_max_position_embeddings"
        found = [int(n) for n in re.findall(rf"'{name}': (\d+)", rope)]
        limits[name] = min([*found, getattr(config, name, None) or float("inf")])
    return {name: limit for name, limit in limits.items() if limit}


def room_of(args):
    """(most tokens of a prompt, what says so): --max_prompt_tokens, or positions less responses."""
    room, why = args.max_prompt_tokens, "--max_prompt_tokens"
    new = 0 if getattr(args, "pairs", "") else args.max_new_tokens
    for option, path in model_folders(args):
        for name, most in position_limits(read_config(path, option)).items():
            less = f"--max_new_tokens {new} leaves {most - new} of {most}, the {name} of its config"
            room, why = min((room, why), (most - new, f"--{option} {path}: {less}"))
    return room, why


def check_cache(path, option="policy"):
    """UserError where a model does not keep plain keys and values: encoder-decoders, recurrent and
    hybrid ones. A sliding window is a mask here, over keys that all stay."""
    config = read_config(path, option)
    layers = set(getattr(config.get_text_config(), "layer_types", None) or [])
    odd = layers - {"full_attention", "sliding_attention", "chunked_attention"}
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    stateful = odd or getattr(kind, "_is_stateful", False)
    what = "an encoder-decoder" if config.is_encoder_decoder else "a recurrent or hybrid model"
    expected = "expected a decoder whose cache is plain keys and values, as sampling needs them"
    fits = not config.is_encoder_decoder and not stateful
    require(fits, f"--{option} {path}: {config.model_type} is {what}, {expected}")
    kinds = ", ".join(config.architectures or [])
    encoder = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and kinds
    fits = not encoder or "CausalLM" in kinds or "LMHead" in kinds
    expected = "expected a causal LM, which writes text"
    require(fits, f"--{option} {path}: {config.model_type} ({kinds}) is an encoder, {expected}")


def stop_ids(path, tokenizer):
    """All end-of-sequence ids: those that the folder names, and the tokenizer's."""
    return sorted({*files.named_ends(path), tokenizer.eos_token_id} - {None})


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


def _require_kind(config, kinds, what):
    family = f"of the family {config.model_type} transformers has no {what}"
    require(type(config) in kinds, f"{config.name_or_path}: {family}")


def empty_causal_lm(config, dtype=torch.float32):
    """The causal LM of a configuration: structure without weights, parameters on meta."""
    _require_kind(config, transformers.MODEL_FOR_CAUSAL_LM_MAPPING, "causal LM")
    with without_weights():
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def empty_classifier(config):
    """The sequence classifier with one label of a configuration, parameters on meta."""
    kinds = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    _require_kind(config, kinds, "sequence classifier, which reward model and critic are")
    config.num_labels = 1
    with without_weights():
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()


def causal_lm_config(path, option="policy"):
    """The configuration of a causal LM. Raises UserError where it is another kind of model.

    As in transformers, embedding and head are not tied, whatever config.json says, where the files
    hold both and they differ.
    """
    config = read_config(path, option)
    kinds = ", ".join(config.architectures or [])
    classifies = "SequenceClassification" in kinds
    require(not classifies, f"--{option} {path}: not a causal LM but a {kinds}")
    if config.get_text_config().tie_word_embeddings:
        model, stored = empty_causal_lm(config), stored_tensors(path, option)
        names = parameter_names(model, stored)
        for pair in model.get_expanded_tied_weights_keys(all_submodels=True).items():
            keys = [key for name in pair for key in names.get(name, [])[:1]]
            both = [read_tensors(stored[key], [key])[key] for key in keys]
            if len(both) == 2 and both[0].shape != both[1].shape:
                shapes = f"{list(both[0].shape)} and {list(both[1].shape)}"
                why = "config.json ties them: expected equal shapes, or tie_word_embeddings false"
                raise UserError(f"--{option} {path}: {' and '.join(pair)} have {shapes}, {why}")
            if len(both) == 2 and not torch.equal(*both):
                config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    return config


def parameter_names(model, stored):
    """{parameter: [names in the files]} as transformers renames what it reads, with or without the
    prefix of the backbone."""
    steps, names, known = get_model_conversion_mapping(model), {}, model.state_dict()
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    for key in stored:
        name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        names.setdefault(key if name not in known and key in known else name, []).append(key)
    return names


def classifier_config(path, option="reward_model"):
    """The configuration of a sequence classifier with one label. Raises UserError: a causal LM is
    refused, its scalar head would be made of random numbers."""
    config = read_config(path, option)
    kinds = ", ".join(config.architectures or ["no architecture"])
    what = f"--{option} {path}: not a reward model but a causal LM ({kinds}), expected a sequence "
    what += "classifier with one label, as train_rm.py writes it"
    require("CausalLM" not in kinds and "LMHead" not in kinds, what)
    what = f"--{option} {path}: expected a classifier with 1 label, found {config.num_labels}"
    require(config.num_labels == 1, what)
    return config


def check_folder(path, option):
    """Raise UserError unless a folder holds a whole model of the kind that an option asks for, by
    what its files say of themselves: no weights are read."""
    (classifier_config if option == "reward_model" else read_config)(path, option)
    if not stored_tensors(path, option):
        raise UserError(f"--{option} {path}: {files.no_model(Path(path), 'weights')}")
