"""The report on one run, or a comparison of several: an HTML page and a picture."""

from tt_train.report.write import write_report

__all__ = ["write_report"]
