"""--selfcheck: sound models pass every check; each property, broken on purpose, fails its own.

Started by torchrun, this file is the worker of the test on two ranks.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import train_ppo
from pfppo import loading
from pfppo.data import render_all, template_hash, vocabulary_hash
from pfppo.fsdp import init_ranks, recompute_blocks
from pfppo.model import scalar_head
from pfppo.problems.benchmarks import Problem
from pfppo.reward import RewardCard
from pfppo.run import selfcheck

import pytest
import torch
import torch.distributed as dist
from conftest import (
    EOS,
    PAD,
    ROOT,
    run_ranks,
    tiny_classifier,
    tiny_lm,
    tiny_tokenizer,
    write_model,
)
from pfppo.examine import Examiner
from tokenizers.processors import TemplateProcessing

LONG = 20  # tokens of the longest prompt
TEXTS = [" ".join(f"w{(i + j) % 58}" for j in range(LONG - i % 5)) for i in range(8)]
# No qwen2: transformers takes every tokenizer beside its configuration for Qwen's own.
ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "mistral", "gemma2")
NAMES = [name for name, _ in selfcheck.CHECKS]
RATIO, KL, LOGP_PADDED, VALUES_PADDED, REWARDS_PADDED, GRADIENTS, SAMPLER, RELOAD, TOKENS = NAMES


def write_folders(folder, architecture="llama", **changes):
    """policy/ and reward_model/ with its card."""
    write_model(folder / "policy", tiny_lm(architecture, **changes))
    write_model(folder / "reward_model", tiny_classifier(architecture, 5, **changes))
    tokenizer = tiny_tokenizer()
    hashes = template_hash(tokenizer, "plain"), vocabulary_hash(tokenizer)
    RewardCard(0.3, 2.0, *hashes).save(folder / "reward_model")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("models"))


def make(folder, ranks, **changes):
    """The Subject that train_ppo.main would have."""
    args = train_ppo.Args(
        policy=str(folder / "policy"),
        reward_model=str(folder / "reward_model"),
        prompts_per_step=4,
        samples_per_prompt=3,
        max_new_tokens=12,
        microbatch=4,
        device="cpu",
    )
    args = dataclasses.replace(args, **changes)
    tokenizer = tiny_tokenizer()
    problems = [Problem(f"task {i}", text, "", "", "") for i, text in enumerate(TEXTS)]
    prompts = render_all(problems, tokenizer, "plain", 1024, "test")
    policy, reference, twin = loading.load_policies(args.policy, ranks, args.param_dtype)
    reward_model, critic, _ = loading.load_scalars(args, tokenizer, ranks)
    return selfcheck.Subject(
        args=args,
        examiner=Examiner(tokenizer, [EOS], None, ranks, args.seed, args.max_new_tokens),
        problems=problems,
        prompts=prompts,
        pad_id=PAD,
        policy=policy,
        reference=reference,
        twin=twin,
        reward_model=reward_model,
        critic=critic,
        log_probs=train_ppo.log_probs,
        values_of=train_ppo.values_of,
        backward=train_ppo.backward,
    )


def words(text):
    """{name of a check: ok, FAILED or skipped} of what was printed."""
    lines = text.splitlines()
    return {name: line.split()[0] for name in NAMES for line in lines if f" {name} " in line}


def failed(subject, capsys):
    """The names of the checks that fail, by print and by status."""
    capsys.readouterr()
    status = selfcheck.run(subject)
    found = words(capsys.readouterr().out)
    assert list(found) == NAMES
    names = {name for name, word in found.items() if word == "FAILED"}
    assert status == int(bool(names))
    return names


def see_everything(model):
    """Attention that also looks to the right, so at padding."""
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False


# ---------------------------------------------------------------------------------- what is sound


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sound_models_pass_every_check(ranks, tmp_path, capsys, architecture, dtype):
    subject = make(write_folders(tmp_path, architecture), ranks, param_dtype=dtype)
    assert failed(subject, capsys) == set()


def test_without_a_reward_model_its_checks_are_skipped(ranks, folders, capsys):
    assert selfcheck.run(make(folders, ranks, reward_model="")) == 0
    found = words(capsys.readouterr().out)
    skipped = [name for name in NAMES if found[name] == "skipped"]
    assert skipped == [REWARDS_PADDED, RELOAD, TOKENS]


def test_rows_as_long_as_the_models_have_positions_are_padded_no_further(ranks, tmp_path, capsys):
    write_folders(tmp_path, "gpt2", n_positions=LONG + 4)
    subject = make(tmp_path, ranks, max_new_tokens=4)
    batch = selfcheck.draw_batch(subject)
    width = batch.wider.ids.shape[1]
    assert batch.rows.ids.shape[1] < width <= LONG + 4
    assert failed(subject, capsys) == set()


def test_a_reward_model_that_pads_with_eos_reloads_to_the_same_scores(ranks, tmp_path, capsys):
    write_folders(tmp_path)
    config = tmp_path / "reward_model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token_id": EOS}))
    assert failed(make(tmp_path, ranks), capsys) == set()


def test_recomputed_blocks_and_one_row_per_microbatch_pass(ranks, folders, capsys):
    subject = make(folders, ranks, microbatch=1, samples_per_prompt=1)
    for model in (subject.policy, subject.critic):
        recompute_blocks(model)
    assert failed(subject, capsys) == set()


def test_checking_leaves_weights_as_they_were_and_no_gradients(ranks, folders, capsys):
    subject = make(folders, ranks)
    models = (subject.policy, subject.critic, subject.reference, subject.reward_model)
    before = [p.detach().full_tensor().clone() for m in models for p in m.parameters()]
    assert failed(subject, capsys) == set()
    after = [p for m in models for p in m.parameters()]
    pairs = zip(before, after, strict=True)
    assert all(torch.equal(x, p.full_tensor()) and p.grad is None for x, p in pairs)


# ---------------------------------------------------------------------------------- what is broken


def test_dropout_in_training_fails_the_ratio(ranks, folders, capsys):
    subject = make(folders, ranks)
    for module in subject.policy.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    subject.policy.train()
    assert {RATIO, KL} <= failed(subject, capsys)


def test_a_reference_that_is_another_model_fails_the_kl(ranks, folders, capsys):
    subject = make(folders, ranks)
    with torch.no_grad():
        next(subject.reference.parameters()).mul_(1.001)
    assert failed(subject, capsys) == {KL}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_that_sees_padding_fails(ranks, folders, capsys, dtype):
    subject = make(folders, ranks, param_dtype=dtype)
    see_everything(subject.policy)
    assert {LOGP_PADDED, SAMPLER} <= failed(subject, capsys)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_critic_and_a_reward_model_that_see_padding_fail(ranks, folders, capsys, dtype):
    subject = make(folders, ranks, param_dtype=dtype)
    see_everything(subject.critic)
    see_everything(subject.reward_model)
    found = failed(subject, capsys)
    assert {VALUES_PADDED, REWARDS_PADDED, RELOAD} <= found
    assert not {RATIO, KL, LOGP_PADDED, SAMPLER, TOKENS} & found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_denominator_of_each_microbatch_its_own_fails_the_gradients(
    ranks, folders, capsys, dtype
):
    def backward(args, policy, critic, rows, ranks):
        for mb in rows.microbatches(args.microbatch):
            train_ppo.backward(args, policy, critic, mb, ranks)

    subject = dataclasses.replace(make(folders, ranks, param_dtype=dtype), backward=backward)
    assert failed(subject, capsys) == {GRADIENTS}


@pytest.mark.parametrize("which", ["policy", "critic"])
def test_a_gradient_that_is_lost_fails_though_the_other_model_s_is_right(
    ranks, folders, capsys, which
):
    def backward(args, policy, critic, rows, ranks):
        train_ppo.backward(args, policy, critic, rows, ranks)
        if args.microbatch == 1:
            next({"policy": policy, "critic": critic}[which].parameters()).grad = None

    subject = dataclasses.replace(make(folders, ranks), backward=backward)
    assert failed(subject, capsys) == {GRADIENTS}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sampler_with_other_logits_fails(ranks, folders, capsys, dtype):
    subject = make(folders, ranks, param_dtype=dtype)
    subject.twin.lm_head.register_forward_hook(lambda module, given, logits: logits * 1.1)
    assert failed(subject, capsys) == {SAMPLER}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sure_policy_hides_no_wrong_sampler(ranks, folders, dtype):
    subject = make(folders, ranks, param_dtype=dtype)
    logp = torch.log1p(-torch.linspace(0.001, 0.1, 50))  # probabilities of 0.9 to 0.999
    assert selfcheck.close_logp(logp * 1.0001, logp, subject).holds
    assert selfcheck.close_logp(logp * 1.1, logp, subject).holds is False


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_that_has_changed_after_loading_fails_the_reload(ranks, folders, capsys, dtype):
    subject = make(folders, ranks, param_dtype=dtype)
    with torch.no_grad():
        scalar_head(subject.reward_model.classifier).weight.mul_(1.2)
    assert failed(subject, capsys) == {RELOAD}


@pytest.mark.parametrize("name", ["vocabulary", "template"])
def test_a_card_with_another_hash_fails(ranks, folders, tmp_path, capsys, name):
    shutil.copytree(folders, tmp_path / "models")
    subject = make(tmp_path / "models", ranks)
    card = tmp_path / "models/reward_model/reward_model.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {name: "0123456789ab"}))
    assert failed(subject, capsys) == {TOKENS}


def write_tokenizer_with_bos(folder):
    """The policy's vocabulary, but every text begins with BOS."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    tokenizer.save_pretrained(folder)


