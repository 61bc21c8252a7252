"""The ``tt`` command: a table of verbs, of which only the one that is asked for is imported."""

import os
from collections.abc import Sequence

import click

from tt_cli import __version__, errors
from tt_cli.group import LazyGroup
from tt_cli.terminal import open_closed_streams

# section of `tt --help` -> verb -> module that holds it as `command`, its line of help
SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "Start": {
        "quickstart": ("tt_cli.verbs.quickstart", "Try everything on made-up data: no model, no network, a CPU."),
        "ls": ("tt_cli.verbs.ls", "List recipes, configs, models or runs."),
        "cat": ("tt_cli.verbs.cat", "Show a config with every default filled in."),
        "cp": ("tt_cli.verbs.cp", "Copy a recipe or config to edit it."),
    },
    "Train": {
        "data": ("tt_cli.verbs.data", "Show rows as the model sees them (tt data show)."),
        "validate": ("tt_cli.verbs.validate", "Check a config, its model and its rows without loading weights."),
        "plan": ("tt_cli.verbs.plan", "Show the memory, steps and time that a run will need."),
        "run": ("tt_cli.verbs.run", "Train with a recipe, a config or your own recipe file."),
        "watch": ("tt_cli.verbs.watch", "Follow a run from another terminal."),
        "report": ("tt_cli.verbs.report", "Write an HTML page and a PNG about one run or several."),
    },
    "Use a model": {
        "chat": ("tt_cli.verbs.chat", "Chat with the newest run, or with any run or model."),
        "generate": ("tt_cli.verbs.generate", "Answer one prompt with a run or a model."),
        "eval": ("tt_cli.verbs.eval", "Evaluate runs or models on benchmark tasks or on your own rows."),
        "merge": ("tt_cli.verbs.merge", "Write a run as one Hugging Face model, adapter merged."),
        "quantize": ("tt_cli.verbs.quantize", "Write a run or a model in 8 or 4 bits."),
        "export": ("tt_cli.verbs.export", "Write a run for vLLM, llama.cpp or Ollama."),
    },
    "Model files": {
        "download": ("tt_cli.verbs.download", "Download a model from the hub, checked by hash."),
        "upload": ("tt_cli.verbs.upload", "Upload a model or adapter to the hub, with a model card."),
        "migrate": ("tt_cli.verbs.migrate", "Turn a YAML file of torchtune into one of tt."),
        "convert": ("tt_cli.verbs.convert", "Convert a model to Hugging Face, Meta or torchtune files."),
        "verify": ("tt_cli.verbs.verify", "Compare a model with the same model in transformers."),
    },
    "Diagnose": {
        "rm-checkpoints": ("tt_cli.verbs.rm_checkpoints", "Free the space of a run's checkpoints."),
        "completion": ("tt_cli.verbs.completion", "Print the completion script of bash, zsh or fish."),
        "env": ("tt_cli.verbs.env", "Show versions and devices, for a bug report."),
    },
}

cli = LazyGroup(
    "tt",
    sections=SECTIONS,
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
