"""--plan: what a rank holds and what passes add; that a run takes what is estimated."""

import dataclasses
import json
import re
import subprocess
import sys

import eval_code
import train_rm
from pfppo import fsdp
from pfppo.run import fitting
from pfppo.run.fitting import GB, rows_at_once
from pfppo.run.memory import AnswerPlan, LiveBytes, Plan, RewardPlan
from pfppo.sampler import sample
from pfppo.slots import Slots
from train_ppo import Args

import pytest
import torch
from conftest import ROOT, policy_of, ragged, scalar_of, tiny_classifier, tiny_config, tiny_lm
from ranks import refused
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

N, PROMPT, NEW = 5, 40, 24
SIZES = {"prompts_per_step": 16, "samples_per_prompt": N, "minibatch": 8, "microbatch": 4}
SIZES |= {"max_prompt_tokens": PROMPT, "max_new_tokens": NEW, "sampling_batch": 40, "prompts": ""}
SIZES |= {"validation": "", "test": "", "device": "cpu"}
LLAMA = {"hidden_size": 11264, "num_hidden_layers": 4, "num_attention_heads": 88}
LLAMA |= {"num_key_value_heads": 88, "intermediate_size": 30000, "vocab_size": 32256}


def arguments(folder, architecture="llama", shape=None, **changes):
    """Args of folders that hold nothing but a config.json each."""
    paths = {}
    for option, kind in (("policy", "CausalLM"), ("reward_model", "SequenceClassification")):
        config = tiny_config(architecture, num_labels=1, **(shape or {}))
        config.architectures = [f"For{kind}"]
        config.save_pretrained(folder / option)
        paths[option] = str(folder / option)
    return Args(**paths | SIZES | changes)


def plan_of(folder, world=1, dtype=torch.float32, **changes):
    return Plan(arguments(folder, **changes), world, dtype)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return plan_of(tmp_path_factory.mktemp("plan"))


# ------------------------------------------------------------------------------------ what is held


def test_16_bytes_are_held_per_trained_parameter_and_4_per_frozen_one(plan):
    models = tiny_lm("llama"), tiny_classifier("llama")
    n = sum(p.numel() for model in models for p in model.parameters())
    assert plan.device == {"parameters": 8 * n, "gradients": 4 * n, "optimizer": 8 * n}


