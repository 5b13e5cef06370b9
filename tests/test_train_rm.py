"""train_rm.py, end to end on a tiny random checkpoint."""

import json
import shutil

import train_ppo
import train_rm
from pfppo import data
from pfppo.config import UserError
from pfppo.loading import read_classifier
from pfppo.model import ScalarModel
from pfppo.rollout import collate
from pfppo.run import pairs

import pytest
import torch
from conftest import words_of
from ranks import refused
from running import forked, options, read, run, write_rows
from test_slots import counted
from transformers import AutoModelForSequenceClassification

FOUR = pytest.param(4, 2, marks=pytest.mark.slow)
EASY = {  # an untaught policy goes on with the comment, and passes, or breaks the line, and fails
    "prompt": "def solve(xs):\n    return 1  #",
    "entry_point": "solve",
    "canonical_solution": "\n",
    "test": "def check(candidate):\n    assert candidate([]) == 1\n",
}


def rm_words(folder, policy, file, **changed):
    files = {"policy": policy, "pairs": file, "run_dir": folder}
    return words_of(**files | {"batch": 8} | changed)


def sampled_words(tiny, folder, count=12, problem=EASY, **changed):
    """Pairs from samples of an untaught policy."""
    rows = [problem | {"task_id": str(i)} for i in range(count)]
    asked = write_rows(folder.parent / "problems.jsonl", rows)
    sizes = {"prompts": asked, "max_new_tokens": 24, "batch": 2, "held_out": 0.2}
    return rm_words(folder, tiny / "policy", "", **sizes | changed)


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


def test_pairs_are_built_by_executing_samples_and_all_samples_are_kept(tiny, tmp_path, capsys):
    run(train_rm, *sampled_words(tiny, tmp_path / "rm", epochs=1))
    assert "have a passing and a failing sample" in capsys.readouterr().out
    pairs, samples = (read(tmp_path / f"rm/{name}.jsonl") for name in ("pairs", "samples"))
    assert len(pairs) >= 2
    keys = [(row["task_id"], row["sample"]) for row in samples]
    assert keys == [(str(i), j) for i in range(12) for j in range(5)]
    assert {row["prompt"] for row in samples} == {EASY["prompt"]}
    marked = {(row["task_id"], row["pair"]): row for row in samples if row["pair"]}
    assert len(marked) == 2 * len(pairs)
    for name, passed in (("chosen", True), ("rejected", False)):
        rows = [row for (_, pair), row in marked.items() if pair == name]
        assert [row["response"] for row in rows] == [pair[name] for pair in pairs]
        assert {row["passed"] for row in rows} == {passed}
    # all samples, as rows of token ids, make the normaliser
    model, tokenizer = read_classifier(tmp_path / "rm"), data.load_tokenizer(tiny / "policy")
    prompt = tokenizer(EASY["prompt"], add_special_tokens=False)["input_ids"]
    rows = collate([prompt] * len(samples), [row["ids"] for row in samples], 1)
    with torch.no_grad():
        raw = ScalarModel(model)(rows.ids, rows.ends)[:, 0, 0].double()
    card = json.loads((tmp_path / "rm/reward_model.json").read_text())
    assert card["mean"] == pytest.approx(raw.mean().item(), abs=1e-5)
    assert card["std"] == pytest.approx(raw.std().item(), abs=1e-5)


def test_memory_is_asked_for_a_part_of_the_samples(tiny, tmp_path, monkeypatch):
    """Of 40 prompts x 5 some 64 samples are drawn, and written, together."""

    def asked(args, ranks, needs):
        raise UserError(f"{needs.keywords['prompts']} prompts")

    monkeypatch.setattr("pfppo.run.pairs.rows_at_once", asked)
    assert refused(run, train_rm, *sampled_words(tiny, tmp_path / "rm", 40)) == "13 prompts"


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"test": EASY["test"].replace("1", "2")}, "all pass in 0 and all fail in 3; 0 prompts"),
        ({"test": "def check(candidate):\n    pass\n", "prompt": "x = 1  #"}, "all pass in"),
    ],
)
def test_without_a_pair_one_line_counts_what_there_is_and_says_what_to_do(
    tiny, tmp_path, change, expected
):
    words = sampled_words(tiny, tmp_path / "rm", 3, EASY | change, temperature=0.7)
    said = refused(run, train_rm, *words)
    assert said.startswith(f"--prompts {tmp_path / 'problems.jsonl'}: no prompt has both a passing")
    assert "Of 3 prompts x 5 samples" in said and expected in said
    assert "more --samples_per_prompt, another --temperature" in said
    assert f"are cut off at --max_new_tokens 24 (see {tmp_path / 'rm/samples.jsonl'})" in said
    cut = sum(row["ids"][-1] != 0 for row in read(tmp_path / "rm/samples.jsonl"))  # 0: EOS
    assert f"and {cut} of 15 samples" in said and ("larger --max_new_tokens" in said) == (cut > 7)


