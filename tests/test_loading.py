"""From folders that transformers has written to sharded networks: each rank its own slices of the
files, whole where names differ; what is damaged or does not fit, named."""

import re
import shutil
from dataclasses import dataclass
from types import SimpleNamespace

from pfppo import loading
from pfppo import model as networks
from pfppo.fsdp import full_state, shard
from pfppo.loading import Slices, Whole, load_models, load_scalars, new_scalar, source_of
from pfppo.model import Policy, ScalarModel
from pfppo.reward import RewardCard, Slot
from pfppo.rollout import collate

import conftest
import pytest
import torch
from conftest import ragged, tiny_classifier, tiny_lm, tiny_tokenizer, write_model
from ranks import ranked, refused

ROWS = collate(ragged([3, 7, 1]), ragged([6, 1, 4], seed=1), pad_id=0)
SLICED = ("llama", "qwen2", "gpt2", "gemma3_text", "mistral")


def log_probs(policy):
    return policy(ROWS.ids, ROWS.states, ROWS.responses, ROWS.mask)[0]


def values(model):
    return model(ROWS.ids, ROWS.states)


def args_of(policy, reward_model="", **changes):
    fixed = {"param_dtype": "float32", "seed": 1, "gradient_checkpointing": False, "compile": False}
    fixed |= {f"offload_{part}": False for part in ("ref", "reward", "optimizer")}
    return SimpleNamespace(policy=policy, reward_model=reward_model, **(fixed | changes))


def tokens_of(style="plain", template=None):
    return conftest.tokens_of(tiny_tokenizer(template=template), style)


def save_card(folder, tokens=None, **changes):
    template, vocabulary = (tokens or tokens_of()).hashes()
    fields = {"mean": 0.3, "std": 2.0, "template": template, "vocabulary": vocabulary} | changes
    RewardCard(**fields).save(folder)


def write(folder, architecture, **options):
    tiny_lm(architecture).save_pretrained(folder / architecture, **options)
    return folder / architecture


