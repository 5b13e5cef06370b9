"""The end of a run by SIGTERM and Ctrl-C."""

import contextlib
import os
import signal

from pfppo.run.stopping import Stop, Stopped

import pytest
from ranks import ranked


def ask():
    signal.raise_signal(signal.SIGTERM)


@ranked(2)
def test_all_ranks_agree_when_one_was_asked_to_stop(ranks):
    stop = Stop(ranks, 60)
    stop.holding = True
    assert not stop.agreed()
    if ranks.rank == 1:
        ask()
    assert stop.agreed()
    stop.close()


@pytest.fixture
def stop(ranks):
    stop = Stop(ranks, grace=60)
    stop.holding = True
    yield stop
    stop.close()


def test_a_phase_is_given_up_once_it_was_asked(stop):
    done = []
    with contextlib.suppress(Stopped):
        for i in range(5):
            if i == 2:
                assert not stop.agreed()
                ask()
            stop.check()
            done.append(i)
    assert done == [0, 1] and stop.agreed()


@pytest.mark.parametrize("when", ["before", "after", "during the last save"])
def test_with_nothing_to_save_the_process_leaves_with_status_0(stop, when):
    stop.holding = when != "before"
    if when == "during the last save":
        ask()
    with pytest.raises(SystemExit) as left:
        if when != "before":
            stop.release()
        ask()
    assert left.value.code == 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_with_nothing_to_save_ctrl_c_is_for_the_script_to_say(stop, when):
    stop.holding = when == "after"
    with pytest.raises(KeyboardInterrupt):
        if when == "after":
            stop.release()
        signal.raise_signal(signal.SIGINT)


SIGNALS = {"TERM": signal.SIGTERM, "INT": signal.SIGINT}


@pytest.mark.parametrize(
    "asked, ends",
    [("INT INT", True), ("INT TERM", True), ("TERM INT", True), ("TERM TERM", False)],
)
def test_a_second_ctrl_c_ends_at_once_and_so_does_what_torchrun_makes_of_it(
    stop, capfd, monkeypatch, asked, ends
):
    ended, (first, second) = [], asked.split()
    monkeypatch.setattr(os, "_exit", ended.append)
    signal.raise_signal(SIGNALS[first])
    assert not ended and stop.agreed() == {"INT": "Ctrl-C", "TERM": "SIGTERM"}[first]
    assert ("once more ends at once" in capfd.readouterr().err) == (first == "INT")
    signal.raise_signal(SIGNALS[second])
    assert ended == [130] * ends


@pytest.mark.parametrize("launcher, name", [("", "INT"), ("torchrun", "INT"), ("", "TERM")])
def test_only_who_will_be_killed_has_to_be_in_time(stop, monkeypatch, launcher, name):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launcher:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    signal.raise_signal(SIGNALS[name])
    assert stop.timer.is_alive() == (launcher == "torchrun" or name == "TERM")


@pytest.mark.parametrize("in_time", [True, False])
def test_a_run_that_cannot_save_in_time_ends_with_status_1_and_a_line(
    ranks, capfd, monkeypatch, in_time
):
    monkeypatch.setattr(os, "_exit", lambda status: print(f"status {status}", flush=True))
    before, stop = signal.getsignal(signal.SIGTERM), Stop(ranks, grace=0.2)
    stop.holding = True
    ask()
    if in_time:
        stop.close()
    stop.timer.join()
    stop.close()
    out, err = capfd.readouterr()
    line = "rank 0: SIGTERM, and not saved within --grace_seconds 0.2: ending"
    assert (out, err[: len(line)]) == (("", "") if in_time else ("status 1\n", line))
    assert err.count("\n") == (0 if in_time else 1)
    assert signal.getsignal(signal.SIGTERM) == before  # closed, it is handled as before
