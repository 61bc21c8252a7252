"""The lower half of the report page: config, commands, manifest. Every text of a run is escaped here."""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from tt_train.config import SCHEMAS, AdapterSection, SFTConfig, to_dict
from tt_train.errors import counted, shell_word
from tt_train.report.read import Run, differences, flatten, value_at
from tt_train.report.samples import clipped, dot, html_text
from tt_train.report.summary import DASH, at
from tt_train.settings.recipe_file import repeating

SHOWN_ELSEWHERE = ("command", "config", "summary")  # keys of the manifest
PACKAGES = "environment.packages."


def evaluations_section(runs: Sequence[Run]) -> str:
    """The figures of ``tt eval``: a row for each task and metric, a column for each run."""
    found = [{(one["task"], one["metric"], one["filter"]): one for one in run.evaluations} for run in runs]
    keys = list(dict.fromkeys(key for of_run in found for key in of_run))
    if not keys:
        return ""
    names = [f"{dot(index)}{html_text(run.name)}" for index, run in enumerate(runs)] if len(runs) > 1 else ["Value"]
    heads = "".join(f'<th scope="col">{name}</th>' for name in ["Metric", *names])
    body = ""
    for task, metric, filter_name in keys:
        cells = "".join(f"<td>{_evaluated(of_run.get((task, metric, filter_name)))}</td>" for of_run in found)
        label = metric if filter_name == "none" else f"{metric} ({filter_name})"
        body += f'<tr><th scope="row">{html_text(task)}</th><td>{html_text(label)}</td>{cells}</tr>'
    return (
        '<section><div class="bar"><h2>Evaluations</h2></div><div class="card scroll" tabindex="0"><table class="keys">'
        f'<thead><tr><th scope="col">Task</th>{heads}</tr></thead><tbody>{body}</tbody></table></div></section>'
    )


