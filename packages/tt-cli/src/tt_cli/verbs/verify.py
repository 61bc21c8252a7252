"""``tt verify``: is this model here what it is in transformers?"""

import json
from pathlib import Path

import click

from tt_cli.group import Verb, json_option, print_json


@click.command("verify", cls=Verb)
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write the certificate to this file.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random tokens that are compared on.")
@json_option
@click.pass_context
def command(ctx: click.Context, model: str, output: Path | None, seed: int, as_json: bool) -> None:
    """Compare MODEL with transformers in fp32: logits, gradients, cached decoding, and the directory written back.

    Needs transformers. Exits with 1 where an error is above the tolerance.
    """
    from tt_train.verify import verify

    certificate = verify(model, seed=seed)
    if output is not None:
        output.write_text(json.dumps(certificate, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(certificate)
    else:
        for name, error in certificate["errors"].items():
            click.echo(f"{name:24}  {error:.1e}" if isinstance(error, float) else f"{name:24}  {error}")
        versions = ", ".join(f"{name} {version}" for name, version in certificate["versions"].items())
        verdict = "equal" if certificate["passed"] else "NOT equal"
        click.echo(f"{certificate['model']}: {verdict} within {certificate['tolerance']:.0e} ({versions})")
    if not certificate["passed"]:
        ctx.exit(1)
