"""torchtune's distillation and quantization-aware training as our recipes ``kd`` and ``qat``.

A file of its own because these have keys that no other recipe has.
"""

from pathlib import Path

from tt_train.errors import ConfigError
from tt_train.settings.torchtune import tables
from tt_train.settings.torchtune.carry import Carry


def carry_teacher(carry: Carry) -> None:
    """``kd``: the teacher, the divergence and its share. The checkpointer of the teacher names its directory."""
    builder = carry.component("teacher_model").rpartition(".")[2]
    hub, _ = tables.MODELS.get(builder, ("", None))
    carry.section("teacher_model")
    carry.component("teacher_checkpointer")
    folder = str(carry.section("teacher_checkpointer").get("checkpoint_dir") or "")
    carry.set("kd.teacher", folder or hub or None)
    if not folder and not hub:
        carry.say("kd.teacher", "missing; give a model directory or hub id")
    elif folder and not Path(folder).is_dir():
        known = f"; the hub id of these weights is {hub}" if hub else ""
        carry.say("kd.teacher", f"{folder} is not here{known}; it must hold safetensors")
    dtype = str(carry.theirs.get("dtype", "bf16"))
    carry.set("kd.teacher_dtype", "fp32" if dtype in ("fp32", "float32") else "bf16")
    path = carry.component("kd_loss")
    carry.section("kd_loss")
    name = path.rpartition(".")[2].removesuffix("Loss").removesuffix("WithChunkedOutput")
    divergences = {"ForwardKL": "forward", "ReverseKL": "reverse"}
    if name not in divergences:
        raise ConfigError([f"kd_loss: {path or 'missing'}: the divergence is forward or reverse here; choose one"])
    carry.set("kd.divergence", divergences[name])
    if name == "ForwardKL":
        carry.say("kd_loss", "torchtune adds the teacher's entropy, a constant; the gradients are the same")
    share = carry.take("kd_ratio", 0.5)
    carry.set("kd.cross_entropy_weight", 1 - share)


def carry_quantizer(carry: Carry) -> None:
    """``quantization``: torchtune's quantizers of 4 bits, with inputs of 8 bits or without."""
    path, options = carry.component("quantizer"), carry.section("quantizer")
    name = path.rpartition(".")[2].removesuffix("ModuleSwap")
    if name not in ("Int8DynActInt4WeightQATQuantizer", "Int4WeightOnlyQATQuantizer"):
        raise ConfigError([f"quantizer: {path} is not known; write quantization yourself: tt cat qat"])
    carry.set("quantization", {"weights": "int4", "group_size": options.pop("groupsize", 256)})
    if name.startswith("Int8DynAct"):
        carry.set("quantization.activations", "int8")
    for key in options:
        carry.say(f"quantizer.{key}", "not known; see docs/quantization-aware.md for what quantization takes")
    if carry.take("fake_quant_after_n_steps"):
        carry.say("fake_quant_after_n_steps", "weights are rounded from the first step on")
    adapter = carry.ours.get("adapter")
    if adapter is not None:
        carry.say("quantizer", "torchtune rounds the base alone, here the sum of base and adapter is rounded: what a "
                  "merge stores")  # fmt: skip
        if adapter["dropout"]:
            carry.say("model.lora_dropout", f"{adapter['dropout']}: qat has no dropout in adapters; it is 0 here")
            adapter["dropout"] = 0.0
