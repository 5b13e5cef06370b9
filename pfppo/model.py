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
from pathlib import Path

from pfppo.config import UserError, reason, require, require_folder
from pfppo.rollout import seeded

import torch
import transformers
from safetensors import safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
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
        self.exact = [scalar_head(classifier)]  # modules whose weights stay fp32 in forward passes

    def forward(self, ids, positions):
        """ids [B, L], positions [B, K] -> scalars [B, K, 1], fp32."""
        hidden = self.classifier.base_model(input_ids=ids, use_cache=False).last_hidden_state
        raw = scalar_head(self.classifier)(positions_of(hidden, positions).float())
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
    try:
        return transformers.AutoConfig.from_pretrained(path)
    except Exception as error:  # a damaged file fails in a dozen ways
        what = "not a model of transformers"
        raise UserError(f"--{option} {path}: {what}: {reason(error)}") from error


def read_generation_config(path, option="policy"):
    """`generation_config.json` of a directory; None where there is none. Raises UserError."""
    try:
        return transformers.GenerationConfig.from_pretrained(path)
    except Exception as error:
        file = Path(path) / "generation_config.json"
        require(not file.exists(), f"--{option} {path}: damaged {file.name}: {reason(error)}")
        return None


def stored_tensors(folder, option):
    """{name: file} of all tensors in a folder's safetensors, by their headers. As transformers has
    it, a single file comes before an index. Raises UserError naming the file that is damaged."""
    folder, names = Path(folder), []
    if (folder / SINGLE).is_file():
        names = [SINGLE]
    elif (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_text())["weight_map"]
            names = sorted(set(index.values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"--{option} {folder / INDEX}: damaged: {reason(error)}") from error
    stored = {}
    for path in (folder / name for name in names):
        require(path.is_file(), f"--{option} {folder}: there is no file {path.name}")
        try:
            with safe_open(path, "pt") as file:
                stored |= dict.fromkeys(file.keys(), path)
        except Exception as error:  # safetensors has an exception of its own
            size = f"damaged or cut short, {path.stat().st_size} bytes"
            raise UserError(f"--{option} {path}: {size}: {reason(error)}") from error
    return stored


def check_positions(path, option, longest, what="the longest prompt with --max_new_tokens"):
    """Raise UserError if a row of `longest` tokens is longer than the model has positions for."""
    config = read_config(path, option).get_text_config()
    names = ["max_position_embeddings"]
    if "longrope" in str(getattr(config, "rope_parameters", None)):
        names.append("original_max_position_embeddings")  # beyond it, padding changes frequencies
    for name in names:
        positions = getattr(config, name, None) or longest
        expected = f"expected at most {positions}, the {name} of its config.json"
        require(longest <= positions, f"--{option} {path}: {what} is {longest} tokens, {expected}")


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


def stop_ids(path, tokenizer):
    """All end-of-sequence ids: those `generate` would stop at, and the tokenizer's."""
    ends = (read_generation_config(path) or read_config(path, "policy")).eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({*ends, tokenizer.eos_token_id} - {None})


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


def empty_causal_lm(config, dtype=torch.float32):
    """The causal LM of a configuration: structure without weights, parameters on meta."""
    with without_weights():
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def empty_classifier(config):
    """The sequence classifier with one label of a configuration, parameters on meta."""
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
        tied = empty_causal_lm(config).get_expanded_tied_weights_keys(all_submodels=True)
        for pair in tied.items():
            both = _tensors(path, pair, option)
            if len(both) == 2 and not torch.equal(*both):
                config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    return config


def _tensors(path, names, option):
    """Those of the named tensors that a folder's files hold: safetensors, or else pickled ones."""
    stored, tensors = stored_tensors(path, option), []
    for name in (name for name in names if name in stored):
        with safe_open(stored[name], "pt") as file:
            tensors.append(file.get_tensor(name))
    for file in [] if stored else sorted(Path(path).glob("pytorch_model*.bin")):
        pickled = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        tensors += [pickled[name] for name in names if name in pickled]
    return tensors


def read_causal_lm(path, option="policy", dtype=torch.float32):
    """A causal LM with its weights, on the CPU, dropout off. Raises UserError."""
    causal_lm_config(path, option)
    model, missing = _read(AutoModelForCausalLM, path, option, dtype=dtype)
    _require_weights(missing, path, option)
    return model


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
