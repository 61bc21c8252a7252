"""A run from its directory to its last line: start, steps, checkpoints, figures, result."""
