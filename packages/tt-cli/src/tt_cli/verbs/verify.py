"""``tt verify``: is this model here what it is in transformers?"""

import json
from pathlib import Path

import click

from tt_cli.group import Verb
from tt_cli.options import SEED, json_option
from tt_cli.terminal import print_json


@click.command(
    "verify",
    cls=Verb,
    examples=[
        "tt verify Qwen/Qwen3-0.6B",
        "tt verify merged -o certificate.json",
    ],
)
@click.argument("model")
@click.option(
    "-o", "--output", metavar="FILE", type=click.Path(path_type=Path), help="Also write the certificate to this file."
)
@click.option("--seed", type=SEED, metavar="N", default=0, show_default=True, help="Random seed of the test tokens.")
@json_option
@click.pass_context
def command(ctx: click.Context, model: str, output: Path | None, seed: int, as_json: bool) -> None:
    """Compare MODEL with transformers: logits, gradients, cached decoding, and the directory written back.

    Both compute in fp32, and both are compared with transformers in fp64. MODEL is equal if its errors are about as
    small as those of transformers. The exit code is 1 if an error is above its limit. Needs transformers.
    """
    from tt_ckpt.redaction import redact_data
    from tt_train.models.verify import verify

    if output is not None and output.exists() and not _is_certificate(output):
        raise click.UsageError(f"{output} exists and is not a certificate: name another file with -o, or remove it")
    certificate = verify(model, seed=seed)
    if output is not None:
        output.write_text(json.dumps(redact_data(certificate), indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(certificate)
    else:
        click.echo(f"{'distance to fp64':24}  {'here':>12}  {'transformers':>12}  {'limit':>12}")
        for name, error in certificate["errors"].items():
            numbers = (error, certificate["reference_errors"].get(name), certificate["limits"][name])
            click.echo("  ".join([f"{name:24}", *(f"{_number(number):>12}" for number in numbers)]))
        if not certificate["passed"] and "worst_gradient" in certificate:
            click.echo(f"the least accurate gradient: {certificate['worst_gradient']}")
        for part in certificate.get("not_reached", ()):
            click.echo(f"not reached: {part}")
        versions = ", ".join(f"{name} {version}" for name, version in certificate["versions"].items())
        verdict = "equal within rounding" if certificate["passed"] else "NOT equal"
        click.echo(f"{certificate['model']}: {verdict} ({versions})")
    if not certificate["passed"]:
        ctx.exit(1)


def _is_certificate(path: Path) -> bool:
    """Whether a file may be replaced: an older certificate, or nothing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8") or "{}")
    except (OSError, ValueError):
        return False
    return found == {} or (isinstance(found, dict) and {"passed", "errors", "versions"} <= found.keys())


def _number(number: float | str | None) -> str:
    return f"{number:.1e}" if isinstance(number, float) else "" if number is None else str(number)
