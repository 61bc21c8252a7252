"""Pages that name tests name tests that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMED = re.compile(r"`([\w./-]+\.py)::(\w+)`")
PAGES = {"SECURITY.md": 25, "docs/bad-input.md": 90, "docs/traps.md": 70}  # and how many tests each names at least
WITHOUT_TEST = {"docs/traps.md": "16 17 18 19 20"}  # rows that give a reason instead


def functions_of(file: Path) -> set[str]:
    if not file.is_file():
        return set()
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_a_page_names_exists(page: str) -> None:
    named = NAMED.findall((ROOT / page).read_text())
    assert len(named) >= PAGES[page]
    lost = sorted({f"{file}::{name}" for file, name in named if name not in functions_of(ROOT / file)})
    assert lost == []


@pytest.mark.parametrize("page", PAGES)
def test_every_row_of_a_page_names_a_test_or_what_holds_it(page: str) -> None:
    rows = [line for line in (ROOT / page).read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not re.match(r"\| *(\||input|rule|#)", row)]
    assert len(rows) >= 15
    bare = [row.split()[1] for row in rows if not NAMED.search(row)]
    assert bare == WITHOUT_TEST.get(page, "").split()


def test_the_page_of_traps_has_each_of_43_rows_once() -> None:
    text = (ROOT / "docs/traps.md").read_text()
    found = [int(number) for number in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)]
    assert sorted(found) == list(range(1, 44))
