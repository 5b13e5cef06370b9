"""Model folders as people have them, through whole runs: forms of weights, tables of other sizes,
folders that are no whole model, where an answer ends."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import train_ppo
from pfppo.data import Tokens
from pfppo.model import causal_lm_config, check_folder

import families
import pytest
import torch
from conftest import quick
from families import other_model
from ranks import refused
from running import numbers, options, run
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

DATA = Path(__file__).parents[2] / "shared" / "data"
BARE = {"validation": "", "test": "", "steps": 1, "actor_lr": 1e-30}


def reading(policy, **changed):
    """What ids mean to the policy in a folder."""
    options = {"policy": policy, "prompt_style": "plain", "max_prompt_tokens": 99}
    options |= {"max_new_tokens": 9} | changed
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


@pytest.mark.parametrize("form", quick(["single", "tied, with another head", "pickled"], FORMS))
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
    assert refused(tokens.rendered, [("here", "<extra> a")]).startswith(line)
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


# ---- folders that are no whole model -------------------------------------------------------------


def written(folder, *names):
    """Only these files in the folder, those that are new empty."""
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


LORA = {"base_model_name_or_path": "org/base", "peft_type": "LORA", "task_type": "CAUSAL_LM"}
MERGE = "holds an adapter (LORA) for org/base{} merge it, AutoModelForCausalLM.from_pretrained('org"
TOKENS = ("tokenizer.json", "tokenizer_config.json")
PARTIAL = [  # the files that there are, the line
    (("adapter_config.json", "adapter_model.safetensors"), MERGE.format(", no whole model:")),
    (
        ("adapter_config.json", "config.json", "model.safetensors"),
        "beside a model: remove adapter_",
    ),
    ((), "is an empty folder"),
    (TOKENS, "has no config.json (found tokenizer.json, tokenizer_config.json), expected a model"),
    (
        ("model.safetensors", *TOKENS),
        "copy config.json and the tokenizer of the model that was tra",
    ),
    (("config.json", *TOKENS), "has no weights (found config.json, tokenizer.json, tokenizer_conf"),
    (("model.Q4_K_M.gguf",), "is a model in llama.cpp's form (GGUF): take the one it was made fro"),
    (
        ("config.json", "model.Q4_K_M.gguf"),
        "is a model in llama.cpp's form (GGUF): take the one it",
    ),
    (("params.json", "consolidated.00.pth"), "is a model in its maker's form: take the one in Hu"),
    (("checkpoint-90/config.json", "checkpoint-500/config.json"), "name {}/checkpoint-500 or {}/c"),
    (("policy/config.json", "args.json"), "the model is in a folder below: name {}/policy"),
    (("config.json", "zero_to_fp32.py", "global_step9/x.pt"), "is a checkpoint of DeepSpeed: make"),
    (
        ("pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/x"),
        "is a checkpoint in FSDP's shards: me",
    ),
    (("config.json", "optimizer.pt", "trainer_state.json"), "is a trainer's state without its mo"),
    (
        ("manifest.json", "state.json"),
        "is a checkpoint of train_ppo.py: write its policy with --run",
    ),
    (("config.json", "tf_model.h5"), "is a model without weights for torch"),
]


@pytest.mark.parametrize("names, line", PARTIAL)
def test_a_folder_that_is_no_whole_model_is_told_for_what_it_is(folder, names, line):
    written(folder, *names)
    if "adapter_config.json" in names:
        (folder / "adapter_config.json").write_text(json.dumps(LORA))
    for option in ("policy", "reward_model"):
        if option == "policy" or "config.json" not in names or "adapter_config.json" in names:
            message = refused(check_folder, folder, option)
            assert message.startswith(f"--{option} {folder}: ")
            assert line.replace("{}", str(folder)) in message


def test_a_large_file_that_git_lfs_has_not_brought_is_told(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"
    for name, read in (
        ("tokenizer.json", reading),
        ("model.safetensors", lambda path: check_folder(path, "policy")),
    ):
        (folder / name).write_text(pointer)
        assert f"{name} is a pointer of git LFS: run git lfs pull there" in refused(read, folder)


def test_an_encoder_is_no_policy(folder):
    families.tiny_family("bert", families.SIZES | {"vocab_size": 512}, AutoModel).save_pretrained(
        folder
    )
    assert "bert (BertModel) is an encoder, expected a causal LM" in refused(reading, folder)


# ---- where an answer ends ------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_lone_tokenizer_json_has_the_eos_that_the_model_names(tiny, folder, file):
    whole = reading(folder)
    (folder / "tokenizer_config.json").unlink()
    named = {"eos_token_id": [0]} if file == "config.json" else {"eos_token_id": None}
    change(folder, **named)
    (folder / "generation_config.json").unlink()
    if file != "config.json":
        (folder / file).write_text(json.dumps({"eos_token_id": 0}))
    alone = reading(folder)
    assert (alone.stop, alone.end) == (whole.stop, whole.end) == ([0], 0)
    assert alone.hashes() == whole.hashes()
    for text in ("def f(x):\n    return x", " é\t12"):
        ids = whole.response([], text, "")
        assert alone.response([], text, "") == ids and ids[-1] == 0
        assert alone.decode([[]], [ids]) == [text]


@pytest.mark.parametrize("named, found", [(None, ""), (5, "names [5], no special token of it")])
def test_a_lone_tokenizer_json_without_a_known_eos_is_told_what_to_write(folder, named, found):
    (folder / "tokenizer_config.json").unlink()
    (folder / "generation_config.json").unlink()
    change(folder, eos_token_id=named)
    message = refused(reading, folder)
    assert message.startswith(f"--policy {folder}: the tokenizer has no EOS: ") and found in message
    assert '"eos_token": "..." in tokenizer_config.json, perhaps one of <eos>, <pad>' in message


def test_a_family_s_default_is_no_end_and_what_is_exported_stops_where_it_did(tiny, folder):
    """Of a Llama whose config.json names no EOS, transformers takes token 2 for it."""
    (folder / "generation_config.json").unlink()
    said = json.loads((folder / "config.json").read_text())
    del said["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(said))
    assert AutoConfig.from_pretrained(folder).eos_token_id == 2
    assert reading(folder).stop == [0]
    run_dir = folder.parent / "run"
    run(train_ppo, *options(tiny, run_dir, policy=folder, **BARE))
    assert (
        AutoModelForCausalLM.from_pretrained(run_dir / "policy").generation_config.eos_token_id == 0
    )
