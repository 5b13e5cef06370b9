"""Policy and ScalarModel against transformers' own forward passes; what is refused as an RM."""

import json
from pathlib import Path

from pfppo import model as model_file
from pfppo.config import UserError
from pfppo.model import (
    Policy,
    ScalarModel,
    check_positions,
    classifier_from_causal_lm,
    empty_causal_lm,
    empty_classifier,
    read_causal_lm,
    read_classifier,
    read_config,
    read_generation_config,
    scalar_head,
)

import pytest
import torch
from conftest import (
    ARCHITECTURES,
    EOS,
    PAD,
    VOCABULARY,
    ragged,
    tiny_classifier,
    tiny_config,
    tiny_lm,
    write_model,
)
from pfppo.batch import collate
from safetensors.torch import load_file, save_file
from torch import nn

PROMPTS, RESPONSES = ragged([3, 7, 1, 5]), ragged([6, 1, 9, 4], seed=1)


def rows_of(pad_id=PAD):
    return collate(PROMPTS, RESPONSES, pad_id)


def slow_log_probs(lm, temperature=1.0):
    """[(logp, entropy)] per row, by transformers alone: no padding, one position at a time."""
    found = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = lm(torch.tensor([prompt + response])).logits[0].double() / temperature
        logp, entropy = [], []
        for j, token in enumerate(response):
            p = logits[len(prompt) + j - 1].softmax(-1)
            logp.append(p[token].log())
            entropy.append(-(p * p.log()).sum())
        found.append((torch.stack(logp), torch.stack(entropy)))
    return found


def log_probs(policy, rows, temperature=1.0):
    return policy(rows.ids, rows.states, rows.responses, rows.mask, temperature)


# ------------------------------------------------------------------------------------- policy


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma2", "mistral"])
def test_log_probs_and_entropy_are_those_of_transformers_logits(lms, architecture, temperature):
    lm = lms.get(architecture) or tiny_lm(architecture)
    rows = rows_of()
    with torch.no_grad():
        logp, entropy = log_probs(Policy(lm), rows, temperature)
        expected = slow_log_probs(lm, temperature)
    assert logp.dtype == entropy.dtype == torch.float32
    for row, (wanted, wanted_entropy) in enumerate(expected):
        length = len(wanted)
        assert torch.allclose(logp[row, :length].double(), wanted, atol=1e-5)
        assert torch.allclose(entropy[row, :length].double(), wanted_entropy, atol=1e-5)
        assert not logp[row, length:].any() and not entropy[row, length:].any()


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 4.0}),
    ],
)
def test_families_that_scale_their_logits_are_followed(architecture, changes):
    lm = tiny_lm(architecture, **changes)
    plain = tiny_lm(architecture, **dict.fromkeys(changes, 1.0))
    with torch.no_grad():
        logp, _ = log_probs(Policy(lm), rows_of())
        wanted, unscaled = (torch.cat([x for x, _ in slow_log_probs(m)]) for m in (lm, plain))
    assert torch.allclose(logp[rows_of().mask > 0].double(), wanted, atol=1e-5)
    assert (wanted - unscaled).abs().max() > 0.1  # the scale matters here


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_chunked_log_probs_are_those_of_the_naive_ones(lms, monkeypatch, architecture):
    monkeypatch.setattr(model_file, "CHUNK", 3 * VOCABULARY)
    lm, rows = lms[architecture], rows_of()
    factors = torch.randn(rows.mask.shape, generator=torch.Generator().manual_seed(0))
    lm.zero_grad()
    (log_probs(Policy(lm), rows, 0.7)[0] * factors).sum().backward()
    found = {name: p.grad.clone() for name, p in lm.named_parameters()}
    lm.zero_grad()
    naive = [
        logp @ factors[i, : len(logp)].double()
        for i, (logp, _) in enumerate(slow_log_probs(lm, 0.7))
    ]
    torch.stack(naive).sum().backward()
    scale = max(p.grad.abs().max() for p in lm.parameters())
    for name, parameter in lm.named_parameters():
        assert (found[name] - parameter.grad).abs().max() < 1e-5 * scale, name
    lm.zero_grad()


def test_entropy_has_no_gradient_and_log_probs_have(lms):
    logp, entropy = log_probs(Policy(lms["llama"]), rows_of())
    assert logp.requires_grad and not entropy.requires_grad


