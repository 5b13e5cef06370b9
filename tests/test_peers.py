"""Two torchrun agents on one machine stand for two nodes: they train as one, and end together.

Run by torchrun, this file is `train_ppo.py` with a heartbeat for the impatient, or looks at folders
(`main` at the bottom).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from pfppo.config import UserError
from pfppo.run import peers

import pytest
import torch.distributed as dist
from conftest import ROOT, run_ranks, tiny_lm, write_model

STATIC, ELASTIC = "static", "c10d"
PATIENCE = 60  # seconds that the surviving node may take


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(folder, name, launch, *options):
    """A torchrun agent; what it and its workers print goes to FOLDER/NAME.txt."""
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, launch), __file__]
    with open(folder / f"{name}.txt", "w") as output:
        return subprocess.Popen(
            [*command, *map(str, options)],
            cwd=folder,
            env=os.environ | settings,
            stdout=output,
            stderr=output,
        )


def start_nodes(folder, backend, *options):
    """Two agents with one rank each."""
    port = free_port()
    launch = ["--nnodes", 2, "--nproc_per_node", 1]
    if backend == STATIC:
        launch += ["--master_addr", "127.0.0.1", "--master_port", port, "--node_rank"]
        return [start(folder, f"node_{n}", [*launch, n], *options) for n in range(2)]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "x"]
    return [start(folder, f"node_{n}", launch, *options) for n in range(2)]


def rows(run_dir):
    """metrics.jsonl as far as it is written, without what depends on the machine's speed."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in row.items() if "second" not in k} for row in found]


