"""The results of ``tt eval`` in a run directory, as reports read them; ``tt_train.evals`` writes them."""

from pathlib import Path
from typing import Any

from tt_train.records.run_files import number, own_folder, read_json

FOLDER = "evals"  # of a run directory
_TEXTS = ("task", "metric", "filter")


def newest(run: Path, problems: list[str], *, last_only: bool = False) -> list[dict[str, Any]]:
    """The figures in a run's evaluations: of each task and metric the newest, in the order of the files.

    A file that is not as ``tt eval`` writes it is left out, and ``problems`` says why. ``last_only``: the figures of
    the newest file alone.
    """
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    try:
        folder = own_folder(run, FOLDER)
        files = sorted(folder.glob("*-results.json")) if folder.is_dir() else []
    except (OSError, ValueError) as error:
        problems.append(f"{FOLDER}: left out ({str(error).splitlines()[0]})")
        return []
    for path in files[-1:] if last_only else files:
        try:
            rows = read_json(path).get("results")
        except (OSError, ValueError) as error:
            problems.append(f"{FOLDER}/{path.name}: left out ({str(error).splitlines()[0]})")
            continue
        for row in rows if isinstance(rows, list) else []:
            if isinstance(row, dict) and number(row.get("value")) is not None:
                figure = {**{name: str(row.get(name)) for name in _TEXTS}, "value": number(row["value"])}
                figure |= {"stderr": number(row.get("stderr")), "rows": number(row.get("rows"))}
                found[tuple(str(row.get(name)) for name in _TEXTS)] = figure
    return list(found.values())
