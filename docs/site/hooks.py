"""Names for a screen reader that the theme leaves out (axe-core: aria-dialog-name, label, empty-table-header)."""

from typing import Any

NAMES = {
    'data-md-component="search" role="dialog"': 'data-md-component="search" role="dialog" aria-label="Search"',
    'data-md-toggle="search"': 'data-md-toggle="search" aria-label="Search"',
    'data-md-toggle="drawer"': 'data-md-toggle="drawer" aria-label="Menu"',
    "<th></th>": "<td></td>",
}


def on_post_page(output: str, **_: Any) -> str:
    """The page with those names."""
    for found, named in NAMES.items():
        output = output.replace(found, named)
    return output
