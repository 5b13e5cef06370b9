"""JSON files, whole or not at all, and JSONL files: read with the line that is wrong, or appended.

What a user brings is read by `read_jsonl`; what a run wrote itself, and may have been killed while
writing, by `whole_lines`.
"""

import gzip
import json
import os
import re
import zlib

from pfppo.config import UserError, require

KINDS = {bool: "true/false", int: "a number", float: "a number", str: "a string", list: "a list"}
KINDS |= {dict: "an object", type(None): "null"}


def read_jsonl(path):
    """[(line number, object)] of a JSONL file, gzipped or not; blank lines are skipped.

    One JSON array of objects is read too (Google's sanitized-mbpp.json); its numbers count entries.
    UserError: unreadable, not UTF-8, not JSON, not an object, no rows.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason})") from None
    rows, number = [], 1
    try:
        if re.match(r"\s*\[\s*\{", text):
            rows = list(enumerate(json.loads(text), 1))
        else:
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    rows.append((number, json.loads(line)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: not JSON ({error})") from None
    for number, row in rows:
        found = f"expected an object {{...}}, found {KINDS[type(row)]}"
        require(isinstance(row, dict), f"{path}, line {number}: {found}")
    require(rows, f"{path}: no rows (expected one JSON object per line)")
    return rows


def write_json(path, value):
    """Write a JSON file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def append_jsonl(path, rows):
    """Append objects to a JSONL file and flush them. Raises UserError where the disk is full."""
    try:
        with open(path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def whole_lines(path):
    """The objects of a JSONL file, without a last line that was cut short; [] without a file.
    Raises UserError naming file and line."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, line {number}: damaged, expected a JSON object") from error
    return rows


def rewrite_jsonl(path, rows):
    """Make a JSONL file hold these rows and no others, if it is there."""
    if path.exists():
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.rename(path)


def check_writable(folder, option):
    """Raise UserError if a folder of this name cannot be made or written into."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    require(there.is_dir(), f"--{option} {folder}: {there} is a file, expected a folder")
    require(
        os.access(there, os.W_OK | os.X_OK),
        f"--{option} {folder}: no permission to write into {there}",
    )
