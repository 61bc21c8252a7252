"""The text of a config or a recipe, and YAML as a config uses it: keys and values, lists, comments.

Aliases, tags and deep nesting are refused, with their place.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from tt_ckpt import files
from tt_train.errors import ConfigError, did_you_mean

LIMIT = 256_000  # bytes; the largest config and the largest recipe are far below
MAX_DEPTH = 32


def read_text(path: Path, what: str, *, root: Path | None = None) -> str:
    """The text of a regular file. A link is followed if a user named it, and must stay in ``root`` if there is one.

    Raises:
        ConfigError: no ``what`` (a config, a recipe file): a pipe or device, too large, not UTF-8, a placeholder.
    """
    try:
        anchor = Path(path).absolute().anchor
        text = files.read_text(path, root or anchor, limit=LIMIT, cure=f"check that it is a {what}, saved as UTF-8")
    except FileNotFoundError as error:
        near = did_you_mean(path.name, (file.name for file in path.parent.glob("*") if file.is_file()))
        raise ConfigError([f"{error} (looked in {Path.cwd()}){near}"]) from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError([f"{path}: cannot be read ({reason}); check its name and its permissions"]) from None
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    if "\0" in text:
        raise ConfigError([f"{path}: binary, not text; check that it is a {what}"])
    return text


class NotPlainError(ValueError):
    """Text that is not plain YAML; ``place`` is ``line:column``, counted from 1."""

    def __init__(self, words: str, mark: Any) -> None:
        self.place = f"{mark.line + 1}:{mark.column + 1}"
        super().__init__(words)


def compose_text(text: str) -> yaml.Node | None:
    """The nodes of one YAML document, None if there is none; NotPlainError for anything else."""
    try:
        return yaml.compose(text, Loader=_PlainLoader)
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        mark = yaml.Mark("", 0, before.count("\n"), len(before) - before.rfind("\n") - 1, None, 0)
        character = f"U+{ord(text[error.position]):04X}"
        raise NotPlainError(f"the control character {character} cannot be in YAML; remove it", mark) from None
    except yaml.MarkedYAMLError as error:
        found = error.problem_mark or error.context_mark or yaml.Mark("", 0, 0, 0, None, 0)
        raise NotPlainError(_in_our_words(error, text), found) from None
    except (ValueError, OverflowError) as error:
        if isinstance(error, NotPlainError):
            raise
        words = "an escape in double quotes or a directive is out of range; use single quotes"
        raise NotPlainError(words, yaml.Mark("", 0, 0, 0, None, 0)) from None


class _PlainLoader(yaml.SafeLoader):
    """Without aliases (a few lines of them unfold to gigabytes), without tags, and not deep."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise NotPlainError(f"aliases (*{event.anchor}) are not read; write the value again", event.start_mark)
        if event.tag is not None:
            tag = str(event.tag).replace("tag:yaml.org,2002:", "!!")
            raise NotPlainError(f"tags ({tag}) are not read; only plain YAML values are: remove it", event.start_mark)
        if self.depth == MAX_DEPTH:
            raise NotPlainError("nested too deeply to be a config; check the brackets", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


# what PyYAML says -> what is wrong and what to do
_WORDS = {
    "mapping values are not allowed": "a second ': ' in one line; put a value that contains ': ' in quotes",
    r"found character '\t'": "a tab where YAML wants spaces; indent with spaces",
    "while scanning an alias": "a value cannot begin with *; put the value in quotes",
    "while scanning an anchor": "a value cannot begin with &; put the value in quotes",
    "YAML directive": "a directive (%YAML) of another version; remove the line",
    "YAML document": "a directive (%YAML) of another version; remove the line",
    "found character": "a value cannot begin with this character; put the value in quotes",
    "expected ':'": "a line that is not 'key: value'; add the ': ', or quotes around a text of several lines",
    "end of stream": "a quote that is not closed; close it on its line",
    "document separator": "a quote that is not closed; close it on its line",
    "escape": r"a backslash in double quotes that is not a known escape; use single quotes, or write \\",
    "expected ',' or ']'": "'[' is not closed, or a comma is missing; write [a, b]",
    "expected ',' or '}'": "'{' is not closed, or a comma is missing; write {a: 1, b: 2}",
    "<stream end>": "the file ends inside brackets; close them",
    "expected <block end>": "the line does not fit the lines above it; indent the keys of a section alike",
    "expected the node content": "a value is missing here; write it, or null",
    "sequence entries are not allowed": "a list item (- x) cannot be here; put it on a line below its key",
    "mapping keys are not allowed": "a key cannot be here; put it on its own line",
    "another document": "a second document begins here (---); a config is one: put each in its own file",
    "document start": "only comments may come before the first key of a config; remove this line",
    "second occurrence": "anchors (&name) are not needed, since aliases are not read; remove them",
}


def _in_our_words(error: yaml.MarkedYAMLError, text: str) -> str:
    said = f"{error.context}: {error.problem}"
    words = next((ours for theirs, ours in _WORDS.items() if theirs in said), None)
    if words is None:
        words = "nothing that YAML knows; check quotes, brackets and indentation"
    number = error.problem_mark.line if error.problem_mark else 0
    line = "".join(text.splitlines()[number : number + 1]).strip()
    return f"not YAML: {words}{f' (found {line[:40]!r})' if line else ''}"


def lone(node: yaml.Node) -> str:
    """The name of a key; NotPlainError if it is a list or a mapping."""
    if not isinstance(node, yaml.ScalarNode):
        raise NotPlainError("a key must be a plain word, not a list or mapping; write 'key: value'", node.start_mark)
    return str(node.value)


def pairs(node: yaml.MappingNode) -> list[tuple[str, yaml.Node, yaml.Node]]:
    """(name, its node, the node of its value) of each key; NotPlainError for merge keys and keys that are no words."""
    found = []
    for key, value in node.value:
        name = lone(key)
        if name == "<<" and re.search("merge", key.tag):
            raise NotPlainError("merge keys (<<) are not read; write out the keys that they expand to", key.start_mark)
        found.append((name, key, value))
    return found
