"""The report of a run, or of several compared: an HTML page and a picture."""

from tt_train.report.write import write_report

__all__ = ["write_report"]
