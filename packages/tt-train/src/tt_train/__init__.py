"""Configs, losses, the training step, recipes, run directories and reports."""

__version__ = "0.1.0"
