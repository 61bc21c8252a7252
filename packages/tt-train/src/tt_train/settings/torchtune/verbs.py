"""What is a recipe in torchtune and a verb here, as a command: for its names, and for its YAML."""

from collections.abc import Mapping
from typing import Any

from tt_train.errors import shell_word

# of torchtune's config eleuther_evaluation
EVALUATION: dict[str, Any] = {"tasks": ["truthfulqa_mc2"], "batch_size": 32, "max_seq_length": 4096, "seed": 217}


def evaluation(values: Mapping[str, Any]) -> str:
    """The ``tt eval`` line that does what eleuther_eval does with these values of its YAML, keys joined by dots."""
    tasks = values.get("tasks")
    listed = ",".join(map(str, tasks)) if isinstance(tasks, list) else str(tasks or "TASKS")
    line = [
        "tt eval",
        shell_word(str(values.get("checkpointer.checkpoint_dir") or "MODEL")),
        "--tasks",
        shell_word(listed),
    ]
    options = {"limit": "--limit", "batch_size": "--batch-size", "max_seq_length": "--max-length", "seed": "--seed"}
    for key, option in options.items():
        if values.get(key) is not None:
            line += [option, shell_word(str(values[key]))]
    if str(values.get("dtype")) in ("fp32", "bf16"):
        line += ["--dtype", str(values["dtype"])]
    quantizes = values.get("quantizer") is not None or values.get("quantizer._component_") is not None
    return " ".join(line) + (", after tt quantize has written MODEL" if quantizes else "")
