"""From any rows to exactly the right labels: tokenizers, chat templates, masks, packing, resumable order."""

__version__ = "0.1.0"
