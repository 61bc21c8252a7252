"""Hugging Face, Meta and torchtune checkpoints, conversion, crash-safe training checkpoints, hub transfer."""

__version__ = "0.1.0"
