"""The scripts on a pretended GPU: no tensor is where torch would not take it (devices.py)."""

import json
import sys

import eval_code
import train_ppo
import train_rm
from pfppo import fsdp, metrics, ppo, reward, sampler
from pfppo.problems import verifiers
from pfppo.run import launch, session
from pfppo.sandbox import Verdict

import gpu
import pytest
import torch
import torch.distributed as dist
from conftest import quick
from devices import pretended
from ranks import fork
from running import numbers, options, read, run, write_rows
from test_slots import counted

FP32 = ("--param_dtype", "float32")
OFFLOADS = ("--offload_optimizer", "--offload_ref", "--offload_reward")
LITTLE = {"steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2, "minibatch": 2}
LITTLE |= {"filter": "none", "microbatch": 1, "max_new_tokens": 3, "validation": "", "test": ""}


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """(folder of the models, a file of prompts without tests, three problems)"""
    folder = tmp_path_factory.mktemp("devices")
    rows = read(tiny / "train.jsonl")[:4]
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows])
    return tiny, prompts, write_rows(folder / "problems.jsonl", rows[:3])


def ppo_options(world, run_dir, *words, **changed):
    tiny, prompts, _ = world
    return [*options(tiny, run_dir, **LITTLE | {"prompts": prompts} | changed), *words]


def on_gpu(script, *argv):
    with pretended():
        return run(script, *argv, "--device", "cuda")


# ----------------------------------------------- what the pretended device takes, and what it says

A, B = "zeros(3, device='cuda')", "ones(3)"
TWO, INDEX = "Expected all tensors to be on the same device", "indices should be either on cpu or"
REFUSED = {
    "a + b": TWO,
    "torch.stack([a.sum(), b.sum()])": TWO,
    "torch.cat([a, b])": TWO,
    "torch.where(a > 0, a, b)": TWO,
    "a.gather(0, i)": TWO,
    "a.masked_fill(b > 0, 1.0)": TWO,
    "torch.searchsorted(a, b)": TWO,
    "b.add_(a.sum())": TWO,
    "a.unsqueeze(0) @ b": TWO,
    "torch.nn.functional.embedding(i, a[:, None])": TWO,
    "a.__setitem__(i.cuda(), b[:2])": TWO,
    "(w * a).sum().backward() or w.grad + b": TWO,
    "b[i.cuda()]": INDEX,
    "b[a > 0]": INDEX,
    "a.numpy()": "can't convert cuda:0 device type tensor to numpy",
    "a.pin_memory()": "cannot pin",
    "torch.rand(3, generator=torch.Generator(), device='cuda')": "Expected a 'cuda' device type",
    "torch.empty(3, device='meta').to('cuda')": "meta",
    "torch.nn.Embedding(3, 2).cuda()(i)": TWO,
    "torch._foreach_mul([a, b], [b, b])": TWO,
}
TAKEN = {
    "a + b.sum()": "cuda",
    "a + b.cuda()": "cuda",
    "a.cpu() + b": "cpu",
    "a[i]": "cuda",
    "a[b > 0]": "cuda",
    "a.masked_fill(a > 0, b.sum())": "cuda",
    "b.copy_(a)": "cpu",
    "b.fill_(a.sum())": "cpu",
    "torch.zeros_like(a)[1:].t()": "cuda",
    "a.new_zeros(2)": "cuda",
    "a.new_tensor([1.0])": "cuda",
    "torch.as_tensor([1, 2], device=a.device)": "cuda",
    "torch.tensor(a.tolist())": "cpu",
    "a.to(b)": "cpu",
    "a.double().to(torch.device('cuda', 0), torch.float32)": "cuda",
    "torch.autograd.grad((w * a).sum(), w)[0]": "cuda",
    "torch.empty(2, device='meta')": "meta",
    "torch.nn.Linear(2, 2).cuda().weight": "cuda",
    "torch.tensor(a)": "cuda",
    "torch.ones(2, device=0)": "cuda",
    "torch.nn.functional.one_hot(i.cuda())": "cuda",
    "torch.nn.utils.rnn.pad_sequence([a, a[:2]])": "cuda",
    "torch.pinverse(a.expand(3, 3))": "cuda",
    "torch._foreach_mul([a, b], 2.0)[0]": "cuda",
    "torch._foreach_mul([a, b], 2.0)[1]": "cpu",
    "torch._foreach_add_([b, a], [b, a]) and b": "cpu",
}


