"""How far each family is from transformers, both against fp64: writes docs/parity.md. `nox -s bench -- parity`."""

import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import tt_models
from tt_models.auto import FAMILIES
from tt_models.parity import certify, is_within
from tt_train.run.environment import cpu_name

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "packages/tt-models/tests"))
from conftest import random_hf_config, reference_of  # noqa: E402

SEEDS = range(5)
COLUMNS = {
    "logits": "logits",
    "gradients": "gradients",
    "packed_logits": "packed rows",
    "cached_decoding": "with a cache",
}
PAGE = """# Equal to transformers

Each family of `tt_models` is compared with the model of the same name in transformers, in five random configurations
with the same random weights. Both run in fp32, and transformers also runs in fp64, which counts as the truth. A figure
is the largest error as a share of the largest value, the worst of the five; beside it, in brackets, is the error of
transformers. Two correct implementations round differently. A family passes if its error is at most {factor:.0f} times
that of transformers, and if the truth would choose each token of its greedy answer.

`tt verify RUN` makes the same comparison with your own weights.

| family | {columns} | greedy tokens that differ |
|---|{rules}---|
{rows}

Made by `nox -s bench -- parity` with torch {torch}, transformers {transformers} and Python {python}, one thread, on an
{cpu}.
The same comparison is a test: `packages/tt-models/tests/test_parity.py`.
"""


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for family in FAMILIES:
        found = [_certificate(family, seed) for seed in SEEDS]
        cells = []
        for name in COLUMNS:
            ours, theirs = (max(one[kind].get(name, 0.0) for one in found) for kind in ("errors", "reference_errors"))
            cells.append(f"{ours:.1e} ({theirs:.1e})")
        cells.append(str(sum(one["errors"]["greedy_differences"] for one in found)))
        rows.append(f"| {family} | {' | '.join(cells)} |")
        print(rows[-1])
        if not all(is_within(one) for one in found):
            sys.exit(f"{family} is not within the limits")
    page = PAGE.format(
        factor=tt_models.parity.FACTOR, columns=" | ".join(COLUMNS.values()), rules="---|" * len(COLUMNS),
        rows="\n".join(rows), torch=torch.__version__.partition("+")[0], transformers=version("transformers"),
        python=platform.python_version(), cpu=cpu_name(),
    )  # fmt: skip
    (ROOT / "docs/parity.md").write_text(page, encoding="utf-8")


def _certificate(family: str, seed: int) -> dict[str, dict[str, float]]:
    config = random_hf_config(family, seed)
    reference = reference_of(config)
    model = tt_models.build(tt_models.config_from_hf(config), device="meta")
    model.to_empty(device="cpu").load_state_dict(reference.state_dict())
    return certify(model.eval(), reference)


if __name__ == "__main__":
    main()
