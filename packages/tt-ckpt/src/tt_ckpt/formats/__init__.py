"""Formats other than Hugging Face's: Meta, torchtune, GGUF, pickles; and conversion between them."""
