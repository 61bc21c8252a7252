"""Everything about a config that can be known before weights load."""

from typing import TYPE_CHECKING

from tt_train.config import SFTConfig
from tt_train.errors import ConfigError

if TYPE_CHECKING:
    from tt_train.recipes._assemble import Job


def check(config: SFTConfig) -> "Job":
    """All that ``tt run`` would read but the weights. ConfigError holds every mistake."""
    from tt_train.recipes._assemble import assemble

    return assemble(config)


def problems(config: SFTConfig) -> list[str]:
    """One line for each mistake; empty where ``tt run`` would start. Reads all but the weights."""
    try:
        check(config)
    except ConfigError as error:
        return error.problems
    return []
