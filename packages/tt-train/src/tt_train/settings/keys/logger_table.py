"""The loggers that a config may name: what they stand for, which package each needs, and its options.

A file of its own because the names of torchtune, which the registry knows, need it too.
"""

from collections.abc import Mapping
from typing import Any

from tt_train.errors import did_you_mean

LOGGERS = {"tensorboard": "tt_train.run.loggers.TensorBoard", "wandb": "tt_train.run.loggers.WandB",
           "trackio": "tt_train.run.loggers.Trackio", "mlflow": "tt_train.run.loggers.MLflow",
           "comet": "tt_train.run.loggers.Comet"}  # fmt: skip
# the module that must be installed for each, as pip calls it if that is another name, and its options
LOGGER_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow",
                   "comet": "comet_ml"}  # fmt: skip
LOGGER_OPTIONS: dict[str, tuple[str, ...]] = {
    "tensorboard": (),
    "wandb": ("project", "entity", "group", "job_type", "name", "notes", "tags", "mode"),
    "trackio": ("project", "name", "group", "space_id"),
    "mlflow": ("tracking_uri", "experiment", "run_name"),
    "comet": ("project", "workspace", "name", "tags", "mode"),
}
_LOGGER_MODES = {"wandb": ("online", "offline", "disabled"), "comet": ("online", "offline")}


def option_mistakes(loggers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Options that a registered logger does not have, or whose value is of the wrong kind. Values are not shown: a key
    may be among them."""
    found = []
    for name, options in loggers.items():
        for option, value in options.items() if name in LOGGERS else ():
            key = f"loggers.{name}.{option}"
            known = LOGGER_OPTIONS[name]
            if "key" in option or "token" in option:
                found.append(f"{key}: a key is never in a config, since a run keeps it; use the client's login")
            elif option not in known:
                cure = did_you_mean(option, known) + (f"; known: {', '.join(known)}" if known else "; it has none")
                found.append(f"{key}: unknown option{cure}")
            elif option == "tags":
                if not isinstance(value, list) or not all(isinstance(tag, str) for tag in value):
                    found.append(f"{key}: expected a list of text such as [a, b]")
            elif not isinstance(value, str):
                found.append(f"{key}: expected text; put a number in quotes, as in {option}: '7'")
            elif option == "mode" and value not in (modes := _LOGGER_MODES[name]):
                found.append(f"{key}: expected one of {', '.join(modes)}{did_you_mean(value, modes)}")
    return found
