"""Policy and ScalarModel against transformers' own forward passes; what a folder says of a model.

Not here: families with their files and their training (test_architectures).
"""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

from pfppo import model as networks
from pfppo.loading import classifier_from_causal_lm, read_causal_lm, read_classifier
from pfppo.model import Policy, ScalarModel
from pfppo.rollout import collate

import pytest
import torch
from conftest import ARCHITECTURES, EOS, PAD, ragged, tiny_classifier, tiny_lm, write_model
from ranks import refused
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, GenerationConfig, LlamaConfig

PROMPTS, RESPONSES = ragged([3, 7, 1, 5]), ragged([6, 1, 9, 4], seed=1)
TEMPERATURE = 0.7
FAMILIES = [(name, {}) for name in (*ARCHITECTURES, "gemma2", "mistral")]
FAMILIES += [("gemma2", {"final_logit_softcapping": 2.0}), ("cohere", {"logit_scale": 0.3})]
FAMILIES += [("granite", {"logits_scaling": 4.0})]


def rows_of(pad_id=PAD, extra=0):
    """The rows, wider than they need to be by some columns."""
    rows = collate(PROMPTS, RESPONSES, pad_id)
    rows.ids = nn.functional.pad(rows.ids, (0, extra), value=pad_id)
    return rows


def slow_log_probs(lm):
    """(logp, entropy) of all response tokens, by transformers alone, one row at a time."""
    logp, entropy = [], []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = lm(torch.tensor([prompt + response])).logits[0].double() / TEMPERATURE
        for j, token in enumerate(response):
            p = logits[len(prompt) + j - 1].softmax(-1)
            logp.append(p[token].log())
            entropy.append(-(p * p.log()).sum())
    return torch.stack(logp), torch.stack(entropy)


