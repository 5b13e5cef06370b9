import json
import os
import subprocess
import sys

import train_ppo
from pfppo.config import UserError
from pfppo.fsdp import Ranks
from pfppo.run import memory
from pfppo.run.memory import Planner, require_fits
from train_ppo import Args

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, tiny_classifier, tiny_lm
from test_footprint import write_configs

N = 5
SIZES = {"prompts_per_step": 16, "samples_per_prompt": N, "minibatch": 8, "microbatch": 4}
SIZES |= {"max_prompt_tokens": 40, "max_new_tokens": 24, "sampling_batch": 40, "prompts": ""}
SIZES |= {"validation": "", "test": ""}


def arguments(folder, **changes):
    shape = changes.pop("shape", {})
    return Args(**write_configs(folder, **shape) | SIZES | changes)


def planner(folder, world=1, dtype=torch.float32, **changes):
    return Planner(arguments(folder, **changes), world, dtype)


def ranks_of(world=1):
    return Ranks(0, 0, world, torch.device("cpu"), None)


def test_what_stays_is_16_bytes_per_trained_parameter_and_4_per_frozen_one(tmp_path):
    stays = planner(tmp_path).plan().stays
    n_p, n_s = (
        sum(p.numel() for p in model.parameters())
        for model in (tiny_lm("llama"), tiny_classifier("llama"))
    )
    assert stays["parameters"] == 4 * 2 * (n_p + n_s)
    assert stays["gradients"] == 4 * (n_p + n_s)
    assert stays["optimizer"] == 8 * (n_p + n_s)


def test_ranks_share_what_stays_and_each_has_the_gathered_copy(tmp_path):
    one, four = (planner(tmp_path, world).plan() for world in (1, 4))
    for name, size in one.stays.items():
        assert four.stays[name] == size // 4
    assert four.comes["gathered copy"] == one.comes["gathered copy"]


def test_groups_share_among_themselves_only(tmp_path):
    two, grouped = planner(tmp_path, 2).plan(), planner(tmp_path, 4, shard_group_size=2).plan()
    assert grouped.stays == two.stays
    with pytest.raises(UserError, match="--shard_group_size 3: does not divide the 4 ranks"):
        planner(tmp_path, 4, shard_group_size=3)


def test_offloading_moves_bytes_from_device_to_host_and_loses_none(tmp_path):
    offload = {"offload_ref": True, "offload_reward": True, "offload_optimizer": True}
    here, away = planner(tmp_path).plan(), planner(tmp_path, **offload).plan()
    assert sum(away.stays.values()) == 0
    offloaded = {name: size for name, size in away.host.items() if "offloaded" in name}
    assert sum(offloaded.values()) == sum(here.stays.values())
    assert all(away.phases[name] < size for name, size in here.phases.items())


def test_bfloat16_halves_the_copy_and_leaves_master_weights(tmp_path):
    full, half = (planner(tmp_path, dtype=of).plan() for of in (torch.float32, torch.bfloat16))
    assert half.stays == full.stays
    assert half.comes["gathered copy"] * 2 == full.comes["gathered copy"]


@pytest.mark.parametrize("wish", ("microbatch", "sampling_batch"))
def test_the_largest_batches_fit_and_the_next_ones_do_not(tmp_path, wish):
    plans = planner(tmp_path)
    allowed = {"microbatch": [1, 2, 4, 8], "sampling_batch": list(range(N, 81, N))}[wish]
    phases = ("sampling",) if wish == "sampling_batch" else ("rewards", "log-probs", "update")
    needs = {}
    for size in allowed:
        found = plans.plan(**{"microbatch": 1, "sampling_batch": N} | {wish: size}).phases
        needs[size] = max(found[phase] for phase in phases)
    for size in allowed[1:-1]:
        found = dict(zip(("microbatch", "sampling_batch"), plans.largest(needs[size]), strict=True))
        assert found[wish] == max(other for other in allowed if needs[other] <= needs[size])
    assert plans.largest(1) == (0, 0)


def test_problems_that_are_looked_at_have_phases_of_their_own(tmp_path):
    """One response per problem: nothing of the prefill is shared. Two policies in the last one."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"prompt": "w1"}\n' * 30)
    found = planner(tmp_path, validation=str(problems), test=str(problems)).plan()
    copy = found.comes["gathered copy"]
    assert found.phases["test"] == found.phases["validation"] + copy
    assert "test" not in planner(tmp_path).plan().phases


def test_sizes_that_do_not_divide_are_told(tmp_path):
    with pytest.raises(UserError, match="--prompts_per_step 16: does not divide over 3 ranks"):
        planner(tmp_path, 3)


def test_the_plan_reads_configurations_only_and_starts_no_ranks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_ppo.fsdp, "init_ranks", None)
    paths = write_configs(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    changes = {"plan": True, "world_size": 8, "device_memory": 0.1, "device": "cpu"}
    train_ppo.main(Args(**paths | SIZES | changes, run_dir=str(tmp_path / "run")))
    lines = capsys.readouterr().out.splitlines()
    told = {line[:32].strip(): line[32:].strip() for line in lines[2:]}
    assert told["fits into 0.1 GB"] == "yes"
    assert int(told["largest microbatch"]) == 1 and int(told["largest sampling batch"]) == 10
    assert float(told["peak"]) == max(float(told[name]) for name in told if "phase" in name)
    assert not dist.is_initialized() and not (tmp_path / "run").exists()


def test_a_run_that_cannot_fit_is_refused_with_its_numbers(tmp_path, ranks):
    args = arguments(tmp_path, device_memory=0.001)
    with pytest.raises(UserError, match=r"--device_memory 0.001: \w+ needs .* GB .* found 0.001"):
        require_fits(args, ranks)
    args.device_memory = 1.0
    require_fits(args, ranks)


def test_short_prompts_count_as_they_are(tmp_path, ranks):
    args = arguments(tmp_path, max_prompt_tokens=1000)
    short = Planner(args, 1, torch.float32, 40).plan().peak[0]
    args.device_memory = short / memory.GB * 1.01
    require_fits(args, ranks, 40)
    with pytest.raises(UserError, match="needs"):
        require_fits(args, ranks)


def test_on_a_cpu_without_a_limit_nothing_is_rehearsed(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "Planner", None)
    require_fits(arguments(tmp_path, device="cpu"), ranks_of())


def test_offloading_more_than_the_host_has_is_refused(tmp_path, ranks, monkeypatch):
    args = arguments(tmp_path, device="cpu", offload_ref=True)
    require_fits(args, ranks)
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(os, "sysconf", pages.get)
    with pytest.raises(UserError, match="offloading: the ranks of this node need .* host memory"):
        require_fits(args, ranks)


def test_a_model_that_cannot_be_rehearsed_runs_all_the_same(tmp_path, ranks, monkeypatch, capsys):
    def fail(*args):
        raise memory.NotRehearsed("memory cannot be told")

    monkeypatch.setattr(memory, "Planner", fail)
    require_fits(arguments(tmp_path, device_memory=1.0), ranks)
    assert "memory cannot be told" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_told_is_what_a_run_takes(tmp_path):
    """The benchmark, with smaller models: every phase within a tenth."""
    script = ROOT / "tests" / "bench" / "memory.py"
    command = [sys.executable, script, "--folder", tmp_path, "--only", "microbatch_4"]
    command += ["--scale", "small"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])["microbatch_4"]
    assert set(found["measured"]) == {"load", "sampling", "rewards", "log-probs", "update"}
    for phase, size in found["measured"].items():
        assert found["told"][phase] == pytest.approx(size, rel=0.1), phase
