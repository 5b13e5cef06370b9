"""The shape of the house: rooms, wings and their doors, arrows, sizes, docstrings."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WINGS = ("sandbox", "problems", "run", "lab")
DOORS = {"run": {"sandbox", "problems"}, "lab": {"sandbox", "problems", "run"}}  # open to a wing
DOORS |= {"problems": {"sandbox"}, "sandbox": set(), "": {"sandbox", "problems"}}  # "": rooms
ROOMS = ("config", "files", "filters", "ppo", "rollout", "reward", "model", "sampler", "fsdp")
ROOMS += ("slots", "loading", "data", "answers", "reliability", "metrics")
SCRIPTS = {"train_ppo.py": 250, "train_rm.py": 170, "eval_code.py": 180}  # lines at most
CORE = {"torch", "transformers", "safetensors", "numpy", "tqdm", "pfppo", "train_rm"}
CORE |= {"matplotlib"}  # optional, imported where it is used
CORE |= {"tokenizers", "huggingface_hub"}  # what transformers itself is made of
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "pfppo").rglob("*.py"))
FILES += [Path(name) for name in SCRIPTS]
TESTS = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py"))


def imports(path):
    """(module, name) of what a file imports, anywhere in it."""
    pairs = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            pairs += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            pairs += [(node.module, alias.name) for alias in node.names]
    return pairs


def name_of(path):
    """A file of the package: "filters", "run.folder", or "run" for its door."""
    return ".".join(path.with_suffix("").parts[1:]).removesuffix(".__init__")


def ours(path):
    """Names of other files of the package that a file imports."""
    known, found = set(map(name_of, FILES)), set()
    for module, name in imports(path):
        if module.split(".")[0] == "pfppo":
            whole = f"{module}.{name}".removeprefix("pfppo.")
            found.add(whole if whole in known else whole.rpartition(".")[0])
    return found - {name_of(path)}


def wing_of(path):
    return path.parts[1] if len(path.parts) == 3 else ""


def door(wing):
    """What a wing's __init__ imports or defines."""
    path = Path("pfppo") / wing / "__init__.py"
    body = ast.parse((ROOT / path).read_text()).body
    made = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return made | {name for _, name in imports(path)}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_uses_the_doors_that_are_open_to_it(path):
    own = wing_of(path)
    open_doors = set(WINGS) if path.name in SCRIPTS else DOORS[own]
    for module, name in imports(path):
        package, wing, *inside = f"{module}.{name}".split(".")
        if package != "pfppo" or wing not in WINGS or wing == own:
            continue
        assert wing in open_doors, f"{path} imports {wing}"
        assert len(inside) <= 1, f"{path} imports {module}, not by the door of {wing}"
        assert not inside or inside[0] in door(wing), f"{path} imports {name}, not in that door"


def test_what_scripts_call_of_a_wing_stands_in_its_door():
    for script in SCRIPTS:
        wings = {name for module, name in imports(script) if module == "pfppo"} & set(WINGS)
        for node in ast.walk(ast.parse((ROOT / script).read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                wing = node.value.id
                inside = door(wing) if wing in wings else {node.attr}
                assert node.attr in inside, f"{script}: {wing}.{node.attr}"


def test_imports_make_no_circle():
    below = {name_of(path): ours(path) for path in FILES if name_of(path)}
    while below:
        ground = {name for name, names in below.items() if not names & below.keys()}
        assert ground, f"in a circle: {sorted(below)}"
        below = {name: names for name, names in below.items() if name not in ground}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_only_core_packages_are_imported(path):
    for module, _ in imports(path):
        package = module.split(".")[0]
        assert package in sys.stdlib_module_names or package in CORE, f"{path} imports {package}"


@pytest.mark.parametrize("path", FILES + TESTS, ids=str)
def test_a_file_says_what_it_is_and_holds_one_concept(path):
    text = (ROOT / path).read_text()
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
    assert text.count("\n") <= SCRIPTS.get(path.name, 350), f"{path} holds two concepts"


def test_the_house_has_the_size_that_can_be_read():
    top = [path for path in FILES if len(path.parts) == 2]
    folders = {p.name for p in (ROOT / "pfppo").iterdir() if p.is_dir() and p.name[0] != "_"}
    assert len(top) <= 16 and folders == set(WINGS)
    assert {path.stem for path in top} == {"__init__", *ROOMS}
    assert sum((ROOT / path).read_text().count("\n") for path in FILES) <= 12640
    main = (ROOT / "train_ppo.py").read_text().partition("\ndef main(")[2].partition("\n\n\n")[0]
    assert main.count("\n") <= 130
    tests = sum(path.read_text().count("\n") for path in (ROOT / "tests").glob("*.py"))
    assert tests <= 15100


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_its_test_file(room):
    assert room == "files" or (ROOT / "tests" / f"test_{room}.py").exists()


def test_every_option_is_described():
    for path in [*SCRIPTS, "pfppo/run/options.py"]:
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.ClassDef):
                lines = (ROOT / path).read_text().splitlines()
                for field in (part for part in node.body if isinstance(part, ast.AnnAssign)):
                    assert re.search(r"  # \S", lines[field.end_lineno - 1]), field.target.id


def test_requirements_are_pinned_and_are_the_card_s():
    lines = (ROOT / "requirements.txt").read_text().split()
    names = {line.split("==")[0] for line in lines}
    assert all("==" in line for line in lines)
    assert names == {"torch", "transformers", "safetensors", "numpy", "tqdm", "pytest"}


def test_readme_can_be_read_in_one_sitting():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 300 and max(map(len, lines)) <= 300
