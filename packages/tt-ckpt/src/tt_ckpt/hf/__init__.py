"""Hugging Face directories: what is in one, loading a model from it, writing a model to one."""
