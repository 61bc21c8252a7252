"""Everything about a config that can be known before weights load."""

from tt_train.config import SFTConfig
from tt_train.errors import ConfigError


def problems(config: SFTConfig) -> list[str]:
    """One line for each mistake; empty where ``tt run`` would start. Reads all but the weights."""
    from tt_train.recipes._assemble import assemble

    try:
        assemble(config)
    except ConfigError as error:
        return error.problems
    return []