@pytest.mark.parametrize("chunk", [1, 7, 19, 20, 21])  # there are 20 response tokens
def test_the_chunk_changes_no_number_and_bounds_the_logits(lms, monkeypatch, chunk):
    lm, rows, seen = lms["llama"], rows_of(), []
    with torch.no_grad():
        expected = log_probs(Policy(lm), rows)
        monkeypatch.setattr(model_file, "CHUNK", chunk * VOCABULARY)
        hook = lm.lm_head.register_forward_hook(lambda m, i, out: seen.append(out.numel()))
        found = log_probs(Policy(lm), rows)
        hook.remove()
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert sum(seen) == 20 * VOCABULARY and max(seen) == min(chunk, 20) * VOCABULARY


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_and_its_value_change_no_number(lms, architecture):
    policy, rows = Policy(lms[architecture]), rows_of()
    scalar = ScalarModel(tiny_classifier(architecture))
    with torch.no_grad():
        expected = [*log_probs(policy, rows), scalar(rows.ids, rows.ends)]
        for pad_id, extra in ((9, 0), (PAD, 4), (1, 11)):
            other = rows_of(pad_id)
            other.ids = nn.functional.pad(other.ids, (0, extra), value=pad_id)
            found = [*log_probs(policy, other), scalar(other.ids, other.ends)]
            for a, b in zip(found, expected, strict=True):
                assert torch.allclose(a, b, atol=1e-5)


def test_a_row_without_response_tokens_gives_zeros(lms):
    rows = rows_of()
    mask = torch.zeros_like(rows.mask)
    logp, entropy = Policy(lms["llama"])(rows.ids, rows.states, rows.responses, mask)
    assert logp.shape == mask.shape and not logp.any() and not entropy.any()
    logp.sum().backward()


# -------------------------------------------------------------------------------- scalar model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_the_classifiers_own_at_the_last_token(architecture):
    classifier, rows = tiny_classifier(architecture), rows_of()
    columns = torch.arange(rows.ids.shape[1])
    with torch.no_grad():
        wanted = classifier(rows.ids, attention_mask=(columns <= rows.ends).long()).logits
        scores = ScalarModel(classifier)(rows.ids, rows.ends)
        normalised = ScalarModel(classifier, mean=0.5, std=4.0)(rows.ids, rows.ends)
    assert scores.shape == (4, 1, 1) and scores.dtype == torch.float32
    assert torch.allclose(scores[:, 0], wanted, atol=1e-5)
    assert torch.allclose(normalised, (scores - 0.5) / 4.0)
    assert scores.std() > 0.1  # rows do differ


def test_a_value_sees_its_state_and_nothing_after_it():
    model, rows = ScalarModel(tiny_classifier("llama")), rows_of()
    with torch.no_grad():
        values = model(rows.ids, rows.states)  # [B, T, 1]
        for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            for j in range(len(response)):
                state = torch.tensor([prompt + response[:j]])
                alone = model(state, torch.tensor([[state.shape[1] - 1]]))
                assert torch.allclose(values[i, j], alone[0, 0], atol=1e-5)


def test_a_classifier_without_a_linear_head_is_refused_by_name():
    with pytest.raises(UserError, match="^Sequential: no linear layer `score` or `classifier`"):
        scalar_head(nn.Sequential(nn.Linear(2, 1)))


# ----------------------------------------------------------------------------- reading, making


