"""train_rm.py, end to end on a tiny random checkpoint."""

import json
import shutil
from types import SimpleNamespace

import train_ppo
import train_rm
from pfppo import data
from pfppo.loading import read_classifier
from pfppo.model import ScalarModel
from pfppo.rollout import collate

import pytest
import torch
from conftest import words_of
from ranks import refused
from running import forked, options, read, run, write_rows
from transformers import AutoModelForSequenceClassification


def rm_words(folder, policy, file, **changed):
    files = {"policy": policy, "pairs": file, "run_dir": folder}
    return words_of(**files | {"batch": 8} | changed)


@pytest.mark.parametrize("padding", ["none", "eos", "its own"])
def test_an_exported_reward_model_scores_a_response_with_eos_as_here(tiny, tmp_path, padding):
    """transformers reads the score before what it takes for padding, which EOS must not be."""
    policy = shutil.copytree(tiny / "policy", tmp_path / "policy")
    tokenizer = data.load_tokenizer(policy)
    if padding != "its own":
        tokenizer.pad_token = None if padding == "none" else tokenizer.eos_token
        tokenizer.save_pretrained(policy)
        config = json.loads((policy / "config.json").read_text())
        config["pad_token_id"] = tokenizer.pad_token_id
        (policy / "config.json").write_text(json.dumps(config))
    run(train_rm, *rm_words(tmp_path / "rm", policy, tiny / "pairs.jsonl"))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    assert theirs.config.num_labels == 1
    rows = collate([[5, 6, 7]], [[8, 9, tokenizer.eos_token_id]], tokenizer.eos_token_id)
    ours = ScalarModel(read_classifier(tmp_path / "rm"))(rows.ids, rows.ends)
    with torch.no_grad():
        torch.testing.assert_close(ours[:, 0], theirs(rows.ids).logits)


def test_all_pairs_of_a_prompt_are_held_out_together(tiny, tmp_path, capsys):
    row = {"prompt": "def f(x):\n", "rejected": "    return 0\n"}
    rows = [row | {"chosen": f"    return {i}\n"} for i in range(1, 9)]
    rows += [row | {"prompt": "def g(x):\n", "chosen": "    return x\n"}]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    changed = {"batch": 1, "held_out": 0.5, "epochs": 1}
    run(train_rm, *rm_words(tmp_path / "rm", tiny / "policy", pairs, **changed))
    said = capsys.readouterr().out
    assert "8 pairs for training, 1 held out" in said or "1 pairs for training, 8 held out" in said


def test_chat_pairs_and_prompts_train_through_one_template(tiny, tmp_path):
    """The policy's tokenizer has a chat template; pairs and prompts are lists of messages."""
    policy = shutil.copytree(tiny / "policy", tmp_path / "policy")
    tokenizer = data.load_tokenizer(policy)
    tokenizer.chat_template = (
        "{% for turn in messages %}<{{ turn.role }}> {{ turn.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>\n{% endif %}"
    )
    tokenizer.save_pretrained(policy)
    system = {"role": "system", "content": "Answer in Python."}
    rows, prompts = [], []
    for pair in read(tiny / "pairs.jsonl"):
        turns = [system, {"role": "user", "content": pair["prompt"]}]
        prompts.append({"prompt": turns})
        answers = {name: {"role": "assistant", "content": pair[name]} for name in pair}
        rows.append({name: [*turns, answers[name]] for name in ("chosen", "rejected")})
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    asked = write_rows(tmp_path / "prompts.jsonl", prompts)
    style = ("--prompt_style", "chat")
    run(train_rm, *rm_words(tmp_path / "rm", policy, pairs), *style)
    assert read(tmp_path / "rm/pairs.jsonl")[0]["prompt"] == prompts[0]["prompt"]
    files = {"policy": policy, "reward_model": tmp_path / "rm"}
    files |= {"prompts": asked, "validation": "", "test": "", "steps": 1}
    run(train_ppo, *options(tiny, tmp_path / "run", **files), *style)
    seen = {row["prompt"] for row in read(tmp_path / "run/samples.jsonl")}
    assert seen <= {row["prompt"][1]["content"] for row in prompts}


def test_pairs_are_built_by_executing_samples(tiny, tmp_path, capsys):
    """An untaught policy goes on with the comment, and passes, or breaks the line, and fails."""
    problem = {
        "prompt": "def solve(xs):\n    return 1  #",
        "entry_point": "solve",
        "canonical_solution": "\n",
        "test": "def check(candidate):\n    assert candidate([]) == 1\n",
    }
    rows = [problem | {"task_id": str(i)} for i in range(12)]
    asked = write_rows(tmp_path / "problems.jsonl", rows)
    changed = {"prompts": asked, "max_new_tokens": 24, "batch": 2, "epochs": 1, "held_out": 0.2}
    run(train_rm, *rm_words(tmp_path / "rm", tiny / "policy", "", **changed))
    assert "have a passing and a failing sample" in capsys.readouterr().out
    pairs = read(tmp_path / "rm/pairs.jsonl")
    assert len(pairs) >= 2
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)


@pytest.mark.parametrize("world", [1, 2, 3, 12, 24])
def test_the_labs_reward_model_is_made_on_any_number_of_ranks(monkeypatch, world):
    asked = []
    monkeypatch.setattr(train_rm, "main", lambda args, ranks: asked.append(args))
    train_rm.make_for_lab("folder", SimpleNamespace(world=world))
    assert asked[0].run_dir == "folder" and asked[0].batch % world == 0
    assert 16 <= asked[0].batch < 16 + world


def test_two_ranks_train_the_reward_model_of_one(tiny, tmp_path):
    how = {"held_out": 0.25, "microbatch": 2}
    for name, runs in (("one", run), ("two", forked)):
        runs(train_rm, *rm_words(tmp_path / name, tiny / "policy", tiny / "pairs.jsonl", **how))
    one, two = (read_classifier(tmp_path / name).state_dict() for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({"held_out": 1.5}, "--held_out 1.5: expected 0 to 1"),
        ({"held_out": 1}, "more than the 0 pairs"),
        ({"batch": 64}, "--batch 64: more than the"),
        ({"pairs": "", "samples_per_prompt": 1}, "a pair needs at least 2"),
        ({"pairs": "", "max_new_tokens": 250}, "expected at most 256"),
        ({"run_dir": "."}, "--run_dir .: is not empty, choose another name"),
    ],
)
def test_train_rm_says_what_is_wrong_in_one_line(tiny, tmp_path, changed, expected):
    words = {"prompts": tiny / "train.jsonl"} | changed
    argv = rm_words(tmp_path / "rm", tiny / "policy", tiny / "pairs.jsonl", **words)
    assert expected in refused(run, train_rm, *argv)
    assert not (tmp_path / "rm").exists()
