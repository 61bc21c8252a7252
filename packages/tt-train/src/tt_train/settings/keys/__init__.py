"""How the keys of a config are read and checked: their types, YAML and words, mistakes, names of other tools."""
