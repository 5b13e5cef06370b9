"""Rows of one's own, and files that cannot be read: named with line, field and what to do."""

import bz2
import gzip
import json
import lzma

from pfppo.files import read_jsonl
from pfppo.problems import assemble, load_pairs, load_problems, load_prompts

import pytest
from conftest import write
from ranks import refused
from test_messages import ASK, SYSTEM, YES
from test_problems import BY_FORM, CONTEST, HUMANEVAL, MBPP, PLUS, SANITIZED


@pytest.mark.parametrize(
    "row, wanted",
    [
        ({"prompt": "a"}, {"prompt": "a", "test": "", "entry_point": "", "task_id": "line 2"}),
        ({"prompt": [ASK]}, {"prompt": "", "messages": [ASK], "question": "q"}),
        (HUMANEVAL | {"task_id": 7}, {"task_id": "7", "entry_point": "two"}),
        (HUMANEVAL | {"test": None}, {"test": "", "entry_point": "two"}),
        (HUMANEVAL | {"setup": "x = 1\n", "instruction": "Do."}, {"setup": "x = 1\n"}),
        ({"messages": [SYSTEM, ASK]}, {"messages": [SYSTEM, ASK], "prompt": "", "test": ""}),
        ({"messages": [ASK], "test_list": ["assert f(1) == 2"]}, {"entry_point": "f"}),
        ({"prompt": "q", "test_list": ["assert set(f(1)) == {2}"]}, {"entry_point": "f"}),
        ({"prompt": "q", "test": "import a\nassert a.b(f(1)) == 2"}, {"entry_point": "f"}),
        ({"prompt": "q", "test": "def s(x): return x\nassert s(f(1))"}, {"entry_point": "f"}),
        ({"prompt": "q", "answer": "42", "source": None}, {"extra": {"answer": "42"}}),
        (MBPP | {"level": [1]}, {"extra": {"level": [1]}, "task_id": "Mbpp/12"}),
        (HUMANEVAL | {"prompt": [ASK]}, {"messages": [ASK], "prompt": "", "entry_point": "two"}),
        ({"prompt": "q", "messages": [ASK, YES]}, {"prompt": "q", "messages": []}),
        ({"question": "q", "answer": "#### 4"}, {"prompt": "q", "extra": {"answer": "#### 4"}}),
        ({"problem": "q", "solution": "s"}, {"prompt": "q", "extra": {"solution": "s"}}),
        ({"instruction": "q", "input": "", "output": "s"}, {"prompt": "q", "test": ""}),
        ({"conversations": [{"from": "human", "value": "q"}]}, {"messages": [ASK]}),
        ({"question": "q", "starter_code": "", "url": "u"}, {"prompt": "q", "test": ""}),  # APPS
        ({"question": "q", "test_list": ["assert f(1) == 2"]}, {"entry_point": "f"}),
    ],
)
def test_a_row_of_ones_own_is_read_by_the_fields_it_has(tmp_path, row, wanted):
    (problem,) = load_prompts(write(tmp_path, "", row))
    assert {name: getattr(problem, name) for name in wanted} == wanted