def _evaluated(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return DASH
    error = "" if figure["stderr"] is None else f" \u00b1 {figure['stderr']:.4f}"
    rows = "" if figure["rows"] is None else f" ({counted(round(figure['rows']), 'row')})"
    return html_text(f"{figure['value']:.4f}{error}{rows}")


def config_section(runs: Sequence[Run]) -> str:
    """The keys that were set (of one run) or that differ (of several) in a table; the whole configs are folded."""
    if not any(run.config for run in runs):
        return ""
    if len(runs) == 1:
        changed = set_keys(runs[0].config)
        table = _table_of_keys(runs, changed, "What was set", "No key was set.", defaults=_defaults(runs[0].config))
        title = "The whole config"
    else:
        changed = differences([run.config for run in runs])
        table = _table_of_keys(runs, changed, "What differs", "No key differs but output_dir.")
        title = "The whole configs"
    blocks = "".join(
        f'<div class="card">{_name_of(run, index, runs)}{_yaml(run.config, changed=changed)}</div>'
        for index, run in enumerate(runs)
    )
    whole = f'<details><summary>{title}</summary><div class="columns">{blocks}</div></details>'
    return f'<section><div class="bar"><h2>Config</h2></div>{table}{whole}</section>'


def set_keys(config: dict[str, Any]) -> list[str]:
    """The dotted keys of a config that differ from the default, and always the rank of an adapter."""
    defaults = _defaults(config)
    return [
        key
        for key, value in flatten(config).items()
        if key == "adapter.rank" or (key not in ("recipe", "output_dir") and defaults.get(key, DASH) != value)
    ]


def _defaults(config: dict[str, Any]) -> dict[str, Any]:
    plain = to_dict(SCHEMAS.get(str(config.get("recipe")), SFTConfig)())
    if isinstance(config.get("adapter"), dict):
        plain["adapter"] = asdict(AdapterSection())
    return flatten(plain)


def _table_of_keys(
    runs: Sequence[Run], keys: Sequence[str], title: str, nothing: str, *, defaults: dict[str, Any] | None = None
) -> str:
    """A row for each key, a column for each run, and one for ``defaults`` if given."""
    if not keys:
        return f'<p class="note">{nothing}</p>'
    names = [f"{dot(index)}{html_text(run.name)}" for index, run in enumerate(runs)] if defaults is None else ["Value"]
    heads = "".join(f'<th scope="col">{name}</th>' for name in [*names, *(["Default"] if defaults is not None else [])])
    body = ""
    for key in keys:
        found = [value_at(run.config, key) for run in runs]
        cells = "".join(f"<td>{_breakable(_shown(value)) if known else DASH}</td>" for known, value in found)
        if defaults is not None:
            cells += f'<td class="soft">{html_text(scalar(defaults[key])) if key in defaults else DASH}</td>'
        body += f'<tr><th scope="row">{_breakable(key)}</th>{cells}</tr>'
    return (
        '<div class="card scroll" tabindex="0"><table class="keys">'
        f'<thead><tr><th scope="col">{title}</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _breakable(text: str) -> str:
    """``text``, escaped; on a narrow screen, a key or path breaks after a sign and not in the middle of a word."""
    return re.sub(r"(?<=\w)([._/])(?=[^\W\d])", r"\1<wbr>", html_text(text))


def _shown(value: Any) -> str:
    """A value in a cell. For a section: the keys that were set, or "none" if it is absent."""
    if value is None:
        return "none"
    if not isinstance(value, dict) or not value:
        return scalar(value)
    keys = set_keys({"adapter": value})  # the only section that can be absent
    return "\n".join(f"{key.removeprefix('adapter.')}: {scalar(value_at({'adapter': value}, key)[1])}" for key in keys)


def _name_of(run: Run, index: int, runs: Sequence[Run]) -> str:
    return f"<h3>{dot(index)}{html_text(run.name)}</h3>" if len(runs) > 1 else ""


def _yaml(config: dict[str, Any], *, changed: Sequence[str]) -> str:
    lines = ""
    for dotted, line in yaml_lines(config):
        key, colon, value = line.partition(":")
        mark = ' class="changed"' if any(dotted == one or dotted.startswith(f"{one}.") for one in changed) else ""
        lines += f'<span{mark}><b class="key">{html_text(key)}</b>{colon}{html_text(value)}</span>'
    return f'<pre class="yaml">{lines}</pre>'


class _OneLine(yaml.SafeDumper):
    """Lists and texts on one line, however long, so that a line of YAML is a key."""


def _text_on_one_line(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if text.splitlines() not in ([], [text]) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_OneLine.add_representer(list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, True))
_OneLine.add_representer(str, _text_on_one_line)


def _yaml_text(value: Any) -> str:
    return yaml.dump(value, Dumper=_OneLine, width=1_000_000, allow_unicode=True, sort_keys=False)


def yaml_lines(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each line of the YAML with the dotted key that it sets."""
    keys: list[str] = []
    for line in _yaml_text(values).splitlines():
        text = line.lstrip(" ")
        keys[(len(line) - len(text)) // 2 :] = [text.partition(":")[0]]
        yield ".".join(keys), line


def scalar(value: Any) -> str:
    """A value as YAML on one line."""
    return _yaml_text([value])[1:-2]


def reproduce_section(runs: Sequence[Run]) -> str:
    """The commands that made the runs, and those that come next."""
    commands: list[tuple[str, str]] = []
    for run in runs:
        what = "this run" if len(runs) == 1 else run.name
        if (command := made_by(run)) is not None:
            commands.append((f"What made {what}", command))
        commands.append((f"Repeat {what} from its resolved config", repeating(_near(run.path), run.manifest)))
        if len(runs) == 1:
            path = _typed(run.path)
            commands.append(("Talk to it", f"tt chat {path}"))
            if isinstance(run.config.get("adapter"), dict):
                commands.append(("Merge it into a model directory", f"tt merge {path} -o merged"))
            commands.append(("Evaluate it on your own rows", f"tt eval {path} --data rows.jsonl"))
    commands.append(("Write this page again", "tt report " + " ".join(_typed(run.path) for run in runs)))
    rows = "".join(
        f'<div class="command"><div><p class="why">{html_text(why)}</p><pre>{html_text(command)}</pre></div>'
        '<button type="button" class="quiet" hidden>Copy</button></div>'
        for why, command in commands
    )
    return f'<section><div class="bar"><h2>Reproduce</h2></div><div class="card">{rows}</div></section>'


def made_by(run: Run) -> str | None:
    """The command that made a run, if it is a command of tt. Every word is quoted, so a shell runs nothing else.

    A stranger may have written it into the manifest for a reader to paste.
    """
    command = run.manifest.get("command")
    try:
        words = [str(word) for word in command] if isinstance(command, list) else shlex.split(str(command or ""))
    except ValueError:
        return None
    return shlex.join(words) if words[:1] == ["tt"] or words[:3] == ["python", "-m", "tt_cli"] else None


def _typed(path: Path) -> str:
    """The path as one would type it."""
    return shell_word(_near(path))


def _near(path: Path) -> Path:
    """The path, relative if it is below the working directory."""
    here, absolute = Path.cwd(), path.absolute()
    return absolute.relative_to(here) if absolute.is_relative_to(here) else path


def facts_section(runs: Sequence[Run]) -> str:
    """The rows and the environment of each run, as a table: a row for each fact, a column for each run."""
    found = [_data_facts(run.manifest) | _environment_facts(run.manifest) for run in runs]
    names = list(dict.fromkeys(name for one in found for name in one))
    if not names:
        return ""
    heads = "".join(f'<th scope="col">{dot(index)}{html_text(run.name)}</th>' for index, run in enumerate(runs))
    heads = heads if len(runs) > 1 else '<th scope="col">Value</th>'
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{clipped(one.get(name, DASH))}</td>" for one in found)}</tr>'
        for name in names
    )
    return (
        '<section><div class="bar"><h2>Data and environment</h2></div><div class="card scroll" tabindex="0">'
        f'<table class="keys"><thead><tr><th scope="col">Fact</th>{heads}</tr></thead><tbody>{body}</tbody></table>'
        "</div></section>"
    )


def _data_facts(manifest: dict[str, Any]) -> dict[str, str]:
    report, lengths = at(manifest, "data.report"), at(manifest, "data.lengths")
    report, facts = report if isinstance(report, dict) else {}, {}
    if report:
        facts["Kind of rows"] = f"{_fact(report.get('schema'))}, {_fact(report.get('form'))}"
        dropped = report.get("dropped")
        dropped = dropped if isinstance(dropped, dict) else {}
        facts["Rows read"] = _fact(report.get("rows"))
        facts["Dropped"] = ", ".join(f"{_fact(count)} {_fact(why)}" for why, count in dropped.items()) or "none"
        facts["Cut at max_seq_len"] = _fact(report.get("truncated"))
    if isinstance(lengths, dict):
        facts["Tokens per row"] = ", ".join(f"{name} {_fact(lengths.get(name))}" for name in ("p50", "p90", "max"))
    if isinstance(share := at(manifest, "data.share_trained"), float):
        facts["Trained share of tokens"] = f"{share:.1%}"
    return facts


def _environment_facts(manifest: dict[str, Any]) -> dict[str, str]:
    keys = {
        "Python": "environment.python", "System": "environment.platform", "CPU": "environment.cpu",
        "Devices": "environment.devices", "torch": "environment.packages.torch",
        "tt-train": "environment.packages.tt-train", "Processes": "ranks", "Commit": "git.commit",
    }  # fmt: skip
    return {name: _fact(value) for name, key in keys.items() if (value := at(manifest, key)) not in (None, [], {})}


def manifest_section(runs: Sequence[Run]) -> str:
    """The manifest, unchanged."""
    blocks = ""
    for index, run in enumerate(runs):
        elsewhere = SHOWN_ELSEWHERE if made_by(run) is not None else SHOWN_ELSEWHERE[1:]
        flat = flatten({key: value for key, value in run.manifest.items() if key not in elsewhere})
        packages = [f"{key.removeprefix(PACKAGES)} {flat.pop(key)}" for key in list(flat) if key.startswith(PACKAGES)]
        flat |= {"packages": packages} if packages else {}
        if run.manifest:
            facts = "".join(f"<dt>{html_text(key)}</dt><dd>{clipped(_fact(value))}</dd>" for key, value in flat.items())
            blocks += f'<div class="card">{_name_of(run, index, runs)}<dl class="manifest">{facts}</dl></div>'
    if not blocks:
        return ""
    title = "The whole manifest" if len(runs) == 1 else "The whole manifests"
    blocks = f'<details><summary>{title}</summary><div class="columns">{blocks}</div></details>'
    return f'<section><div class="bar"><h2>Manifest</h2></div>{blocks}</section>'


def _fact(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_fact(item) for item in value) or DASH
    return DASH if value is None or value == {} else str(value)
