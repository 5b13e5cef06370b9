"""What fits into a machine: rows at once, what is free, what --plan prints and refuses."""

import dataclasses
import functools
import os
import re

import eval_code
import train_ppo
import train_rm
from pfppo.run import fitting
from pfppo.run.fitting import free_bytes, rows_at_once
from pfppo.run.memory import AnswerPlan, Needs, Plan, RewardPlan
from train_ppo import Args

import pytest
import torch
from ranks import ranked, refused
from test_memory import LLAMA, arguments


@ranked(2)
def test_all_ranks_decode_as_many_rows_as_fit_into_the_smallest_machine(ranks):
    """Before any test here has a process group."""
    needs, free = Needs(), (45.9, 22.9)[ranks.rank]
    needs.draws, needs.at_most = {"sampling": (0, 60, 1)}, lambda rows: 10 * rows
    needs.drawing = lambda rows: {"sampling": rows}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "limit_of", lambda *_: (free, "this machine", "92%"))
        args = Args(param_dtype="float32")
        assert rows_at_once(args, ranks, lambda *_: needs) == 11  # half of it
        needs.draws = {"sampling": (15, 60, 1)}  # of what is held beside rows nothing is left out
        needs.drawing = lambda rows: {"sampling": 15 + rows}
        assert rows_at_once(args, ranks, lambda *_: needs) == 3
        needs.draws, needs.drawing = {"sampling": (0, 3000, 1)}, lambda rows: {"sampling": 0}
        for asked, rows in {0: 1024, 2000: 2000, 5000: 3000}.items():  # as many as are asked for
            args.sampling_batch = asked
            assert rows_at_once(args, ranks, lambda *_: needs) == rows
        needs.draws = {"sampling": (0, 60, 1)}
        needs.drawing, args.sampling_batch = lambda rows: {"sampling": rows}, 23
        patch.setattr(fitting, "_parts", lambda *_: {})
        assert "--sampling_batch" in refused(rows_at_once, args, ranks, lambda *_: needs)


BENT = [lambda n: 50 + 10 * n, lambda n: 50 + 10 * n + 25 * -(-n // 5)]
BENT += [lambda n: 50 + n + 9 * min(n, 40)]  # prompts are read in passes that are full at 40


@pytest.mark.parametrize("size", BENT)
def test_the_rows_that_fit_do_and_a_few_more_do_not(monkeypatch, size):
    needs, asked = Needs(), []
    needs.draws = {"sampling": (0, 300, 5)}
    monkeypatch.setattr(needs, "drawing", lambda n: asked.append(n) or {"sampling": size(n)})
    for right in (1, 7, 50, 123, 299, 300):
        found = needs.rows_within(size(right))
        assert right * 0.95 - 1 <= found <= right
    assert needs.rows_within(size(1) - 1) == 0 and needs.rows_within(size(301)) == 300
    assert len(asked) <= 8 * 9  # estimates take their time


def test_the_plan_reads_configurations_only_and_starts_no_ranks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_ppo.fsdp, "init_ranks", None)
    args = arguments(tmp_path, plan=True, world_size=8, device_memory=0.1)
    args.run_dir = str(tmp_path / "run")
    assert not list(tmp_path.rglob("*.safetensors"))
    train_ppo.main(args)
    sizes, _, *table = capsys.readouterr().out.splitlines()
    assert sizes.startswith("sizes: 16 prompts x 5 samples")
    row = {line[:32].strip(): line[32:].strip() for line in table}
    assert row["fits into 92% of 0.1 GB"] == "yes"
    assert row["largest microbatch"] == "1" and row["largest sampling batch"] == "32"
    assert float(row["peak"]) == max(float(row[name]) for name in row if "phase" in name)
    assert float(row["host memory of a node"]) > float(row["host memory"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"world_size": 3}, "--prompts_per_step 16: does not divide over 3 ranks"),
        ({"world_size": 4, "shard_group_size": 3}, "--shard_group_size 3: does not divide the 4"),
        ({"policy": "none"}, "--policy none: there is no such folder"),
    ],
)
def test_what_a_plan_cannot_be_of_is_one_line(tmp_path, changes, message):
    assert refused(fitting.show, arguments(tmp_path, **changes)).startswith(message)


