"""The one door for models by name: a directory or a hub id becomes a ``Path`` here, and nowhere else.

Public functions call ``resolve`` first and pass a ``Path`` on.
"""

import difflib
from pathlib import Path

from tt_ckpt.safe_names import from_home
from tt_ckpt.shown import plain, quoted

_LONGEST = 4096


def resolve(path: str | Path) -> Path:
    """The local directory of a model: ``path`` itself if it is one, else the snapshot of the hub repository ``path``.

    FileNotFoundError, ValueError or ConnectionError, in one line that says how to fix it, if there is neither.
    """
    if len(str(path)) > _LONGEST:
        raise ValueError(f"{quoted(str(path))}: no directory has so long a name; give a model directory or hub id")
    local = from_home(path)
    if local.is_dir():
        return local
    shown = plain(Path(path))
    if local.is_file():
        cure = "give the model directory that contains it"
        if local.suffix == ".gguf":
            cure = f"a Hugging Face directory is needed; run: tt convert {shown} DIR"
        raise ValueError(f"{shown}: a file; {cure}")
    if local.exists():
        raise ValueError(f"{shown}: neither a directory nor a regular file; give a model directory")
    text = str(path)
    kind = "file" if local.suffix == ".gguf" else "directory"
    is_path = isinstance(path, Path) or kind == "file" or text.startswith((".", "/", "~"))
    if is_path or text.count("/") > 1 or "\\" in text:
        raise FileNotFoundError(f"{shown}: no such {kind}{_similar(local)}")
    close = _similar(local)
    if "/" not in text and "did you mean" in close:  # a typo of a folder's name, not a hub id
        raise FileNotFoundError(f"{shown}: no such directory{close}")
    from tt_ckpt.hub.download import snapshot

    try:
        return snapshot(text)
    except (FileNotFoundError, ConnectionError) as error:
        if "did you mean" not in close:
            raise
        raise type(error)(f"{error}{close}") from None  # runs/frist looks like a repository


def _similar(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor is {plain(path.parent)}; the working directory is {Path.cwd()})"
    is_file = path.suffix == ".gguf"
    beside = [entry.name for entry in path.parent.iterdir()
              if (entry.is_file() and entry.suffix == ".gguf") or (entry.is_dir() and not is_file)]  # fmt: skip
    close = difflib.get_close_matches(path.name, beside, 1, 0.5)
    return f"; did you mean {plain(path.parent / close[0])}?" if close else f" (the working directory is {Path.cwd()})"
