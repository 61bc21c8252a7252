"""Batches of token rows: padded, and in an order that continues."""
