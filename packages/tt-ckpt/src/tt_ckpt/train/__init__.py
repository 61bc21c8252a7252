"""Training checkpoints that survive a crash, on one rank or many."""
