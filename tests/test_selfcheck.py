"""--selfcheck: sound models pass every check; each property, broken on purpose, fails its own."""

import json
from types import SimpleNamespace

import train_ppo
from pfppo import loading
from pfppo.answers import Examiner
from pfppo.data import Tokens, read_problems
from pfppo.fsdp import recompute_blocks
from pfppo.model import scalar_head
from pfppo.reward import RewardCard
from pfppo.run.selfcheck import Report, draw, selfcheck

import pytest
import torch
from conftest import EOS, tiny_classifier, tiny_lm, write_model
from ranks import ranked
from test_slots import INDUCTOR, counted

LONG = 20  # tokens of the longest prompt
TEXTS = [" ".join(f"w{(i + j) % 58}" for j in range(LONG - i % 5)) for i in range(8)]
NAMES = [
    "ratio before the first update, from 1",
    "KL before the first update, from 0",
    "log-probs, alone and padded",
    "values, alone and padded",
    "log-probs, sampler and training",
    "gradients, large and small microbatches",
    "losses of the first update",
    "log-probs, here and by plain transformers",
    "rewards, here and by plain transformers",
]
RATIO, KL, LOGP_PADDED, VALUES_PADDED, SAMPLER, GRADIENTS, LOSSES, FILES, REWARDS = NAMES
BOTH = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def write_folders(folder, architecture="llama", **changes):
    """policy/, reward_model/ with its card, and prompts.jsonl."""
    path = write_model(folder / "policy", tiny_lm(architecture, **changes))
    write_model(folder / "reward_model", tiny_classifier(architecture, 5, **changes))
    hashes = Tokens.of(train_ppo.Args(policy=path, reward_model="")).hashes()
    RewardCard(0.3, 2.0, *hashes).save(folder / "reward_model")
    lines = "".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS)
    (folder / "prompts.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("models"), num_hidden_layers=1)


def make(folder, ranks, **changes):
    """What train_ppo.main would have, to be broken."""
    files = {name: str(folder / name) for name in ("policy", "reward_model")}
    sizes = {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 12, "microbatch": 4}
    prompts = str(folder / "prompts.jsonl")
    args = train_ppo.Args(**files | sizes | changes, prompts=prompts, device="cpu")
    tokens = Tokens.of(args)
    models = loading.load_models(args, tokens, ranks)
    with Examiner(tokens, args, ranks) as examiner:  # no test is run
        return SimpleNamespace(
            models=models,
            trained={"actor": (models.policy, None), "critic": (models.critic, None)},
            examiner=examiner,
            train=read_problems(args, "prompts", tokens, tested=False),
            forward=dict(train_ppo.FORWARD),
            backward=train_ppo.backward,
        )


def failed(subject, capsys):
    """The names of the checks that fail, by print and by status."""
    capsys.readouterr()
    status = selfcheck(**vars(subject))
    words = words_of(capsys.readouterr().out)
    names = {name for name, word in words.items() if word == "FAILED"}
    assert list(words) == NAMES and status == int(bool(names))
    return names


def words_of(text):
    """{name of a check: ok, FAILED or skipped} of what was printed."""
    lines = [line for line in text.splitlines() if line.startswith(("ok ", "FAILED ", "skipped "))]
    return {line[8:51].strip(): line[:8].strip() for line in lines}


def see_everything(model):
    """Attention that also looks to the right, so at padding."""
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False


# ------------------------------------------------------------------------------------- two ranks


@pytest.mark.slow
@ranked(2)
def test_what_only_the_second_rank_sees_fails_on_both(ranks, folders):
    def other_ratio(model, rows, args):
        logp, entropy = train_ppo.log_probs(model, rows, args)
        return logp * (1 + 0.1 * ranks.rank * torch.is_grad_enabled()), entropy

    subject = make(folders, ranks)
    assert selfcheck(**vars(subject)) == 0
    subject.forward["actor"] = other_ratio
    assert selfcheck(**vars(subject)) == 1
    subject.forward["actor"] = train_ppo.log_probs
    if ranks.rank == 1:
        see_everything(subject.models.policy)
    assert selfcheck(**vars(subject)) == 1


# ---------------------------------------------------------------------------------- what is sound


@BOTH
@pytest.mark.parametrize(
    "architecture",
    ["llama", *(pytest.param(a, marks=pytest.mark.slow) for a in ("gpt2", "gpt_neox", "gemma2"))],
)
def test_sound_models_pass_and_are_left_as_they_were(ranks, tmp_path, capsys, architecture, dtype):
    subject = make(write_folders(tmp_path, architecture), ranks, param_dtype=dtype)
    models = subject.models
    models = (models.policy, models.critic, models.reference, models.reward_model)
    before = [p.detach().full_tensor().clone() for m in models for p in m.parameters()]
    assert failed(subject, capsys) == set()
    after = [p for m in models for p in m.parameters()]
    pairs = zip(before, after, strict=True)
    assert all(torch.equal(x, p.full_tensor()) and p.grad is None for x, p in pairs)


@pytest.mark.parametrize("backend", ["eager", INDUCTOR])
def test_compiled_models_pass(folders, ranks, backend):
    with counted(backend):
        assert selfcheck(**vars(make(folders, ranks, compile=True))) == 0


def test_rows_as_long_as_the_models_have_positions_are_padded_no_further(ranks, tmp_path, capsys):
    subject = make(write_folders(tmp_path, "gpt2", n_positions=LONG + 4), ranks, max_new_tokens=4)
    rows, _ = draw(subject.models, subject.examiner, subject.train)
    assert int(rows.ends.max()) + 1 < rows.ids.shape[1] <= LONG + 4
    assert failed(subject, capsys) == set()


def test_a_reward_model_that_pads_with_eos_is_read_at_its_last_token(ranks, tmp_path, capsys):
    config = write_folders(tmp_path) / "reward_model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token_id": EOS}))
    assert failed(make(tmp_path, ranks), capsys) == set()