def workers_of(agent):
    """Process ids of an agent's workers."""
    text = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text()
    return [int(pid) for pid in text.split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A tiny train_ppo command line without reward model and tests."""
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder / "policy", tiny_lm("llama"))
    prompts = [{"prompt": f"w{i} w{i + 1} w{i + 2}"} for i in range(8)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    (folder / "own.py").write_text(
        "def long(prompts, responses, problems):\n"
        "    return [float(len(response)) / 20 for response in responses]\n"
    )
    files = {"policy": folder / "policy", "prompts": folder / "prompts.jsonl"}
    sizes = {"prompts_per_step": 4, "samples_per_prompt": 3, "minibatch": 8, "save_every": 2}
    chosen = {"reward_model": "", "reward": f"{folder}/own.py:long", "max_new_tokens": 12}
    chosen |= files | sizes | {"eval_every": 1000}
    return [word for name, value in chosen.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def on_one_node(options, tmp_path_factory):
    """The metrics of three steps by two ranks of one agent."""
    folder = tmp_path_factory.mktemp("one")
    launch = ["--standalone", "--nproc_per_node", 2]
    agent = start(folder, "node", launch, *options, "--run_dir", folder / "run", "--steps", 3)
    assert agent.wait(2 * PATIENCE) == 0, (folder / "node.txt").read_text()
    return rows(folder / "run")


@pytest.mark.slow
def test_two_nodes_train_as_two_ranks_of_one_and_end_in_peace(options, on_one_node, tmp_path):
    run = ("--run_dir", tmp_path / "run", "--steps", 3)
    agents = start_nodes(tmp_path, STATIC, *options, *run)
    said = [
        (agent.wait(2 * PATIENCE), tmp_path / f"node_{n}.txt") for n, agent in enumerate(agents)
    ]
    assert all(status == 0 for status, _ in said), [path.read_text() for _, path in said]
    assert rows(tmp_path / "run") == on_one_node
    assert not any("error:" in path.read_text() for _, path in said)


@pytest.mark.slow
@pytest.mark.parametrize("backend, killed", [(STATIC, 0), (ELASTIC, 1)])
def test_where_a_node_dies_the_other_says_so_and_ends(
    options, on_one_node, tmp_path, backend, killed
):
    run = ("--run_dir", tmp_path / "run", "--steps", 100_000, "--warmup", 0)
    agents = start_nodes(tmp_path, backend, *options, *run)
    try:
        deadline = time.monotonic() + 2 * PATIENCE
        while len(rows(tmp_path / "run")) < 2:
            assert time.monotonic() < deadline and all(agent.poll() is None for agent in agents)
            time.sleep(0.1)
        workers = sum(map(workers_of, agents), [])
        assert len(workers) == 2 and rows(tmp_path / "run")[:2] == on_one_node[:2]
        dead, other = agents[killed], agents[1 - killed]
        dead.send_signal(signal.SIGKILL)
        assert other.wait(PATIENCE) not in (0, None)
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    said = (tmp_path / f"node_{1 - killed}.txt").read_text()
    lines = [line for line in said.splitlines() if line.startswith("test_peers.py: error: ")]
    what = "the store of node 0" if killed == 0 else "has been silent for 3 s"
    assert len(lines) == 1 and what in lines[0] and socket.gethostname() in lines[0], said
    assert not any(map(alive, workers))


@pytest.fixture
def watch(ranks, monkeypatch, capsys):
    """Node 0's Watch in a process of its own making; the test plays node 1 through `node`.

    `lines()` waits for the watch and gives what it said; instead of ending, the process says so.
    """
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    names = {"GROUP_WORLD_SIZE": 2, "GROUP_RANK": 0, "LOCAL_RANK": 0}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": server.port}
    names |= {"TORCHELASTIC_USE_AGENT_STORE": True}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(peers, "PERIOD", 0.1)
    monkeypatch.setattr(peers, "SILENCE", 0.6)
    monkeypatch.setattr(peers, "_watch", None)
    monkeypatch.setattr(peers.uuid, "uuid4", lambda: SimpleNamespace(hex="run"))
    monkeypatch.setattr(os, "_exit", lambda status: print(f"status {status}"))
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)

    def gathered(box, value):
        box[:] = [value, (1, "there")]

    monkeypatch.setattr(dist, "all_gather_object", gathered)
    peers.watch()
    node = dist.PrefixStore("peers/run", server)

    def lines():
        peers._watch.join(20)
        said = capsys.readouterr()
        return said.err.splitlines(), said.out.split()

    yield SimpleNamespace(node=node, lines=lines, thread=peers._watch, server=server)
    peers._watch.leave(None)


def test_a_silent_node_is_named_with_its_host(watch):
    watch.node.add("beat/1", 1)
    lines, status = watch.lines()
    assert len(lines) == 1 and "node 1 (there) has been silent for 1 s" in lines[0]
    assert status == ["status", "1"]


def test_a_node_that_beats_or_has_said_goodbye_is_not_dead(watch):
    for _ in range(12):
        watch.node.add("beat/1", 1)
        time.sleep(0.1)
    watch.node.set("left/1", "yes")
    time.sleep(1.2)
    assert watch.thread.is_alive()
    watch.thread.leave(None)
    assert watch.lines() == ([], [])
    assert watch.node.get("left/0") == b"yes" and int(watch.node.get("beat/0")) > 5


def test_a_node_that_fails_tells_the_others_why(watch):
    watch.node.set("failed", "1: --policy x: there is no such folder")
    (line,), status = watch.lines()
    assert "node 1 (there) has ended: --policy x: there is no such folder; " in line
    assert status == ["status", "1"]


def test_a_store_that_does_not_even_refuse_is_told_after_the_silence(watch):
    never, real = threading.Event(), watch.thread.store
    watch.thread.store = SimpleNamespace(
        add=lambda *_: never.wait(2), multi_get=real.multi_get, set=real.set
    )
    time.sleep(1.5)
    watch.thread.leaving.set()
    (line,), status = watch.lines()
    assert "the store of node 0 (" in line and status == ["status", "1"]


def raising(error):
    def main(args):
        raise error

    return peers.together(main)


@pytest.mark.parametrize(
    "error, told",
    [
        (UserError("--policy x: found none"), b"0: --policy x: found none"),
        (ValueError("of a kind"), b"0: ValueError: of a kind"),
        (RuntimeError("shapes do not fit"), b"0: RuntimeError: shapes do not fit"),
        (KeyboardInterrupt(), b"0: KeyboardInterrupt:"),
        (SystemExit(3), b"0: exit status 3"),
        (SystemExit(0), b""),
    ],
)
def test_an_exception_stays_as_it_is_and_is_told(watch, monkeypatch, error, told):
    """And a regular end, whatever its form, ends the process group."""
    ended = []
    monkeypatch.setattr(peers.dist, "destroy_process_group", lambda: ended.append(True))
    watch.node.add("beat/1", 1)
    with pytest.raises(type(error)) as caught:
        raising(error)(None)
    assert caught.value is error and watch.node.get("failed") == told
    assert bool(ended) == (told == b"")
    assert watch.lines() == ([], [])


def test_a_lost_connection_waits_until_it_is_known_whose(watch):
    error = RuntimeError("pair.cc:553] Connection closed by peer [10.0.0.2]:30097.")
    with pytest.raises(RuntimeError):  # where `os._exit` really ends, nothing is raised
        raising(error)(None)
    (line,), status = watch.lines()
    assert "node 1 (there) has been silent" in line and status == ["status", "1"]


def test_one_node_is_not_watched(monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    before = threading.active_count()
    peers.watch()
    peers.check_shared("/there/is/no/such/folder", "--run_dir x")
    assert peers._watch is None and threading.active_count() == before


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """{rank: what `check_shared` said in the same folder, and in one of each rank's own}"""
    folder = tmp_path_factory.mktemp("shared")
    run_ranks(__file__, folder)
    return {rank: json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)}


@pytest.mark.slow
def test_a_folder_that_nodes_do_not_share_is_refused_on_all_of_them(shared):
    for said in shared.values():
        assert said["same"] is None and said["left behind"] == []
        assert said["own"].startswith("--run_dir runs/x: ") and "1 of " in said["own"]
        assert "expected a file system that all nodes share" in said["own"]


def see_folders(folder):
    """One of two ranks: `check_shared` of a folder seen by both, and of one that is not the same"""
    from pfppo.fsdp import init_ranks

    ranks, said = init_ranks("cpu"), {}
    os.environ["GROUP_WORLD_SIZE"] = "2"
    own = folder / f"node_{ranks.rank}"
    own.mkdir()
    peers.VISIBLE = 1.0
    for name, place in (("same", folder), ("own", own)):
        os.chdir(place)
        try:
            said[name] = peers.check_shared("runs/x", "--run_dir runs/x")
        except UserError as error:
            said[name] = str(error)
    dist.barrier()
    said["left behind"] = [str(path) for path in folder.rglob(".shared-*")]
    (folder / f"{ranks.rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


def main():
    """A worker: given a folder, `see_folders`; given options, train_ppo.py."""
    if len(sys.argv) == 2:
        return see_folders(Path(sys.argv[1]))
    import train_ppo
    from pfppo.config import launch

    peers.PERIOD, peers.SILENCE = 0.3, 3.0
    launch(peers.together(train_ppo.main), train_ppo.Args)


if __name__ == "__main__":
    main()
