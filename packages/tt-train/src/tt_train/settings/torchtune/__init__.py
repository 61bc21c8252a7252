"""torchtune's names, configs and YAML, and what they are here. See docs/from-torchtune.md."""
