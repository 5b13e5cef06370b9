"""The command line of a test.

This paragraph is not part of the help.
"""

import dataclasses
import errno
import json
import os
import signal
import sys
from dataclasses import dataclass
from typing import Literal

from pfppo import config, filters, reward
from pfppo.config import UserError, load_function, parse, reason

import pytest


@dataclass
class Machine:
    """The machine (changes no number)

    Nor this.
    """

    workers: config.Count = 2  # processes
    seed: int = 0  # of the machine


@dataclass
class Args(Machine):
    batch_size: int = 4  # rows, usually 1 to 64
    seed: config.Seed = 1  # of the run
    # 1. Sample
    learning_share: float = 0.5  # share of them that is used, 50 % by default
    name: str = "a # b"  # a default may hold the sign

    # 2. Check
    fast_mode: bool = False  # skip the checks
    careful: bool = True  # look twice
    bare: int = 3
    NAMES = ("a", "b")  # no field

    def method(self):
        inner: int = 3  # no field
        # no group
        return inner

    prompt_style: Literal["plain", "chat"] = "plain"  # how to ask


@pytest.mark.parametrize(
    "words, values",
    [
        ([], {}),
        (["--batch_size", "7"], {"batch_size": 7}),
        (["--batch-size", "7"], {"batch_size": 7}),
        (["--batch_size=7"], {"batch_size": 7}),
        (["--batch-size=-3"], {"batch_size": -3}),
        (["--learning_share", "1e-6"], {"learning_share": 1e-6}),
        (["--name", "7"], {"name": "7"}),
        (["--name", "a-b--c"], {"name": "a-b--c"}),  # dashes in a value stay
        (["--name=a-b--no_c"], {"name": "a-b--no_c"}),
        (["--prompt-style", "chat"], {"prompt_style": "chat"}),
        (["--workers", "3"], {"workers": 3}),  # inherited
        (["--bare", "5"], {"bare": 5}),  # without a comment
        (["--fast_mode"], {"fast_mode": True}),
        (["--fast-mode", "--no-fast-mode"], {"fast_mode": False}),  # the last one counts
        (["--no_fast_mode", "--fast_mode"], {"fast_mode": True}),
        (["--no_careful"], {"careful": False}),
        (["--no-careful", "--careful"], {"careful": True}),
    ],
    ids=lambda x: " ".join(x),
)
def test_options_are_taken_with_underscores_or_dashes_and_have_their_fields_types(words, values):
    args = parse(Args, words)
    assert args == Args(**values)
    assert all(type(getattr(args, name)) is type(value) for name, value in values.items())


