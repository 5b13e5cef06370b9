"""Exports: whole or not at all, and what they hold loads in transformers."""

import contextlib

from pfppo.config import UserError
from pfppo.data import template_hash, vocabulary_hash
from pfppo.loading import load_policies
from pfppo.model import empty_causal_lm, empty_classifier
from pfppo.reward import RewardCard, load_card
from pfppo.run import export
from pfppo.sampler import stop_ids

import pytest
import torch
from conftest import (
    ARCHITECTURES,
    EOS,
    PAD,
    files_of,
    full_disk,
    out_of_space,
    policy_of,
    ragged,
    scalar_of,
    tiny_classifier,
    tiny_lm,
    tiny_tokenizer,
    write_model,
)
from pfppo.batch import collate
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedTokenizerFast,
)


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor(ragged([9, 9]))).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_exported_policy_loads_in_transformers_with_equal_logits(
    ranks, tmp_path, architecture, tied
):
    lm = tiny_lm(architecture, tie_word_embeddings=tied)
    folder, wanted = tmp_path / "policy", logits_of(lm)
    tokenizer = tiny_tokenizer()
    export.write(policy_of(lm, ranks).lm, folder, empty_causal_lm(lm.config), tokenizer, ranks)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert loaded.dtype == torch.float32 and type(loaded) is type(lm)
    assert torch.equal(logits_of(loaded), wanted)
    assert loaded.config.tie_word_embeddings == tied
    written = PreTrainedTokenizerFast.from_pretrained(folder)
    assert vocabulary_hash(written) == vocabulary_hash(tokenizer)
    assert {path.name for path in tmp_path.iterdir()} == {"policy"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_exported_reward_model_loads_as_a_classifier_with_equal_scores_and_its_card(
    ranks, tmp_path, architecture
):
    classifier, tokenizer = tiny_classifier(architecture), tiny_tokenizer()
    model = scalar_of(classifier, ranks)
    config = model.classifier.config
    config.pad_token_id = PAD
    card = RewardCard(0.25, 1.5, template_hash(tokenizer, "plain"), vocabulary_hash(tokenizer))
    folder = tmp_path / "rm"
    export.write(model.classifier, folder, empty_classifier(config), tokenizer, ranks, [card.save])
    loaded = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert loaded.config.num_labels == 1
    rows = collate(ragged([2, 6, 4]), ragged([5, 1, 3], seed=1), pad_id=PAD)
    columns = torch.arange(rows.ids.shape[1])
    with torch.no_grad():
        scores = loaded(rows.ids, attention_mask=(columns <= rows.ends).long()).logits
        assert torch.allclose(model(rows.ids, rows.ends)[:, 0], scores, atol=1e-6)
    assert load_card(folder) == card


def small_export(ranks, folder, seed, extra=()):
    lm = tiny_lm("llama", seed)
    empty, tokenizer = empty_causal_lm(lm.config), tiny_tokenizer()
    export.write(policy_of(lm, ranks).lm, folder, empty, tokenizer, ranks, extra)


@pytest.mark.parametrize("failure", ["an extra writer", "a full disk"])
def test_a_failed_export_leaves_the_old_one(ranks, tmp_path, failure):
    folder = tmp_path / "policy"
    small_export(ranks, folder, seed=0)
    before = files_of(tmp_path)
    broken = [out_of_space] if failure == "an extra writer" else []
    limit = contextlib.nullcontext() if broken else full_disk(5000)
    with limit, pytest.raises(UserError) as error:
        small_export(ranks, folder, seed=1, extra=broken)
    assert str(error.value).startswith(f"{folder}: cannot be written: ")
    assert "\n" not in str(error.value)
    assert files_of(tmp_path) == before


def test_an_export_replaces_the_old_one_whole(ranks, tmp_path):
    folder = tmp_path / "policy"
    small_export(ranks, folder, 0, [lambda path: (path / "notes.txt").write_text("old")])
    small_export(ranks, folder, 1)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits_of(loaded), logits_of(tiny_lm("llama", 1)))
    assert not (folder / "notes.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"policy"}


def test_what_a_killed_export_left_behind_is_in_nobodys_way(ranks, tmp_path):
    for name in ("policy.tmp", "policy.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    small_export(ranks, tmp_path / "policy", 1)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert torch.equal(logits_of(loaded), logits_of(tiny_lm("llama", 1)))
    assert {path.name for path in tmp_path.iterdir()} == {"policy"}


def test_an_exported_policy_stops_where_the_one_it_came_from_stops(ranks, tmp_path):
    lm, tokenizer = tiny_lm("llama"), tiny_tokenizer()
    lm.generation_config = GenerationConfig(eos_token_id=[EOS, 9, 7])
    write_model(tmp_path / "sft", lm)
    policy, _, twin = load_policies(str(tmp_path / "sft"), ranks, "float32")
    export.write(policy.lm, tmp_path / "policy", twin, tokenizer, ranks)
    assert stop_ids(tmp_path / "policy", tokenizer) == stop_ids(tmp_path / "sft", tokenizer)
    assert stop_ids(tmp_path / "policy", tokenizer) == [EOS, 7, 9]


def test_what_a_bfloat16_twin_exports_is_read_back_as_fp32(ranks, tmp_path):
    lm = tiny_lm("llama")
    twin = empty_causal_lm(lm.config, torch.bfloat16)
    export.write(policy_of(lm, ranks).lm, tmp_path / "policy", twin, tiny_tokenizer(), ranks)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    wanted = dict(lm.named_parameters())
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.named_parameters())
    assert twin.dtype == torch.bfloat16