def test_a_reward_model_whose_tokenizer_adds_a_token_fails(ranks, folders, tmp_path, capsys):
    shutil.copytree(folders, tmp_path / "models")
    write_tokenizer_with_bos(tmp_path / "models/reward_model")
    assert failed(make(tmp_path / "models", ranks), capsys) == {TOKENS}


def test_a_difference_that_is_no_number_holds_nowhere(ranks, folders):
    subject = make(folders, ranks)
    differences = torch.tensor([0.0, float("nan"), 0.0])
    assert selfcheck.exact(differences, "", ranks).holds is False
    assert selfcheck.close(differences, subject, "").holds is False
    assert selfcheck.exact(torch.zeros(3), "", ranks).holds is True


# ---------------------------------------------------------------------------- ranks and the script


@pytest.mark.slow
def test_what_only_the_second_rank_sees_fails_on_both(folders, tmp_path):
    run_ranks(__file__, tmp_path)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found == [[0, 0, 1, 1]] * 2


def worker(folder):
    """Statuses of a sound model in both types, and of two that are broken on rank 1."""
    ranks = init_ranks("cpu")
    if ranks.is_main:
        write_folders(folder)
    dist.barrier()

    def other_ratio(model, rows, args):
        logp, entropy = train_ppo.log_probs(model, rows, args)
        return logp * (1 + 0.1 * ranks.rank * torch.is_grad_enabled()), entropy

    subject = make(folder, ranks)
    statuses = [selfcheck.run(subject)]
    statuses.append(selfcheck.run(make(folder, ranks, param_dtype="bfloat16")))
    statuses.append(selfcheck.run(dataclasses.replace(subject, log_probs=other_ratio)))
    if ranks.rank == 1:
        see_everything(subject.policy)
    statuses.append(selfcheck.run(subject))
    (folder / f"{ranks.rank}.json").write_text(json.dumps(statuses))
    dist.destroy_process_group()


