"""The lab: hints where its values are kept, its tokenizer, its policy, the making of its files."""

import json
from types import SimpleNamespace

import eval_code
import train_ppo
import train_rm
from pfppo.lab import default as lab
from pfppo.lab import world
from pfppo.lab.world import draw_corpus
from pfppo.model import Policy
from pfppo.problems import load_problems

import pytest
import torch
from conftest import tokens_of
from running import read, run
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


@pytest.mark.parametrize(
    "script, changes, named",
    [
        (
            train_ppo,
            {},
            "--max_new_tokens 64, --kl_coef 0.2 (the paper: 0.01 at 6.7B), --actor_lr 0.0002 "
            "(the paper: 5e-7 at 6.7B), --critic_lr 0.0005 (the paper: 9e-6 at 6.7B)",
        ),
        (train_ppo, {"kl_coef": 0.01, "actor_lr": 1e-6, "critic_lr": 1e-5}, "--max_new_tokens 64"),
        (train_rm, {}, "--max_new_tokens 64, --lr 0.0005 (the paper: 1e-5)"),
        (train_rm, {"pairs": "pairs.jsonl", "lr": 1e-5}, None),  # nothing is sampled
        (eval_code, {"problems": "HumanEval.jsonl"}, "--max_new_tokens 64"),
        (eval_code, {"problems": "runs/lab/test.jsonl"}, None),  # whose answers are short
        (eval_code, {"policy": "", "problems": "x.jsonl"}, None),  # --samples
        (train_ppo, {"policy": "runs/lab/policy"}, None),
    ],
)
def test_what_still_has_the_labs_value_is_named_where_the_policy_is_another(script, changes, named):
    hint = lab.hint_of(script.Args(**{"policy": "own/model"} | changes))
    line = f"hint: --policy own/model is not the lab's, but these have the lab's values: {named}"
    assert hint == (line if named else "")


@pytest.fixture(scope="module")
def corpus():
    return draw_corpus(0, 1000)


def test_the_corpus_is_made_of_programs_and_a_function_of_its_seed(corpus):
    for prompt, response in corpus[:200]:
        compile(prompt + response, "corpus", "exec")
    assert draw_corpus(0, 20) == corpus[:20] != draw_corpus(4, 20)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return lab.make_tokenizer(corpus)


def test_the_tokenizer_gives_back_every_byte(corpus, tokenizer):
    for text in [*map("".join, corpus[:50]), "tab\t é \x00 \r\n  12", "<eos"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokens_stay_within_a_line_and_never_join_digits(tokenizer):
    for i in range(2, len(tokenizer)):
        token = tokenizer.decode([i])
        assert len(token) == 1 or not any(c == "\n" or c.isdigit() for c in token), token


def test_responses_end_with_eos_and_decode_without_it(corpus, tokenizer):
    tokens = tokens_of(tokenizer, policy="policy")
    for texts, (p, y) in zip(corpus[:20], lab.rows_of(corpus[:20], tokenizer), strict=True):
        assert y[-1] == tokenizer.eos_token_id and y.count(y[-1]) == 1
        assert tokens.decode([[], p], [p, y]) == list(texts)


def test_training_lowers_the_loss_and_repeats_exactly(corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(lab, "SFT_BATCH", 16)
    rows = lab.rows_of(corpus, tokenizer)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=lab.VOCABULARY, num_attention_heads=2, **sizes)

    def train(steps):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        return lab.train_policy(Policy(model), rows[: 16 * steps], 1, "cpu"), model.lm_head.weight

    (early, weight), (again, repeated), (late, _) = train(4), train(4), train(60)
    assert early == again and torch.equal(weight, repeated)
    assert late < early - 1


COUNTS = {"train": 8, "rm": 6, "validation": 4, "test": 4}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "FOLDER", tmp_path / "lab")
    monkeypatch.setattr(lab, "PROBLEMS", COUNTS)
    monkeypatch.setattr(lab, "SFT_STEPS", 2)
    return tmp_path / "lab"


def resolved(**args):
    args = SimpleNamespace(**args)
    lab.resolve(args)
    return args


def test_making_writes_what_is_missing_and_leaves_the_rest(folder, ranks, monkeypatch):
    args, models = resolved(reward_model="lab", test="lab"), []

    def make_reward_model(path, ranks):
        models.append(path)
        (folder / "reward_model").mkdir(exist_ok=True)
        if len(models) == 1:
            (folder / "reward_model/args.json").touch()  # what is there from the start
        else:
            (folder / "reward_model/config.json").touch()  # and what is written last

    lab.make(args, ranks, make_reward_model)
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    problems = {name: load_problems(folder / f"{name}.jsonl") for name in COUNTS}
    assert {name: len(problems[name]) for name in COUNTS} == COUNTS
    assert len({p.prompt for part in problems.values() for p in part}) == sum(COUNTS.values())
    row = json.loads((folder / "test.jsonl").read_text().split("\n")[0])
    assert set(row) == {"task_id", "prompt", "entry_point", "canonical_solution", "test"}
    AutoModelForCausalLM.from_pretrained(folder / "policy")

    (folder / "rm.jsonl").unlink()
    lab.make(args, ranks, make_reward_model)
    assert load_problems(folder / "rm.jsonl") == problems["rm"]
    for name in ("rm.jsonl", "reward_model/config.json"):
        made[folder / name] = (folder / name).stat().st_mtime_ns
    monkeypatch.setattr(world, "draw_problems", pytest.fail)  # minutes for nothing
    lab.make(args, ranks, make_reward_model)
    assert made == {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    assert models == [str(folder / "reward_model")] * 2  # the first time it was stopped


def test_nothing_is_made_that_is_not_used(folder, ranks):
    lab.make(resolved(policy="", prompts=""), ranks)
    assert not folder.exists()
    lab.make(resolved(problems="lab"), ranks)
    assert {path.name for path in folder.iterdir()} == {f"{name}.jsonl" for name in COUNTS}


def test_resolve_puts_paths_where_arguments_say_lab():
    args = SimpleNamespace(policy="lab", prompts="lab", reward_model="mine", test="auto")
    lab.resolve(args, prompts="rm.jsonl")
    known = {"policy": "policy", "prompts": "rm.jsonl", "test": "test.jsonl"}
    expected = {name: str(lab.FOLDER / path) for name, path in known.items()}
    assert vars(args) == expected | {"reward_model": "mine"}
    assert resolved(prompts="mine", test="auto", validation="x").test == ""


def test_the_lab_is_made_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lab, "SFT_STEPS", 3)
    monkeypatch.setattr(lab, "PROBLEMS", {"train": 8, "rm": 8, "validation": 4, "test": 4})
    run(eval_code, "--max_new_tokens", 8)
    made = capsys.readouterr().out
    assert "SFT policy of" in made and "8 problems in" in made
    assert len(read("runs/lab/test.jsonl")) == 4
    run(eval_code, "--max_new_tokens", 8)
    again = capsys.readouterr().out
    assert "SFT policy of" not in again and "runs/eval-2" in again
