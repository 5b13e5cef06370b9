"""JSON files, whole or not at all, and JSONL files: read with the line that is wrong, or appended.

`read_jsonl` reads what a user brings, `whole_lines` what a run wrote and may have died writing.
"""

import gzip
import json
import os
import zlib
from pathlib import Path

from pfppo.config import UserError, require


def read_jsonl(path):
    """[(line number, object)] of a JSONL file, gzipped or not; blank lines are skipped.

    One JSON array of objects is read too (Google's sanitized-mbpp.json); its numbers count entries.
    UserError: unreadable, not UTF-8, not JSON, not an object, no rows.
    """
    number = 1
    try:
        data = Path(path).read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        array = data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        lines = enumerate([data] if array else data.split(b"\n"), 1)
        rows = [(number := i, json.loads(line)) for i, line in lines if line.strip()]
    except (ValueError, RecursionError) as error:  # json.loads decodes, so not UTF-8 is one of them
        raise UserError(f"{path}, line {number}: not JSON ({error})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error.args[-1]})") from None
    rows = list(enumerate(rows[0][1], 1)) if array else rows
    for number, row in rows:
        found = f"expected an object {{...}}, found {json.dumps(row):.40}"
        require(isinstance(row, dict), f"{path}, line {number}: {found}")
    require(rows, f"{path}: no rows (expected one JSON object per line)")
    return rows


def whole_lines(path):
    """The objects of a JSONL file, without a last line that was cut short; [] without a file."""
    rows = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for i, line in enumerate(rows):
        try:
            rows[i] = dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, line {i + 1}: damaged, expected a JSON object") from error
    return rows


def write_json(path, value):
    """Write a JSON file so that it is there whole or not at all."""
    _replace(path, json.dumps(value, indent=2) + "\n")


def append_jsonl(path, rows):
    """Append objects to a JSONL file and flush them. Raises UserError where the disk is full."""
    try:
        with open(path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def rewrite_jsonl(path, rows):
    """Make a JSONL file hold these rows and no others, if it is there."""
    if path.exists():
        _replace(path, "".join(json.dumps(row) + "\n" for row in rows))


def _replace(path, text):
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def check_writable(folder, option):
    """Raise UserError if a folder of this name cannot be made or written into."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    require(there.is_dir(), f"--{option} {folder}: {there} is a file, expected a folder")
    writable = os.access(there, os.W_OK | os.X_OK)
    require(writable, f"--{option} {folder}: no permission to write into {there}")
