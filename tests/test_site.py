"""What docs/site adds to the theme: breaks in the code of tables, names for a screen reader, a style and a script."""

import re
import runpy
from pathlib import Path

SITE = Path(__file__).parents[1] / "docs" / "site"
HOOKS = runpy.run_path(str(SITE / "hooks.py"))
LONG = "packages/tt-train/tests/test_run.py::test_a_long_name"


def test_long_code_in_a_cell_breaks_at_its_signs_and_reads_the_same():
    page = HOOKS["on_post_page"](f"<p><code>{LONG}</code></p><td>see <code>{LONG}</code></td>")
    assert page.startswith(f"<p><code>{LONG}</code></p>")
    assert page.replace("<wbr>", "").endswith(f"<td>see <code>{LONG}</code></td>")
    parts = re.sub(r".*<td>see <code>|</code></td>", "", page).split("<wbr>")
    assert max(map(len, parts)) <= 9
    assert {"packages/", "tests/", "py::", "test_"} <= set(parts)


def test_short_code_in_a_cell_stays_together():
    assert HOOKS["on_post_page"]("<td><code>--dry-run</code></td>") == '<td><code class="short">--dry-run</code></td>'


def test_every_name_is_still_looked_for_in_the_theme():
    pages = "".join(HOOKS["NAMES"])
    assert all(named in HOOKS["on_post_page"](pages) for named in HOOKS["NAMES"].values())


def test_style_and_script_are_staged_and_ask_no_other_host(tmp_path):
    runpy.run_path(str(SITE / "stage.py"))["stage"](tmp_path / "pages")
    for name, key in (("site.css", "extra_css"), ("site.js", "extra_javascript")):
        text = (tmp_path / "pages" / name).read_text()
        assert not re.search(r"//\w|@import|url\(|fetch", text.replace("// ", ""))
        assert f"{key}: [{name}]" in (SITE / "mkdocs.yml").read_text()
