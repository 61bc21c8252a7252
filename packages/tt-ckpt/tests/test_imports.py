"""Which file may import which: read from the source, with imports inside functions."""

import ast
from pathlib import Path

import pytest

import tt_ckpt

ROOT = Path(tt_ckpt.__file__).parent
FLOORS = ["files", "hub", "model_path", "hf", "formats train", ""]  # a floor imports itself and the floors before it
NAMES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in ROOT.rglob("*.py")
}


def imports(name):
    """The files of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(NAMES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "tt_ckpt":
            module = str(node.module).removeprefix("tt_ckpt").lstrip(".")
            found |= {f"{module}.{alias.name}".lstrip(".") for alias in node.names} | {module}
    return {other for other in found if other in NAMES and other != name and NAMES[other].name != "__init__.py"}


def floor(name):
    wing = name.partition(".")[0]
    return next((i for i, wings in enumerate(FLOORS) if wing in wings.split()), 0) if name else len(FLOORS) - 1


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_import_runs_down(name):
    for other in imports(name):
        assert floor(other) <= floor(name), f"{name} imports {other}, which is on a floor above it"
        if floor(other) == floor(name) == FLOORS.index("formats train"):
            assert other.partition(".")[0] == name.partition(".")[0], f"{name} imports {other}, of the wing beside it"


def test_no_files_import_each_other_in_a_circle():
    left = {name: imports(name) for name in NAMES}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert sorted(left) == []


def test_a_submodule_has_no_name_of_a_public_function():
    """An import of the submodule would replace the function."""
    assert {name.partition(".")[0] for name in NAMES} & set(tt_ckpt.__all__) == set()
