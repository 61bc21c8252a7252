"""Tokenizers: one protocol over tokenizer.json, sentencepiece and tiktoken files, and the template that each gets."""
