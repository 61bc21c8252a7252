"""The ``tt`` command: a table of verbs, of which only the one that is asked for is imported."""

import os
from collections.abc import Sequence

import click

from tt_cli import __version__, errors
from tt_cli.group import LazyGroup
from tt_cli.terminal import open_closed_streams

# verb -> module that holds it as `command`, its line in `tt --help`
VERBS: dict[str, tuple[str, str]] = {
    "quickstart": ("tt_cli.verbs.quickstart", "The whole story in two minutes on a CPU: no model, no network."),
    "run": ("tt_cli.verbs.run", "Train: a recipe, a config or your own recipe file."),
    "chat": ("tt_cli.verbs.chat", "Talk to the newest run, or to a run or model that you name."),
    "generate": ("tt_cli.verbs.generate", "Answer one prompt with a run or a model."),
    "merge": ("tt_cli.verbs.merge", "Write a run as one Hugging Face model, adapter merged."),
    "export": ("tt_cli.verbs.export", "Write a run for vLLM, llama.cpp or Ollama, with the commands to run it."),
    "convert": ("tt_cli.verbs.convert", "A model directory from Hugging Face, Meta or torchtune to another of them."),
    "verify": ("tt_cli.verbs.verify", "Certify that a model is here what it is in transformers."),
    "download": ("tt_cli.verbs.download", "Fetch a model from the hub, checked by hash."),
    "upload": ("tt_cli.verbs.upload", "Send a model or adapter to the hub, with a model card."),
    "report": ("tt_cli.verbs.report", "One HTML page and PNG about a run, or comparing several."),
    "ls": ("tt_cli.verbs.ls", "List recipes and configs, models, or runs."),
    "cat": ("tt_cli.verbs.cat", "Show a config with every default filled in."),
    "cp": ("tt_cli.verbs.cp", "Copy a recipe or config, to edit it."),
    "validate": ("tt_cli.verbs.validate", "Check a config, its model and its data, before weights load."),
    "data": ("tt_cli.verbs.data", "Look at rows as the model sees them."),
    "env": ("tt_cli.verbs.env", "Versions and devices, for a bug report."),
}

cli = LazyGroup(
    "tt",
    table=VERBS,
    help="Fine-tune, evaluate and run open language models with plain PyTorch.\n\n"
    "Start with `tt quickstart`, or with\n\n"
    "  tt run sft model.path=MODEL data.train=rows.jsonl adapter.rank=8",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
cli.params.append(
    click.Option(
        ["--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=lambda ctx, _param, asked: _print_version(ctx) if asked and not ctx.resilient_parsing else None,
        help="Show the version and exit.",
    )
)


def _print_version(ctx: click.Context) -> None:
    click.echo(f"tt {__version__}")
    ctx.exit()


def main(args: Sequence[str] | None = None) -> int:
    """Run ``tt`` with ``args`` (default: the command line's) and return its exit code."""
    programs = os.environ.get("PATH", "").split(os.pathsep)  # a relative one is in a folder that may be anybody's
    os.environ["PATH"] = os.pathsep.join(filter(os.path.isabs, programs)) or os.defpath
    open_closed_streams()
    return errors.run(cli, args)