@pytest.mark.parametrize("text", [*REFUSED, *TAKEN])
def test_operators_on_two_devices_fail_and_copies_scalars_and_indices_do_not(text):
    with pretended():
        names = {"torch": torch, "a": torch.zeros(3, device="cuda"), "b": torch.ones(3)}
        names |= {"i": torch.tensor([0, 2]), "w": torch.ones(3, device="cuda", requires_grad=True)}
        if text in REFUSED:
            with pytest.raises((RuntimeError, IndexError, TypeError), match=REFUSED[text]):
                eval(text, names)
        else:
            found = eval(text, names)
            assert found.device.type == TAKEN[text] and found.is_cuda == (TAKEN[text] == "cuda")
    assert not torch.cuda.is_available() and names["a"].device.type == "cpu"


def test_a_group_takes_only_tensors_that_its_backend_has():
    with pretended():
        how = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("cpu:gloo,cuda:nccl", **how)
        groups = {name: dist.new_group(backend=name) for name in ("gloo", "nccl")}
        for name, wrong in (("gloo", "cuda"), ("nccl", "cpu")):
            right = {"cuda": "cpu", "cpu": "cuda"}[wrong]
            dist.all_reduce(torch.ones(2, device=wrong))
            dist.all_reduce(torch.ones(2, device=right), group=groups[name])
            with pytest.raises(RuntimeError, match=f"No backend type .* device type {wrong}"):
                dist.all_reduce(torch.ones(2, device=wrong), group=groups[name])
        functional, world = torch.ops._c10d_functional, dist.group.WORLD.group_name
        gathered = functional.all_gather_into_tensor(torch.ones(2, device="cuda"), 1, world)
        assert functional.wait_tensor(gathered).is_cuda
        with pytest.raises(RuntimeError, match="from host to host"):
            functional.all_gather_into_tensor(torch.ones(2), 1, world)
        dist.destroy_process_group()


# --------------------------------------------------------------------------------- the scripts


# Three deliberate mistakes; the first is what `Meter.add` did once.
def add(original, meter, name, total, count):
    torch.stack([total, torch.as_tensor(count)])


def loss_coefficients(original, mask, weights, *how):
    original(mask.cpu(), weights, *how)


def take(original, slots, who, tokens, logp):
    slots.row.cpu()[who]


MISTAKES = {
    "add": (metrics.Meter, add),
    "loss_coefficients": (ppo, loss_coefficients),
    "take": (sampler.Slots, take),
}


def first_wrong(name, mistake, original, found):
    """The function `original`, before whose first call the mistake is tried, and found."""

    def function(*args):
        if name not in found:
            with pytest.raises((RuntimeError, IndexError), match=f"{TWO}|{INDEX}") as found[name]:
                mistake(original, *args)
        return original(*args)

    return function


def on_ranks(count, script, argv):
    """Exit statuses of the script on so many ranks, and what they printed."""

    def work():
        sys.argv = ["script.py", *map(str, argv), "--device", "cuda"]
        with pretended():
            launch(script.main, script.Args)

    return fork(work, count)


def test_two_ranks_train_in_bf16(world, tmp_path):
    argv = ppo_options(world, tmp_path / "run", "--gradient_checkpointing")
    statuses, said = on_ranks(2, train_ppo, argv)
    assert statuses == [0, 0], said
    assert "on the device" in said and len(numbers(tmp_path / "run")) == 1


def test_hybrid_groups_of_two_nodes_train_with_offloads(world, tmp_path):
    argv = ppo_options(world, tmp_path / "run", *OFFLOADS, "--shard_group_size", 2)
    statuses, said = on_ranks(4, train_ppo, [*argv, "--prompts_per_step", 4, "--minibatch", 8])
    assert statuses == [0] * 4, said


