"""Tables made from results/*.json, and the marked places of pages that contain them.

A page has ``<!-- bench FILES KIND -->``, what this file makes, and ``<!-- end -->``. FILES are names in results/, such
as ``loss-*.json``; KIND is ``table``, ``best`` (each cell beside its best peer) or ``summary`` (a row for each file).
A place whose files are not there stays as it is. A test compares the pages with what this file makes.
"""

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

from workloads import hf_config, weight_shapes

HERE = Path(__file__).parent
ROOT = HERE.parent
PLACE = re.compile(r"(<!-- bench (\S+) (\w+) -->\n)(.*?)(\n<!-- end -->)", re.DOTALL)


def number(value: float) -> str:
    """Three digits that count."""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(digits, 3)}f}"


def machine_line(report: dict[str, Any]) -> str:
    machine, cells = report["machine"], report["cells"]
    features = f" ({', '.join(machine['features'])})" if machine["features"] else ""
    gpu = f"{machine['gpu']}, " if machine.get("gpu") and report["suite"] == "gpu" else ""
    commits = sorted({cell["commit"] for cell in cells})
    loads = [load for cell in cells for load in cell["load_average"]]
    dates, rounds = ({cell[key] for cell in cells} for key in ("date", "rounds"))
    return (
        f"{gpu}{machine['cpu']}{features}, one thread, torch {machine['torch']}, commit{'s' * (len(commits) > 1)} "
        f"{', '.join(commits)}, {_span(dates)}, load average {min(loads):.1f} to {max(loads):.1f}; "
        f"medians of {_span(rounds)} alternated runs{', tiny shapes' if report['quick'] else ''}."
    )


def _span(values: set[Any]) -> str:
    return str(min(values)) if len(values) == 1 else f"{min(values)} to {max(values)}"


def table(report: dict[str, Any]) -> str:
    """A row for each contestant of each cell."""
    on_gpu = report["suite"] == "gpu"
    second = "s" if on_gpu else "CPU s"
    lines = [
        machine_line(report),
        "",
        f"| | contestant | per {second} | {second} | spread | peak MB | above imports, MB "
        f"| tt / it |{' TFLOP/s, 4N and 6N |' if on_gpu else ''}",
        "|---|---|---|---|---|---|---|---|" + "---|" * on_gpu,
    ]
    for cell in report["cells"]:
        for label, found in cell["contestants"].items():
            seconds, rate = found["wall_s" if on_gpu else "cpu_s"], found["rate"]
            spread = f"{(rate['max'] - rate['min']) / rate['median']:.0%}"
            memory = [number(found[key]["median"]) if key in found else "" for key in ("peak_mb", "grown_mb")]
            ratio = f"{found['tt_over_it']['median']:.2f}" if "tt_over_it" in found else ""
            row = [cell["name"], label, f"{number(rate['median'])} {cell['unit']}", number(seconds["median"]), spread,
                   *memory, ratio]  # fmt: skip
            if on_gpu:
                weights = sum(map(math.prod, weight_shapes(hf_config(cell["request"])).values()))
                row.append(" and ".join(f"{rate['median'] * each * weights / 1e12:.0f}" for each in (4, 6)))
            lines.append(f"| {' | '.join(row)} |")
        lines += [f"| {cell['name']} | {label} | {reason} | | | | | |{' |' * on_gpu}"
                  for label, reason in cell["without"].items()]  # fmt: skip
    return "\n".join(lines)


def best_ratios(report: dict[str, Any]) -> dict[str, tuple[str, float, float | None]]:
    """For each cell with a peer: the best peer, how many times tt has its rate, and tt's peak memory as a share."""
    found = {}
    for cell in report["cells"]:
        kept = cell["contestants"]
        peers = {label: one for label, one in kept.items() if label.split()[0] not in ("tt", "limits")}
        own = {label: one for label, one in kept.items() if label.split()[0] == "tt"}
        if not peers or "tt" not in own:
            continue
        fastest = max(peers, key=lambda label: peers[label]["rate"]["median"])
        best = max(own, key=lambda label: own[label]["rate"]["median"])
        ratio = own[best]["rate"]["median"] / peers[fastest]["rate"]["median"]
        ratio = peers[fastest]["tt_over_it"]["median"] if best == "tt" else ratio
        memory = (
            own["tt"]["peak_mb"]["median"] / peers[fastest]["peak_mb"]["median"] if "peak_mb" in own["tt"] else None
        )
        found[cell["name"]] = fastest, ratio, memory
    return found


def best(report: dict[str, Any]) -> str:
    """Each cell beside its best peer; the lowest ratio and the geometric mean below."""
    found = best_ratios(report)
    head = "| | best peer | tt / it, work per CPU s | peak memory, tt / it |"
    lines = [machine_line(report), "", head, "|---|---|---|---|"]
    for name, (peer, ratio, memory) in found.items():
        lines.append(f"| {name} | {peer} | {ratio:.2f} | {'' if memory is None else f'{memory:.2f}'} |")
    return "\n".join(lines)


def summary(reports: list[dict[str, Any]]) -> str:
    """A row for each suite and machine: the geometric mean of the ratios to the best peer, and the lowest one."""
    lines = ["| suite | CPU | cells | tt / best peer, geometric mean | the lowest | peak memory, tt / it |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for report in reports:
        if found := best_ratios(report):
            name, (peer, lowest, _) = min(found.items(), key=lambda item: item[1][1])
            mean = statistics.geometric_mean(ratio for _, ratio, _ in found.values())
            shares = [memory for _, _, memory in found.values() if memory is not None]
            memory = f"{statistics.geometric_mean(shares):.2f}, at most {max(shares):.2f}" if shares else ""
            place = f"{lowest:.2f} ({name}; {peer})"
            cells = [report["suite"], report["machine"]["cpu"], str(len(found)), f"{mean:.2f}", place, memory]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def reports_of(pattern: str) -> list[dict[str, Any]]:
    """The results that are no trial of the harness."""
    found = [json.loads(file.read_text()) for file in sorted((HERE / "results").glob(pattern))]
    return [report for report in found if not report["quick"]]


def filled(text: str) -> str:
    """``text`` with every marked place as results/ has it now."""

    def place(match: re.Match[str]) -> str:
        reports = reports_of(match[2])
        if not reports:
            return match[0]
        made = summary(reports) if match[3] == "summary" else "\n\n".join(KINDS[match[3]](one) for one in reports)
        return f"{match[1]}{made}{match[5]}"

    return PLACE.sub(place, text)


KINDS = {"table": table, "best": best}


def pages() -> list[Path]:
    found = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("packages/*/README.md"), *HERE.glob("*.md")]
    return [page for page in found if PLACE.search(page.read_text(encoding="utf-8"))]


def write_all() -> int:
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (made := filled(text)) != text:
            page.write_text(made, encoding="utf-8")
            print(f"written: {page.relative_to(ROOT)}")
    return 0