def test_tests_alone_make_a_problem_and_code_in_a_prompt_stays_code(tmp_path, passed):
    tests = {"test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}
    stub = 'def add(a, b):\n    """Add."""\n'
    rows = ({"prompt": prompt} | tests for prompt in ("Add.", stub))
    told, continued = load_prompts(write(tmp_path, *rows))
    assert "assert add(1, 2) == 3" in told.prompt and "task: Add. Your code" in told.instruction
    assert continued.prompt == stub and continued.instruction == ""
    answers = ["```python\ndef add(a, b):\n    return a + b\n```", "    return a + b\n"]
    checks = [assemble(told, answers[0]), *(assemble(continued, answer) for answer in answers)]
    assert passed(*checks, assemble(continued, "    return a - b\n")) == [True, True, True, False]


@pytest.mark.parametrize("form", BY_FORM)
def test_a_named_form_refuses_rows_of_other_forms(tmp_path, form):
    for other, row in BY_FORM.items():
        path = write(tmp_path, BY_FORM[form], row | {"task_id": "x"})
        if other == form:
            assert len(load_problems(path, form)) == len(load_problems(path)) == 2
        else:
            message = refused(load_problems, path, form)
            assert f"line 2: expected a row of {form}, found one of {other} (has: " in message
    assert "'apps' is unknown: expected leetcode, mbpp, " in refused(load_problems, path, "apps")


BROKEN = [  # row or line, what the message says of it
    ("{'prompt'", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ('"\\ud800', "not JSON"),
    ("3", "expected an object {...}, found 3"),
    ({"text": "a"}, "field 'prompt' is missing (expected a string or a list; has: text)"),
    ({"prompt": 3}, "field 'prompt': expected a string or a list, found 3"),
    ({"text": "a"}, "; also read: question, instruction, problem, query"),
    ({"instruction": "q", "input": "r"}, "'instruction' and 'input': expected one text of both"),
    ({"Question": "How many?", "Body": "Tom has 3."}, "'Question' and 'Body': expected one text"),
    ({"question": "Which?", "options": ["a", "b"]}, "'question' and 'options': expected one"),
    ({"prompt": None}, "field 'prompt' is missing (expected a string or a list; has: no field)"),
    ({"prompt": " \n"}, "field 'prompt' is empty, expected some text"),
    ({"messages": [ASK, YES]}, "field 'messages': expected a system turn or none"),
    ({"prompt": "a", "task_id": 7.5}, "field 'task_id': expected a number or a string, found 7.5"),
    (HUMANEVAL | {"test": ["x"]}, "field 'test': expected a string, found ['x']"),
    (HUMANEVAL | {"entry_point": ""}, "field 'entry_point' is missing: 'test' defines check"),
    (PLUS | {"base_input": 3}, "field 'base_input': expected a list, found 3"),
    (MBPP | {"test_list": []}, "field 'test_list': expected a list, found []"),
    (MBPP | {"test_list": ["a", 2]}, "field 'test_list': expected a list of strings, found ['2']"),
    (MBPP | {"code": "two = 2"}, "expected a call of what the reference defines, found 'assert"),
    ({"prompt": "q", "test_list": ["x"]}, "expected a call of what is asked for defines"),
    (MBPP | {"test_setup_code": 1}, "field 'test_setup_code': expected a string or a list, found"),
    (CONTEST | {"test": "assert f()"}, "field 'test': expected a call 'my_solution.NAME(...)'"),
]


@pytest.mark.parametrize("row, message", BROKEN)
def test_a_line_that_cannot_be_read_is_named_with_field_found_and_expected(tmp_path, row, message):
    path = write(tmp_path, {"prompt": "fine"}, "", row)
    told = refused(load_prompts, path)
    assert told.startswith(f"{path}, line 3: ") and message in told


def test_a_repeated_task_id_names_both_lines_and_a_benchmark_needs_tests(tmp_path):
    for load in (load_problems, load_prompts):
        message = refused(load, write(tmp_path, HUMANEVAL, HUMANEVAL))
        assert "line 2: task_id 'A/1' was on line 1 already" in message
    path = write(tmp_path, HUMANEVAL, {"prompt": "q"})
    assert len(load_prompts(path)) == 2
    assert "line 2: field 'test' is missing (expected a string; has" in refused(load_problems, path)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, ": cannot be read (No such file"),
        (b"", ": no rows"),
        (b"\n \n", ": no rows"),
        (b'[{"a": 1},', ", line 1: not JSON"),
        (b'[{"a": 1}, 2]', ", line 2: expected an object {...}, found 2"),
        (b'{}\n{"a": "\xe9"}', ", line 2: not JSON ('utf-8' codec can't decode"),
        (b"\x1f\x8b\x08rest", ": cannot be read (Compressed file ended"),
        (gzip.compress(b'{"a": 1}')[:-6], ": cannot be read (Compressed file ended"),
    ],
)
def test_a_file_that_is_broken_or_missing_is_named(tmp_path, content, message):
    path = tmp_path / "broken.jsonl"
    if content is not None:
        path.write_bytes(content)
    for load in (load_problems, load_prompts, load_pairs):
        assert refused(load, path).startswith(f"{path}{message}")


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "p.csv",
            b"prompt,answer\na,b\n",
            "is CSV (columns: prompt, answer), expected JSONL: conv",
        ),
        (
            "p.txt",
            b'"prompt"\t"answer"\na\tb\n',
            "is TSV (columns: prompt, answer), expected JSONL",
        ),
        (
            "p.parquet",
            b"PAR1\x15",
            "python -c \"import pandas; pandas.read_parquet('{}').to_json('p.",
        ),
        (
            "p.arrow",
            b"\xff\xff\xff\xffx",
            'is Arrow, expected JSONL: convert it, python -c "import d',
        ),
        ("p.xlsx", b"PK\x03\x04", "is a zip archive or a spreadsheet, expected JSONL"),
        ("p.jsonl.zst", b"(\xb5/\xfdx", "is packed by zstd, expected JSONL"),
        ("p.jsonl", b"<!DOCTYPE html>", "is HTML or XML, expected JSONL"),
        ("p.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull), expected JSO"),
        ("set/x.jsonl", b"{}", "{} is a folder"),
        (
            "set/dataset_dict.json",
            b"{}",
            "datasets.load_from_disk('{}')['train'].to_json('set.jsonl",
        ),
    ],
)
def test_a_file_of_another_kind_is_told_and_how_to_convert_it(tmp_path, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    path = path.parent if "/" in name else path
    for load in (load_problems, load_prompts, load_pairs):
        told = refused(load, path)
        assert told.startswith(f"{path}: is ")
        assert message.removeprefix("{} ").format(path) in told


def test_a_hub_id_in_place_of_a_file_is_told_how_to_make_one():
    told = refused(load_prompts, "openai/gsm8k")
    assert "datasets.load_dataset('openai/gsm8k', split='train').to_json('gsm8k.jsonl')" in told


def test_windows_encoding_other_packers_and_objects_over_lines_are_read(tmp_path):
    rows, path = [{"a": "\xe9"}, {"a": [1, {"b": 2}]}], tmp_path / "rows.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    indented = "\n".join(json.dumps(row, indent=2) for row in rows)
    for content in (
        text.encode("utf-16"),
        text.encode("utf-16").replace(b"\n\0", b"\r\0\n\0"),
        bz2.compress(text.encode()),
        lzma.compress(text.encode()),
        indented.encode(),
        b"\xef\xbb\xbf" + indented.encode(),
    ):
        path.write_bytes(content)
        assert read_jsonl(path) == [(1, rows[0]), (2, rows[1])]
    path.write_text(indented[:-2])
    assert refused(read_jsonl, path).startswith(f"{path}, line 1: not JSON")


def test_gzip_blank_lines_byte_order_mark_and_one_array_are_read(tmp_path):
    path = tmp_path / "packed.jsonl.gz"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xe2\x80\xa8"}'))
    assert read_jsonl(path) == [(1, {"a": 1}), (4, {"a": "\u2028"})]
    path.write_text(json.dumps([SANITIZED, SANITIZED | {"task_id": 13}], indent=2))
    assert [p.task_id for p in load_problems(path, "mbpp")] == ["Mbpp/12", "Mbpp/13"]
