"""Configs, losses, the training step, recipes, run directories and reports."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tt_train.config import RunConfig
    from tt_train.errors import ConfigError, Interrupted, TrainingError
    from tt_train.losses.cross_entropy import Summed, cross_entropy, linear_cross_entropy
    from tt_train.losses.log_probs import linear_log_probs
    from tt_train.losses.preferences import dpo_loss
    from tt_train.models.load import load
    from tt_train.models.merge import merge_run
    from tt_train.models.quantize import quantize_run
    from tt_train.optim.schedule import learning_rate
    from tt_train.settings.composing import compose
    from tt_train.step import train_step

_HOMES = {
    "compose": "settings.composing",
    "RunConfig": "config",
    "Summed": "losses.cross_entropy",
    "ConfigError": "errors",
    "Interrupted": "errors",
    "TrainingError": "errors",
    "load": "models.load",
    "cross_entropy": "losses.cross_entropy",
    "dpo_loss": "losses.preferences",
    "linear_cross_entropy": "losses.cross_entropy",
    "learning_rate": "optim.schedule",
    "linear_log_probs": "losses.log_probs",
    "merge_run": "models.merge",
    "quantize_run": "models.quantize",
    "train_step": "step",
}

__all__ = [
    "ConfigError",
    "Interrupted",
    "RunConfig",
    "Summed",
    "TrainingError",
    "compose",
    "cross_entropy",
    "dpo_loss",
    "learning_rate",
    "linear_cross_entropy",
    "linear_log_probs",
    "load",
    "merge_run",
    "quantize_run",
    "train_step",
]


if not TYPE_CHECKING:  # so that a misspelt name is an error to a type checker

    def __getattr__(name: str) -> object:
        """Import on first use: the command line reads names from here without loading torch."""
        if name not in _HOMES:
            raise AttributeError(f"module 'tt_train' has no attribute {name!r}")
        import importlib

        return getattr(importlib.import_module(f"tt_train.{_HOMES[name]}"), name)
