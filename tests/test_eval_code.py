"""eval_code.py, end to end on tiny random checkpoints."""

import dataclasses
import json
import shutil

import eval_code
from pfppo import answers, data, sampler
from pfppo.config import UserError
from pfppo.data import encode, load_tokenizer
from pfppo.filters import FILTERS
from pfppo.problems import Stops

import numpy as np
import pytest
import torch
from conftest import tokens_of, words_of
from running import read, run, write_rows
from test_slots import counted


def asked(tiny, out, *words, **options):
    files = {"policy": tiny / "policy", "problems": tiny / "held_out.jsonl", "out": out}
    return [*words_of(**files | {"max_new_tokens": 8} | options), *words]


def timeless(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def comparison_of(folder):
    return json.loads((folder / "reliability.json").read_text())


def test_eval_code_reads_what_it_writes(tiny, tmp_path, capsys):
    run(eval_code, *asked(tiny, tmp_path / "a", samples_per_problem=2, k="1,2"))
    assert "pass@2" in capsys.readouterr().out
    samples = ("--samples", tmp_path / "a/samples.jsonl", "--out", tmp_path / "b")
    run(eval_code, "--problems", tiny / "held_out.jsonl", *samples)
    first, second = (read(tmp_path / name / "results.jsonl") for name in "ab")
    assert len(first) == 12
    assert set(first[0]) == {"task_id", "sample", "passed", "outcome", "seconds"}
    for row, other in zip(first, second, strict=True):
        assert all(row[name] == other[name] for name in ("task_id", "sample", "passed"))


def test_eval_code_judges_completions_and_solutions_in_input_order(tiny, tmp_path):
    problems = read(tiny / "held_out.jsonl")[:3]
    samples = []
    for p in reversed(problems):
        for answer in (
            {"completion": p["canonical_solution"]},
            {"solution": p["prompt"] + "    return None\n"},
        ):
            samples.append({"task_id": p["task_id"]} | answer)
    file = write_rows(tmp_path / "samples.jsonl", samples)
    files = ("--problems", tiny / "held_out.jsonl", "--samples", file)
    with pytest.raises(UserError, match="3 of 6 problems .* --allow_partial"):
        run(eval_code, *files, "--out", tmp_path / "o")
    run(eval_code, *files, "--out", tmp_path / "o", "--allow_partial")
    results = read(tmp_path / "o/results.jsonl")
    assert [r["task_id"] for r in results] == [s["task_id"] for s in samples]
    assert [r["passed"] for r in results] == [True, False] * 3


def test_a_problem_that_is_too_long_is_refused_or_left_out(tiny, tmp_path, capsys):
    rows = read(tiny / "held_out.jsonl")[:3]
    rows[1]["prompt"] = "# " + "what it does " * 99 + "\n" + rows[1]["prompt"]
    file = write_rows(tmp_path / "long.jsonl", rows)
    words = asked(tiny, tmp_path / "o", problems=file)
    with pytest.raises(UserError, match="8 leaves 248 of 256, .*1 of 3 are .*--allow_partial lea"):
        run(eval_code, *words)
    assert not (tmp_path / "o").exists()
    run(eval_code, *words, "--allow_partial")
    assert "left out: " in (said := capsys.readouterr().out) and "2 problems" in said
    assert [r["task_id"] for r in read(tmp_path / "o/results.jsonl")] == [
        rows[i]["task_id"] for i in (0, 2)
    ]


def test_eval_code_goes_on_where_it_was_stopped(tiny, tmp_path, capsys, monkeypatch):
    words = {"samples_per_problem": 2, "sampling_batch": 1, "filters": "best_worst"}
    words |= {"reward_model": tiny / "rm"}
    run(eval_code, *asked(tiny, tmp_path / "whole", **words))
    table = capsys.readouterr().out.split("held_out.jsonl: ")[1].split(str(tmp_path))[0]
    original, calls = answers.files.append_jsonl, []

    def interrupted(path, rows):
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt
        original(path, rows)

    monkeypatch.setattr(answers.files, "append_jsonl", interrupted)
    argv = asked(tiny, tmp_path / "stopped", **words)
    with pytest.raises(KeyboardInterrupt):
        run(eval_code, *argv)
    monkeypatch.undo()
    assert 0 < len(read(tmp_path / "stopped/samples.jsonl")) < 12
    with pytest.raises(UserError, match="--out .* holds a run with other arg.*seed 1 there"):
        run(eval_code, *argv, "--resume", "--seed", 2)
    capsys.readouterr()
    run(eval_code, *argv, "--resume", "--k", "1,2")
    again = capsys.readouterr().out
    for name in ("samples.jsonl", "results.jsonl"):
        whole, stopped = (read(tmp_path / folder / name) for folder in ("whole", "stopped"))
        assert len(whole) == 12 and timeless(whole) == timeless(stopped)
    assert "pass@2" in again and table.split("outcome")[1] in again


@pytest.fixture
def says(tiny, monkeypatch):
    """Makes the policy write a text, and then "x" to the last token. Returns the rows of every
    decode step."""
    tokenizer, steps = load_tokenizer(tiny / "policy"), []

    def speak(text):
        ids, (x,) = encode(tokenizer, text), encode(tokenizer, "x")

        def uniforms(seed, tag, named, width):
            return torch.tensor([(ids + [x] * width)[:width]] * len(named)).double()

        def draw(logits, numbers, *options):
            return numbers.long(), torch.zeros(len(numbers))

        original = sampler.decode_one
        monkeypatch.setattr(answers, "draw_uniforms", uniforms)
        monkeypatch.setattr(sampler, "draw_tokens", draw)
        watched = lambda *a: steps.append(len(a[1])) or original(*a)  # noqa: E731
        monkeypatch.setattr(sampler, "decode_one", watched)
        return steps

    return speak


RAMBLE = "    return xs\n\ndef g(x):\n    return x\nprint(1)\n"


def test_what_runs_on_ends_at_a_stop_string_and_verdicts_stay(tiny, tmp_path, says, capsys):
    """The lab's problems as a benchmark, written by a model that never stops."""
    steps, found = says(RAMBLE), {}
    for name, words in {
        "lab": (),
        "none": ("--benchmark", "humaneval", "--stop", ""),
        "usual": ("--benchmark", "humaneval"),
        "given": ("--stop", r"\nprint", "xxx"),
        "one slot": ("--stop", r"\nprint", "xxx", "--sampling_batch", 1),
    }.items():
        steps.clear()
        run(eval_code, *asked(tiny, tmp_path / name, max_new_tokens=100), *words)
        rows = read(tmp_path / name / "samples.jsonl")
        results = [row["passed"] for row in read(tmp_path / name / "results.jsonl")]
        found[name] = results, {row["response"] for row in rows}, sum(steps)
        cut = name in ("lab", "none")
        assert all(row["finished"] != cut for row in rows)
        assert ("6 of 6 responses reached --max_new_tokens" in capsys.readouterr().out) == cut
    verdicts, (whole,), work = found["none"]
    assert found["lab"] == found["none"] and whole.startswith(RAMBLE + "xxx")
    assert all(part[0] == verdicts for part in found.values())
    assert found["usual"][1] == {"    return xs\n"}
    assert found["given"][1] == found["one slot"][1] == {RAMBLE.partition("\nprint")[0]}
    assert found["usual"][2] <= found["given"][2] < work / 2
    with pytest.raises(UserError, match=r"holds a run with other arguments \(stop None there, \["):
        argv = asked(tiny, tmp_path / "usual", max_new_tokens=100, benchmark="humaneval")
        run(eval_code, *argv, "--resume", "--stop", "")


def test_a_reward_model_reads_what_a_stop_string_leaves(tiny, tmp_path, says, monkeypatch):
    says(RAMBLE)
    read_by, original = [], answers.model_rewards

    def watch(model, rows, microbatch):
        read_by.append(rows)
        return original(model, rows, microbatch)

    monkeypatch.setattr(answers, "model_rewards", watch)
    words = {"max_new_tokens": 60, "benchmark": "humaneval", "reward_model": tiny / "rm"}
    run(eval_code, *asked(tiny, tmp_path / "o", filters="none", samples_per_problem=2, **words))
    tokenizer = load_tokenizer(tiny / "policy")
    said = encode(tokenizer, "    return xs\n") + [tokenizer.eos_token_id]
    for rows in read_by:
        for ids, start, count in zip(rows.ids, rows.prompt_lengths, rows.lengths, strict=True):
            assert ids[start : start + count].tolist() == said


def test_a_stop_string_that_is_one_token_ends_a_response_as_eos_does(tiny, tmp_path, monkeypatch):
    tokens = tokens_of(load_tokenizer(tiny / "policy"))
    tokens.tokenizer.add_special_tokens({"additional_special_tokens": ["<file_sep>", "<far>"]})
    tokens = dataclasses.replace(tokens, rows=len(tokens.tokenizer) - 1)
    one, far = tokens.tokenizer.convert_tokens_to_ids(["<file_sep>", "<far>"])
    stops = Stops(("x", "<far>"), special=("<file_sep>",))
    assert stops.known_to(tokens).stop == sorted([*tokens.stop, one])


def test_compiled_answers_and_rewards_are_those_of_plain_ones(tiny, tmp_path):
    how = {"reward_model": tiny / "rm", "samples_per_problem": 2}
    run(eval_code, *asked(tiny, tmp_path / "plain", **how))
    with counted() as graphs:
        run(eval_code, *asked(tiny, tmp_path / "compiled", "--compile", **how))
        assert graphs() > 2
    rows = (read(tmp_path / name / "samples.jsonl") for name in ("compiled", "plain"))
    for row, plain in zip(*rows, strict=True):
        assert row == plain | {"reward": pytest.approx(plain["reward"], 1e-4)}


def test_what_was_cut_off_is_said_and_a_folder_without_that_knowledge_goes_on(
    tiny, tmp_path, capsys
):
    """The folder's name is enough to go on: the arguments are in it."""
    out = tmp_path / "o"
    run(eval_code, *asked(tiny, out))
    rows, said = read(out / "samples.jsonl"), capsys.readouterr().out
    cut = sum(not row["finished"] for row in rows)
    assert cut and f"\n{cut} of 6 responses reached --max_new_tokens 8" in said
    for row in rows:
        del row["finished"]
    write_rows(out / "samples.jsonl", rows[:4])
    (out / "results.jsonl").unlink()
    run(eval_code, "--out", out, "--resume")
    rows, said = read(out / "samples.jsonl"), capsys.readouterr().out
    assert ["finished" in row for row in rows] == [False] * 4 + [True] * 2
    last = sum(not row["finished"] for row in rows[4:])
    assert ("responses reached" in said) == (last > 0) and len(read(out / "results.jsonl")) == 6
    run(eval_code, "--out", out, "--resume", "--workers", 1, "--k", 1)  # may differ
    with pytest.raises(UserError, match="max_new_tokens 8 there, 9 here"):
        run(eval_code, "--out", out, "--resume", "--max_new_tokens", 9)
    capsys.readouterr()
    files = ("--problems", tiny / "held_out.jsonl", "--samples", out / "samples.jsonl")
    run(eval_code, *files, "--out", tmp_path / "again")
    assert "reached" not in capsys.readouterr().out  # nobody knows of samples from elsewhere


@pytest.mark.parametrize("style", ["chat", "deepseek"])
def test_eval_code_asks_in_dialogue(tiny, tmp_path, style, monkeypatch):
    policy = shutil.copytree(tiny / "policy", tmp_path / "policy")
    config = json.loads((policy / "tokenizer_config.json").read_text())
    config["chat_template"] = "<{{ messages[0]['content'] }}>"
    (policy / "tokenizer_config.json").write_text(json.dumps(config))
    seen, original = [], data.render

    def watch(prompt, tokenizer, style):
        ids = original(prompt, tokenizer, style)
        seen.append(tokenizer.decode(ids))
        return ids

    monkeypatch.setattr(data, "render", watch)
    argv = asked(tiny, tmp_path / "o", policy=policy, prompt_style=style)
    with pytest.raises(UserError, match="max_position_embeddings"):  # 256 are too few for these
        run(eval_code, *argv, "--max_new_tokens", 250)
    ends = {"chat": ("<Please", "```>"), "deepseek": ("You are an AI", "### Response:\n")}
    begin, end = ends[style]
    assert len(seen) == 6
    assert all(text.startswith(begin) and text.endswith(end) for text in seen)
    assert all("```python\ndef" in text for text in seen)


def test_judged_samples_give_the_same_numbers_without_a_model(tiny, tmp_path):
    """Also of a reward model without a card, whose raw rewards are normalised here, and under a
    filter that asks for the sampler's log-probs."""
    rm, out = shutil.copytree(tiny / "rm", tmp_path / "rm"), tmp_path / "o"
    (rm / "reward_model.json").unlink()
    text = "def likely(rewards, generator, logp):\n    return (logp > logp.median()).float()\n"
    (tmp_path / "own.py").write_text(text)
    compared = {"bins": 4, "filters": f"none,best_worst,{tmp_path}/own.py:likely"}
    argv = asked(tiny, out, samples_per_problem=4, reward_model=rm, **compared)
    run(eval_code, *argv)
    first, samples = comparison_of(out), (out / "samples.jsonl").read_text()
    rewards = [row["reward"] for row in read(out / "samples.jsonl")]
    assert np.mean(rewards) == pytest.approx(0, abs=1e-5)
    assert np.std(rewards, ddof=1) == pytest.approx(1, abs=1e-5)
    assert first["filters"][2]["kept"] == 0.5
    run(eval_code, *argv, "--resume")
    assert comparison_of(out) == first
    assert (out / "samples.jsonl").read_text() == samples
    (out / "samples.jsonl").rename(tmp_path / "mine.jsonl")
    alone = {"from_samples": tmp_path / "mine.jsonl", "out": tmp_path / "again"}
    run(eval_code, *words_of(**alone, **compared))
    assert comparison_of(tmp_path / "again") == first


@pytest.mark.parametrize("reward", ["tests", "noisy:tails"])
def test_rewards_without_a_model_are_compared_and_repeat(tiny, tmp_path, reward):
    argv = asked(tiny, tmp_path / "o", reward=reward, samples_per_problem=4, filters="none")
    run(eval_code, *argv)
    first = comparison_of(tmp_path / "o")
    run(eval_code, *argv, "--resume")
    assert comparison_of(tmp_path / "o") == first


def test_samples_of_training_can_be_compared_under_all_filters(finished, tmp_path, capsys):
    run(eval_code, "--from_samples", finished / "samples.jsonl", "--out", tmp_path, "--bins", 3)
    said = capsys.readouterr().out
    assert all(name in said for name in FILTERS) and "3 bins" in said
    rows = read(finished / "metrics.jsonl")
    compared = {row["filter"]: row for row in comparison_of(tmp_path)["filters"]}
    scores = [row["score_all"] for row in rows]
    assert compared["none"]["pass_kept"] == pytest.approx(np.mean(scores))


def test_contamination_ends_with_1_above_the_limit_that_was_asked_for(tiny, tmp_path, capsys):
    path = tiny / "held_out.jsonl"
    argv = ("--problems", path, "--contamination", path, "--out", tmp_path)
    assert run(eval_code, *argv, "--max_overlap", 1.0) == 0
    assert run(eval_code, *argv, "--max_overlap", 0.9) == 1
    assert "100.0%" in capsys.readouterr().out
