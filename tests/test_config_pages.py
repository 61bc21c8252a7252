"""docs/configs.md and docs/coming-from.md say what the code says about keys."""

import dataclasses
import re
from pathlib import Path

from tt_train.config import AdapterSection, PreferenceSection, ProfileSection, SFTConfig
from tt_train.settings.keys.foreign import FOREIGN
from tt_train.settings.keys.schema import all_keys, section_type
from tt_train.settings.registry import PREFERENCE_LOSSES

DOCS = Path(__file__).parents[1] / "docs"


def rows(page: str) -> list[list[str]]:
    """The cells of every table row of a page whose first cell is code."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]


def test_the_page_for_those_who_come_from_elsewhere_shows_the_table_of_the_code():
    expected = [[f"`{theirs}`", f"`{ours}`" if ours else "", note] for theirs, (ours, note) in FOREIGN.items()]
    assert rows("coming-from.md") == sorted(expected), "\n".join(f"| {' | '.join(row)} |" for row in sorted(expected))


def test_the_page_about_configs_names_every_key_and_its_default():
    plain = dataclasses.asdict(SFTConfig(adapter=AdapterSection(), profile=ProfileSection()))
    shown = {re.sub("`", "", row[0]): row[1] for row in rows("configs.md")}
    sections = {field.name for field in dataclasses.fields(SFTConfig) if section_type(field.type)}
    keys = [key for key in all_keys(SFTConfig) if key not in sections]
    assert list(shown) == keys
    for key in keys:
        value = plain
        for part in key.split("."):
            value = value[part]
        said = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        assert shown[key] == f"`{said.replace(chr(39), '').replace('(', '[').replace(')', ']')}`", key


def test_the_page_about_preferences_names_every_key_of_its_losses_and_every_loss():
    plain = dataclasses.asdict(PreferenceSection())
    shown = {re.sub("`", "", row[0]): row[1] for row in rows("preference.md")}
    assert {key: value for key, value in shown.items() if key.startswith("loss.")} == {
        f"loss.{key}": f"`{'null' if value is None else value}`" for key, value in plain.items()
    }
    assert {key for key in shown if not key.startswith("loss.")} >= set(PREFERENCE_LOSSES)
