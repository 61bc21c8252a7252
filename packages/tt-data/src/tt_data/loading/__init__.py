"""From a path or a name to a data set: load_dataset, its cache, and torchtune's named sets."""
