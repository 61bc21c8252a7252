"""Keys of a config that cannot be given together. A file of its own, so that a new key finds the others here."""

from tt_train.config import RunConfig, ScheduleSection


def conflicts(config: RunConfig) -> list[str]:
    """Keys that cannot be given together: both are named, and the way out."""
    found = _of_schedule(config.schedule) + _of_backward(config)
    if config.model.path is not None and config.model.name is not None:
        found.append(
            f"model: path {config.model.path} and name {config.model.name} are both given; name makes random weights: "
            "set one of them to null"
        )
    if config.adapter is not None and config.adapter.path is not None and config.adapter.init != "kaiming":
        found.append(
            f"adapter: path {config.adapter.path} and init {config.adapter.init} are both given; a trained adapter "
            "needs no initialization: leave out init, or set path to null"
        )
    if config.data.streaming and isinstance(config.data.eval, float):
        found.append("data.eval: a share of a stream (data.streaming) cannot be held out; give a separate file")
    if config.samples.exact_match and config.data.train_on == "all":
        found.append(
            "samples.exact_match: data.train_on=all trains prompts too, so that no row says where its answer begins; "
            "use data.train_on=assistant or last, or leave samples.exact_match out"
        )
    return found


def _of_schedule(schedule: ScheduleSection) -> list[str]:
    found = []
    for part in ("warmup", "decay"):
        steps, ratio = getattr(schedule, f"{part}_steps"), getattr(schedule, f"{part}_ratio")
        if steps is not None and ratio is not None:
            both = f"{part}_steps {steps} and {part}_ratio {ratio}"
            found.append(f"schedule: {both} are both given; set one of them to null")
    given = ["decay", "decay_steps", "decay_ratio"] if schedule.name != "wsd" else []
    given += ["num_cycles"] if "cosine" not in (schedule.name, schedule.decay if schedule.name == "wsd" else "") else []
    for name in given:
        if getattr(schedule, name) != getattr(ScheduleSection(), name):
            cure = "use schedule.name=cosine" if name == "num_cycles" else "use schedule.name=wsd"
            found.append(f"schedule.{name}: a {schedule.name} schedule has none; {cure}, or leave it out")
    return found


def _of_backward(config: RunConfig) -> list[str]:
    """What an update during the backward pass comes too early for."""
    if not config.optimizer_in_backward:
        alone = "max_grad_norm_of: parameter is for optimizer_in_backward; set that to true, or this to model"
        return [alone] if config.max_grad_norm_of != "model" else []
    found = []
    if config.max_grad_norm is not None and config.max_grad_norm_of == "model":
        found.append(
            f"optimizer_in_backward: the norm over all gradients (max_grad_norm {config.max_grad_norm:g}) is known "
            "only after the updates; set max_grad_norm_of=parameter to clip each parameter's gradient by its own norm, "
            "or max_grad_norm=null"
        )
    if config.on_nonfinite == "skip":
        found.append(
            "optimizer_in_backward: a gradient that is not finite is found after other weights were updated, so the "
            "step cannot be skipped; set on_nonfinite=stop"
        )
    return found
