"""The lower half of the report page: config, commands, manifest. Every text of a run is escaped here."""

import shlex
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from tt_train.report_headline import DASH
from tt_train.report_run import Run, differences, flatten
from tt_train.report_samples import clipped, dot

SHOWN_ELSEWHERE = ("command", "config", "summary")  # keys of the manifest
PACKAGES = "environment.packages."


def config_section(runs: Sequence[Run]) -> str:
    """The resolved config. With several runs: the keys that differ, then every config with those lines marked."""
    if not any(run.config for run in runs):
        return ""
    if len(runs) == 1:
        content = f'<div class="card">{_yaml(runs[0].config, changed=[])}</div>'
    else:
        changed = differences([run.config for run in runs])
        blocks = "".join(
            f'<div class="card"><h3>{dot(index)}{escape(run.name)}</h3>{_yaml(run.config, changed=changed)}</div>'
            for index, run in enumerate(runs)
        )
        whole = f'<details><summary>The whole configs</summary><div class="columns">{blocks}</div></details>'
        content = _differing(runs, changed) + whole
    return f'<section><div class="bar"><h2>Config</h2></div>{content}</section>'


def _differing(runs: Sequence[Run], changed: Sequence[str]) -> str:
    heads = "".join(f'<th scope="col">{dot(index)}{escape(run.name)}</th>' for index, run in enumerate(runs))
    flat = [flatten(run.config) for run in runs]
    body = ""
    for key in changed:
        cells = "".join(f"<td>{escape(scalar(one[key])) if key in one else DASH}</td>" for one in flat)
        body += f'<tr><th scope="row">{escape(key)}</th>{cells}</tr>'
    if not changed:
        return '<p class="note">No key differs but output_dir.</p>'
    return (
        '<div class="card scroll" tabindex="0"><table class="keys">'
        f'<thead><tr><th scope="col">What differs</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _yaml(config: dict[str, Any], *, changed: Sequence[str]) -> str:
    lines = ""
    for dotted, line in yaml_lines(config):
        key, colon, value = line.partition(":")
        mark = ' class="changed"' if dotted in changed else ""
        lines += f'<span{mark}><b class="key">{escape(key)}</b>{colon}{escape(value)}</span>'
    return f'<pre class="yaml">{lines}</pre>'


def yaml_lines(values: dict[str, Any], prefix: str = "", indent: str = "") -> Iterator[tuple[str, str]]:
    """Each line of the YAML with the dotted key that it sets."""
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield dotted, f"{indent}{key}:"
            yield from yaml_lines(value, f"{dotted}.", indent + "  ")
        else:
            yield dotted, f"{indent}{key}: {scalar(value)}"


def scalar(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1_000_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def reproduce_section(runs: Sequence[Run]) -> str:
    """The commands that made the runs, and those that come next."""
    commands: list[tuple[str, str]] = []
    for run in runs:
        what = "this run" if len(runs) == 1 else run.name
        command = run.manifest.get("command")
        if command:
            text = shlex.join(str(word) for word in command) if isinstance(command, list) else str(command)
            commands.append((f"What made {what}", text))
        commands.append((f"Repeat {what} from its resolved config", f"tt run {_typed(run.path / 'config.yaml')}"))
        if len(runs) == 1:
            commands.append(("Talk to it", f"tt chat {_typed(run.path)}"))
    commands.append(("Write this page again", "tt report " + " ".join(_typed(run.path) for run in runs)))
    rows = "".join(
        f'<div class="command"><div><p class="why">{escape(why)}</p><pre>{escape(command)}</pre></div>'
        '<button type="button" class="quiet" hidden>Copy</button></div>'
        for why, command in commands
    )
    return f'<section><div class="bar"><h2>Reproduce</h2></div><div class="card">{rows}</div></section>'


def _typed(path: Path) -> str:
    """As one would type it: relative where the path is below the working directory."""
    here, absolute = Path.cwd(), path.absolute()
    return shlex.quote(str(absolute.relative_to(here) if absolute.is_relative_to(here) else path))


def manifest_section(runs: Sequence[Run]) -> str:
    """What the manifest records, as it is."""
    blocks = ""
    for index, run in enumerate(runs):
        flat = flatten({key: value for key, value in run.manifest.items() if key not in SHOWN_ELSEWHERE})
        packages = [f"{key.removeprefix(PACKAGES)} {flat.pop(key)}" for key in list(flat) if key.startswith(PACKAGES)]
        flat |= {"packages": packages} if packages else {}
        if run.manifest:
            facts = "".join(f"<dt>{escape(key)}</dt><dd>{clipped(_fact(value))}</dd>" for key, value in flat.items())
            name = f"<h3>{dot(index)}{escape(run.name)}</h3>" if len(runs) > 1 else ""
            blocks += f'<div class="card">{name}<dl class="manifest">{facts}</dl></div>'
    if not blocks:
        return ""
    blocks = f'<div class="columns">{blocks}</div>'
    if len(runs) > 1:
        blocks = f"<details><summary>The whole manifests</summary>{blocks}</details>"
    return f'<section><div class="bar"><h2>Manifest</h2></div>{blocks}</section>'


def _fact(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_fact(item) for item in value) or DASH
    return DASH if value is None or value == {} else str(value)
