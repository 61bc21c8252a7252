"""What is done with a finished run, an adapter or a model: load, merge, export, verify."""