def test_a_machine_has_what_its_kernel_and_its_control_groups_leave(tmp_path):
    assert free_bytes(tmp_path) == 0  # told nowhere
    group = tmp_path / "sys/fs/cgroup/job/step"
    (tmp_path / "proc/self").mkdir(parents=True)
    group.mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  5000 kB\n")
    assert free_bytes(tmp_path) == 5000 * 1024
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    limits = {group: "max", group.parent: "9000"}
    for folder, limit in limits.items():
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text("4000")
        (folder / "memory.stat").write_text("anon 3500\ninactive_file 500\n")
    assert free_bytes(tmp_path) == 9000 - 4000 + 500


def test_a_cpu_s_memory_is_what_is_free_over_its_ranks(ranks, monkeypatch):
    monkeypatch.setattr(fitting, "free_bytes", lambda: 1000)
    four = dataclasses.replace(ranks, world=4)
    where = "this machine", "92% of what is free, for 4 ranks"
    assert fitting.limit_of(Args(device="cpu"), four) == (230, *where)


def test_a_gpu_s_memory_is_what_others_leave_of_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for free, found in ((790, 800), (460, 500)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 800))
        assert fitting.device_bytes(Args()) == pytest.approx(found)


def test_where_no_limit_is_known_nothing_is_estimated(tmp_path, ranks, monkeypatch):
    monkeypatch.setattr(fitting, "free_bytes", lambda: 0)
    args = arguments(tmp_path)
    assert rows_at_once(args, ranks, None) == 40
    args.sampling_batch = 0
    assert rows_at_once(args, ranks, None) == 256


def test_offloading_more_than_the_host_has_is_refused(tmp_path, ranks, monkeypatch):
    args = arguments(tmp_path, offload_ref=True)
    needs = functools.partial(Plan, args)
    rows_at_once(args, ranks, needs)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 1000}.get)
    message = "offloading: the ranks of this node need .* host memory"
    assert re.match(message, refused(rows_at_once, args, ranks, needs))


def test_two_thousand_tokens_of_7b_parameters_are_refused_by_all_three_scripts(tmp_path, ranks):
    """256 rows have 94 GB of keys and values. Configurations are enough to know. (A Llama of 32
    layers has 275 GB, and takes longer to look at.)"""
    sizes = {"max_new_tokens": 1024, "sampling_batch": 256, "device_memory": 80.0}
    sizes |= {"param_dtype": "bfloat16"}
    big = {"prompts_per_step": 512, "minibatch": 512, "microbatch": 1}
    args = arguments(tmp_path, shape=LLAMA, max_prompt_tokens=1024, **sizes | big)
    paths = {"policy": args.policy}
    rm = train_rm.Args(**paths, **sizes, gradient_checkpointing=True, microbatch=1)
    judge = {"reward_model": args.reward_model, "samples_per_problem": 8}
    answers = eval_code.Args(**paths, **sizes, **judge)
    half, length = torch.bfloat16, {"prompt": 1024, "prompts": 999}
    for asked, needs in (
        (args, Plan(args, 8, half)),
        (rm, RewardPlan(rm, 8, half, new=1024, **length)),
        (answers, AnswerPlan(answers, 8, half, **length)),
    ):
        said = refused(rows_at_once, asked, ranks, lambda *_, needs=needs: needs)
        assert re.match(r"--device_memory 80: sampling needs [12]\d\d GB per rank", said)
        found = re.search(r"the policy (.*), keys and values (.*)\), found 73.6 \(92%", said)
        assert float(found[1]) == pytest.approx(13.6, abs=0.1)
        assert 94 < float(found[2]) < 107
        assert "with 256 rows that decode together: lower --sampling_batch (0: as many as" in said
