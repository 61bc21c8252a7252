"""Names for a screen reader that the theme leaves out, and code in tables that breaks at a sign instead of anywhere."""

import re
from typing import Any

NAMES = {  # axe-core: aria-dialog-name, label, empty-table-header
    'data-md-component="search" role="dialog"': 'data-md-component="search" role="dialog" aria-label="Search"',
    'data-md-toggle="search"': 'data-md-toggle="search" aria-label="Search"',
    'data-md-toggle="drawer"': 'data-md-toggle="drawer" aria-label="Menu"',
    "<th></th>": "<td></td>",
}
CODE = re.compile(r"<code>([^<>]+)</code>")
SHORT = 12  # letters of code that stay together
SIGN = re.compile(r"(?<=[a-z0-9])(::|[_/=.,]|-(?=[a-z]))(?=[\w\[])")


def on_post_page(output: str, **_: Any) -> str:
    """The page with those names and breaks."""
    for found, named in NAMES.items():
        output = output.replace(found, named)
    return re.sub(r"<td.*?</td>", lambda cell: CODE.sub(_with_breaks, cell[0]), output, flags=re.DOTALL)


def _with_breaks(code: re.Match[str]) -> str:
    if len(code[1]) <= SHORT:
        return f'<code class="short">{code[1]}</code>'
    return "<code>" + SIGN.sub(r"\1<wbr>", code[1]) + "</code>"
