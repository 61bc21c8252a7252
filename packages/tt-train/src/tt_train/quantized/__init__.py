"""Weights in 8 and 4 bits: the formats, torchao's tensors, and layers that are read from files and written to them."""
