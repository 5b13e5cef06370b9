"""The embedded default: its tokenizer, its files, its policy's training."""

import json
from types import SimpleNamespace

from pfppo.lab import default as lab, world
from pfppo.problems.benchmarks import load_problems
from pfppo.config import UserError
from pfppo.data import decode
from pfppo.model import Policy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def corpus():
    return world.draw_corpus(0, 1000)


def test_the_tokenizer_gives_back_every_byte(corpus):
    tokenizer = lab.make_tokenizer(corpus)
    for text in [*map("".join, corpus[:50]), "tab\t é \x00 \r\n  12", "<eos"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokens_stay_within_a_line_and_never_join_digits(corpus):
    tokenizer = lab.make_tokenizer(corpus)
    for i in range(2, len(tokenizer)):
        token = tokenizer.decode([i])
        assert len(token) == 1 or not any(c == "\n" or c.isdigit() for c in token), token


def test_responses_end_with_eos_and_decode_without_it(corpus):
    tokenizer = lab.make_tokenizer(corpus)
    for (prompt, response), (p, y) in zip(
        corpus[:20], lab.rows_of(corpus[:20], tokenizer), strict=True
    ):
        assert y[-1] == tokenizer.eos_token_id and y.count(y[-1]) == 1
        assert (decode(p, tokenizer), decode(y, tokenizer)) == (prompt, response)


def test_training_lowers_the_loss_and_repeats_exactly(corpus, monkeypatch):
    monkeypatch.setattr(lab, "SFT_BATCH", 16)
    tokenizer = lab.make_tokenizer(corpus)
    rows = lab.rows_of(corpus[: 16 * 60], tokenizer)

    def train(rows):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=lab.VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        model = LlamaForCausalLM(config)
        return lab.train_policy(Policy(model), rows, 1, "cpu"), model.lm_head.weight

    early, _ = train(rows[:64])
    (late, weight), (again, repeated) = train(rows), train(rows)
    assert late < early - 1
    assert late == again and torch.equal(weight, repeated)


def test_making_writes_the_files_and_then_leaves_them(tmp_path, monkeypatch, ranks):
    monkeypatch.setattr(lab, "FOLDER", tmp_path / "lab")
    monkeypatch.setattr(lab, "SFT_STEPS", 2)
    counts = {"train": 8, "rm": 6, "validation": 4, "test": 4}
    monkeypatch.setattr(lab, "PROBLEMS", counts)
    args, used = SimpleNamespace(), ["policy", "test"]
    lab.make(ranks, args, used)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "lab").rglob("*")}
    prompts = set()
    for name, count in counts.items():
        problems = load_problems(tmp_path / "lab" / f"{name}.jsonl")
        assert len(problems) == count
        prompts |= {problem.prompt for problem in problems}
    assert len(prompts) == sum(counts.values())
    row = json.loads((tmp_path / "lab/test.jsonl").read_text().split("\n")[0])
    assert set(row) == {"task_id", "prompt", "entry_point", "canonical_solution", "test"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "lab/policy")
    lab.make(ranks, args, used)
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "lab").rglob("*")}


def test_nothing_is_made_that_is_not_used(tmp_path, monkeypatch, ranks):
    monkeypatch.setattr(lab, "FOLDER", tmp_path / "lab")
    monkeypatch.setattr(lab, "PROBLEMS", {"train": 8, "test": 4})
    lab.make(ranks, SimpleNamespace(), [])
    assert not (tmp_path / "lab").exists()
    lab.make(ranks, SimpleNamespace(), ["test"])
    assert {path.name for path in (tmp_path / "lab").iterdir()} == {"train.jsonl", "test.jsonl"}


@pytest.mark.parametrize("name", ["policy", "reward_model", "prompts", "validation", "test"])
def test_what_is_not_the_labs_is_read_before_the_lab_is_made(tmp_path, monkeypatch, ranks, name):
    monkeypatch.setattr(lab, "FOLDER", tmp_path / "lab")
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=nowhere):
        lab.make(ranks, SimpleNamespace(**{name: nowhere}), ["problems"])
    assert not (tmp_path / "lab").exists()


def test_resolve_names_what_it_replaced():
    args = SimpleNamespace(policy="lab", prompts="lab", reward_model="mine")
    assert lab.resolve(args, prompts="rm") == ["policy", "prompts"]
    assert args.policy == str(lab.FOLDER / "policy")
    assert args.prompts == str(lab.FOLDER / "rm.jsonl") and args.reward_model == "mine"
