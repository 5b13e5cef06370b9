"""train_ppo.py, end to end on tiny random checkpoints."""

import json
import shutil
import sys

import eval_code
import train_ppo
import train_rm
from pfppo import fsdp, rollout
from pfppo.config import UserError
from pfppo.metrics import NAMES
from pfppo.run import session

import pytest
import torch
from conftest import words_of
from ranks import refused
from running import forked, numbers, options, read, run, write_rows
from safetensors.torch import load_file
from test_slots import INDUCTOR, counted
from transformers import AutoModelForCausalLM, AutoTokenizer

BARE = {"validation": "", "test": "", "steps": 1}
OWN = """
import os, torch
def first(rewards, generator):
    return (torch.arange(rewards.shape[1]) == 0) * torch.ones_like(rewards) * 0.5
def nothing(rewards, generator):
    return (rewards > 0) * (len(rewards) != 4)  # some only when it is tried
def late(rewards, generator, scores, lengths, finished, logp):
    weights = lengths + 100 * finished + 1000 * scores + 10_000 * (logp < 0)
    return weights * (torch.arange(len(rewards)) >= 3)[:, None]
def second(rewards, generator, members):
    return (members[..., 1] > 0).float()
def half(rewards, generator):
    if os.environ["RANK"] == "1" and len(rewards) == 4:
        raise KeyError("rank 1 filters nothing")
    return (torch.rand(rewards.shape) < 0.5).float()
def leaving(rewards, generator):
    exit(0)
def long(prompts, responses, problems):
    return [float(len(r)) / 20 for r in responses]
def failing(prompts, responses, problems):
    raise KeyError("x")
def half_nan(prompts, responses, problems):
    return [float("nan") if os.environ["RANK"] == "1" else 0.5] * len(responses)
"""


@pytest.fixture
def own(tmp_path):
    """A file with filters and rewards of a user's own."""
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


