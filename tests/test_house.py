"""What every package and every file of the repository has in common."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
PRIVATE = re.compile(
    r"(?<![\w.])/(?:home/(?!me/|you/)\w|root/|Users/(?!me/|you/)\w|work/|opt/|mnt/|srv/)"  # a folder of a machine
    r"|\b(?!127\.|0\.0\.0\.0)(?:\d{1,3}\.){3}\d{1,3}:\d+\b"  # a host and its port
    r"|[\w-]+\.(?:internal|corp|lan)\b(?!\()"
)


def tracked() -> list[Path]:
    """The files of the repository, by git where it is one, else all that is no build output."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    hidden = {".git", ".nox", "dist", "__pycache__", "runs"}
    return [path for path in ROOT.rglob("*") if path.is_file() and not hidden & set(path.relative_to(ROOT).parts)]


def texts() -> list[tuple[Path, str]]:
    found = []
    for path in tracked():
        try:
            found.append((path.relative_to(ROOT), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    return found


def test_no_file_names_a_folder_of_a_machine_or_a_private_host():
    hits = [
        f"{path}:{number}: {line.strip()[:100]}"
        for path, text in texts()
        if path != Path("tests/test_house.py")
        for number, line in enumerate(text.splitlines(), start=1)
        if PRIVATE.search(line)
    ]
    assert hits == []


@pytest.mark.parametrize(
    "text", ["/home/alice/x", "cd /{}/.cache".format("root"), "/opt/venv/bin", "10.0.0.7:8080", "pypi.corp"]
)
def test_a_private_path_would_be_found(text):
    assert PRIVATE.search(text)


@pytest.mark.parametrize(
    "text",
    ["/home/me/rows", "a/{}/b".format("root"), "https://x.org/{}/y".format("work"), "127.0.0.1:8000", "str.internal("],
)
def test_what_is_not_private_is_let_through(text):
    assert not PRIVATE.search(text)


def test_python_files_are_ascii():
    assert [str(path) for path, text in texts() if path.suffix == ".py" and not text.isascii()] == []


def test_no_large_file_is_kept():
    assert [str(path) for path in tracked() if path.stat().st_size > 500_000] == []


def test_files_are_short_enough_to_read():
    """A longer one says why in its docstring, with the word `long`."""
    long = [
        f"{path}: {len(text.splitlines())} lines"
        for path, text in texts()
        if path.suffix == ".py" and "src" in path.parts and len(text.splitlines()) > 300
        and "long" not in (ast.get_docstring(ast.parse(text)) or "")
    ]  # fmt: skip
    assert long == []


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_package_is_complete(package):
    name = package.name.replace("-", "_")
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    for file in ("README.md", "CHANGELOG.md", "LICENSE", f"src/{name}/py.typed"):
        assert (package / file).is_file(), file
    assert (package / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert project["license"] == "BSD-3-Clause"
    assert project["requires-python"] == ">=3.11"
    assert f"[{project['version']}]" in (package / "CHANGELOG.md").read_text(), "this version has no section"
    init = (package / f"src/{name}/__init__.py").read_text()
    assert f'__version__ = "{project["version"]}"' in init
    assert any((package / "tests").glob("test_*.py"))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_sibling_requirements_are_ranges_that_hold(package):
    versions = {
        path.name: tomllib.loads((path / "pyproject.toml").read_text())["project"]["version"] for path in PACKAGES
    }
    for line in tomllib.loads((package / "pyproject.toml").read_text())["project"]["dependencies"]:
        sibling = re.match(r"(tt-\w+)(?:\[\w+\])?>=(\d+)\.(\d+),<(\d+)\.(\d+)$", line)
        assert bool(sibling) == line.startswith("tt-"), line
        if sibling:
            low, high = (sibling[2], sibling[3]), (sibling[4], sibling[5])
            major, minor, _ = versions[sibling[1]].split(".")
            assert (int(low[0]), int(low[1])) <= (int(major), int(minor)) < (int(high[0]), int(high[1])), line


def test_constraints_pin_what_the_packages_require():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert all(re.fullmatch(r"[\w.]+", version) for version in pins.values()), "no local versions, no ranges"
    assert pins["torch"] == "2.13.0"
    known = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    for package in PACKAGES:
        project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
        extras = [line for lines in project.get("optional-dependencies", {}).values() for line in lines]
        for line in [*project["dependencies"], *extras]:
            name = re.sub(r"[-_.]+", "-", re.split(r"[<>=]", line)[0]).lower()
            assert name.startswith("tt-") or name in known, f"{package.name} requires {line}, which nothing pins"
