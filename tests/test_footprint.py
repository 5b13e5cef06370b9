import dataclasses

from pfppo.config import UserError
from pfppo.fsdp import recompute_blocks
from pfppo.model import Policy, ScalarModel
from pfppo.run.footprint import Living, NotRehearsed, Rehearsal
from train_ppo import Args

import pytest
import torch
from conftest import ARCHITECTURES, tiny_classifier, tiny_config, tiny_lm
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

PROMPT, NEW = 40, 24


def write_configs(folder, architecture="llama", **shape):
    """Folders with a config.json each, as arguments."""
    paths = {}
    for option, kind in (("policy", "CausalLM"), ("reward_model", "SequenceClassification")):
        config = tiny_config(architecture, num_labels=1, **shape)
        config.architectures = [f"For{kind}"]
        config.save_pretrained(folder / option)
        paths[option] = str(folder / option)
    return paths


def rehearsal(folder, prompt=PROMPT, architecture="llama", shape=None, **changes):
    paths = write_configs(folder, architecture, **(shape or {}))
    args = Args(**paths, max_new_tokens=NEW, **changes)
    return Rehearsal(args, torch.float32, prompt)


def measured(run):
    """The greatest number of bytes that torch's allocator hands out during run()."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    waiting, peak = prof.profiler.kineto_results.experimental_event_tree(), 0
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            peak = max(peak, event.extra_fields.total_allocated)
    return peak


def rows_of(count):
    ids = torch.zeros(count, PROMPT + NEW, dtype=torch.long)
    columns = torch.zeros(count, NEW, dtype=torch.long)
    return ids, columns


class Choosing(torch.nn.Module):
    """A layer whose way depends on numbers."""

    def forward(self, hidden):
        return hidden if hidden.sum() > 0 else -hidden


def test_living_counts_what_is_alive_at_the_same_time():
    with Living() as living:
        kept = torch.zeros(100)  # 400 bytes
        for _ in range(5):
            torch.zeros(200)  # 800 bytes that die at once
    assert living.lap() == 1200
    assert living.lap() == 400
    del kept
    living.lap()
    assert living.lap() == 0


def test_living_counts_a_storage_once_and_what_came_from_outside_not_at_all():
    outside = torch.zeros(100)
    with Living([outside]) as living:
        views = [outside[:50], outside.view(10, 10)]
        own = torch.zeros(25)
        views += [own[:5], own.view(5, 5)]
    assert living.lap() == 100


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("kind", ("policy", "scalar"))
def test_what_is_rehearsed_is_what_torch_allocates(tmp_path, kind, checkpointing):
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4}
    told = rehearsal(tmp_path, shape=shape, gradient_checkpointing=checkpointing)
    if kind == "policy":
        model = Policy(tiny_lm("llama", **shape))
    else:
        model = ScalarModel(tiny_classifier("llama", **shape))
    if checkpointing:
        recompute_blocks(model)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def run():
        ids, columns = rows_of(8)
        if kind == "scalar":
            return model(ids, columns)
        return model(ids, columns, columns, torch.ones(8, NEW))[0]

    def run_without_gradient():
        with torch.no_grad():
            run()

    peak = max(dataclasses.astuple(told.backward(kind, 8)))
    assert measured(lambda: run().sum().backward()) == pytest.approx(peak, rel=0.03)
    assert measured(run_without_gradient) == pytest.approx(told.forward(kind, 8), rel=0.03)


def test_checkpointing_keeps_inputs_of_blocks_only(tmp_path):
    shape = {"num_hidden_layers": 12}
    plain = rehearsal(tmp_path, shape=shape).backward("scalar", 4)
    less = rehearsal(tmp_path, shape=shape, gradient_checkpointing=True).backward("scalar", 4)
    inputs = 12 * 4 * (PROMPT + NEW) * 32 * 4
    assert inputs < less.forward < 2 * inputs < plain.forward / 4
    assert less.blocks < plain.blocks / 4


def test_attention_makes_no_scores(tmp_path):
    """Twice the length takes twice the memory, not four times."""
    short = rehearsal(tmp_path, prompt=512 - NEW).backward("scalar", 1)
    long = rehearsal(tmp_path, prompt=1024 - NEW).backward("scalar", 1)
    assert long.blocks == pytest.approx(2 * short.blocks, rel=0.05)


def test_the_cache_has_keys_and_values_of_all_rows_at_full_length(tmp_path):
    found = rehearsal(tmp_path).sampling(15, 5)
    assert found.cache == 2 * 2 * 15 * 2 * (PROMPT + NEW) * 8 * 4  # kv, layers, rows, heads, width
    assert found.cache + found.logits < found.peak


def test_logits_are_counted_in_full_precision_with_their_copies(tmp_path):
    found = rehearsal(tmp_path, shape={"vocab_size": 5000}).sampling(15, 5)
    assert found.logits >= 3 * 15 * 5000 * 4


@pytest.mark.parametrize("architecture", (*ARCHITECTURES, "gemma3_text"))
def test_any_architecture_is_rehearsed(tmp_path, architecture):
    told = rehearsal(tmp_path, architecture=architecture)
    assert told.backward("policy", 2).blocks > told.backward("policy", 1).blocks > 0
    assert told.sampling(10, 5).peak > told.sampling(5, 5).peak > 0


def test_what_needs_numbers_is_told_in_one_line(tmp_path):
    told = rehearsal(tmp_path)
    told.models["policy"].lm.model.layers[0].mlp = Choosing()
    with pytest.raises(NotRehearsed, match="policy: memory cannot be told, .*DataDependent"):
        told.forward("policy", 1)


def test_units_add_up_to_the_parameters_with_tied_weights_once(tmp_path):
    for tied in (False, True):
        told = rehearsal(tmp_path, shape={"tie_word_embeddings": tied})
        lm = tiny_lm("llama", tie_word_embeddings=tied)
        units = told.units["policy"]
        assert units.all == sum(p.numel() for p in lm.parameters())
        assert units.root + 2 * units.block == units.all
        assert units.head == lm.lm_head.weight.numel()
    assert told.units["scalar"].head == 0


def test_without_a_reward_model_the_critic_has_the_policy_s_backbone(tmp_path):
    paths = write_configs(tmp_path) | {"reward_model": ""}
    units = Rehearsal(Args(**paths), torch.float32, PROMPT).units
    assert units["scalar"].block == units["policy"].block


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match="--policy .*: there is no such folder"):
        Rehearsal(Args(policy=str(tmp_path / "none")), torch.float32, PROMPT)
