"""The README's examples do what it says."""

import fnmatch
import io
import re
import shlex
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def examples(text: str) -> list[tuple[str, list[str]]]:
    """The commands of the README's console blocks, each with the lines that it prints."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^```console\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def matches(expected: list[str], printed: list[str]) -> bool:
    """Whether the lines agree; ``...`` stands for anything within a line, and alone for any lines."""
    if not expected:
        return not printed
    if expected[0] == "...":
        return any(matches(expected[1:], printed[skipped:]) for skipped in range(len(printed) + 1))
    pattern = re.sub(r"([\[*?])", r"[\1]", expected[0]).replace("...", "*")
    return bool(printed) and fnmatch.fnmatchcase(printed[0], pattern) and matches(expected[1:], printed[1:])


def test_the_readme_does_what_it_says(tt, model_dir, rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("MODEL").symlink_to(model_dir)
    Path("rows.jsonl").write_bytes(rows_file.read_bytes())
    assert len(examples(README.read_text())) > 10
    for command, expected in examples(README.read_text()):
        piped, _, words = command.rpartition(" | ")
        if piped:
            monkeypatch.setattr(sys, "stdin", io.StringIO(shlex.split(piped)[1] + "\n"))
        answer = tt(*shlex.split(words)[1:])
        printed = answer.err if expected and expected[0].startswith("error:") else answer.out
        assert matches(expected, printed.splitlines()), f"{command}\n{answer}"
        assert answer.code == (2 if "error:" in printed else 0)


def test_the_table_of_the_readme_names_every_verb():
    from tt_cli.main import cli

    text = README.read_text()
    assert all(f"`tt {verb}" in text for verb in cli.table)


@pytest.mark.parametrize(("expected", "printed", "agree"), [
    (["a", "...", "d"], ["a", "b", "c", "d"], True),
    (["a ... c"], ["a b c"], True),
    (["[x]"], ["[x]"], True),
    (["a"], ["a", "b"], False),
    (["a", "...", "e"], ["a", "b"], False),
    ([], ["a"], False),
])  # fmt: skip
def test_lines_are_compared_as_said(expected, printed, agree):
    assert matches(expected, printed) is agree
