"""torchtune's batches, optimizer, memory switches and outputs as ours.

A file of its own so that ``migrate`` holds what a config is, and this how it trains.
"""

from pathlib import Path

from tt_train.settings.keys.logger_table import LOGGER_OPTIONS
from tt_train.settings.torchtune import tables
from tt_train.settings.torchtune.carry import Carry


def carry_steps(carry: Carry) -> None:
    """Batches, epochs and steps."""
    micro = carry.take("batch_size", 1)
    accumulation = carry.take("gradient_accumulation_steps", 1) or 1
    carry.set("batch_size", micro * accumulation * carry.devices)
    carry.set("micro_batch_size", micro)
    if carry.devices == 1:
        carry.say("batch_size", f"{micro * accumulation} per step is torchtune's on one GPU; for N GPUs: --devices N")
    epochs, most = carry.take("epochs", 1), carry.take("max_steps_per_epoch")
    carry.set("epochs", epochs)
    if most:
        carry.set("max_steps", most * epochs)
        carry.say("max_steps_per_epoch", "max_steps counts over the whole run, also if an epoch has fewer steps")
    if epochs > 1:
        carry.say("epochs", "torchtune wrote a checkpoint after each epoch; here save_every says it, in steps")
    seed = carry.take("seed")
    carry.set("seed", seed or 0)
    if seed is None:
        carry.say("seed", "null drew a random seed; here it is 0")
    if clip := carry.take("clip_grad_norm"):
        carry.set("max_grad_norm", None if str(clip) == "inf" else float(clip))
    else:
        carry.set("max_grad_norm", None)
    if every := carry.take("run_val_every_n_steps"):
        carry.set("eval_every", every)
    _carry_schedule(carry)


def _carry_schedule(carry: Carry) -> None:
    path, options = carry.component("lr_scheduler"), carry.section("lr_scheduler")
    if path.endswith("get_cosine_schedule_with_warmup"):
        carry.set("schedule", {"name": "cosine", "warmup_steps": options.get("num_warmup_steps", 0)})
        if options.get("num_cycles", 0.5) != 0.5:
            carry.set("schedule.num_cycles", options["num_cycles"])
        carry.say("lr_scheduler", "torchtune made step 1 at rate 0; here the warm-up begins above 0")
        return
    carry.set("schedule", {"name": "constant", "warmup_steps": 0})
    if path:
        carry.say("lr_scheduler", f"{path} is not known; the rate is constant")


def carry_optimizer(carry: Carry) -> None:
    path, options = carry.component("optimizer"), carry.section("optimizer")
    name, differs = tables.OPTIMIZERS.get(path, ("adamw", f"{path} is not known; adamw with the same lr"))
    decays = "AdamW" in path or path not in tables.OPTIMIZERS
    lr = options.pop("lr", 1e-3)
    carry.set("optimizer", {"name": name, "lr": float(lr), "weight_decay": options.pop("weight_decay", 0.01 * decays)})
    for key in ("betas", "eps", "momentum"):
        if key in options:
            carry.set(f"optimizer.{key}", options.pop(key))
    if differs:
        carry.say("optimizer", differs)
    for key in options:
        if f"optimizer.{key}" not in tables.SILENT:
            carry.say(f"optimizer.{key}", "not carried over; optimizer.options takes further arguments of the class")


def carry_memory(carry: Carry) -> None:
    if carry.take("enable_activation_checkpointing"):
        carry.set("activation_checkpointing", True)
    if mode := carry.take("ac_mode"):
        every = carry.take("ac_option")
        carry.set("activation_checkpointing", every if isinstance(every, int) else "selective")
        carry.take("ac_option")
        if mode not in ("selective", "full"):
            carry.say("ac_mode", f"{mode} is not known")
    if carry.take("enable_activation_offloading"):
        carry.set("activation_offloading", True)
    if carry.take("optimizer_in_bwd"):
        carry.set("optimizer_in_backward", True)
    if carry.take("fsdp_cpu_offload") or carry.take("fsdp.cpu_offload"):
        carry.set("parallel.cpu_offload", True)
    compiled = carry.take("compile")
    carry.set("compile", bool(compiled if not isinstance(compiled, dict) else compiled.get("model", True)))
    device = str(carry.take("device", "cuda"))
    if device != "cuda":  # auto takes it, if there is one
        carry.set("device", device)


def carry_output(carry: Carry) -> None:
    output, folder = carry.take("output_dir"), carry.ours["model"].get("path")
    if output and Path(str(output)) != Path(str(folder)):
        carry.set("output_dir", output)
    elif output:
        carry.say("output_dir", "the directory of the model; a run has its own, runs/<time>-<model>-<method>")
    path, options = carry.component("metric_logger"), carry.section("metric_logger")
    name = path.rpartition(".")[2]
    if name in tables.LOGGERS:
        ours, renamed = tables.LOGGERS[name]
        kept = {renamed.get(key, key): value for key, value in options.items()}
        known = {key: value for key, value in kept.items() if key in LOGGER_OPTIONS[ours] and value is not None}
        carry.set("loggers", {ours: {"project": "torchtune", **known} if ours == "wandb" else known})
        for key in kept.keys() - known.keys() - {"log_dir", "organize_logs"}:
            carry.say(f"metric_logger.{key}", f"{ours} has no such option here")
    elif name and name not in ("DiskLogger", "StdoutLogger"):
        carry.say("metric_logger", f"{path} is not known; metrics.jsonl has every figure")
    carry.set("log_every", carry.take("log_every_n_steps") or 1)
    carry.component("profiler")
    profiler = carry.section("profiler")
    if profiler.get("enabled"):
        first = profiler.get("wait_steps", 5) + profiler.get("warmup_steps", 3) + 1
        carry.set("profile", {
            "first_step": first, "num_steps": min(profiler.get("active_steps", 2), 20),
            "record_shapes": bool(profiler.get("record_shapes", True)),
            "with_stack": bool(profiler.get("with_stack", False)),
            "memory": bool(profiler.get("profile_memory", False)),
        })  # fmt: skip
        carry.say("profiler", "one trace is written, in profile/ of the run, and its steps are those of the optimizer")