@pytest.mark.parametrize("words", quick([OFFLOADS], [(), *((w,) for w in OFFLOADS), OFFLOADS]))
def test_ppo_gives_the_numbers_of_the_cpu_and_each_mistake_is_found(
    world, tmp_path, monkeypatch, words
):
    argv = {name: ppo_options(world, tmp_path / name, *FP32) for name in ("cpu", "cuda")}
    run(train_ppo, *argv["cpu"])
    if words:  # the estimate takes its time, and runs on no device
        monkeypatch.setattr(session, "rows_at_once", lambda *_: 64)
    found = {}
    for name, (owner, mistake) in MISTAKES.items():
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, first_wrong(name, mistake, original, found))
    on_gpu(train_ppo, *argv["cuda"], *words)
    assert found.keys() == MISTAKES.keys()
    expected = numbers(tmp_path / "cpu")
    assert expected[0]["grad_norm_actor"] > 0 and numbers(tmp_path / "cuda") == expected
    assert read(tmp_path / "cuda/samples.jsonl") == read(tmp_path / "cpu/samples.jsonl")


def test_selfcheck_passes_in_bf16(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(session, "rows_at_once", lambda *_: 64)
    assert on_gpu(train_ppo, *ppo_options(world, tmp_path / "run", "--selfcheck")) == 0
    said = capsys.readouterr().out
    assert "torch.bfloat16" in said and "nothing FAILED" in said


def some_pass(verifier, problems, texts, progress=None):
    """Verdicts of half of the responses, so that there are pairs."""
    return [Verdict(("passed", "wrong_answer")[i % 2], 0.0) for i in range(len(texts))]


@pytest.mark.parametrize("kind", ["pairs", "prompts"])
def test_a_reward_model_is_trained(world, tmp_path, monkeypatch, kind):
    tiny, _, problems = world
    monkeypatch.setattr(verifiers.ByTests, "__call__", some_pass)
    data = {"pairs": tiny / "pairs.jsonl", "prompts": problems}[kind]
    sizes = {"run_dir": tmp_path, "batch": 8, "epochs": 1, "max_new_tokens": 4}
    sizes |= {"policy": tiny / "policy", kind: data, "held_out": 0.4, "save_every": 1}
    on_gpu(train_rm, *[word for name, value in sizes.items() for word in (f"--{name}", value)])
    assert (tmp_path / "config.json").exists()
    assert reward.load_card(tmp_path).std > 0


def test_samples_are_judged_by_a_reward_model(world, tmp_path, monkeypatch):
    tiny, _, problems = world
    monkeypatch.setattr(eval_code.run, "compare_filters", lambda *_: None)  # no tensor in it
    words = ("--reward_model", tiny / "rm", "--samples_per_problem", 2, "--max_new_tokens", 3)
    words += ("--problems", problems, "--policy", tiny / "policy", "--out", tmp_path / "out")
    on_gpu(eval_code, *words)
    rows = read(tmp_path / "out/samples.jsonl")
    assert len(rows) == 6 and len({row["reward"] for row in rows}) > 1


def printed(device, capsys):
    """What tests/gpu.py prints at its smallest."""
    assert gpu.main(["--device", device, "--small"]) == 0, capsys.readouterr()
    found = json.loads(capsys.readouterr().out)
    assert all(check["ok"] for check in found["checks"].values())
    times = {"roofline", "decode", "seconds of a decode step", "step"}
    assert times | {"update", "update, compiled"} == found["times"].keys()
    assert "floor_by_step" in found["times"]["decode"] and found["seconds"] > 0
    return found


def test_the_script_for_a_gpu_runs_on_a_cpu(capsys):
    with counted():
        found = printed("cpu", capsys)
    assert "log-probs as on the CPU, bfloat16" in found["checks"]
    assert "log-probs of compiled decode steps" in found["checks"]
    assert found["times"]["seconds of a decode step"]["captured"] == "left out: no GPU"


def test_the_script_for_a_gpu_says_that_there_is_none(capsys):
    assert gpu.main(["--small"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "none was found"
    assert {"parity", "runs", "times"} <= {n for n, c in found["checks"].items() if not c["ok"]}


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_on_a_pretended_one(capsys, monkeypatch):
    """Where nothing is compiled, but blocks are fixed."""
    monkeypatch.setattr(fsdp, "compiled", lambda function: function)
    monkeypatch.setattr(sampler, "compiled_once", lambda function: function)
    monkeypatch.setattr(gpu, "captured", gpu.compiled)
    with pretended():
        checks = printed("cuda", capsys)["checks"]
    assert "peak memory of a run, share of --plan" in checks
