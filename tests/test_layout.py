"""The shape of the house: floors, packages, file sizes, docstrings."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    ("config", "filters", "ppo", "batch", "reliability", "extract", "wire", "isolation", "plan"),
    ("noise", "figures"),
    ("jail", "remote", "messages", "weights", "peers", "cells"),
    ("tester",),
    ("sandbox",),
    ("reward", "benchmarks"),
    ("world", "data", "fsdp", "model"),
    ("sampler", "rundir", "loading", "metrics", "stopping"),
    ("checkpoint", "examine", "lab", "evaluation", "inputs", "footprint", "selfcheck"),
    ("export", "memory", "study", "comparison", "contamination"),
)  # a file imports lower floors only, and on the ground floor config
INSIDE = {"wire", "isolation", "plan", "remote", "tester"}  # tested through sandbox and jail
CORE = {"torch", "transformers", "safetensors", "numpy", "tqdm", "pfppo"}
CORE |= {"matplotlib"}  # optional, imported where it is used
CORE |= {"tokenizers", "huggingface_hub"}  # what transformers itself is made of
MODULES = sorted((ROOT / "pfppo").glob("[a-z]*.py"))
SCRIPTS = [ROOT / name for name in ("train_ppo.py", "train_rm.py", "eval_code.py")]


def imports(path):
    """Names of the modules that a file imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def floor(name):
    return next((i for i, modules in enumerate(FLOORS) if name in modules), None)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_only_lower_floors(path):
    own = floor(path.stem)
    assert own is not None, f"{path.stem} stands on no floor"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "pfppo":
            lower = floor(parts[1]) < own or (parts[1] == "config" and own == 0)
            assert lower, f"{path.stem} imports {parts[1]}"


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=lambda path: path.stem)
def test_only_core_packages_are_imported(path):
    for name in imports(path):
        package = name.split(".")[0]
        known = package in sys.stdlib_module_names or package in CORE
        assert known or package == "train_rm", f"{path.name} imports {package}"


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=lambda path: path.stem)
def test_a_file_says_what_it_is_and_is_short(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), f"{path.name} has no docstring"
    assert text.count("\n") <= 400, f"{path.name} holds two concepts"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_module_has_its_test_file(path):
    assert path.stem in INSIDE or (ROOT / "tests" / f"test_{path.stem}.py").exists()


def test_every_option_of_the_scripts_is_described():
    for path in SCRIPTS:
        args = path.read_text().split("class Args:")[1].split("\n\n\n")[0]
        for line in filter(None, args.strip().splitlines()):
            assert re.search(r"#\s*\S", line), f"{path.name}: {line.strip()}"


def test_requirements_are_pinned_and_are_the_card_s():
    lines = (ROOT / "requirements.txt").read_text().split()
    names = {line.split("==")[0] for line in lines}
    assert all("==" in line for line in lines)
    assert names == {"torch", "transformers", "safetensors", "numpy", "tqdm", "pytest"}