def same_weights(first, second):
    a, b = dict(first.named_parameters()), dict(second.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_was_written_is_read_in_fp32_with_dropout_off(lms, tmp_path, architecture):
    classifier = tiny_classifier(architecture)
    half = tiny_lm(architecture).to(torch.bfloat16)
    lm = read_causal_lm(write_model(tmp_path / "lm", lms[architecture]))
    rm = read_classifier(write_model(tmp_path / "rm", classifier))
    assert same_weights(lm, lms[architecture]) and same_weights(rm, classifier)
    fp32 = read_causal_lm(write_model(tmp_path / "half", half))
    for model in (lm, rm, fp32):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_empty_models_are_on_meta_and_have_the_names_of_full_ones(lms, architecture):
    empty = empty_causal_lm(tiny_config(architecture))
    rm = empty_classifier(tiny_config(architecture, num_labels=2))
    for found, full in ((empty, lms[architecture]), (rm, tiny_classifier(architecture))):
        shapes, wanted = (
            {name: p.shape for name, p in model.named_parameters()} for model in (found, full)
        )
        assert shapes == wanted
        assert {p.device.type for p in found.parameters()} == {"meta"}
        assert not any(module.training for module in found.modules())


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_head(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


REFUSED = {
    "a causal LM": (lambda: tiny_lm("llama"), None, "causal LM"),
    "two labels": (
        lambda: tiny_classifier("llama", num_labels=2),
        None,
        "1 label, found .*2",
    ),
    "truncated": (lambda: tiny_classifier("llama"), truncate, "cannot read the weights"),
    "no head": (lambda: tiny_classifier("llama"), lose_head, "not a reward model.*score.weight"),
    "no weights": (
        lambda: tiny_classifier("llama"),
        lambda folder: (folder / "model.safetensors").unlink(),
        "cannot read the weights",
    ),
    "no config": (
        lambda: tiny_classifier("llama"),
        lambda folder: (folder / "config.json").unlink(),
        "not a model of transformers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_reward_model_is_refused_in_one_line(tmp_path, case):
    build, damage, expected = REFUSED[case]
    folder = tmp_path / "rm"
    write_model(folder, build())
    if damage:
        damage(folder)
    with pytest.raises(UserError, match=f"^--reward_model {folder}: .*{expected}") as error:
        read_classifier(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_causal_lm_is_refused_by_its_architecture_or_by_what_it_lacks(tmp_path, architecture):
    folder = write_model(tmp_path, tiny_lm(architecture, num_labels=1))
    with pytest.raises(UserError, match="not a reward model.*causal LM"):
        read_classifier(folder)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]  # now nothing but the missing head gives it away
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="not a reward model.*score.weight"):
        read_classifier(folder)


@pytest.mark.parametrize("read", [read_config, read_causal_lm, read_classifier])
def test_a_folder_that_does_not_exist_is_one_line_with_option_and_name(tmp_path, read):
    folder = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"^--any_option {folder}: ") as error:
        read(folder, "any_option")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_new_head_comes_from_the_seed_and_the_backbone_from_the_policy(
    lms, tmp_path, architecture
):
    lm, folder = lms[architecture], write_model(tmp_path, lms[architecture])
    torch.manual_seed(0)
    first = classifier_from_causal_lm(folder, seed=3)
    torch.manual_seed(1)
    again, other = (classifier_from_causal_lm(folder, seed=seed) for seed in (3, 4))
    assert same_weights(first, again)
    assert same_weights(first.base_model, lm.base_model)
    assert same_weights(first.base_model, other.base_model)
    head = scalar_head(first).weight
    assert head.shape == (1, 32) and (head != scalar_head(other).weight).all()
    assert 0.5 < head.std() * 33**0.5 < 1.6 and first.config.num_labels == 1


def test_a_policy_whose_weights_are_missing_is_refused(tmp_path):
    folder = write_model(tmp_path, tiny_lm("llama"))
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    lost = next(name for name in weights if "layers.1." in name)
    save_file({k: v for k, v in weights.items() if k != lost}, file, metadata={"format": "pt"})
    for read in (read_causal_lm, lambda path: classifier_from_causal_lm(path, seed=0)):
        with pytest.raises(
            UserError, match=f"^--policy {folder}: 1 weights .* missing: .*layers.1"
        ):
            read(folder)


def damage(folder, **changes):
    """Change config.json."""
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vocab_size": 99}, r"has shape \[61, 32\], expected \[99, 32\] by config.json"),
        ({"hidden_size": "x"}, "'hidden_size' expected int, got str"),
        ({"num_attention_heads": 5}, r"hidden size \(32\) is not a multiple"),
        ({"model_type": "nonsense"}, "model type `nonsense`"),
        ({"num_hidden_layers": 3}, "weights are missing: .*layers.2"),
    ],
)
def test_a_config_that_does_not_fit_is_one_line_that_says_why(tmp_path, changes, expected):
    folder = write_model(tmp_path, tiny_lm("llama"))
    damage(folder, **changes)
    with pytest.raises(UserError, match=f"^--policy {folder}: .*{expected}") as error:
        read_causal_lm(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_longer_than_the_model_has_positions_for_are_refused(tmp_path, architecture):
    folder = write_model(tmp_path, tiny_lm(architecture))
    check_positions(folder, "policy", 128)
    with pytest.raises(UserError, match=f"^--policy {folder}: .* is 129 tokens .* at most 128"):
        check_positions(folder, "policy", 129)


def test_a_damaged_generation_config_is_named_and_a_missing_one_is_not(tmp_path):
    folder = write_model(tmp_path, tiny_lm("llama"))
    assert read_generation_config(folder).eos_token_id == EOS
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match="--policy .*: damaged generation_config.json"):
        read_generation_config(folder)
    (tmp_path / "generation_config.json").unlink()
    assert read_generation_config(folder) is None


def test_a_policy_is_read_in_the_type_asked_for_with_fp32_frequencies(tmp_path):
    folder = write_model(tmp_path, tiny_lm("llama"))
    model = read_causal_lm(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}


def test_a_classifier_is_refused_as_policy(tmp_path):
    write_model(tmp_path / "rm", tiny_classifier("llama"))
    with pytest.raises(UserError, match="--policy .*: not a causal LM but a Llama"):
        read_causal_lm(tmp_path / "rm")
