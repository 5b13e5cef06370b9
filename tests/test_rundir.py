"""The run directory: whose it is, and files that are cut or whole."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from pfppo.config import UserError
from pfppo.run.folder import (
    append_jsonl,
    check_run,
    cut_jsonl,
    last_steps,
    open_run,
    unused,
    write_json,
)

import pytest
from conftest import (
    files_of,
    full_disk,
)


@pytest.mark.parametrize("tail", ["", '{"step": 2, "x"', '{"step": 2}', '{"step": 3}\n{"st'])
def test_cutting_drops_later_rows_and_a_half_written_line(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, [{"step": 1, "text": "a\u2028b\n"}])  # a row is a line, whatever it holds
    append_jsonl(path, [{"step": 2, "text": "ü"}])
    whole = path.read_text()
    path.write_text(whole + tail)
    cut_jsonl(path, 2)
    assert path.read_text() == whole
    cut_jsonl(path, 2)  # once more changes nothing
    assert path.read_text() == whole and [p.name for p in tmp_path.iterdir()] == [path.name]
    cut_jsonl(path, 0)
    assert path.read_text() == ""


def test_a_file_that_does_not_exist_is_not_cut(tmp_path):
    cut_jsonl(tmp_path / "metrics.jsonl", 3)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_under_a_jsonl_file_is_one_line():
    with pytest.raises(UserError, match="^/dev/full: cannot be written: No space left on device$"):
        append_jsonl(Path("/dev/full"), [{"step": 1}])


# ------------------------------------------------------------------------------ run directory


@dataclass
class Args:
    run_dir: str
    seed: int = 1
    filter: str = "best_random"
    steps: int = 40
    resume: bool = False


def start(folder, ranks, **changes):
    """Check, then make a run directory, as train_ppo.py does."""
    args = Args(str(folder), **changes)
    assert check_run(args, ranks) == Path(folder)
    open_run(args, ranks)


def test_a_fresh_run_directory_holds_its_arguments(ranks, tmp_path):
    folder = tmp_path / "new" / "run"
    assert check_run(Args(str(folder)), ranks) == folder
    assert not list(tmp_path.iterdir())  # checking writes nothing
    start(folder, ranks, seed=3)
    there = dataclasses.asdict(Args(str(folder), seed=3))
    assert json.loads((folder / "args.json").read_text()) == there
    assert [path.name for path in folder.iterdir()] == ["args.json"]


def test_an_existing_empty_folder_and_resume_without_a_run_are_fresh_runs(ranks, tmp_path):
    start(tmp_path, ranks, resume=True)
    assert (tmp_path / "args.json").exists()


def test_a_run_with_the_same_arguments_needs_resume(ranks, tmp_path):
    start(tmp_path, ranks)
    with pytest.raises(UserError, match="--run_dir .*give --resume"):
        start(tmp_path, ranks)
    before = files_of(tmp_path)
    start(tmp_path, ranks, resume=True)
    start(tmp_path, ranks, resume=True, steps=80)  # a run may be made longer
    assert files_of(tmp_path) == before


def test_a_run_directory_may_be_moved_or_named_in_another_way(ranks, tmp_path):
    start(tmp_path / "old", ranks)
    (tmp_path / "old").rename(tmp_path / "new")
    start(tmp_path / "new", ranks, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_with_other_arguments_is_refused_by_name_and_both_values(ranks, tmp_path, resume):
    start(tmp_path, ranks, seed=1)
    before = files_of(tmp_path)
    with pytest.raises(UserError) as error:
        start(tmp_path, ranks, seed=2, filter="none", resume=resume)
    message = str(error.value)
    assert f"--run_dir {tmp_path}: " in message and "\n" not in message
    assert "seed 1 there, 2 here" in message
    assert "filter 'best_random' there, 'none' here" in message and "steps" not in message
    assert files_of(tmp_path) == before


def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(ranks, tmp_path):
    (tmp_path / "thesis.tex").write_text("all of it")
    for resume in (False, True):
        with pytest.raises(UserError, match="not empty and holds no run"):
            start(tmp_path, ranks, resume=resume)
    assert files_of(tmp_path) == {"thesis.tex": b"all of it"}


def test_a_run_directory_that_is_or_is_below_a_file_is_one_line(ranks, tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"^--run_dir {folder}: "):
            start(folder, ranks)


def test_a_run_killed_while_its_arguments_were_written_can_start(ranks, tmp_path):
    (tmp_path / "args.json.tmp").write_text('{"se')
    start(tmp_path, ranks)
    assert json.loads((tmp_path / "args.json").read_text())["seed"] == 1


def test_a_full_disk_at_the_start_is_one_line_and_leaves_nothing_in_the_way(ranks, tmp_path):
    with full_disk(10), pytest.raises(UserError, match=f"--run_dir {tmp_path}: .*File too large"):
        start(tmp_path, ranks)
    start(tmp_path, ranks)


def test_unused_names_do_not_exist(tmp_path):
    assert unused(tmp_path / "run") == tmp_path / "run"
    (tmp_path / "run").mkdir()
    (tmp_path / "run-2").mkdir()
    assert unused(tmp_path / "run") == tmp_path / "run-3"


def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "x.json", {"old": 1})
    with full_disk(20), pytest.raises(OSError):
        write_json(tmp_path / "x.json", {"new": "n" * 100})
    assert json.loads((tmp_path / "x.json").read_text()) == {"old": 1}


def test_the_last_steps_of_a_file_are_lists_of_their_rows(tmp_path):
    path = tmp_path / "samples.jsonl"
    assert last_steps(path, 5) == []
    append_jsonl(path, [{"step": step, "row": row} for step in (1, 2, 3) for row in (0, 1)])
    assert last_steps(path, 2) == [
        [{"step": step, "row": row} for row in (0, 1)] for step in (2, 3)
    ]
