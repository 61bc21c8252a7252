"""One file for each training method; read one from top to bottom to know what happens."""
