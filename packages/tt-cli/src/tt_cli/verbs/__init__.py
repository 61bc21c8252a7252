"""One file per verb; each holds ``command``, and imports what is heavy only inside it."""