def test_metrics_are_written_for_every_step_and_held_out_ones_after_every_epoch(tiny, tmp_path):
    how = {"held_out": 0.25, "epochs": 2}
    run(train_rm, *rm_words(tmp_path / "rm", tiny / "policy", tiny / "pairs.jsonl", **how))
    rows = read(tmp_path / "rm/metrics.jsonl")  # 18 pairs: batches of 8, 8 and 2
    assert [(row["step"], row["epoch"]) for row in rows] == [(i, 1 + i // 4) for i in range(1, 7)]
    unseen = ("held_out_loss", "held_out_accuracy")
    assert all((row[name] is None) == (row["step"] % 3 > 0) for row in rows for name in unseen)
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 and 0 < row["lr"] < 5e-4 for row in rows)
    assert rows[-1]["lr"] < rows[1]["lr"] and rows[2]["accuracy"] in (0, 0.5, 1)


def test_the_loss_is_the_mean_over_the_real_pairs_of_a_batch_however_they_are_cut(
    tiny, tmp_path, monkeypatch
):
    """With a rate that moves nothing, the losses of an epoch add up to that of one batch. Pairs of
    like length share a pass."""
    losses, cut = {}, []
    shares = train_rm.run.shares
    monkeypatch.setattr(
        train_rm.run, "shares", lambda rows, *how: cut.append(rows) or shares(rows, *how)
    )
    for name, batch in (("whole", 64), ("cut", 7)):  # 24 pairs: fewer than a batch; 7, 7, 7, 3
        how = {"batch": batch, "held_out": 0, "epochs": 1, "lr": 1e-20, "microbatch": 2}
        run(train_rm, *rm_words(tmp_path / name, tiny / "policy", tiny / "pairs.jsonl", **how))
        losses[name] = [row["loss"] for row in read(tmp_path / name / "metrics.jsonl")]
    assert len(losses["whole"]) == 1 and len(losses["cut"]) == 4
    total = sum(loss * n for loss, n in zip(losses["cut"], (7, 7, 7, 3), strict=True))
    assert total / 24 == pytest.approx(losses["whole"][0], rel=1e-5)
    lengths = [[sum(map(len, pair)) for pair in rows] for rows in cut]
    assert lengths == list(map(sorted, lengths)) and len({*sum(lengths, [])}) > 1


def test_measuring_takes_no_more_rows_than_training(tiny, tmp_path, monkeypatch):
    rows, collate = [], pairs.collate
    monkeypatch.setattr(pairs, "collate", lambda a, *b: rows.append(len(a)) or collate(a, *b))
    how = {"batch": 3, "held_out": 0.25, "epochs": 1, "microbatch": 16}
    run(train_rm, *rm_words(tmp_path / "rm", tiny / "policy", tiny / "pairs.jsonl", **how))
    assert max(rows) == 2 * 3  # of a pair both are read


@pytest.mark.parametrize("world, group", [(2, 1), (3, 0), FOUR])
def test_many_ranks_train_the_reward_model_of_one_whatever_is_left_for_each(
    tiny, tmp_path, world, group
):
    """18 pairs in batches of 4, 4, 4, 4 and 2: three ranks have 2, 1, 1, then 1, 1, 0 of them."""
    how = {"held_out": 0.25, "microbatch": 1, "batch": 4, "epochs": 1}
    for name, runs in (("one", run), ("many", forked)):
        words = rm_words(tmp_path / name, tiny / "policy", tiny / "pairs.jsonl", **how)
        if name == "many":
            words += ["--shard_group_size", group, *["--compile"] * (group == 1)]
        with counted():
            runs(train_rm, *words, **({} if name == "one" else {"ranks": world}))
    one, many = (read_classifier(tmp_path / name).state_dict() for name in ("one", "many"))
    for name, value in one.items():
        torch.testing.assert_close(value, many[name], rtol=1e-4, atol=1e-5)
    rows = zip(*(read(tmp_path / name / "metrics.jsonl") for name in ("one", "many")), strict=True)
    for ours, theirs in rows:
        known = {name: value for name, value in theirs.items() if value is not None}
        assert {name: ours[name] for name in known} == pytest.approx(known, rel=1e-3)
