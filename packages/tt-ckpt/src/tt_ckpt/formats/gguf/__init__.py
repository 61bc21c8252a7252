"""GGUF files: the header, the tensors, the config and the tokenizer in them."""
