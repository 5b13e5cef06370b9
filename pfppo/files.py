"""JSON files, whole or not at all, and JSONL files: read with the line that is wrong, or appended.

`read_jsonl` reads what a user brings, `whole_lines` what a run wrote and may have died writing. Who
names a file or a folder of another kind is told what it is and how to make the right one of it.
"""

import bz2
import contextlib
import gzip
import hashlib
import json
import lzma
import os
import re
import tempfile
import zlib
from pathlib import Path

from pfppo.config import UserError, is_hub_id, require

PACKED = {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ": lzma}  # by the first bytes of a file
POINTER = b"version https://git-lfs"  # what a clone without git LFS has in place of a large file
FRAME = "import pandas; pandas.read_{}({!r}{}).to_json({!r}, orient='records', lines=True)"
DATASET = "import datasets; datasets.{}.to_json({!r})"
OTHERS = {  # first bytes: what such a file is, Python that converts it
    b"PAR1": ("Parquet", lambda path, to: FRAME.format("parquet", path, "", to)),
    b"ARROW1": ("Arrow", lambda path, to: FRAME.format("feather", path, "", to)),
    b"\xff\xff\xff\xff": (
        "Arrow",
        lambda path, to: DATASET.format(f"Dataset.from_file({path!r})", to),
    ),
    b"PK": ("a zip archive or a spreadsheet", None),
    b"(\xb5/\xfd": ("packed by zstd", None),
    b"<": ("HTML or XML", None),
    POINTER: ("a pointer of git LFS (run git lfs pull)", None),
}


def read_jsonl(path):
    """[(line number, object)] of a JSONL file, packed (gzip, bzip2, xz) or not, UTF-8 or UTF-16;
    blank lines are skipped.

    One JSON array of objects is read too (Google's sanitized-mbpp.json), and objects over several
    lines; their numbers count entries. UserError: unreadable, another kind of file, not JSON, not
    an object, no rows.
    """
    number, data = 1, _plain(path)
    array = data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    lines = [data] if array else data.split(b"\n")
    try:
        rows = [(number := i, json.loads(line)) for i, line in enumerate(lines, 1) if line.strip()]
    except (ValueError, RecursionError) as error:  # json.loads decodes, so not UTF-8 is one of them
        first = next(i for i, line in enumerate(lines, 1) if line.strip())
        rows = [] if array or number > first else _over_lines(data)
        if not rows:
            _require_no_table(path, lines[first - 1])
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
    rows = list(enumerate(rows[0][1], 1)) if array else rows
    for number, row in rows:
        found = f"expected an object {{...}}, found {json.dumps(row):.40}"
        require(isinstance(row, dict), f"{path}, line {number}: {found}")
    require(rows, f"{path}: no rows (expected one JSON object per line)")
    return rows


def _plain(path):
    """The bytes of a file, unpacked, as UTF-8. UserError where it is of another kind."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected a JSONL file{_in_folder(path)}")
    if not path.exists() and is_hub_id(path) and not path.suffix:
        python = DATASET.format(f"load_dataset({str(path)!r}, split='train')", f"{path.name}.jsonl")
        raise UserError(f"{path}: there is no such file{_convert('it is on the Hub', python)}")
    try:
        data = path.read_bytes()
        data = next((m.decompress(data) for k, m in PACKED.items() if data.startswith(k)), data)
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):  # Windows' "Unicode", PowerShell's >
            data = data.decode("utf-16").encode()
    except UnicodeError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be read ({error.args[-1]})") from None
    for mark, (kind, convert) in OTHERS.items():
        if data.startswith(mark):
            how = convert and convert(str(path), f"{path.stem}.jsonl")
            raise UserError(f"{path}: is {kind}, expected JSONL{_convert('', how)}")
    return data


def _convert(why, python):
    """The end of a message: how to make a JSONL file."""
    return f'{why and f"; if {why}"}: convert it, python -c "{python}"' if python else ""


def _in_folder(path):
    """The end of a message: what there is to take in a folder that was named in place of a file."""
    for name, loaded in (("dataset_dict.json", "['train']"), ("dataset_info.json", "")):
        if (path / name).is_file():
            python = DATASET.format(f"load_from_disk({str(path)!r}){loaded}", f"{path.name}.jsonl")
            return _convert("", python)
    inside = sorted(p.name for p in path.iterdir() if ".json" in p.name or p.suffix == ".parquet")
    return f", such as {', '.join(inside[:3])} in it" if inside else ""


def _over_lines(data):
    """[(number, object)] of JSON objects that stand over several lines; [] where they are none."""
    decoder, found = json.JSONDecoder(), []
    try:
        text = data.decode("utf-8-sig").strip()
        while text:
            row, end = decoder.raw_decode(text)
            found.append(row)
            text = text[end:].lstrip(" \t\r\n,")
    except (ValueError, RecursionError):
        return []
    return list(enumerate(found, 1))


def _require_no_table(path, line):
    """Raise UserError if the first line of a file is the head of a table."""
    path, line = Path(path), line.decode(errors="replace").strip()
    tab = "\t" in line
    names = [name.strip().strip('"') for name in line.split("\t" if tab else ",")]
    if len(names) > 1 and line[0] not in "{[":
        python = FRAME.format("csv", str(path), ", sep='\\t'" if tab else "", f"{path.stem}.jsonl")
        kind = f"is {'TSV' if tab else 'CSV'} (columns: {', '.join(names[:6])}), expected JSONL"
        raise UserError(f"{path}: {kind}{_convert('', python)}")


def is_pointer(path):
    """What to do where a file is what git leaves of a large one in a clone without git LFS; "" for
    any other file, or none."""
    path = Path(path)
    pointer = f"{path.name} is a pointer of git LFS: run git lfs pull there"
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return pointer if file.read(len(POINTER)) == POINTER else ""
    return ""


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


def short_hash(value):
    """12 hex digits of what JSON can say."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def append_jsonl(path, rows):
    """Append objects to a JSONL file and flush them. Raises UserError where the disk is full."""
    try:
        with open(path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def write_jsonl(path, rows):
    """Write a JSONL file so that it is there whole or not at all."""
    _replace(path, "".join(json.dumps(row) + "\n" for row in rows))


def rewrite_jsonl(path, rows):
    """Make a JSONL file hold these rows and no others, if it is there."""
    if path.exists():
        write_jsonl(path, rows)


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
    try:
        tempfile.TemporaryFile(dir=there).close()  # root may write, and some systems take no files
    except OSError as error:
        why = f"--{option} {folder}: cannot write into {there}: {error.strerror}"
        raise UserError(why) from error


TRAINED = "and put config.json and the tokenizer of the model that was trained beside them"
FOLDERS = (  # files that tell it, what the folder is, what to do
    (
        ("zero_to_fp32.py", "global_step*", "*_optim_states.pt", "mp_rank_*"),
        "a checkpoint of DeepSpeed",
        f"make weights of it (python zero_to_fp32.py . DIR), {TRAINED}",
    ),
    (
        ("*.distcp", "pytorch_model_fsdp*", ".metadata", "rank*_shard*"),
        "a checkpoint in FSDP's shards",
        f"merge it (accelerate merge-weights FOLDER DIR), {TRAINED}",
    ),
    (
        ("*.gguf",),
        "a model in llama.cpp's form (GGUF)",
        "take the one it was made from, or AutoModelForCausalLM.from_pretrained(FOLDER, "
        "gguf_file=NAME) and its tokenizer likewise, both saved with save_pretrained(DIR)",
    ),
    (
        ("params.json", "consolidated*"),
        "a model in its maker's form",
        "take the one in Hugging Face form (on the Hub often NAME-hf)",
    ),
    (("tf_model.h5", "flax_model.msgpack", "*.onnx"), "a model without weights for torch", ""),
    (
        ("manifest.json",),
        "a checkpoint of train_ppo.py",
        "write its policy with --run_dir RUN --export DIR",
    ),
    (
        ("args.json",),
        "a run that is not finished",
        "go on with it (train_rm.py --run_dir FOLDER --resume)",
    ),
    (
        ("optimizer.*", "scheduler.pt", "trainer_state.json", "training_args.bin"),
        "a trainer's state without its model",
        "name the folder that save_pretrained or save_model wrote",
    ),
)


def no_model(folder, lacks):
    """What a folder is that lacks this part of a model, and what to do, as the end of a message."""
    for pattern in ("*/config.json", "*/adapter_config.json", "*/*/config.json"):
        if below := sorted({p.parent for p in folder.glob(pattern)}, key=_number):
            return f"the model is in a folder below: name {' or '.join(map(str, below[:-4:-1]))}"
    for patterns, kind, advice in FOLDERS:
        if any(next(folder.glob(pattern), None) for pattern in patterns):
            return f"is {kind}{advice and f': {advice}'}"
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return "is an empty folder"
    weights = any(name.endswith((".safetensors", ".bin", ".pt", ".pth")) for name in names)
    copy = ": copy config.json and the tokenizer of the model that was trained into it"
    advice = copy if weights and lacks == "config.json" else ", as save_pretrained writes it"
    return f"has no {lacks} (found {', '.join(names[:6])}), expected a model{advice}"


def no_tokenizer(folder):
    """What to do in a folder that holds no tokenizer, as the end of a message; "" in any other."""
    names = ("tokenizer*", "vocab*", "spiece.model", "*.tiktoken", "merges.txt")
    if any(next(folder.glob(name), None) for name in names):
        return ""
    how = f"AutoTokenizer.from_pretrained(BASE).save_pretrained({str(folder)!r})"
    return f"there is none, save that of the model it was trained from there ({how})"


def named_ends(folder):
    """The end-of-sequence ids that a folder's generation_config.json names, or where there is none
    its config.json: not one that transformers takes for granted where neither names any."""
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        if path.is_file():
            try:
                said = dict(json.loads(path.read_text()))
            except (ValueError, TypeError) as error:
                raise UserError(f"{path}: damaged, expected a JSON object ({error})") from error
            nested = said.get("text_config") or {}
            ends = said.get("eos_token_id", nested.get("eos_token_id"))
            return [i for i in (ends if isinstance(ends, list) else [ends]) if i is not None]
    return []


def name_eos(tokenizer, path, option):
    """Give a tokenizer the EOS that the model's configuration names. Raises UserError where it
    names none, or an ordinary token: the default of a family, as a rule."""
    added, ids = tokenizer.added_tokens_decoder.items(), named_ends(path)
    special = {i: token.content for i, token in added if token.special}
    names = [special[i] for i in ids if i in special]
    found = f"the model's configuration names {ids}, no special token of it, " if ids else ""
    advice = f'{found}expected "eos_token": "..." in tokenizer_config.json'
    like = f", perhaps one of {', '.join(list(special.values())[:6])}" if special else ""
    require(names, f"--{option} {path}: the tokenizer has no EOS: {advice}{like}")
    tokenizer.eos_token = names[0]


def _number(path):
    """Steps of checkpoint-500, step_20, ...: what was written last comes last."""
    return [int(digits) for digits in re.findall(r"\d+", path.name)], path.name


def adapter_in(folder):
    """What a PEFT adapter in a folder needs, as the end of a message; "" where there is none."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return ""
    try:
        said = dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        said = {}
    base = said.get("base_model_name_or_path") or "BASE"
    task = "SequenceClassification" if said.get("task_type") == "SEQ_CLS" else "CausalLM"
    kind = f"holds an adapter ({said.get('peft_type') or 'PEFT'}) for {base}"
    whole = (folder / "config.json").is_file()
    beside = ", beside a model: remove adapter_config.json if that is merged already, else"
    merge = (
        f"AutoModelFor{task}.from_pretrained({base!r}, ...) in "
        f"PeftModel.from_pretrained(model, {str(folder)!r}).merge_and_unload()"
        ".save_pretrained(DIR), and save the tokenizer there"
    )
    return f"{kind}{beside if whole else ', no whole model:'} merge it, {merge}"
