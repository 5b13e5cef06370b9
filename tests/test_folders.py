"""Model folders as people have them, through whole runs: forms of weights, tables of other sizes,
families that cannot be used; and a reward of a user's own."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import eval_code
import train_ppo
from pfppo.config import UserError
from pfppo.data import Tokens
from pfppo.model import causal_lm_config, check_positions

import families
import pytest
import torch
from ranks import refused
from running import numbers, options, run
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

DATA = Path(__file__).parents[2] / "shared" / "data"
BARE = {"validation": "", "test": "", "steps": 1, "actor_lr": 1e-30}


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny / "policy", tmp_path / "policy")


def reading(policy, **changed):
    """What ids mean to the policy in a folder."""
    options = {"policy": policy, "prompt_style": "plain", "max_prompt_tokens": 99} | changed
    return Tokens.of(SimpleNamespace(**options))


# ---- weights -------------------------------------------------------------------------------------


def untied(folder, other):
    """Tied in config.json, with a head in the file that is the embedding, or another one."""
    weights = load_file(folder / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    weights["lm_head.weight"] = head + torch.randn_like(head) if other else head
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def sharded(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data += 0.01
    (folder / "model.safetensors").rename(folder / "stale.safetensors")
    model.save_pretrained(folder, max_shard_size="60KB")


def stale(folder):
    """A single file of another training beside shards: transformers reads the single file."""
    sharded(folder)
    (folder / "stale.safetensors").rename(folder / "model.safetensors")


def pickled(folder, other=False):
    if other:
        untied(folder, True)
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def stale_pickle(folder):
    """A single pickle of another training beside pickled shards: transformers reads the single."""
    sharded(folder)
    (folder / "stale.safetensors").rename(folder / "model.safetensors")
    pickled(folder)
    index = folder / "model.safetensors.index.json"
    for shard in folder.glob("model-*.safetensors"):
        torch.save(load_file(shard), shard.with_suffix(".bin"))
        shard.unlink()
    text = index.read_text().replace(".safetensors", ".bin")
    (folder / "pytorch_model.bin.index.json").write_text(text)
    index.unlink()


def change(folder, **values):
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


def named(folder):
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    untied(folder, True)
    change(folder, transformers_weights="other.safetensors")


def bare(folder):
    """Names without the backbone's, as base models are saved; and another head."""
    untied(folder, True)
    weights = load_file(folder / "model.safetensors")
    weights = {name.removeprefix("model."): value for name, value in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def renamed(folder):
    """A family whose names in files are not those of its modules, with another head."""
    other_model(folder, "gpt_neox")
    change(folder, tie_word_embeddings=True)


FORMS = {
    "single": lambda folder: None,
    "shards": sharded,
    "a stale single file beside shards": stale,
    "tied, with a copy": lambda folder: untied(folder, False),
    "tied, with another head": lambda folder: untied(folder, True),
    "pickled": pickled,
    "pickled, tied, with another head": lambda folder: pickled(folder, True),
    "a stale pickle beside pickled shards": stale_pickle,
    "a file that config.json names": named,
    "bare names, tied, with another head": bare,
    "other names, tied, with another head": renamed,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_policy_that_learns_nothing_is_what_transformers_reads(tiny, folder, tmp_path, form):
    FORMS[form](folder)
    sizes = {"prompts_per_step": 1, "samples_per_prompt": 4, "minibatch": 2, "max_new_tokens": 4}
    sizes |= {"reward_model": ""} if form.startswith("other names") else {}
    sizes |= {"reward": "noisy:middle"} if form.startswith("other names") else {}
    run(train_ppo, *options(tiny, tmp_path / "run", **BARE | sizes, policy=folder))
    run(train_ppo, "--run_dir", tmp_path / "run", "--export", tmp_path / "out")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    expected, *ours = (
        AutoModelForCausalLM.from_pretrained(path)(ids).logits
        for path in (folder, tmp_path / "run/policy", tmp_path / "out")
    )
    for logits in ours:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    (row,) = numbers(tmp_path / "run")
    assert abs(row["kl_k1"]) < 1e-5 and row["ratio_first_minibatch"] == 1


# ---- sizes ---------------------------------------------------------------------------------------


def resized(path, build, rows):
    model = build.from_pretrained(path)
    model.resize_token_embeddings(rows)
    model.config.pad_token_id = min(model.config.pad_token_id or 0, rows - 1)
    model.save_pretrained(path)


def test_rows_without_a_token_or_without_a_row_in_the_reward_model_are_never_sampled(
    tiny, folder, tmp_path, capsys
):
    rm = shutil.copytree(tiny / "rm", tmp_path / "rm")
    size = len(AutoTokenizer.from_pretrained(folder))
    resized(folder, AutoModelForCausalLM, size + 200)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # what nobody trained can be likely
        model.get_input_embeddings().weight[size:] *= 50
    model.save_pretrained(folder)
    resized(rm, AutoModelForSequenceClassification, size + 100)
    argv = options(tiny, tmp_path / "run", **BARE, policy=folder, reward_model=rm)
    assert run(train_ppo, *argv, "--selfcheck") == 0  # the sampler's log-probs are training's
    assert f"200 of {size + 200} ids are never sampled" in capsys.readouterr().out
    tokens = reading(folder, reward_model=rm)
    assert tokens.rows == size + 100 and tokens.never == list(range(size, size + 200))


def test_a_token_beyond_the_rows_is_one_line_wherever_it_stands(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    tokens, line = reading(folder), "here: token '<extra>' has id 512, beyond the 512 rows"
    assert refused(tokens.prompt, "<extra> a", "here").startswith(line)
    assert refused(tokens.response, [5], "b<extra>", "here").startswith(line)


NEVER = {  # what config.json says: the line
    "its weights are quantised": {"quantization_config": {"quant_method": "fp8"}},
    "pad_token_id 600 .* beyond the 512 rows": {"pad_token_id": 600},
    "lm_head.weight and model.embed_tokens.weight have": {},  # a head of another shape
}


@pytest.mark.parametrize("line", NEVER)
def test_a_folder_that_cannot_be_read_as_it_says_is_one_line(folder, line):
    if not NEVER[line]:
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"][:-3].clone()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    change(folder, **NEVER[line])
    assert re.search(f"^--policy {folder}: {line}", refused(causal_lm_config, folder))


def test_a_policy_that_could_never_end_is_refused(folder):
    change(folder, eos_token_id=600)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<|beyond|>"})
    tokenizer.save_pretrained(folder)
    assert "no end-of-sequence id is below the 512 rows" in refused(reading, folder)


# ---- architectures -------------------------------------------------------------------------------


def other_model(folder, family, build=AutoModelForCausalLM, **values):
    """The folder's tokenizer with a random model of another family."""
    sizes = families.SIZES | {"vocab_size": 512, "max_position_embeddings": 256} | values
    families.tiny_family(family, sizes, build).save_pretrained(folder)


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
    with pytest.raises(UserError, match=f"--reward_model {folder}: .*expected at most 16"):
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
    check_positions(folder, "policy", 40)
    message = refused(check_positions, folder, "policy", 41)
    assert "expected at most 40, the original_max_position_embeddings" in message


def test_a_sampler_that_is_not_the_policy_ends_the_first_step(tiny, tmp_path, monkeypatch):
    original = train_ppo.sample

    def wrong(*args, **how):
        samples = original(*args, **how)
        samples.logp = [[x - 0.1 for x in row] for row in samples.logp]
        return samples

    monkeypatch.setattr(train_ppo, "sample", wrong)
    with pytest.raises(UserError, match="log-probs of sampler and training differ by 0.1 nats"):
        run(train_ppo, *options(tiny, tmp_path / "run", **BARE))


# ---- rewards -------------------------------------------------------------------------------------


def test_an_own_reward_is_in_standard_deviations_as_a_checkpoint_knows_them(tiny, tmp_path, capsys):
    own = tmp_path / "own.py"
    own.write_text("def large(p, responses, q):\n    return [100.0 + len(r) for r in responses]\n")
    reward = {"reward": f"{own}:large", "reward_clip": 1e9, "filter": "none"}
    argv = options(tiny, tmp_path / "run", **BARE, **reward)
    run(train_ppo, *argv)
    said, (row,) = capsys.readouterr().out, numbers(tmp_path / "run")
    state = json.loads((tmp_path / "run/checkpoints/step_1/state.json").read_text())
    assert abs(row["reward_all"]) < 1.5 and row["value_loss"] < 100
    assert re.search(r"own.py:large: rewards of 24 samples of the SFT policy: mean 1\d\d", said)
    run(train_ppo, *argv, "--resume", "--steps", 2)
    again = json.loads((tmp_path / "run/checkpoints/step_2/state.json").read_text())
    assert again["scale"] == state["scale"] and "SFT policy" not in capsys.readouterr().out