@pytest.mark.parametrize(
    "words, named",
    [
        (["--bath_size", "7"], ["--bath_size"]),
        (["--batch", "7"], ["--batch"]),
        (["--batch_size", "7.5"], ["--batch_size", "'7.5'", "int"]),
        (["--batch_size", "many"], ["--batch_size", "'many'", "int"]),
        (["--batch_size"], ["--batch_size"]),
        (["--learning_share", "nan"], ["--learning_share", "'nan'", "float"]),
        (["--learning_share=-inf"], ["--learning_share", "'-inf'"]),
        (["--prompt_style", "poem"], ["--prompt_style", "'poem'", "'plain'", "'chat'"]),
        (["--fast_mode=yes"], ["--fast_mode", "'yes'"]),
        (["stray"], ["stray"]),
        (["--workers", "1.5"], ["--workers: invalid int value: '1.5'"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_cannot_be_parsed_is_one_line_that_names_it(words, named):
    with pytest.raises(UserError) as caught:
        parse(Args, words)
    message = str(caught.value)
    assert all(name in message for name in named) and "\n" not in message


def test_the_help_holds_the_first_paragraph_and_in_groups_each_comment_and_each_default(capsys):
    """Own fields stand before inherited ones, in the order of the source."""
    with pytest.raises(SystemExit) as stopped:
        parse(Args, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    parts = """The command line of a test. | options: | rows, usually 1 to 64 [4] | of the run [1]
        | 1. Sample: | share of them that is used, 50 % by default [0.5]
        | --name str a default may hold the sign [a # b]
        | 2. Check: | skip the checks [False] | look twice [True] | --bare int [3]
        | how to ask [plain]
        | The machine (changes no number): | processes [2]"""
    places = [text.index(" ".join(part.split())) for part in parts.split("|")]
    assert places == sorted(places)
    for absent in ("This paragraph", "Nor this", "of the machine", "no field", "no group"):
        assert absent not in text


@dataclass
class Resumed(Args):
    stop: config.Strings = None  # several words
    run_dir: str = ""  # where
    resume: bool = False  # go on


def test_resume_reads_the_folder_as_if_its_arguments_stood_in_front(tmp_path):
    path, words = tmp_path / "args.json", ["--run_dir", str(tmp_path), "--resume"]
    with pytest.raises(UserError, match="there is no run to go on with .no args.json in it"):
        parse(Resumed, words)
    begun = parse(Resumed, [*words, "--batch_size", "5"])  # a run may begin with --resume
    assert begun == Resumed(batch_size=5, run_dir=str(tmp_path), resume=True)
    known = Resumed(batch_size=9, learning_share=1e-7, name="-x = --no_y", careful=False)
    known.run_dir = "moved since"
    path.write_text(json.dumps(dataclasses.asdict(known)))
    known.run_dir, known.resume = str(tmp_path), True
    assert parse(Resumed, words) == known
    assert parse(Resumed, words[:2]).batch_size == 4  # without --resume nothing is read
    again = parse(Resumed, [*words, "--batch_size", "4", "--careful"])
    assert again == dataclasses.replace(known, batch_size=4, careful=True)


@pytest.mark.parametrize(
    "words, found",
    [
        ([], None),
        (["--stop", ""], [""]),
        (["--stop", r"\ndef", "\nclass -x", "é"], [r"\ndef", "\nclass -x", "é"]),
        (["--stop=--x"], ["--x"]),
        (["--stop", "a", "b", "--stop", "c", "--batch_size", "3"], ["c"]),  # the last one counts
    ],
)
def test_several_words_are_taken_and_stay_when_a_folder_is_resumed(tmp_path, words, found):
    args = parse(Resumed, words)
    assert args.stop == found
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(args)))
    resumed = ["--run_dir", str(tmp_path), "--resume"]
    assert parse(Resumed, resumed).stop == found
    assert parse(Resumed, [*resumed, "--stop", "x", "y"]).stop == ["x", "y"]


@pytest.mark.parametrize(
    "written, line",
    [
        ('{"seed": -1}', "--run_dir {0}: args.json: --seed -1: expected 0 to 4294967295"),
        ('{"seed": "x"}', "--run_dir {0}: args.json: argument --seed: invalid int value: 'x'"),
        ('{"seed": 2, "pairs": ""}', "{0}/args.json: options that are not known here (pairs): "),
    ],
)
def test_what_is_wrong_in_the_folders_arguments_is_one_line_that_names_the_file(
    tmp_path, written, line
):
    (tmp_path / "args.json").write_text(written)
    with pytest.raises(UserError) as caught:
        parse(Resumed, ["--run_dir", str(tmp_path), "--resume"])
    assert str(caught.value).startswith(line.format(tmp_path)), caught.value


@dataclass
class Ranged:
    rows: config.Count = 4  # at least 1
    top: config.Natural = 0  # at least 0
    lr: config.Positive = 0.1  # more than 0
    beta: config.NonNegative = 0.1  # at least 0
    gamma: config.Share = 0.9  # 0 to 1
    seed: config.Seed = 1  # 32 bits


@pytest.mark.parametrize(
    "option, inside, outside, expected",
    [
        ("rows", ["1", "9"], ["0", "-1"], "at least 1"),
        ("top", ["0", "5"], ["-1"], "at least 0"),
        ("lr", ["1e-9", "3"], ["0", "-0.001"], "more than 0"),
        ("beta", ["0", "2.5"], ["-0.001"], "at least 0"),
        ("gamma", ["0", "1", "0.5"], ["-0.1", "1.01"], "0 to 1"),
        ("seed", ["0", "4294967295"], ["-1", "4294967296"], "0 to 4294967295"),
    ],
)
def test_a_number_out_of_its_range_is_refused_by_name(option, inside, outside, expected):
    for text in inside:
        assert getattr(parse(Ranged, [f"--{option}", text]), option) == float(text)
    for text in outside:
        with pytest.raises(UserError, match=f"^--{option} {text}: expected {expected}$"):
            parse(Ranged, [f"--{option}", text])


@dataclass
class Named:
    chosen: str = "none"  # name in FILTERS, file.py:function
    some: str = "all"  # all, or some of REWARDS, comma-separated
    unknown: str = ""  # name in NOWHERE


def test_the_help_lists_the_names_of_a_table_that_a_comment_speaks_of(monkeypatch, capsys):
    monkeypatch.setitem(filters.FILTERS, "brand_new", None)
    with pytest.raises(SystemExit):
        parse(Named, ["--help"])
    text = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # where a line broke
    assert f"{', '.join(filters.FILTERS)}, file.py:function [none]" in text
    assert f"all, or some of {', '.join(reward.REWARDS)}, comma-separated [all]" in text
    assert "brand_new" in text and "name in NOWHERE" in text


def test_a_reason_is_one_short_line():
    assert reason(KeyError("a\n  b")) == "KeyError: 'a\\n b'"
    assert reason(ValueError("first:\n   second")) == "ValueError: first: second"
    assert reason(OSError(28, "No space left on device")) == "No space left on device"
    assert len(reason(ValueError("long " * 100))) <= 240


def test_a_function_is_loaded_from_a_file_a_module_and_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "own_module_here.py").write_text("def triple(x):\n    return 3 * x\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for place in (f"{tmp_path}/own_module_here.py", "own_module_here"):
        assert load_function(f"{place}:triple", "filter")(2) == 6
    assert load_function("os.path:basename", "filter") is os.path.basename


def test_a_file_that_gives_several_functions_is_imported_once_and_again_when_it_has_changed(
    tmp_path,
):
    path = tmp_path / "own.py"
    path.write_text("COUNT = []\ndef f():\n    return COUNT\ndef g():\n    return COUNT\n")
    f, g = (load_function(f"{path}:{name}", name) for name in "fg")
    assert f() is g()
    path.write_text("def f():\n    return 2\n")
    os.utime(path, ns=(1, 1))
    assert load_function(f"{path}:f", "filter")() == 2


@pytest.mark.parametrize(
    "spec, named",
    [
        ("{0}/none.py:f", "there is no file {0}/none.py"),
        ("{0}/own.py:g", "has no function 'g'"),
        ("{0}/own.py:number", "has no function 'number'"),
        ("{0}/broken.py:f", "cannot import {0}/broken.py"),
        ("no_such_module_here:f", "cannot import no_such_module_here"),
        ("os.path:no_such_name", "os.path has no function 'no_such_name'"),
        (":f", "cannot import"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_one_line_that_says_why(tmp_path, spec, named):
    (tmp_path / "own.py").write_text("number = 3\n\ndef f():\n    pass\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    spec, named = spec.format(tmp_path), named.format(tmp_path)
    with pytest.raises(UserError) as caught:
        load_function(spec, "reward")
    message = str(caught.value)
    assert message.startswith(f"--reward {spec}: ") and named in message and "\n" not in message


@pytest.fixture
def launched(monkeypatch, capsys):
    """(words, error, rank) -> (exit status, standard error) of a script that raises the error."""

    def run(*words, error=None, rank="0"):
        def main(args):
            assert args == Args(batch_size=7)
            if isinstance(error, signal.Signals):
                signal.raise_signal(error)
            elif error:
                raise error

        monkeypatch.setattr(sys, "argv", ["some/script.py", "--batch_size=7", *words])
        monkeypatch.setenv("RANK", rank)
        try:
            status = config.launch(main, Args) or 0
        except SystemExit as stopped:
            status = stopped.code
        return status, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    "words, error, status, line",
    [
        ([], UserError("--size 3:\n expected 4"), 2, "--size 3: expected 4"),
        (["--eror", "user"], None, 2, "unrecognized arguments: --eror user (see --help)"),
        ([], OSError(errno.ENOSPC, "No space left", "model.bin"), 2, "model.bin: No space left"),
        ([], OSError(errno.EACCES, "Permission denied"), 2, "file system: Permission denied"),
        ([], KeyboardInterrupt(), 130, "ended by Ctrl-C; the same command starts it again"),
        ([], signal.SIGTERM, 143, "ended by SIGTERM; the same command starts it again"),
        ([], None, 0, ""),
    ],
)
def test_a_script_ends_with_a_status_and_what_a_user_can_mend_in_one_line_of_rank_0(
    launched, words, error, status, line
):
    kind = "" if line.startswith("ended") else "error: "
    said = f"script.py: {kind}{line}\n" if line else ""
    assert launched(*words, error=error) == (status, said)
    assert launched(*words, error=error, rank="1") == (status, "")


@pytest.mark.parametrize("bug", [ValueError("our own mistake"), OSError(errno.ENOENT, "gone")])
def test_a_bug_keeps_its_traceback(launched, bug):
    with pytest.raises(type(bug)) as caught:
        launched(error=bug)
    assert caught.value is bug