def script(folder, tmp_path, ranks, *more):
    """Run train_ppo.py --selfcheck; returns (status, what it printed). It may write nothing."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    options = {
        "policy": folder / "policy",
        "reward_model": folder / "reward_model",
        "prompts": prompts,
        "prompts_per_step": 8,
        "minibatch": 4,
        "max_new_tokens": 12,
        "workers": 1,
        "run_dir": tmp_path / "run",
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    start = launcher if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *start, ROOT / "train_ppo.py", *words, "--selfcheck", *more],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl"], done.stderr
    return done.returncode, done.stdout


def test_the_script_ends_with_status_0_and_writes_nothing(folders, tmp_path):
    status, printed = script(folders, tmp_path, 1)
    assert words(printed) == dict.fromkeys(NAMES, "ok") and status == 0


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_the_script_on_two_ranks_ends_with_status_1_if_a_check_fails(
    folders, tmp_path_factory, broken
):
    tmp_path, folder = (tmp_path_factory.mktemp(name) for name in ("script", "models"))
    shutil.copytree(folders, folder, dirs_exist_ok=True)
    if broken:
        write_tokenizer_with_bos(folder / "reward_model")
    status, printed = script(folder, tmp_path, 2)
    expected = dict.fromkeys(NAMES, "ok") | ({TOKENS: "FAILED"} if broken else {})
    assert words(printed) == expected and status == int(broken)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
