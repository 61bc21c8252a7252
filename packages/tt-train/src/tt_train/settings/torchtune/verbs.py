"""What is a recipe in torchtune and a verb here, as a command: for its names, and for its YAML."""

from collections.abc import Callable, Mapping
from typing import Any

from tt_train.errors import shell_word

# of torchtune's config eleuther_evaluation
EVALUATION: dict[str, Any] = {"tasks": ["truthfulqa_mc2"], "batch_size": 32, "max_seq_length": 4096, "seed": 217}
# and of quantization
QUANTIZATION: dict[str, Any] = {"quantizer._component_": "Int4WeightOnlyQuantizer", "quantizer.groupsize": 256}
_QUANTIZERS = {"Int8WeightOnlyQuantizer": "int8", "Int4WeightOnlyQuantizer": "int4",
               "Int8DynActInt4WeightQuantizer": "int8-dynamic-int4", "Int4WeightOnlyGPTQQuantizer": "int4"}  # fmt: skip


def quantization(values: Mapping[str, Any]) -> str:
    """The ``tt quantize`` line that does what quantize does with these values of its YAML, keys joined by dots."""
    kind = str(values.get("quantizer._component_")).rpartition(".")[2]
    folder, to = str(values.get("checkpointer.checkpoint_dir") or "MODEL"), _QUANTIZERS.get(kind, "FORMAT")
    line = ["tt quantize", shell_word(folder), "-o DIR --to", to]
    if values.get("quantizer.groupsize") is not None and to != "int8":
        line += ["--group-size", shell_word(str(values["quantizer.groupsize"]))]
    return " ".join(line) + (", the nearest to GPTQ, which is not offered" if "GPTQ" in kind else "")


# of torchtune's config generation
GENERATION: dict[str, Any] = {"prompt": "Hello, my name is", "max_new_tokens": 300, "temperature": 0.8, "top_k": 300,
                              "seed": 1234}  # fmt: skip


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


def generation(values: Mapping[str, Any]) -> str:
    """The ``tt generate`` line that does what generate does with these values; it puts the prompt into no template."""
    line = ["tt generate", shell_word(str(values.get("checkpointer.checkpoint_dir") or "MODEL")), "--raw", "-p"]
    line.append(shell_word(str(values.get("prompt") or "TEXT")))
    for key in ("max_new_tokens", "temperature", "top_k", "seed"):
        if values.get(key) is not None:
            line += [f"--{key.replace('_', '-')}", shell_word(str(values[key]))]
    quantizes = values.get("quantizer") is not None or values.get("quantizer._component_") is not None
    return " ".join(line) + (", after tt quantize has written MODEL" if quantizes else "")


# torchtune's recipes and configs that are verbs here: the values of its config, and the line that they make
VERBS: dict[str, tuple[dict[str, Any], Callable[[Mapping[str, Any]], str]]] = {
    **dict.fromkeys(("eleuther_eval", "eleuther_evaluation"), (EVALUATION, evaluation)),
    **dict.fromkeys(("generate", "generation"), (GENERATION, generation)),
    **dict.fromkeys(("quantize", "quantization"), (QUANTIZATION, quantization)),
}
