"""What a config names, read and checked before weights load: the model's files, the rows, the components."""