def test_a_run_leaves_what_the_readme_promises(finished):
    wanted = {"args.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "policy"}
    assert wanted <= {path.name for path in finished.iterdir()}
    rows, samples = read(finished / "metrics.jsonl"), read(finished / "samples.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(tuple(row) == NAMES for row in rows)
    assert all(row["ratio_first_minibatch"] == 1.0 for row in rows)
    assert all(row[name] is not None for row in rows for name in ("kl_k1", "kl_k3", "kl_kept"))
    assert rows[0]["kl_k1"] == rows[0]["kl_k3"] == 0
    fields = {"step", "task_id", "sample", "prompt", "response", "reward", "score", "weight"}
    assert len(samples) == 4 * 4 * 3 and fields <= set(samples[0])
    for row in rows:
        mine = [s for s in samples if s["step"] == row["step"]]
        kept = [s["reward"] for s in mine if s["weight"]]
        dropped = [s["score"] for s in mine if not s["weight"]]
        assert len(kept) == 8 and {s["weight"] for s in mine} == {0, 1}
        assert row["reward_all"] == pytest.approx(sum(s["reward"] for s in mine) / len(mine), 1e-4)
        assert row["reward_kept"] == pytest.approx(sum(kept) / len(kept), 1e-4)
        assert row["score_dropped"] == pytest.approx(sum(dropped) / len(dropped))
    model = AutoModelForCausalLM.from_pretrained(finished / "policy")
    assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", INDUCTOR])
def test_a_compiled_run_has_the_numbers_of_a_plain_one_and_compiles_in_its_first_steps(
    tiny, finished, tmp_path, monkeypatch, backend
):
    graphs, log = [], session.Session.log

    def noted(self, *row):
        graphs.append(count())
        log(self, *row)

    monkeypatch.setattr(session.Session, "log", noted)
    with counted(backend) as count:
        argv = options(tiny, tmp_path / "run", steps=4, save_every=2)
        run(train_ppo, *argv, "--compile")
    assert 0 < graphs[1] == graphs[3]  # nothing after two steps
    rows = [read(folder / "samples.jsonl") for folder in (tmp_path / "run", finished)]
    assert [row["response"] for row in rows[0]] == [row["response"] for row in rows[1]]
    for row, plain in zip(numbers(tmp_path / "run"), numbers(finished), strict=True):
        assert row == {n: pytest.approx(x, 1e-3, 1e-4) if x else x for n, x in plain.items()}


@pytest.mark.parametrize(
    "name, samples, kept", [("single", 1, 1), ("top", 3, None), ("pow_2", 3, 1)]
)
def test_filters_that_keep_one_or_some_or_shares_train(tiny, tmp_path, name, samples, kept):
    changed = BARE | {"filter": name, "samples_per_prompt": samples}
    run(train_ppo, *options(tiny, tmp_path / "run", **changed))
    (row,) = numbers(tmp_path / "run")
    assert kept is None or row["kept"] == pytest.approx(kept)
    assert row["grad_norm_actor"] is None or row["grad_norm_actor"] > 0


def test_other_options_run(tiny, tmp_path, own):
    changed = {"filter": f"{own}:first", "reward": f"{own}:long", "reward_model": "", "steps": 1}
    changed |= {"ppo_epochs": 2, "loss_aggregation": "token_mean", "kl_target": 0.5}
    changed |= {"reward_scale": "none", "missing_eos_penalty": 0.5, "temperature": 0.8}
    changed |= {
        "param_dtype": "bfloat16",
        "sampling_batch": 5,
        "collective_timeout": 1,
        "gamma": 0.9,
    }
    run(train_ppo, *options(tiny, tmp_path / "run", **changed))
    (row,) = numbers(tmp_path / "run")
    samples = read(tmp_path / "run/samples.jsonl")
    assert [s["weight"] for s in samples if s["sample"] == 0] == [0.5] * 4
    assert row["kept"] == pytest.approx(1 / 3)
    assert row["truncated"] > 0.5 and min(s["reward"] for s in samples) >= -0.5


def test_a_reward_that_fails_in_mid_run_leaves_what_is_done(tiny, tmp_path):
    """One that asks for all that the sampler knows, which its first call, for mean and deviation,
    gets too."""
    text = "calls = []\n\n\ndef score(answers):\n    calls.append(1)\n"
    text += "    assert len(calls) < 5, 'server away'\n    return answers.logp / answers.lengths\n"
    file = tmp_path / "own.py"  # it is tried once, and once more for its mean and deviation
    file.write_text(text)
    words = options(tiny, tmp_path / "run", **BARE | {"steps": 4, "reward": f"{file}:score"})
    message = refused(run, train_ppo, *words)
    assert (
        f"server away (own.py, line 6); saved after step 2; go on with --run_dir {tmp_path}"
        in message
    )
    file.write_text(text.replace("< 5", "< 9"))
    run(train_ppo, "--run_dir", tmp_path / "run", "--resume")
    assert [row["step"] for row in numbers(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_filter_that_fails_in_mid_run_leaves_what_is_done(tiny, tmp_path):
    """It is called once per step, and before that on rewards of another shape."""
    text = "seen = []\n\n\ndef rule(rewards, generator):\n    seen.append(len(rewards))\n"
    text += "    assert seen[-3:] != [4] * 3, 'too much'\n    return rewards * 0 + 1\n"
    (file := tmp_path / "own.py").write_text(text)
    words = options(tiny, tmp_path / "run", **BARE | {"steps": 4, "filter": f"{file}:rule"})
    message = refused(run, train_ppo, *words)
    assert "too much (own.py, line 6); saved after step 2; go on with --run_dir" in message
    file.write_text(text.replace("!= [4] * 3", "is not None"))
    run(train_ppo, "--run_dir", tmp_path / "run", "--resume")
    assert [row["step"] for row in numbers(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_reward_without_spread_over_sft_samples_stays_as_it_is(tiny, tmp_path):
    run(train_ppo, *options(tiny, tmp_path / "run", **BARE, reward="tests"))
    samples = read(tmp_path / "run/samples.jsonl")  # of an untaught policy, which fails all
    assert all(s["reward"] == 2 * s["score"] - 1 for s in samples)


def test_a_step_in_which_nothing_is_kept_makes_no_update(tiny, tmp_path, capsys, own):
    run(train_ppo, *options(tiny, tmp_path / "run", **BARE, filter=f"{own}:nothing"))
    assert numbers(tmp_path / "run")[-1]["empty_steps"] == 1
    assert "nothing kept: no update" in capsys.readouterr().out
    folders = (tiny / "policy", tmp_path / "run/policy")
    before, after = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_refill_samples_until_enough_prompts_have_weight(tiny, tmp_path, own):
    changed = BARE | {"filter": f"{own}:late", "refill": 2}
    for name, runs in (("one", run), ("two", forked)):
        runs(train_ppo, *options(tiny, tmp_path / name, **changed))
    one, two = (read(tmp_path / name / "samples.jsonl") for name in ("one", "two"))
    kept, others = (sorted((r["task_id"], r["sample"], r["weight"]) for r in x) for x in (one, two))
    assert kept == others
    assert len(one) == 2 * 4 * 3 and len({row["task_id"] for row in one}) == 8  # two rounds
    assert (
        sum(row["weight"] > 0 for row in one) == 4 * 3
    )  # the fifth prompt with weight is left out
    for row in one:  # and what the filter asked for was that sample's own
        known = row["length"] + 100 * row["finished"] + 1000 * row["score"] + 10_000
        assert row["weight"] in (0, known)


def test_several_reward_models_teach_their_mean_and_a_filter_sees_each(tiny, tmp_path, own):
    """The second has no card; on two ranks, and offline, the same weights."""
    shutil.copytree(tiny / "rm", tmp_path / "rm")
    (tmp_path / "rm/reward_model.json").unlink()
    names = {"reward_model": f"{tiny}/rm, {tmp_path}/rm", "filter": f"{own}:second", "refill": 1}
    for name, runs in (("one", run), ("two", forked)):
        runs(train_ppo, *options(tiny, tmp_path / name, **BARE | names))
    one, two = (read(tmp_path / name / "samples.jsonl") for name in ("one", "two"))
    for row in one:
        assert row["weight"] == float(row["members"][1] > 0) and len(row["members"]) == 2
    assert 0 < sum(row["weight"] for row in one) < len(one)
    kept, others = (sorted((r["task_id"], r["sample"], r["weight"]) for r in x) for x in (one, two))
    assert kept == others
    run(train_ppo, "--run_dir", tmp_path / "one", "--export", tmp_path / "out")
    assert (tmp_path / "out/reward_model/reward_model.json").exists()
    table = ("--from_samples", tmp_path / "one/samples.jsonl", "--out", tmp_path / "table")
    run(eval_code, *table, "--filters", f"{own}:second,agreeing,reject,finished_only")
    rows = json.loads((tmp_path / "table/reliability.json").read_text())["filters"]
    assert rows[0]["kept"] == pytest.approx(sum(row["weight"] for row in one) / len(one))
    with pytest.raises(UserError, match="agreeing: asks for members"):
        run(train_ppo, *options(tiny, tmp_path / "no", **BARE, filter="agreeing"))


OWN_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}<pad>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def test_a_run_in_a_template_of_ones_own_exports_what_chats_that_way_and_ends_there(
    tiny, tmp_path, capsys
):
    """<pad> ends a turn in it, and is no EOS of the policy: so sampling stops, and `generate`."""
    file, files = tmp_path / "own.jinja", {"prompts": tiny / "train.jsonl", "validation": ""}
    file.write_text(OWN_TEMPLATE)
    rm = {"policy": tiny / "policy", "pairs": tiny / "pairs.jsonl", "run_dir": tmp_path / "rm"}
    chat = {"prompt_style": file, "max_prompt_tokens": 250}
    short = write_rows(tmp_path / "short.jsonl", read(tiny / "pairs.jsonl")[:8])
    run(train_rm, *words_of(**rm | chat | {"pairs": short, "batch": 2, "held_out": 0}))
    rows = [{"prompt": f"Say {i}.", "task_id": str(i)} for i in range(8)]
    files = {"prompts": write_rows(tmp_path / "p.jsonl", rows), "reward_model": tmp_path / "rm"}
    run(train_ppo, *options(tiny, tmp_path / "run", **BARE | files | chat))
    assert "'<pad>', the end of a turn in its chat template, is EOS too" in capsys.readouterr().out
    run(train_ppo, "--run_dir", tmp_path / "run", "--export", tmp_path / "out")
    for folder in (tmp_path / "run/policy", tmp_path / "out"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.chat_template == OWN_TEMPLATE
        ends = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
        assert sorted(ends) == sorted([tokenizer.eos_token_id, tokenizer.pad_token_id])
    # The folders know the template now: it is their style chat.
    again = files | BARE | {"policy": tmp_path / "out", "prompt_style": "chat"}
    run(train_ppo, *options(tiny, tmp_path / "again", **again))


def test_a_step_has_bars_on_a_terminal_and_a_log_has_a_line_of_it(
    tiny, tmp_path, monkeypatch, capsys
):
    seen, bars = [], fsdp.bar

    def at_once(what, *args, **how):
        shown = bars(what, *args, **how)
        seen.append((what, shown.total, shown.disable))
        return shown

    for module in (fsdp, rollout):
        monkeypatch.setattr(module, "bar", at_once)
    run(train_ppo, *options(tiny, tmp_path / "log", **BARE))
    assert {"samples", "verdicts", "update", "log probs", "values of", "rewards"} <= {
        w for w, *_ in seen
    }
    assert (
        ("samples", 12, True) in seen
        and ("verdicts", 12, True) in seen
        and ("update", 2, True) in seen
    )
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    seen.clear()
    run(train_ppo, *options(tiny, tmp_path / "terminal", **BARE))
    assert [what for what, *_ in seen].count("update") == 2
    assert not any(hidden for *_, hidden in seen)
    monkeypatch.setenv("RANK", "1")
    assert bars("x", total=1).disable


@pytest.mark.parametrize(
    "kind, name, expected",
    [("reward", "failing", "KeyError: 'x'"), ("filter", "leaving", "SystemExit: 0")],
)
def test_what_a_user_s_function_does_wrong_is_told_before_anything_is_written(
    tiny, tmp_path, own, kind, name, expected
):
    with pytest.raises(UserError, match=f"--{kind} .*own.py:{name}.*{expected}"):
        run(train_ppo, *options(tiny, tmp_path / "run", **{kind: f"{own}:{name}"}))
    assert not (tmp_path / "run").exists()


# ---- two ranks -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_one_rank_meets_is_one_line_of_rank_0_and_every_rank_leaves(tiny, tmp_path, own):
    for changed, expected in (
        ({"reward": f"{own}:half_nan"}, "finite numbers, found [nan"),
        ({"policy": "nobody/no-such"}, "--policy nobody/no-such: there is no such"),
    ):
        argv = options(tiny, tmp_path / "run", **BARE | changed)
        statuses, said = forked(train_ppo, *argv)
        assert statuses == [2, 2] and said.count("error: ") == 1 and expected in said
        assert "gloo" not in said and not (tmp_path / "run").exists()
    # A filter that draws from elsewhere is asked on rank 0 only: all ranks train on its answer.
    argv = options(tiny, tmp_path / "run", **BARE, filter=f"{own}:half")
    statuses, said = forked(train_ppo, *argv)
    assert statuses == [0, 0], said
