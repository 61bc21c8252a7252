"""Secrets never reach a file or a screen: tt_ckpt has the one rule."""

from tt_ckpt.redaction import redact, redact_data, redact_known, redact_said

__all__ = ["redact", "redact_data", "redact_known", "redact_said"]
