"""Families of models that PF-PPO cannot use rightly, and a sampler that errs, are one line."""

import shutil
from types import SimpleNamespace

import eval_code
import train_ppo
from pfppo.config import UserError
from pfppo.model import room_of

import pytest
from families import other_model
from running import options, run
from safetensors.torch import load_file, save_file
from test_folders import BARE
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

UNFIT = {  # (option, family): what its configuration says
    ("policy", "bart"): {"is_encoder_decoder": False},
    ("policy", "bert"): {"is_decoder": False},
    ("policy", "xlm-roberta"): {},
    ("policy", "modernbert-decoder"): {},
    ("policy", "openai-gpt"): {"n_positions": 256},
}
SCALAR = {"is_decoder": False, "id2label": {0: "reward"}}
UNFIT |= {("reward_model", name): SCALAR for name in ("bert", "distilbert", "modernbert")}


@pytest.mark.parametrize("option, family", UNFIT)
def test_a_family_that_cannot_be_used_rightly_is_one_line(tiny, tmp_path, option, family):
    causal = option == "policy"
    folder = shutil.copytree(tiny / ("policy" if causal else "rm"), tmp_path / option)
    build = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    other_model(folder, family, build, **UNFIT[option, family])
    line = f"--{option} {folder}: .*(causal decoder|decoder with)"
    with pytest.raises(UserError, match=line):
        run(train_ppo, *options(tiny, tmp_path / "run", **{option: folder}), "--selfcheck")
    if causal and family != "modernbert-decoder":  # it samples rightly, it is trained wrongly
        problems = ("--problems", tiny / "held_out.jsonl", "--out", tmp_path / "run")
        with pytest.raises(UserError, match=line):
            run(eval_code, "--policy", folder, *problems)
    assert not (tmp_path / "run").exists()


def test_a_reward_model_that_looks_ahead_is_refused_whatever_its_offset_and_in_evaluation(
    tiny, tmp_path
):
    folder = shutil.copytree(tiny / "rm", tmp_path / "rm")
    other_model(folder, "bert", AutoModelForSequenceClassification, **SCALAR)
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"] += 30
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "reward_model.json").unlink()
    line = f"--reward_model {folder}: .*causal decoder"
    with pytest.raises(UserError, match=line):
        run(train_ppo, *options(tiny, tmp_path / "run", reward_model=folder))
    models = ("--policy", tiny / "policy", "--reward_model", folder)
    problems = ("--problems", tiny / "held_out.jsonl", "--out", tmp_path / "run")
    with pytest.raises(UserError, match=line):
        run(eval_code, *models, *problems)
    short = {"n_positions": 16, "max_position_embeddings": 16}
    other_model(folder, "gpt2", AutoModelForSequenceClassification, **SCALAR | short)
    with pytest.raises(UserError, match=f"--reward_model {folder}: --max_new_tokens 64 leaves -48"):
        run(eval_code, *models, *problems)


def test_a_family_without_a_classifier_is_one_line_where_a_critic_is_needed(tiny, folder, tmp_path):
    other_model(folder, "codegen", n_positions=256)
    argv = options(tiny, tmp_path / "run", policy=folder, reward_model="", reward="noisy:middle")
    with pytest.raises(UserError, match="family codegen transformers has no sequence classifier"):
        run(train_ppo, *argv)


@pytest.mark.parametrize("family", ["phi3", "llama"])  # the length in the config, in its rope
def test_longrope_beyond_its_first_length_is_refused(folder, family):
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 40}
    long = {"original_max_position_embeddings": 40} if family == "phi3" else {}
    other_model(folder, family, rope_parameters=rope | factors, **long)
    args = SimpleNamespace(policy=folder, max_prompt_tokens=99, max_new_tokens=30)
    room, why = room_of(args)
    assert room == 10 and "30 leaves 10 of 40, the original_max_position_embeddings" in why


def test_a_sampler_that_is_not_the_policy_ends_the_first_step(tiny, tmp_path, monkeypatch):
    original = train_ppo.sampler.sample

    def wrong(*args, **how):
        samples = original(*args, **how)
        samples.logp = [[x - 0.1 for x in row] for row in samples.logp]
        return samples

    monkeypatch.setattr(train_ppo.sampler, "sample", wrong)
    with pytest.raises(UserError, match="log-probs of sampler and training differ by 0.1 nats"):
        run(train_ppo, *options(tiny, tmp_path / "run", **BARE))
