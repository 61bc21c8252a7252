"""Decoder-only language models in plain PyTorch: one file per family, KV cache, generation."""

__version__ = "0.1.0"
