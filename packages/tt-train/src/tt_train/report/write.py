"""One page, and one picture, of what a run or several runs came to."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tt_train.records.run_files import naming
from tt_train.report.figure import GENERATOR, NO_PICTURE, picture
from tt_train.report.page import notices, page
from tt_train.report.read import read_runs


def write_report(
    runs: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    with_picture: bool = True,
    tell: Callable[[str], None] | None = None,
) -> tuple[Path, Path | None]:
    """Write the report of one run, or of several compared, and return its HTML page and its PNG.

    The page is a single self-contained file. ``output`` is the page's name (``*.html``; the picture is beside it) or a
    folder. By default a run's report is in its directory as ``report.html``, and a comparison beside the first run as
    ``comparison.html``. The PNG needs matplotlib. Without it the second path is None, and
    the page says so; it is also None without ``with_picture``.

    An older report is replaced, any other file is not. Raises FileExistsError for one, and FileNotFoundError for a
    directory without metrics.jsonl. A cut last line, rows without a figure, and a
    missing manifest, config or samples are named on the page instead, and given to ``tell``.
    """
    from tt_ckpt import files

    paths = [Path(run) for run in runs]
    read = read_runs(paths)
    html = _destination(paths, None if output is None else Path(output))
    png = html.with_suffix(".png")
    for path in (html, png) if html.parent not in paths else ():  # a run's own report is the run's to replace
        if os.path.lexists(path) and not _is_ours(path):
            raise FileExistsError(f"{path} exists and is not a report of tt; name another page with -o, or remove it")
    drawn, notice = None, None
    try:
        drawn = picture(read) if with_picture else None
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        notice = NO_PICTURE
    html.parent.mkdir(parents=True, exist_ok=True)
    with naming(html):
        if tell is not None:
            for line in notices(read):
                tell(line)
        text = page(read, has_picture=drawn is not None, notice=notice)
        files.replace_bytes(html, text.encode("utf-8", "backslashreplace"))
    if drawn is None:
        png.unlink(missing_ok=True)  # of an older report
        return html, None
    with naming(png):
        files.replace_bytes(png, drawn)
    return html, png


def _destination(paths: Sequence[Path], output: Path | None) -> Path:
    name = "report.html" if len(paths) == 1 else "comparison.html"
    if output is None:
        return (paths[0] if len(paths) == 1 else paths[0].parent) / name
    if output.suffix.lower() in (".html", ".htm"):
        return output
    if output.suffix and not output.is_dir():
        raise ValueError(f"{output}: a report is an .html page or a folder, found {output.suffix!r}")
    return output / name


def _is_ours(path: Path) -> bool:
    """Whether a file is a page or a picture that this module wrote, or is empty."""
    from tt_ckpt.files import regular

    with regular(path).open("rb") as file:
        head = file.read(4096)
    return not head or GENERATOR.encode() in head