def same_weights(first, second):
    a, b = dict(first.named_parameters()), dict(second.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def folders(lms, tmp_path_factory):
    """{architecture: folder of a causal LM}; tests leave the files as they are."""
    folder = tmp_path_factory.mktemp("models")
    return {name: write_model(folder / name, lm) for name, lm in lms.items()}


@pytest.mark.parametrize("architecture, scale", FAMILIES)
def test_log_probs_entropy_and_gradients_are_those_of_a_loop_whatever_chunk_and_padding(
    monkeypatch, architecture, scale
):
    lm, sizes = tiny_lm(architecture, **scale), []
    parameters, V = list(lm.parameters()), lm.config.vocab_size
    factors = torch.randn(20, generator=torch.Generator().manual_seed(0))
    naive = slow_log_probs(lm)
    unscaled, _ = slow_log_probs(tiny_lm(architecture, **dict.fromkeys(scale, 1.0)))
    assert not scale or (naive[0] - unscaled).abs().max() > 0.1  # it matters here
    expected = torch.autograd.grad(naive[0] @ factors.double(), parameters)
    largest = max(gradient.abs().max() for gradient in expected)
    lm.get_output_embeddings().register_forward_hook(lambda m, i, out: sizes.append(out.numel()))
    # There are 20 response tokens.
    for chunk, pad_id, extra in ((1, PAD, 0), (7, 9, 0), (19, EOS, 11), (20, PAD, 4), (21, PAD, 0)):
        monkeypatch.setattr(networks, "CHUNK", chunk * V)
        sizes.clear()
        rows = rows_of(pad_id, extra)
        logp, entropy = Policy(lm)(rows.ids, rows.states, rows.responses, rows.mask, TEMPERATURE)
        assert sum(sizes) == 20 * V and max(sizes) == min(chunk, 20) * V
        for values, wanted in zip((logp, entropy), naive, strict=True):
            assert values.dtype == torch.float32 and not values[rows.mask == 0].any()
            assert torch.allclose(values[rows.mask > 0].double(), wanted, atol=1e-5)
        found = torch.autograd.grad(logp[rows.mask > 0] @ factors, parameters)
        pairs = zip(found, expected, strict=True)
        assert all((a - b).abs().max() < 1e-5 * largest for a, b in pairs)
        assert not entropy.requires_grad


def test_rows_without_response_tokens_give_zeros(lms):
    rows = rows_of()
    mask = torch.zeros_like(rows.mask)
    logp, entropy = Policy(lms["llama"])(rows.ids, rows.states, rows.responses, mask)
    assert logp.shape == mask.shape and not logp.any() and not entropy.any()
    logp.sum().backward()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pad_id, extra", [(9, 0), (PAD, 4), (EOS, 11)])
def test_a_value_is_the_classifiers_own_of_its_state_and_of_nothing_after_it(
    architecture, pad_id, extra
):
    classifier, rows = tiny_classifier(architecture), rows_of(pad_id, extra)
    model = ScalarModel(classifier)
    with torch.no_grad():
        values = model(rows.ids, rows.states)  # [B, T, 1]
        normalised = ScalarModel(classifier, mean=0.5, std=4.0)(rows.ids, rows.states)
        assert torch.allclose(normalised, (values - 0.5) / 4.0)
        assert values.dtype == torch.float32 and values.std() > 0.1  # rows do differ
        for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            for j in range(len(response)):
                state = torch.tensor([prompt + response[:j]])
                assert torch.allclose(values[i, j], classifier(state).logits[0], atol=1e-5)


def test_a_classifier_without_a_linear_head_is_refused_by_name():
    message = refused(networks.scalar_head, nn.Sequential(nn.Linear(2, 1)))
    assert message.startswith("Sequential: no linear layer `score` or `classifier`")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_was_written_is_read_in_the_type_asked_for(lms, folders, tmp_path, architecture):
    rm = read_classifier(write_model(tmp_path / "rm", tiny_classifier(architecture)))
    lm = read_causal_lm(folders[architecture])
    assert same_weights(lm, lms[architecture]) and same_weights(rm, tiny_classifier(architecture))
    half = write_model(tmp_path / "half", tiny_lm(architecture).to(torch.bfloat16))
    fp32, bf16 = read_causal_lm(half), read_causal_lm(half, dtype=torch.bfloat16)
    for model in (lm, rm, fp32, bf16):
        wanted = torch.bfloat16 if model is bf16 else torch.float32
        assert {p.dtype for p in model.parameters()} == {wanted}
        assert all(b.dtype != torch.bfloat16 for b in model.buffers())  # frequencies
        assert not any(module.training for module in model.modules())  # dropout is off


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_empty_models_have_the_names_of_full_ones_no_weights_and_real_buffers(architecture):
    how = {"tie_word_embeddings": architecture == "llama"}
    empties = networks.empty_causal_lm, networks.empty_classifier
    for build, empty in zip((tiny_lm, tiny_classifier), empties, strict=True):
        full, two = (build(architecture, num_labels=labels, **how) for labels in (1, 2))
        model = empty(two.config)
        shapes, wanted = ({n: p.shape for n, p in m.named_parameters()} for m in (model, full))
        assert shapes == wanted  # tied ones once
        assert {p.device.type for p in model.parameters()} == {"meta"}
        buffers = dict(model.named_buffers())
        assert all(torch.equal(b, buffers[name]) for name, b in full.named_buffers())
        assert not any(module.training for module in model.modules())
    assert not nn.Linear(2, 2).weight.is_meta  # outside everything is as before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_new_head_is_the_seeds_and_the_backbone_the_policys(lms, folders, architecture):
    states = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)  # the global state plays no part
        states.append(classifier_from_causal_lm(folders[architecture], seed))
    first, again, other = states
    assert same_weights(first, again) and first.config.num_labels == 1
    for model in (lms[architecture], other):
        assert same_weights(first.base_model, model.base_model)
    head = networks.scalar_head(first).weight
    assert head.shape == (1, 32) and (head != networks.scalar_head(other).weight).all()
    assert 0.5 < head.std() * 33**0.5 < 1.6


def config(**changes):
    """Damage to config.json: other fields; None takes one out."""

    def damage(folder):
        fields = json.loads((folder / "config.json").read_text()) | changes
        fields = {name: value for name, value in fields.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(fields))

    return damage


def lose(part):
    """Damage to the weights: those with this in their names are taken out."""

    def damage(folder):
        file = folder / "model.safetensors"
        left = {name: value for name, value in load_file(file).items() if part not in name}
        save_file(left, file, metadata={"format": "pt"})

    return damage


def read_backbone(path, option):
    return classifier_from_causal_lm(path, 0, option)


