"""File names that come out of files: each must name a file of its own folder, and nothing else."""

from pathlib import Path

_MAX_NAME = 255


def check_basename(name: object, *, where: object) -> str:
    """``name`` when it is one plain file name, else a ValueError that says where it stood."""
    bad = (
        not isinstance(name, str)
        or not name
        or name in {".", ".."}
        or any(mark in name for mark in ("/", "\\", ":"))
        or not name.isprintable()
        or len(name.encode("utf-8", "surrogatepass")) > _MAX_NAME
    )
    if bad:
        raise ValueError(f"{where}: refused the file name {str(name)[:80]!r}: not a plain name in the same folder")
    assert isinstance(name, str)
    return name


def safe_file(directory: Path, name: object) -> Path:
    """The path of ``name`` inside ``directory``; a link that leaves it is refused (the hub cache's own are not)."""
    path = directory / check_basename(name, where=directory)
    if path.is_symlink():
        target, root = path.resolve(), directory.resolve()
        allowed = {root}
        if root.parent.name == "snapshots":  # models--org--name/snapshots/<revision>/file -> ../../blobs/<hash>
            repository = root.parent.parent
            allowed |= {repository / "blobs", repository.parent / "blobs" / target.parent.name}  # the second: shared
        if target.parent not in allowed:
            raise ValueError(f"{path}: refused: a link that leaves its folder, to {target}; copy the file instead")
    return path
