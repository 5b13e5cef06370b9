"""The command line of a test.

This paragraph is not part of the help.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pfppo.config import (
    Count,
    Natural,
    NonNegative,
    Positive,
    Seed,
    Share,
    UserError,
    comments,
    load_function,
    parse,
    reason,
    require,
)

import pytest

ROOT = Path(__file__).parents[1]


@dataclass
class Args:
    batch_size: int = 4  # rows, usually 1 to 64
    # share of them that
    learning_share: float = 0.5  # is used, 50 % by default
    name: str = ""  # of the run
    fast_mode: bool = False  # skip the checks
    careful: bool = True  # look twice
    prompt_style: Literal["plain", "chat"] = "plain"  # how to ask


@pytest.mark.parametrize(
    "words",
    [
        ["--batch_size", "7"],
        ["--batch-size", "7"],
        ["--batch_size=7"],
        ["--batch-size=7"],
    ],
)
def test_an_option_is_taken_with_underscores_and_with_dashes(words):
    assert parse(Args, words) == Args(batch_size=7)


def test_without_options_every_field_has_its_default():
    assert parse(Args, []) == Args()


def test_values_have_the_types_of_their_fields():
    args = parse(Args, ["--batch_size", "-3", "--learning_share", "1e-6", "--name", "7"])
    assert (args.batch_size, args.learning_share, args.name) == (-3, 1e-6, "7")


@pytest.mark.parametrize("words", [["--name", "a-b--c"], ["--name=a-b--c"]])
def test_dashes_in_a_value_stay(words):
    assert parse(Args, words).name == "a-b--c"


@pytest.mark.parametrize(
    "words, fast, careful",
    [
        (["--fast_mode"], True, True),
        (["--fast-mode", "--no-fast-mode"], False, True),
        (["--no_fast_mode", "--fast_mode"], True, True),
        (["--no_careful"], False, False),
        (["--no-careful", "--careful"], False, True),
    ],
)
def test_a_flag_is_set_and_unset_by_its_name_and_the_last_one_counts(words, fast, careful):
    args = parse(Args, words)
    assert (args.fast_mode, args.careful) == (fast, careful)


def test_a_literal_takes_its_choices():
    assert parse(Args, ["--prompt-style", "chat"]).prompt_style == "chat"


@pytest.mark.parametrize(
    "words, named",
    [
        (["--bath_size", "7"], ["--bath_size"]),
        (["--batch", "7"], ["--batch"]),
        (["--batch_size", "7.5"], ["--batch_size", "'7.5'", "int"]),
        (["--batch_size", "many"], ["--batch_size", "'many'", "int"]),
        (["--batch_size"], ["--batch_size"]),
        (["--learning_share", "nan"], ["--learning_share", "'nan'", "float"]),
        (["--learning_share", "-inf"], ["--learning_share"]),
        (["--learning-share=inf"], ["--learning_share", "'inf'"]),
        (["--prompt_style", "poem"], ["--prompt_style", "'poem'", "'plain'", "'chat'"]),
        (["--fast_mode=yes"], ["--fast_mode", "'yes'"]),
        (["stray"], ["stray"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_cannot_be_parsed_is_one_line_that_names_it(words, named):
    with pytest.raises(UserError) as caught:
        parse(Args, words)
    message = str(caught.value)
    assert all(name in message for name in named) and "\n" not in message


def test_the_help_holds_each_comment_each_default_and_the_first_paragraph(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(Args, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for words in (
        "The command line of a test.",
        "rows, usually 1 to 64 [4]",
        "share of them that is used, 50 % by default [0.5]",
        "of the run",
        "skip the checks [False]",
        "how to ask [plain]",
    ):
        assert words in text
    assert "This paragraph" not in text


def test_require_raises_the_message_only_where_the_condition_fails():
    require(True, "fine")
    with pytest.raises(UserError, match="^not fine$"):
        require(0, "not fine")


@dataclass
class Odd:
    mark: str = "#"  # a default may hold the sign
    none: str = "a:b"


def test_a_comment_begins_where_python_says():
    assert comments(Odd) == {"mark": "a default may hold the sign", "none": ""}


@dataclass
class Ranged:
    rows: Count = 4  # at least 1
    top: Natural = 0  # at least 0
    lr: Positive = 0.1  # more than 0
    beta: NonNegative = 0.1  # at least 0
    gamma: Share = 0.9  # 0 to 1
    seed: Seed = 1  # 32 bits


@pytest.mark.parametrize(
    ("option", "inside", "outside", "expected"),
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


def test_a_number_with_a_range_is_still_of_its_kind():
    with pytest.raises(UserError, match="--rows: invalid int value: '1.5'"):
        parse(Ranged, ["--rows", "1.5"])
    assert type(parse(Ranged, ["--rows", "3"]).rows) is int


def test_a_reason_is_one_short_line():
    assert reason(KeyError("a\n  b")) == "KeyError: 'a\\n b'"
    assert reason(ValueError("first:\n   second")) == "ValueError: first: second"
    assert reason(OSError(28, "No space left on device")) == "No space left on device"
    assert len(reason(ValueError("long " * 100))) <= 240


# ------------------------------------------------------------------------------- a user's function


def test_a_function_is_loaded_from_a_file(tmp_path):
    (tmp_path / "own.py").write_text("def double(x):\n    return 2 * x\n")
    assert load_function(f"{tmp_path}/own.py:double", "filter")(21) == 42


def test_a_function_is_loaded_from_a_module_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "own_module_here.py").write_text("def triple(x):\n    return 3 * x\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_function("own_module_here:triple", "filter")(2) == 6


def test_a_function_is_loaded_from_a_module():
    assert load_function("os.path:basename", "filter") is os.path.basename


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


# ------------------------------------------------------------------------------------------ launch

SCRIPT = """
import errno
from dataclasses import dataclass
from pfppo.config import UserError, launch

@dataclass
class Args:
    error: str = ""  # what goes wrong

def main(args):
    if args.error == "user":
        raise UserError("--size 3: expected 4")
    if args.error == "full":
        raise OSError(errno.ENOSPC, "No space left on device", "model.bin")
    if args.error == "bug":
        raise ValueError("our own mistake")
    print("done")

launch(main, Args)
"""


def run_script(folder, *words, rank="0"):
    path = folder / "script.py"
    path.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RANK": rank}
    return subprocess.run(
        [sys.executable, path, *words], capture_output=True, text=True, env=environment
    )


def test_a_run_without_errors_ends_with_status_0(tmp_path):
    result = run_script(tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


@pytest.mark.parametrize(
    "words, line",
    [
        (["--error", "user"], "--size 3: expected 4"),
        (["--eror", "user"], "unrecognized arguments: --eror user (see --help)"),
        (["--error", "full"], "model.bin: No space left on device"),
    ],
)
def test_what_a_user_can_mend_is_one_line_on_stderr_and_status_2(tmp_path, words, line):
    result = run_script(tmp_path, *words)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == f"script.py: error: {line}\n"


def test_only_rank_0_prints_the_line(tmp_path):
    result = run_script(tmp_path, "--error", "user", rank="1")
    assert (result.returncode, result.stderr) == (2, "")


def test_a_bug_keeps_its_traceback(tmp_path):
    result = run_script(tmp_path, "--error", "bug")
    assert result.returncode == 1 and "Traceback" in result.stderr
