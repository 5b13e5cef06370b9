"""Weights from files: each rank its own slices, whole where names differ, damage named.

Run as a script under torchrun it loads one model per architecture and writes what it found.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from pfppo.config import UserError
from pfppo.fsdp import full_state, init_ranks, shard
from pfppo.loading import load_policies, load_scalars
from pfppo.model import Policy, empty_causal_lm

import pytest
import torch
from conftest import run_ranks, tiny_classifier, tiny_config, tiny_lm, tiny_tokenizer, write_model
from pfppo.weights import Slices, Whole, source_of, stored_tensors, without_weights
from torch import nn
from transformers import AutoModelForCausalLM

SLICED = ("llama", "qwen2", "gpt2", "gemma3_text", "mistral")
RANKS = (1, 2, 3)  # 3: some rows are shared unevenly, some ranks own nothing of a parameter


def no_read():
    raise AssertionError("nobody may read the whole model")


def write(folder, architecture, **options):
    tiny_lm(architecture).save_pretrained(folder / architecture, **options)
    return folder / architecture


# ------------------------------------------------------------------------- what is run under ranks


def main(folder):
    ranks = init_ranks("cpu", 2 if "grouped" in folder.name else 0)
    found = {}
    for architecture in SLICED:
        path = folder.parent / architecture
        empty = Policy(empty_causal_lm(tiny_config(architecture)))
        source = source_of(empty, path, "policy", no_read)
        policy = shard(empty, source, ranks)
        state = full_state(policy)
        if ranks.is_main:
            whole = Policy(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
            parameters, buffers = dict(whole.named_parameters()), dict(whole.named_buffers())
            found[architecture] = {
                "equal": state.keys() == parameters.keys()
                and all(torch.equal(parameters[name], value) for name, value in state.items()),
                "buffers": all(torch.equal(b, buffers[n]) for n, b in policy.named_buffers())
                and buffers.keys() == dict(policy.named_buffers()).keys(),
                "share": max(p.to_local().numel() / p.numel() for p in policy.parameters()),
            }
    if ranks.is_main:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
    sys.exit()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for number, architecture in enumerate(SLICED):  # single files, and several with an index
        write(folder, architecture, **({"max_shard_size": "30KB"} if number % 2 else {}))
    assert len(list((folder / "qwen2").glob("*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize(
    "world, kind", [(3, "whole"), pytest.param(4, "grouped", marks=pytest.mark.slow)]
)
def test_every_rank_reads_its_own_slices_and_together_they_are_the_model(checkpoints, world, kind):
    folder = checkpoints / f"{kind}-{world}"
    folder.mkdir()
    run_ranks(__file__, folder, world)
    found = json.loads((folder / "found.json").read_text())
    for architecture in SLICED:
        assert found[architecture]["equal"] and found[architecture]["buffers"], architecture
        owners = world if kind == "whole" else 2
        assert found[architecture]["share"] <= 1 / owners + 0.35  # rows are not cut further


def test_a_model_without_weights_has_real_buffers_and_ties():
    with without_weights():
        lm = AutoModelForCausalLM.from_config(tiny_config("llama", tie_word_embeddings=True))
    assert all(p.is_meta for p in lm.parameters())
    assert not any(b.is_meta for b in lm.buffers())
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    assert not nn.Linear(2, 2).weight.is_meta  # outside everything is as before


@pytest.mark.parametrize("architecture", ["gpt_neox", "mixtral"])
def test_a_family_stored_in_other_pieces_is_read_whole(tmp_path, architecture):
    config = tiny_config(architecture)
    path = write(tmp_path, architecture)
    empty = Policy(empty_causal_lm(config))
    source = source_of(empty, path, "policy", lambda: Policy(tiny_lm(architecture)))
    assert isinstance(source, Whole) or architecture == "gpt_neox"


def test_a_weight_of_another_shape_or_none_is_left_to_the_whole_reader(tmp_path):
    path = write(tmp_path, "llama")
    for changes in ({"hidden_size": 16}, {"num_hidden_layers": 3}):
        empty = Policy(empty_causal_lm(tiny_config("llama", **changes)))
        assert isinstance(source_of(empty, path, "policy", lambda: None), Whole)
    same = Policy(empty_causal_lm(tiny_config("llama")))
    assert isinstance(source_of(same, path, "policy", no_read), Slices)


@pytest.mark.parametrize("left", [0, 7, 200, -40])
def test_a_file_that_was_cut_short_is_named(tmp_path, left):
    path = write(tmp_path, "llama", max_shard_size="30KB")
    file = sorted(path.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(UserError, match=f"^--policy {file}: damaged or cut short, .* bytes") as e:
        stored_tensors(path, "policy")
    assert "\n" not in str(e.value)


def test_a_file_of_the_index_that_is_not_there_is_named(tmp_path):
    path = write(tmp_path, "llama", max_shard_size="30KB")
    gone = sorted(path.glob("*.safetensors"))[2]
    gone.unlink()
    with pytest.raises(UserError, match=f"there is no file {gone.name}"):
        stored_tensors(path, "policy")
    (path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="index.json: damaged"):
        stored_tensors(path, "policy")


def test_policies_and_scalars_of_a_cut_file_are_refused(ranks, tmp_path):
    policy = write_model(tmp_path / "policy", tiny_lm("llama"))
    rm = write_model(tmp_path / "rm", tiny_classifier("llama"))
    args = SimpleNamespace(policy=policy, reward_model=rm, seed=1, param_dtype="float32")
    args.prompt_style = "plain"
    for name, folder in (("policy", policy), ("reward_model", rm)):
        file = Path(folder) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(UserError, match=f"^--{name} {file}: "):
            if name == "policy":
                load_policies(policy, ranks, "float32")
            load_scalars(args, tiny_tokenizer(), ranks)
