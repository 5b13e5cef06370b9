"""From folders that transformers has written to sharded networks; RMs that do not fit."""

from types import SimpleNamespace

from pfppo import loading
from pfppo.config import UserError
from pfppo.data import template_hash, vocabulary_hash
from pfppo.fsdp import full_state, gathered
from pfppo.loading import load_policies, load_scalars, new_scalar
from pfppo.model import Policy, ScalarModel, classifier_from_causal_lm
from pfppo.reward import RewardCard

import pytest
import torch
from conftest import (
    ARCHITECTURES,
    EOS,
    WORDS,
    ragged,
    tiny_classifier,
    tiny_lm,
    tiny_tokenizer,
    write_model,
)
from pfppo.batch import collate

ROWS = collate(ragged([3, 7, 1]), ragged([6, 1, 4], seed=1), pad_id=0)


def log_probs(policy):
    with torch.no_grad():
        return policy(ROWS.ids, ROWS.states, ROWS.responses, ROWS.mask)[0]


def scalars(model):
    with torch.no_grad():
        return model(ROWS.ids, ROWS.states)


def args_of(policy, reward_model, style="plain", seed=1):
    return SimpleNamespace(
        policy=policy,
        reward_model=reward_model,
        prompt_style=style,
        param_dtype="float32",
        seed=seed,
    )


def card_of(tokenizer, **changes):
    fields = {"template": template_hash(tokenizer, "plain")}
    fields |= {"vocabulary": vocabulary_hash(tokenizer)}
    return RewardCard(**({"mean": 0.3, "std": 2.0} | fields | changes))


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("policy"), tiny_lm("llama"))


@pytest.fixture
def rm_folder(tmp_path):
    return write_model(tmp_path, tiny_classifier("llama", seed=5))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_policy_reference_and_twin_of_a_folder(ranks, lms, tmp_path, architecture):
    folder = write_model(tmp_path, lms[architecture])
    policy, reference, twin = load_policies(folder, ranks, "float32")
    wanted = log_probs(Policy(lms[architecture]))
    for model in (policy, reference):
        assert torch.allclose(log_probs(model), wanted, atol=1e-5)
    assert all(p.requires_grad for p in policy.parameters())
    assert not any(p.requires_grad for p in reference.parameters())
    assert {p.device.type for p in twin.parameters()} == {"meta"}
    with gathered(policy.lm, twin) as model:
        assert torch.allclose(log_probs(Policy(model)), wanted, atol=1e-5)


def test_training_the_policy_leaves_the_reference(ranks, policy_folder):
    policy, reference, _ = load_policies(policy_folder, ranks, "float32")
    before = log_probs(reference)
    policy(ROWS.ids, ROWS.states, ROWS.responses, ROWS.mask)[0].sum().backward()
    torch.optim.SGD(policy.parameters(), lr=0.1).step()
    assert torch.equal(log_probs(reference), before)
    assert (log_probs(policy) - before).abs().max() > 0.01


def test_a_bfloat16_folder_is_trained_with_fp32_weights(ranks, tmp_path):
    folder = write_model(tmp_path, tiny_lm("llama").to(torch.bfloat16))
    policy, reference, _ = load_policies(folder, ranks, "bfloat16")
    for model in (policy, reference):
        assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reward_model_and_critic_are_the_folders_classifier_in_the_cards_units(
    ranks, policy_folder, tmp_path, architecture
):
    classifier, tokenizer = tiny_classifier(architecture, seed=5), tiny_tokenizer()
    folder = write_model(tmp_path, classifier)
    card_of(tokenizer).save(folder)
    reward_model, critic, known = load_scalars(args_of(policy_folder, folder), tokenizer, ranks)
    wanted = scalars(ScalarModel(classifier, 0.3, 2.0))
    for model in (reward_model, critic):
        assert torch.allclose(scalars(model), wanted, atol=1e-5)
        assert (model.mean, model.std) == (0.3, 2.0)
    assert known
    assert not any(p.requires_grad for p in reward_model.parameters())
    assert all(p.requires_grad for p in critic.parameters())


def test_a_reward_model_from_elsewhere_has_an_unknown_normaliser(ranks, policy_folder, rm_folder):
    reward_model, critic, known = load_scalars(
        args_of(policy_folder, rm_folder), tiny_tokenizer(), ranks
    )
    assert known is False
    assert (reward_model.mean, reward_model.std) == (critic.mean, critic.std) == (0.0, 1.0)
    assert torch.allclose(scalars(reward_model), scalars(ScalarModel(tiny_classifier("llama", 5))))


