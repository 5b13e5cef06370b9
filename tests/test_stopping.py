"""SIGTERM: given up where nothing has changed, agreed by all ranks, left within the grace."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pfppo.fsdp import init_ranks
from pfppo.run.stopping import Stop

import pytest
import torch.distributed as dist
from conftest import ROOT, run_ranks


@pytest.fixture
def stop(ranks):
    stop = Stop(ranks, grace=60)
    yield stop
    stop.close()


def tell():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0)  # the handler runs between two instructions


def test_a_phase_is_given_up_once_it_was_asked(stop):
    stop.holding, done = True, []
    with stop.giving_up():
        for i in range(5):
            if i == 2:
                tell()
            stop.check(i)
            done.append(i)
    assert done == [0, 1] and stop.agreed()


def test_a_run_that_has_saved_is_not_ended_when_the_grace_is_over(ranks):
    stop = Stop(ranks, grace=0.2)
    stop.holding = True
    tell()
    stop.close()
    time.sleep(0.5)  # os._exit would end the tests here


def test_without_a_signal_nothing_is_given_up(stop):
    stop.holding = True
    stop.check()
    assert not stop.agreed()
    stop.release()


@pytest.mark.parametrize("when", ["before", "after"])
def test_with_nothing_to_save_the_process_leaves_at_once_with_status_0(stop, when):
    if when == "after":
        stop.holding = True
        stop.release()
    with pytest.raises(SystemExit) as left:
        tell()
    assert left.value.code == 0


def test_a_wish_during_the_last_save_is_kept(stop):
    stop.holding = True
    tell()
    with pytest.raises(SystemExit) as left:
        stop.release()
    assert left.value.code == 0


def test_the_handler_of_before_comes_back(ranks):
    before = signal.getsignal(signal.SIGTERM)
    Stop(ranks, 1).close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_that_cannot_save_in_time_ends_with_status_1_and_a_line():
    script = (
        "import time, os, signal\n"
        "from pfppo.stopping import Stop\n"
        "from types import SimpleNamespace\n"
        "stop = Stop(SimpleNamespace(rank=0, is_main=True), 0.3)\n"
        "stop.holding = True\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "not saved within --grace_seconds 0.3" in done.stderr


def test_all_ranks_agree_when_one_was_asked(tmp_path):
    run_ranks(__file__, tmp_path)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["False True"] * 2


def main(folder):
    ranks = init_ranks("cpu")
    stop = Stop(ranks, 60)
    stop.holding = True
    before = stop.agreed()
    if ranks.rank == 1:
        tell()
    (folder / str(ranks.rank)).write_text(f"{before} {stop.agreed()}")
    stop.close()  # the timer's thread would outlive the process group
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