def no_read(path):
    raise AssertionError("nobody may read the whole model")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder of models, in single files and in several with an index; and a reward model, rm."""
    folder = tmp_path_factory.mktemp("weights")
    for number, architecture in enumerate(SLICED):
        write(folder, architecture, **({"max_shard_size": "30KB"} if number % 2 else {}))
    assert len(list((folder / "qwen2").glob("*.safetensors"))) > 2
    write_model(folder / "rm", tiny_classifier("llama"))
    return folder


def check_slices(ranks, checkpoints):
    def same(model, whole):
        state, wanted = full_state(model), dict(whole.named_parameters()) if ranks.is_main else {}
        assert state.keys() == wanted.keys()
        assert all(torch.equal(value, wanted[name]) for name, value in state.items())
        buffers = dict(whole.named_buffers())
        assert buffers.keys() == dict(model.named_buffers()).keys()
        assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())

    for architecture in SLICED:
        lm = tiny_lm(architecture)
        empty = Policy(networks.empty_causal_lm(lm.config))
        source = source_of(empty, checkpoints / architecture, "policy", no_read, ranks)
        policy = shard(empty, source, ranks)
        same(policy, Policy(lm))
        share = max(p.to_local().numel() / p.numel() for p in policy.parameters())
        assert share <= 1 / ranks.mesh["shard"].size() + 0.05  # rows are not cut further
    # A head has one row: most ranks own nothing of it.
    args = args_of(str(checkpoints / "llama"), str(checkpoints / "rm"))
    (scalar,) = load_scalars(args, tokens_of(), ranks, [True])
    same(scalar, ScalarModel(tiny_classifier("llama")))
    whole = loading.classifier_from_causal_lm(args.policy, args.seed)
    same(new_scalar(args, ranks), ScalarModel(whole))


groups = ranked(pytest.param(4, marks=pytest.mark.slow), shard_group_size=2)
test_every_rank_reads_its_own_slices_and_together_they_are_the_model = ranked(3)(check_slices)
test_every_group_of_ranks_reads_the_whole_model = groups(check_slices)


@pytest.mark.parametrize("architecture", ["gpt_neox", "mixtral"])
def test_a_family_stored_in_other_pieces_is_read_whole(ranks, tmp_path, architecture):
    path, lm = write(tmp_path, architecture), tiny_lm(architecture)
    empty = Policy(networks.empty_causal_lm(lm.config))
    source = source_of(empty, path, "policy", lambda path: lm, ranks)
    assert isinstance(source, Whole) or architecture == "gpt_neox"
    assert torch.equal(log_probs(shard(empty, source, ranks)), log_probs(Policy(lm)))


def test_a_weight_of_another_shape_or_none_is_left_to_the_whole_reader(ranks, checkpoints):
    whole = {"hidden_size": 16}, {"num_hidden_layers": 3}
    for changes, kind in ((whole[0], Whole), (whole[1], Whole), ({}, Slices)):
        empty = Policy(networks.empty_causal_lm(tiny_lm("llama", **changes).config))
        read = no_read if kind is Slices else lambda path: None
        assert isinstance(source_of(empty, checkpoints / "llama", "policy", read, ranks), kind)


@pytest.mark.parametrize("left", [0, 7, 200, -40])
@pytest.mark.parametrize("option", ["policy", "reward_model"])
def test_a_file_that_was_cut_short_is_named(ranks, checkpoints, tmp_path, option, left):
    folders = {"policy": checkpoints / "qwen2", "reward_model": checkpoints / "rm"}
    path = folders[option] = shutil.copytree(folders[option], tmp_path / "cut")
    file = sorted(path.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:left])
    args = args_of(**{name: str(folder) for name, folder in folders.items()})
    message = refused(load_models, args, tokens_of(), ranks)
    assert re.match(f"--{option} {file}: damaged or cut short, .* bytes", message)


def test_a_file_of_the_index_that_is_not_there_is_named(tmp_path):
    path = write(tmp_path, "llama", max_shard_size="30KB")
    gone = sorted(path.glob("*.safetensors"))[2]
    gone.unlink()
    assert f"there is no file {gone.name}" in refused(loading.stored_tensors, path, "policy")
    (path / "model.safetensors.index.json").write_text("{}")
    assert "index.json: damaged" in refused(loading.stored_tensors, path, "policy")


# ------------------------------------------------------------------------------- the four models


@pytest.fixture
def policy(checkpoints):
    return str(checkpoints / "llama")


@pytest.fixture
def rm(tmp_path):
    return write_model(tmp_path / "rm", tiny_classifier("llama", seed=5))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # others: test_architectures
def test_a_folder_gives_policy_frozen_reference_empty_copy_and_critic(
    ranks, lms, tmp_path, architecture
):
    folder = write_model(tmp_path, lms[architecture])
    models = load_models(args_of(folder), tokens_of(), ranks)
    wanted = log_probs(Policy(lms[architecture]))
    for model in (models.policy, models.reference):
        assert torch.allclose(log_probs(model), wanted, atol=1e-5)
    assert all(p.requires_grad for p in models.policy.parameters())
    assert not any(p.requires_grad for p in models.reference.parameters())
    assert {p.device.type for p in models.unsharded.parameters()} == {"meta"}
    with models.gathered(models.policy) as lm:
        assert torch.allclose(log_probs(Policy(lm)), wanted, atol=1e-5)
    assert models.reward_model is None and models.normalised is True
    new = ScalarModel(loading.classifier_from_causal_lm(folder, 1))  # the policy with a new head
    assert torch.allclose(values(models.critic), values(new), atol=1e-5)
    values(models.critic).pow(2).mean().backward()
    assert all(p.grad is not None for p in models.critic.parameters())
    log_probs(models.policy).sum().backward()
    torch.optim.SGD(models.policy.parameters(), lr=0.1).step()
    assert torch.allclose(log_probs(models.reference), wanted, atol=1e-5)  # it is another model
    assert (log_probs(models.policy) - wanted).abs().max() > 0.01


def test_a_bfloat16_folder_is_trained_with_fp32_weights(ranks, tmp_path):
    folder = write_model(tmp_path, tiny_lm("llama").to(torch.bfloat16))
    for name, dtype in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        models = load_models(args_of(folder, param_dtype=name), tokens_of(), ranks)
        for model in (models.policy, models.reference):
            assert {p.dtype for p in model.parameters()} == {torch.float32}
        with models.gathered(models.policy) as lm:  # of the type of the forward passes
            assert {p.dtype for p in lm.parameters()} == {dtype}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_reward_model_is_normalised_as_its_card_says_or_as_known_or_as_measured(
    ranks, policy, tmp_path, architecture
):
    classifier = tiny_classifier(architecture, seed=5)
    rm = write_model(tmp_path, classifier)
    models = load_models(args_of(policy, rm), tokens_of(), ranks)
    reward_model, critic = models.reward_model, models.critic
    assert models.normalised is False
    assert (reward_model.mean, reward_model.std) == (critic.mean, critic.std) == (0.0, 1.0)
    assert torch.allclose(values(reward_model), values(ScalarModel(classifier)), atol=1e-5)
    assert not any(p.requires_grad for p in reward_model.parameters())
    assert all(p.requires_grad for p in critic.parameters())
    probe = SimpleNamespace(members=torch.tensor([[1.0], [2.0], [3.0]]))
    for known, expected in ((None, [2.0, 1.0]), ([3.0, 4.0], [3.0, 4.0])):
        normalise(models, ranks, probe, state := state_of(known, known and [0.0, 1.0]))
        assert [reward_model.mean, reward_model.std] == [critic.mean, critic.std] == expected
        assert state.normaliser == expected
    save_card(rm)
    models = load_models(args_of(policy, rm), tokens_of(), ranks)
    normalise(models, ranks, None, state_of([3.0, 4.0]))
    assert models.normalised is True
    for model in (models.reward_model, models.critic):
        assert torch.allclose(values(model), values(ScalarModel(classifier, 0.3, 2.0)), atol=1e-5)


def state_of(normaliser=None, scale=None):
    return SimpleNamespace(normaliser=normaliser, scale=scale)


def normalise(models, ranks, probe, state, spec="model", score=None, reward_scale="sft"):
    args = SimpleNamespace(reward_model="rm", reward_scale=reward_scale)
    examiner = SimpleNamespace(args=args, ranks=ranks, probe=lambda models, asked: probe)
    slot = Slot(spec, score)
    models.normalise(state, examiner, "prompts", slot)
    return slot


@dataclass
class Probe:
    texts: tuple = ("a", "bb", "ccc")
    members: torch.Tensor = None


def lengths(answers):
    return [100.0 + len(text) for text in answers.texts]


def test_a_reward_of_ones_own_gets_the_mean_and_spread_of_sft_samples(ranks, policy, rm, capsys):
    save_card(rm)
    models = load_models(args_of(policy, rm), tokens_of(), ranks)
    slot = normalise(models, ranks, Probe(), state := state_of(), "f.py:lengths", lengths)
    assert state.scale == [102.0, 1.0] == [slot.mean, slot.std]
    assert slot(Probe()).tolist() == [-1.0, 0.0, 1.0]
    assert "mean 102, standard deviation 1" in capsys.readouterr().out
    again = normalise(models, ranks, None, state_of(scale=[5.0, 2.0]), "f.py:lengths", lengths)
    assert (again.mean, again.std) == (5.0, 2.0)  # as a checkpoint knows it, without a probe
    raw = normalise(models, ranks, None, state := state_of(), "f.py:lengths", lengths, "none")
    assert [raw.mean, raw.std] == state.scale == [0.0, 1.0]
    flat = normalise(models, ranks, Probe(), state_of(), "f.py:flat", lambda _: [7.0] * 3)
    assert (flat.mean, flat.std) == (0.0, 1.0)
    assert "no spread" in capsys.readouterr().out


# --------------------------------------------------------------------------------- what is refused


def refusal(ranks, policy, rm, tokens):
    message = refused(load_scalars, args_of(policy, rm), tokens, ranks, [False])
    assert message.startswith(f"--reward_model {rm}")
    return message


@pytest.mark.parametrize("name, number", [("prompt template", 0), ("vocabulary", 1)])
def test_what_differs_on_the_card_is_an_error_with_both_hashes(ranks, policy, rm, name, number):
    save_card(rm, **{name.split()[-1]: "0123456789ab"})
    message = refusal(ranks, policy, rm, tokens_of())
    assert f"its {name} differs" in message and policy in message
    assert f"hash 0123456789ab there, {tokens_of().hashes()[number]} here" in message


WORDS = {  # what was trained with, what there is now -> what is said
    "style": ("plain", "chat", "--prompt_style plain there, chat here"),
    "style back": ("chat", "deepseek", "--prompt_style chat there, deepseek here"),
    "template": ("chat", "chat", "--prompt_style chat there, chat here: 'B {{ messages[0].content"),
    "file": ("own.jinja", "chat", "--prompt_style own.jinja there, chat here: 'B {{ messages[0].c"),
}


@pytest.mark.parametrize("case", WORDS)
def test_another_style_or_template_is_told_in_words(ranks, policy, tmp_path, case):
    then, now, said = WORDS[case]
    old = tokens_of("chat" if case == "file" else then, "A B {{ messages[0].content }}")
    folder = write_model(tmp_path, tiny_classifier("llama"), old.tokenizer)
    save_card(folder, old, style=then)
    message = refusal(ranks, policy, folder, tokens_of(now, "A C {{ messages[0].content }}"))
    assert f"its prompt template differs from that of --policy {policy}: {said}" in message
    assert ("from character 2 on" in message) == (case in ("template", "file"))


def test_another_vocabulary_is_told_with_the_number_of_tokens(ranks, policy, tmp_path):
    old = tokens_of()
    old.tokenizer.add_tokens(["more", "most"])
    folder = write_model(tmp_path, tiny_classifier("llama"), old.tokenizer)
    save_card(folder, old)
    message = refusal(ranks, policy, folder, tokens_of())
    known = f"{len(old.tokenizer) - 2} there, missing here"
    assert f"2 tokens have other ids, such as 'more', {known}" in message


def test_without_a_card_the_vocabularies_are_compared_all_the_same(ranks, policy, tmp_path):
    other = tokens_of()
    other.tokenizer.add_tokens(["more"])
    folder = write_model(tmp_path, tiny_classifier("llama"), other.tokenizer)
    message = refusal(ranks, policy, folder, tokens_of())
    assert "tokens have other ids, such as 'more'" in message


def test_without_a_card_the_chat_template_is_that_of_the_folders_tokenizer(ranks, policy, tmp_path):
    theirs = tokens_of(template="User: {{ messages[0]['content'] }}").tokenizer
    folder = write_model(tmp_path, tiny_classifier("llama"), theirs)
    ours = tokens_of("chat", "{{ messages[0]['content'] }}")
    assert "prompt template differs" in refusal(ranks, policy, folder, ours)
    # Plain prompts use no template.
    load_scalars(args_of(policy, folder), tokens_of(template="{{ 1 }}"), ranks, [False])


def test_a_causal_lm_offered_as_a_reward_model_is_refused_whatever_its_card(
    ranks, policy, tmp_path
):
    folder = write_model(tmp_path, tiny_lm("llama"))
    save_card(folder)
    assert "LlamaForCausalLM" in refusal(ranks, policy, folder, tokens_of())


def test_folders_that_do_not_exist_are_named(ranks, policy, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    refusal(ranks, policy, nowhere, tokens_of())
    for message in (
        refused(load_models, args_of(nowhere), tokens_of(), ranks),
        refused(new_scalar, args_of(nowhere), ranks),
    ):
        assert message.startswith(f"--policy {nowhere}: ")


def test_a_hub_id_becomes_the_folder_of_its_download_or_is_one_line(ranks, policy, rm, monkeypatch):
    message = refused(loading.fetch, args_of("owner/model"), ("policy",), ranks)  # no network here
    assert message.startswith("--policy owner/model: there is no such folder")
    asked = []

    def download(name, ignore_patterns):
        asked.append(name)
        assert "*.bin" in ignore_patterns
        return policy

    monkeypatch.setattr(loading, "snapshot_download", download)
    args = args_of("owner/model", rm)
    loading.fetch(args, ("policy", "reward_model"), ranks)
    assert (args.policy, args.reward_model) == (policy, rm)
    assert asked == ["owner/model"]  # folders are not asked for
    args = args_of("", "owner/model")
    assert "not a reward model" in refused(loading.fetch, args, ("reward_model",), ranks)
