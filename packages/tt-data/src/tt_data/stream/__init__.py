"""Rows that are read while training: raw, shuffled, packed."""
