"""Everything about a config that can be known before weights load."""

from typing import TYPE_CHECKING, Any

from tt_train.config import RunConfig
from tt_train.errors import ConfigError
from tt_train.keys.mistakes import missing

if TYPE_CHECKING:
    from tt_train.job import Job


def check(config: RunConfig) -> "Job":
    """All that ``tt run`` would read but the weights. ConfigError holds every mistake."""
    from tt_train.job import assemble

    return assemble(config)


def problems(config: RunConfig) -> list[str]:
    """One line for each mistake; empty where ``tt run`` would start. Reads all but the weights."""
    try:
        check(config)
    except ConfigError as error:
        return error.problems
    return []


def rows(config: RunConfig, *, limit: int | None = None) -> Any:
    """The rows of ``data.train`` (the first ``limit``) as the run would see them, held-out ones included; needs no
    device and no weights."""
    from tt_train import job as _assemble

    if lacking := [line for line in missing(config) if not line.startswith("max_steps")]:
        raise ConfigError(lacking)
    return _assemble.rows_to_train(config, limit=limit)