def test_ranks_of_a_group_share_what_is_held_and_each_has_the_gathered_copy(plan, tmp_path):
    for world, group in ((4, 0), (8, 4)):
        shared = plan_of(tmp_path, world, shard_group_size=group)
        assert shared.device == {name: size // 4 for name, size in plan.device.items()}
        assert shared.policy.copy == plan.policy.copy


def test_offloading_moves_bytes_from_device_to_host_and_loses_none(plan, tmp_path):
    away = plan_of(tmp_path, offload_ref=True, offload_reward=True, offload_optimizer=True)
    assert set(away.device.values()) == {0}
    assert away.host - plan.host == sum(plan.device.values())


def test_bfloat16_halves_the_copy_and_leaves_master_weights(plan, tmp_path):
    half = plan_of(tmp_path, dtype=torch.bfloat16)
    assert half.device == plan.device and half.policy.copy * 2 == plan.policy.copy


def test_tied_weights_are_counted_once_and_a_reward_model_only_where_there_is_one(plan, tmp_path):
    tied = plan_of(tmp_path, shape={"tie_word_embeddings": True}, reward_model="")
    head = tiny_lm("llama").lm_head.weight.numel()
    assert plan.policy.count - tied.policy.count == head
    assert tied.scalar.count == plan.scalar.count  # the critic has the policy's backbone
    lost = 4 * plan.scalar.count + 8 * head
    assert plan.device["parameters"] - tied.device["parameters"] == lost


# --------------------------------------------------------------------------------- what passes add


def test_bytes_that_are_alive_at_once_count_and_what_came_from_outside_does_not():
    outside = torch.zeros(100)
    with LiveBytes([outside]) as live:
        views = [outside[:50], outside.view(10, 10)]
        kept = torch.zeros(100)  # 400 bytes
        views += [kept[:5], kept.view(10, 10)]
        for _ in range(5):
            torch.zeros(200)  # 800 bytes that die at once
        assert live.peak == 1200
        del kept, views
        torch.zeros(301)
        assert live.peak == 1204


def measured(work):
    """The greatest number of bytes that torch's allocator hands out during work()."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        work()
    waiting, peak = prof.profiler.kineto_results.experimental_event_tree(), 0
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            peak = max(peak, event.extra_fields.total_allocated)
    return peak


@pytest.mark.parametrize("kind, checkpointing", [("policy", True), ("scalar", False)])
def test_a_sharded_model_s_passes_take_what_is_estimated(ranks, tmp_path, kind, checkpointing):
    fake = getattr(plan_of(tmp_path, gradient_checkpointing=checkpointing), kind)
    made, sharded = {"policy": (tiny_lm, policy_of), "scalar": (tiny_classifier, scalar_of)}[kind]
    model, rows = sharded(made("llama"), ranks), 16
    if checkpointing:
        fsdp.recompute_blocks(model)
    ids = torch.zeros(rows, PROMPT + NEW, dtype=torch.long)
    columns = torch.zeros(rows, NEW, dtype=torch.long)

    def forward(gradients):
        with torch.set_grad_enabled(gradients):
            if kind == "scalar":
                return model(ids, columns)
            return model(ids, columns, columns, torch.ones(rows, NEW))[0]

    forward(True).sum().backward()  # FSDP makes what it keeps
    assert fake.passes(rows, False) == pytest.approx(measured(lambda: forward(False)), rel=0.01)
    passes = measured(lambda: forward(True).sum().backward())
    assert fake.passes(rows, True) == pytest.approx(passes, rel=0.01)


def test_with_compile_rows_count_as_they_are_padded(tmp_path):
    args = arguments(tmp_path, max_new_tokens=65, microbatch=11, minibatch=22, compile=True)
    plan = fitting._padded(Plan(args, 1, torch.float32), args)
    assert plan.microbatch == 12 and {plan.policy.new, plan.scalar.new} == {112 - PROMPT}
    for rows in (30, 40):
        columns = Slots(40, rows, PROMPT, 65, [], "cpu", fixed=True).columns
        cache = plan.policy.sampling(rows, N, 40)[1]
        assert columns >= 112 and cache >= 2 * 2 * rows * 2 * (columns - 2) * 8 * 4  # as below


def sampled(rounds, shape=None, **how):
    """Peak of sampling in the slots of 8 x N rows, which are filled so many times. A token is never
    drawn, as in most vocabularies."""
    lm, uniforms = tiny_lm("llama", **shape or {}), torch.full((rounds * 8 * N, NEW), 0.5)
    how = {"stop": [], "never": [3], "samples_per_prompt": N, "batch": 8 * N} | how
    return measured(lambda: sample(lm, ragged([PROMPT] * 8 * rounds), uniforms, **how))


def test_with_compile_slots_are_as_many_as_their_rounded_number(tmp_path, monkeypatch):
    plan, asked = plan_of(tmp_path, compile=True), []
    fitting._padded(plan, plan.args)
    plan.draws = {"test": (0, 33, 1)}
    monkeypatch.setattr(plan.policy, "sampling", lambda *a: asked.append(a) or (0, 0, 0))
    assert plan.drawing(256) == {"test": 8 * 33 * plan.policy.new}
    assert asked == [(40, 1, 40)] and len(Slots(33, 256, 4, 4, [], "cpu", fixed=True)) == 40


def test_sampling_takes_what_is_estimated(plan):
    peak, cache, logits = plan.policy.sampling(8 * N, N)
    assert peak == pytest.approx(sampled(1), rel=0.05)
    assert cache == 2 * 2 * 8 * N * 2 * (PROMPT + NEW - 1) * 8 * 4  # kv, layers, rows, heads, width
    assert logits >= 3 * 8 * N * 61 * 4  # in full precision, with their copies
    assert cache + logits < peak


def test_prompts_that_wait_are_read_beside_the_block(plan):
    first, again = (plan.policy.sampling(8 * N, N, total)[0] for total in (8 * N, 24 * N))
    assert again == pytest.approx(sampled(3), rel=0.08) and again > 1.2 * first


def test_prompts_stay_until_all_of_their_rows_have_slots(tmp_path):
    policy = plan_of(tmp_path, shape=(shape := {"vocab_size": 4000})).policy
    for rounds in (1, 3):
        peak = policy.sampling(8 * N - 1, N, rounds * 8 * N)[0]
        assert peak == pytest.approx(sampled(rounds, shape, batch=8 * N - 1), rel=0.08)


def test_what_top_p_sorts_is_counted(tmp_path):
    args = arguments(tmp_path, shape=(shape := {"vocab_size": 8000}))
    peaks = []
    for top_p in (1.0, 0.9):
        asked = eval_code.Args(policy=args.policy, max_new_tokens=NEW, top_p=top_p)
        policy = AnswerPlan(asked, 1, torch.float32, PROMPT, 8).policy
        peaks.append(policy.sampling(8 * N, N)[0])
        assert peaks[-1] == pytest.approx(sampled(1, shape, top_p=top_p), rel=0.05)
    assert peaks[1] > 1.5 * peaks[0]


def test_checkpointing_keeps_inputs_of_blocks_only(tmp_path):
    shallow, deep = (
        plan_of(tmp_path, shape={"num_hidden_layers": layers}, gradient_checkpointing=True).scalar
        for layers in (1, 3)
    )
    grown = deep.passes(4, True) - shallow.passes(4, True)
    assert grown == pytest.approx(2 * 4 * (PROMPT + NEW) * 32 * 4, rel=0.1)  # x rows, tokens, width


def test_attention_makes_no_scores(tmp_path):
    """Twice the length takes twice the memory, not four times."""
    short, long = (
        plan_of(tmp_path, max_prompt_tokens=length - NEW, shape={"num_hidden_layers": 1}).scalar
        for length in (512, 1024)
    )
    assert long.passes(1, True) == pytest.approx(2 * short.passes(1, True), rel=0.1)


@pytest.mark.parametrize(
    "architecture",
    ["gpt2", *(pytest.param(a, marks=pytest.mark.slow) for a in ("qwen2", "gemma2"))],
)
def test_any_architecture_runs_on_fake_tensors(tmp_path, architecture):
    policy = plan_of(tmp_path, architecture=architecture, shape={"num_hidden_layers": 1}).policy
    assert policy.passes(2, True) > policy.passes(1, True) > policy.root
    assert policy.sampling(10, 5)[0] > policy.sampling(5, 5)[0] > 0


# -------------------------------------------------------------------------------------- what fits


def test_problems_that_are_looked_at_have_phases_of_their_own(plan, tmp_path):
    """One response per problem: nothing of the prefill is shared. Two policies in the last one."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"prompt": "w1"}\n' * 30)
    looking = plan_of(tmp_path, validation=str(problems), test=str(problems))
    looking.policy, looking.scalar = plan.policy, plan.scalar  # which have made their passes
    phases = looking.phases()
    names = ["load", "sampling", "normaliser", "rewards", "log-probs", "update"]
    assert list(plan.phases()) == names  # the reward model has no card
    rollout = plan.policy.sampling(40, N, 16 * N)[0] + 8 * 16 * N * NEW
    alone = phases["sampling"] - rollout + plan.policy.sampling(30, 1)[0] + 8 * 30 * NEW
    assert phases["validation"] == alone and phases["test"] == alone + plan.policy.copy


def test_the_largest_microbatch_fits_and_the_next_one_does_not(plan, monkeypatch):
    monkeypatch.setattr(plan, "training", lambda rows: {"update": 10 * rows})
    largest = {9: 0, 10: 1, 39: 2, 40: 4, 79: 4, 1000: 8}
    assert {limit: plan.microbatch_within(limit) for limit in largest} == largest


@pytest.mark.parametrize("shape", [{}, pytest.param(LLAMA, marks=pytest.mark.slow)])
def test_what_is_beyond_question_is_more_than_any_phase_needs(tmp_path, shape):
    args = arguments(tmp_path, shape=shape)
    some = {"prompt": PROMPT, "prompts": 16}
    answers = eval_code.Args(policy=args.policy, reward_model=args.reward_model)
    for needs in (
        Plan(args, 1, torch.float32),
        RewardPlan(train_rm.Args(policy=args.policy), 1, torch.float32, new=NEW, **some),
        AnswerPlan(answers, 1, torch.float32, **some),
    ):
        phases = needs.drawing(needs.rows) | needs.training()
        assert 1.5 * max(phases.values()) < needs.at_most(needs.rows)


def test_a_run_may_take_92_percent_of_a_device(plan, ranks, monkeypatch):
    needed = max(plan.phases(N).values()) / 0.92 / GB
    args = dataclasses.replace(plan.args, sampling_batch=N, device_memory=1.001 * needed)
    assert rows_at_once(args, ranks, lambda *_: plan) == N  # as it is asked for
    args.device_memory = 0.999 * needed
    message = r"--device_memory .*: update needs .* GB .*found .* \(92%.*--microbatch 4: .*--plan"
    assert re.match(message, refused(rows_at_once, args, ranks, lambda *_: plan))


def test_training_a_reward_model_holds_16_bytes_per_parameter_and_two_rows_per_pair(tmp_path):
    args = arguments(tmp_path)
    words = {"policy": args.policy, "batch": 16}
    for world, microbatch, rows, alone in ((1, 16, 32, True), (1, 4, 8, False), (4, 16, 8, True)):
        rm = train_rm.Args(**words, microbatch=microbatch)
        needs = RewardPlan(rm, world, torch.float32, PROMPT, NEW)
        n = needs.scalar.count
        assert needs.device == {"parameters": 4 * n // world, "gradients": 4 * n // world} | {
            "optimizer": 8 * n // world
        }
        rm.shard_group_size = group = max(1, world // 2)
        shared = RewardPlan(rm, world, torch.float32, PROMPT, NEW).device
        assert shared["gradients"] == 4 * n // group
        passes = needs.scalar.passes(rows, True) - alone * needs.device["gradients"]
        assert needs.training() == {"training": sum(needs.device.values()) + passes}


def test_short_prompts_count_as_they_are(plan, tmp_path):
    short = Plan(arguments(tmp_path, max_prompt_tokens=1000), 1, torch.float32, PROMPT)
    assert short.scalar.passes(4, False) == plan.scalar.passes(4, False)


class Choosing(torch.nn.Module):
    """A layer whose way depends on numbers."""

    def forward(self, hidden):
        return hidden if hidden.sum() > 0 else -hidden


def test_a_model_that_needs_numbers_has_no_estimate_and_runs_all_the_same(
    tmp_path, ranks, monkeypatch, capfd
):
    plan = plan_of(tmp_path, device_memory=1e-6)
    plan.policy.net.lm.model.layers[0].mlp = Choosing()
    plan.args.sampling_batch = 0
    assert rows_at_once(plan.args, ranks, lambda *_: plan) == 256
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 1 and not err
    assert "policy: no estimate of memory, its operators need real tensors: DataDep" in out


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["microbatch_4", "microbatch_8", "two_ranks"])
def test_a_run_s_peak_is_estimated_within_15_percent(tmp_path, setting):
    """The benchmark, with smaller models."""
    script = ROOT / "tests" / "bench" / "memory.py"
    command = [sys.executable, script, "--folder", tmp_path, "--only", setting, "--scale", "small"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])[setting]
    measured, estimated = (max(found[kind].values()) for kind in ("measured", "estimated"))
    assert estimated == pytest.approx(measured, rel=0.15)