def test_without_a_reward_model_the_critic_is_the_policy_with_a_new_head(ranks, policy_folder):
    args = args_of(policy_folder, "", seed=3)
    reward_model, critic, known = load_scalars(args, tiny_tokenizer(), ranks)
    assert reward_model is None and known is True
    wanted = scalars(ScalarModel(classifier_from_causal_lm(policy_folder, 3)))
    assert torch.allclose(scalars(critic), wanted, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_new_scalar_is_trainable_and_depends_on_its_seed_in_the_head_only(
    ranks, lms, tmp_path, architecture
):
    folder = write_model(tmp_path, lms[architecture])
    states = [full_state(new_scalar(folder, seed, ranks, "float32")) for seed in (1, 1, 2)]
    names = {name for name in states[0] if not torch.equal(states[0][name], states[2][name])}
    assert names == {"classifier.score.weight"}
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    scalar = new_scalar(folder, 1, ranks, "float32")
    scalar(ROWS.ids, ROWS.states).pow(2).mean().backward()
    assert all(p.grad is not None for p in scalar.parameters())


# --------------------------------------------------------------------------------- what is refused


def refusal(folder, policy_folder, ranks, tokenizer=None, style="plain"):
    with pytest.raises(UserError) as error:
        load_scalars(args_of(policy_folder, folder, style), tokenizer or tiny_tokenizer(), ranks)
    message = str(error.value)
    assert message.startswith(f"--reward_model {folder}") and "\n" not in message
    return message


def test_another_vocabulary_on_the_card_is_an_error_with_both_hashes(
    ranks, policy_folder, rm_folder
):
    tokenizer = tiny_tokenizer()
    card_of(tokenizer, vocabulary="0123456789ab").save(rm_folder)
    message = refusal(rm_folder, policy_folder, ranks)
    assert "its vocabulary differs" in message and policy_folder in message
    assert f"hash 0123456789ab there, {vocabulary_hash(tokenizer)} here" in message


def test_another_template_on_the_card_is_an_error_with_both_hashes(ranks, policy_folder, rm_folder):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    card_of(tokenizer).save(rm_folder)  # made from plain prompts, used with chat prompts
    message = refusal(rm_folder, policy_folder, ranks, tokenizer, "chat")
    theirs, ours = (template_hash(tokenizer, style) for style in ("plain", "chat"))
    assert "its prompt template differs" in message and theirs != ours
    assert f"hash {theirs} there, {ours} here" in message


def test_without_a_card_the_vocabularies_are_compared_all_the_same(ranks, policy_folder, tmp_path):
    other = tiny_tokenizer([*WORDS[:10], *reversed(WORDS[10:])])  # same words, other ids
    assert other.eos_token_id == EOS
    folder = write_model(tmp_path, tiny_classifier("llama"), other)
    message = refusal(folder, policy_folder, ranks)
    assert vocabulary_hash(other) in message and vocabulary_hash(tiny_tokenizer()) in message


def test_a_damaged_card_is_named(ranks, policy_folder, rm_folder):
    with open(f"{rm_folder}/reward_model.json", "w") as file:
        file.write('{"mean": 1.0}')
    with pytest.raises(UserError, match=f"^{rm_folder}/reward_model.json: damaged .*expected"):
        load_scalars(args_of(policy_folder, rm_folder), tiny_tokenizer(), ranks)


@pytest.mark.parametrize("with_card", [False, True])
def test_a_causal_lm_offered_as_a_reward_model_is_refused(
    ranks, policy_folder, tmp_path, with_card
):
    folder = write_model(tmp_path, tiny_lm("llama"))
    if with_card:
        card_of(tiny_tokenizer()).save(folder)
    assert "LlamaForCausalLM" in refusal(folder, policy_folder, ranks)


def test_a_hub_id_becomes_the_folder_of_its_download(ranks, policy_folder, monkeypatch):
    asked = []

    def download(name, ignore_patterns):
        asked.append(name)
        assert "*.bin" in ignore_patterns
        return policy_folder

    monkeypatch.setattr(loading, "snapshot_download", download)
    args = SimpleNamespace(policy="owner/model", reward_model=policy_folder)
    loading.fetch(args, ("policy", "reward_model"), ranks)
    assert (args.policy, args.reward_model) == (policy_folder, policy_folder)
    assert asked == ["owner/model"]  # folders are not asked for


def test_a_hub_id_without_a_network_is_one_line(ranks):
    args = SimpleNamespace(policy="owner/model")
    with pytest.raises(UserError, match="^--policy owner/model: there is no such folder") as error:
        loading.fetch(args, ("policy",), ranks)
    assert "\n" not in str(error.value)


def test_folders_that_do_not_exist_are_named(ranks, policy_folder, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    refusal(nowhere, policy_folder, ranks)
    for load in (
        lambda: load_policies(nowhere, ranks, "float32"),
        lambda: new_scalar(nowhere, 1, ranks, "float32"),
    ):
        with pytest.raises(UserError, match=f"^--policy {nowhere}: "):
            load()


def test_the_chat_template_of_a_reward_model_without_a_card_is_its_tokenizers(
    ranks, policy_folder, tmp_path
):
    ours, theirs = tiny_tokenizer(), tiny_tokenizer()
    ours.chat_template = "{{ messages[0]['content'] }}"
    theirs.chat_template = "User: {{ messages[0]['content'] }}"
    folder = write_model(tmp_path, tiny_classifier("llama"), theirs)
    assert "prompt template differs" in refusal(folder, policy_folder, ranks, ours, "chat")
    load_scalars(args_of(policy_folder, folder), ours, ranks)  # plain prompts use no template


def test_the_twin_has_the_type_of_the_forward_passes(ranks, policy_folder):
    for name, dtype in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        policy, _, twin = load_policies(policy_folder, ranks, name)
        with gathered(policy.lm, twin) as model:
            assert {p.dtype for p in model.parameters()} == {dtype}
