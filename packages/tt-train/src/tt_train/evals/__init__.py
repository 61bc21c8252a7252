"""Evaluation of runs and models: by lm-evaluation-harness, and on rows of one's own."""
