"""From YAML, overrides and names to a checked config."""
