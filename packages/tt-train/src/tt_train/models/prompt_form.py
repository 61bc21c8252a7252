"""The form in which a run is prompted: that of its rows. Imports no torch; ``tt chat`` uses it as well."""

from pathlib import Path
from typing import Any

from tt_train.records.run_files import FinishedRun


def trained_on(path: Path) -> tuple[dict[str, Any], str | None]:
    """The report on the rows that a run was trained on, and its ``data.template``; ({}, None) for a model."""
    run = FinishedRun.at(path)
    return ({}, None) if run is None else (run.data_report, run.section("data").get("template"))


def prompt_form(report: dict[str, Any], template: str | None, *, has_chat_template: bool) -> str:
    """``chat``, ``text`` (unchanged), or the name of an instruct template: the form that tt_data gave such rows."""
    from tt_data.template.prompts import INSTRUCT_TEMPLATES, our_name

    if template is not None and our_name(template) in INSTRUCT_TEMPLATES:
        return our_name(template)
    schemas, forms = str(report.get("schema", "")).split("+"), str(report.get("form", "")).split("+")
    if "chat" in forms:
        return "chat"
    if "text" in forms or not has_chat_template:
        return "alpaca" if "alpaca" in schemas else "text"
    return "chat"  # a model, or a stream of which no row was read