def test_recomputed_blocks_and_one_row_per_microbatch_pass_without_a_reward_model(
    ranks, folders, capsys
):
    subject = make(folders, ranks, microbatch=1, samples_per_prompt=1, reward_model="")
    for model in (subject.models.policy, subject.models.critic):
        recompute_blocks(model)
    assert selfcheck(**vars(subject)) == 0
    words = words_of(capsys.readouterr().out)
    assert words == dict.fromkeys(NAMES, "ok") | {REWARDS: "skipped"}


# ---------------------------------------------------------------------------------- what is broken


def test_weights_that_transformers_would_not_read_fail_where_they_are_compared(
    ranks, folders, capsys
):
    subject = make(folders, ranks)
    with torch.no_grad():
        for model in (subject.models.policy, subject.models.reference):
            model.lm.lm_head.weight.mul_(1.1)
    assert failed(subject, capsys) == {FILES}


def test_dropout_in_training_fails_the_ratio(ranks, folders, capsys):
    subject = make(folders, ranks)
    for module in subject.models.policy.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    subject.models.policy.train()
    assert {RATIO, KL} <= failed(subject, capsys)


@BOTH
def test_models_that_see_padding_fail_their_own_checks(ranks, tmp_path, capsys, dtype):
    subject = make(write_folders(tmp_path), ranks, param_dtype=dtype)
    see_everything(subject.models.critic)
    see_everything(subject.models.reward_model)
    names = failed(subject, capsys)
    assert {VALUES_PADDED, REWARDS} <= names
    assert not {RATIO, KL, LOGP_PADDED, SAMPLER} & names
    see_everything(subject.models.policy)
    assert {LOGP_PADDED, SAMPLER} <= failed(subject, capsys)


@BOTH
def test_five_things_broken_at_once_fail_five_checks_and_no_other(ranks, folders, capsys, dtype):
    """Another reference, other logits while sampling, a head that has changed since it was loaded,
    a denominator of each microbatch its own, a loss that is not finite."""

    def backward(trained, rows, args, ranks):
        for mb in rows.microbatches(args.microbatch):
            mb.coefficients = mb.coefficients / mb.coefficients.sum()
            sums = train_ppo.backward(trained, mb, args, ranks)
        return sums | {"value_loss": torch.tensor(float("inf"))}

    subject = make(folders, ranks, param_dtype=dtype)
    models, subject.backward = subject.models, backward
    with torch.no_grad():
        next(models.reference.parameters()).mul_(1.01)
        scalar_head(models.reward_model.classifier).weight.mul_(1.2)
    models.unsharded.lm_head.register_forward_hook(lambda head, given, logits: logits * 1.1)
    assert failed(subject, capsys) == {KL, SAMPLER, REWARDS, GRADIENTS, LOSSES}


@pytest.mark.parametrize("which", ["actor", "critic"])
def test_a_gradient_that_is_lost_fails_though_the_other_model_s_is_right(
    ranks, folders, capsys, which
):
    def backward(trained, rows, args, ranks):
        sums = train_ppo.backward(trained, rows, args, ranks)
        if args.microbatch == 1:
            next(trained[which][0].parameters()).grad = None
        return sums

    subject = make(folders, ranks)
    subject.backward = backward
    assert failed(subject, capsys) == {GRADIENTS}


@BOTH
def test_neither_a_sure_policy_nor_what_is_no_number_hides_a_wrong_sampler(ranks, dtype):
    report = Report(ranks, getattr(torch, dtype))
    logp = torch.log1p(-torch.linspace(0.001, 0.1, 50))  # probabilities of 0.9 to 0.999
    report.close_logp("right", logp * 1.0001, logp)
    report.hold("exact", torch.zeros(3), "largest", 0.0)
    assert report.failed == 0
    report.close_logp("wrong", logp * 1.1, logp)
    numbers = torch.tensor([0.0, float("nan"), 0.0])
    report.hold("no number", numbers, "largest", 0.0)
    report.close_logp("no number", numbers, torch.zeros(3))
    assert report.failed == 3
