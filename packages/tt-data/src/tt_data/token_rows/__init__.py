"""Rows of token ids: whole, packed, mixed or part of another data set, and the order in which they come."""
