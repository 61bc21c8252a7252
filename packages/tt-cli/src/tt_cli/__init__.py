"""The tt command: fine-tune, evaluate and run open language models."""

__version__ = "0.1.0"