LM, RM = (read_causal_lm, tiny_lm), (read_classifier, tiny_classifier)
REFUSED = [  # what reads, what has been written; damage; what is said
    (RM, shutil.rmtree, "there is no such folder"),
    (RM, config(num_labels=2), "expected .* 1 label, found 2"),
    (RM, lambda f: os.truncate(f / "model.safetensors", 9000), "cannot read the weights"),
    (RM, lose("score"), "not a reward model.*score.weight"),
    (RM, lambda f: os.remove(f / "model.safetensors"), "cannot read the weights"),
    (RM, lambda f: os.remove(f / "config.json"), "has no config.json"),
    ((read_causal_lm, tiny_classifier), config(), "not a causal LM but a Llama"),
    (LM, shutil.rmtree, "there is no such folder"),
    (LM, lose("1.mlp.up"), "1 weights are missing: .*layers.1"),
    ((read_backbone, tiny_lm), lose("1.mlp.up"), "1 weights are missing: .*layers.1"),
    (LM, config(vocab_size=99), r"has shape \[61, 32\], expected \[99, 32\] by config.json"),
    (LM, config(hidden_size="x"), "'hidden_size' expected int, got str"),
    (LM, config(num_attention_heads=5), r"hidden size \(32\) is not a multiple"),
    (LM, config(model_type="nonsense"), "model type `nonsense`"),
    (LM, config(num_hidden_layers=3), "weights are missing: .*layers.2"),
]


@pytest.mark.parametrize("kind, damage, expected", REFUSED)
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, kind, damage, expected):
    read, build = kind
    folder = write_model(tmp_path / "x", build("llama"))
    damage(Path(folder))
    message = refused(read, folder, "any_option")
    assert re.match(f"--any_option {folder}: .*{expected}", message), message


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_causal_lm_is_refused_by_its_architecture_or_by_what_it_lacks(tmp_path, architecture):
    folder = write_model(tmp_path, tiny_lm(architecture, num_labels=1))
    assert re.search("not a reward model.*causal LM", refused(read_classifier, folder))
    config(architectures=None)(tmp_path)  # now nothing but the missing head gives it away
    assert re.search("not a reward model.*score.weight", refused(read_classifier, folder))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prompt_has_the_room_that_positions_leave_and_no_more_than_asked(folders, architecture):
    args = SimpleNamespace(policy=folders[architecture], max_prompt_tokens=90, max_new_tokens=38)
    assert networks.room_of(args) == (90, "--max_prompt_tokens")
    args.max_new_tokens = 39
    room, why = networks.room_of(args)
    assert room == 89 and "--max_new_tokens 39 leaves 89 of 128" in why
    args.pairs = "pairs.jsonl"  # nothing is sampled
    assert networks.room_of(args)[0] == 90


def test_a_damaged_generation_config_is_named_and_a_missing_one_is_not(tmp_path):
    folder = write_model(tmp_path, tiny_lm("llama"))
    assert networks.read_generation_config(folder).eos_token_id == EOS
    (tmp_path / "generation_config.json").write_text("{")
    assert "damaged generation_config.json" in refused(networks.read_generation_config, folder)
    (tmp_path / "generation_config.json").unlink()
    assert networks.read_generation_config(folder) is None


@pytest.mark.parametrize("kind", [GenerationConfig, LlamaConfig])  # the latter where it is alone
@pytest.mark.parametrize(
    "eos, expected", [([7, 5], [EOS, 5, 7]), (9, [EOS, 9]), (None, [EOS]), (EOS, [EOS])]
)
def test_stop_ids_are_those_of_the_folder_and_the_tokenizer(tmp_path, kind, eos, expected):
    kind(eos_token_id=eos).save_pretrained(tmp_path)
    assert networks.stop_ids(tmp_path, SimpleNamespace(eos_token_id=EOS)) == expected


@pytest.mark.parametrize("kind", ["mamba", "jamba", "t5", "lfm2"])
def test_a_model_without_a_plain_cache_is_refused_by_name(tmp_path, kind):
    hybrid = {"layer_types": ["conv", "full_attention"]} if kind == "lfm2" else {}
    AutoConfig.for_model(kind, num_hidden_layers=2, **hybrid).save_pretrained(tmp_path)
    message = refused(networks.check_cache, tmp_path)
    assert re.match(f"--policy {tmp_path}: {kind} is .*expected a decoder", message)
