"""What can be known of a device, an optimizer, a loss and the loggers before anything is loaded."""

import importlib.util
import inspect
import os
import re
from pathlib import Path
from typing import Any

import torch

from tt_ckpt.hub.endpoint import check_url
from tt_ckpt.ranks import is_dtensor
from tt_train.config import RunConfig, logger_options
from tt_train.devices.distributed import world
from tt_train.devices.sharding import ways
from tt_train.errors import ConfigError, counted, did_you_mean
from tt_train.losses.table import PREFERENCE_KEYS
from tt_train.optim.optimizers import decayed, make_optimizer
from tt_train.settings.keys.logger_table import LOGGER_PACKAGES, LOGGERS
from tt_train.settings.registry import OPTIMIZERS, losses_of, resolve

_DEVICES = ("auto", "cpu", "cuda", "cuda:0", "xpu", "mps")


def pick_device(name: str) -> torch.device:
    """``auto``: what torch.accelerator finds (CUDA, ROCm, which is called cuda, XPU or MPS), else the CPU.

    Of several processes each takes the device of its local rank. A device that is unknown or absent is refused.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if found is None else _of_rank(found.type)
    if not re.fullmatch(r"cpu|mps|(cuda|xpu)(:\d{1,3})?", name):
        near = "; did you mean 'cuda'?" if re.search("gpu|rocm|hip", name.lower()) else did_you_mean(name, _DEVICES)
        raise ConfigError([f"device: unknown device {name!r}{near}; known: {', '.join(_DEVICES)}"])
    device = torch.device(name)
    cure = "use device=cpu or device=auto"
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(
            [f"device: mps is not available on this machine or in this torch {torch.__version__}; {cure}"]
        )
    count, kind = _device_count(device.type), device.type.upper()
    if device.type in ("cuda", "xpu") and (device.index or 0) >= count:
        has = torch.version.cuda or torch.version.hip if device.type == "cuda" else torch.xpu._is_compiled()
        built = "" if has else f" (torch {torch.__version__} is built without {kind})"
        raise ConfigError([f"device: {name} asked for, {counted(count, f'{kind} device')} visible{built}; {cure}"])
    if device.index is not None and world().size > 1:
        raise ConfigError([f"device: {name} is one device for {world().size} processes; use device={device.type}"])
    return device if device.type in ("cpu", "mps") or device.index is not None else _of_rank(device.type)


def _device_count(kind: str) -> int:
    return int(torch.get_device_module(kind).device_count()) if kind in ("cuda", "xpu") else 1


def _of_rank(kind: str) -> torch.device:
    """The device of this process. SLURM may show each task its own device alone."""
    index = world().local_rank
    return torch.device(kind, index) if kind != "mps" and 0 < index < _device_count(kind) else torch.device(kind)


def too_many_processes(config: RunConfig, nproc: int) -> list[str]:
    """A line if ``nproc`` processes of this machine have fewer GPUs: each needs one of its own."""
    device = pick_device(config.device)
    count = _device_count(device.type)
    if device.type == "cpu" or nproc <= count:
        return []
    return [
        f"--nproc: {nproc} processes, {counted(count, f'{device.type.upper()} device')} visible; use --nproc {count}, "
        "or device=cpu"
    ]


def device_notes(config: RunConfig, device: torch.device | None) -> list[str]:
    """What ``auto`` took, and what that cannot do of what the config asks for."""
    if device is None or config.device != "auto":
        return []
    if device.type == "cpu":
        slow = config.model.dtype == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        more = "; this CPU has no instructions for bf16 and emulates it: model.dtype=fp32 may be faster" if slow else ""
        return [f"device: auto took the CPU, since torch {torch.__version__} sees no accelerator{more}"]
    name = torch.get_device_module(device.type).get_device_name(device) if device.type != "mps" else "Apple GPU"
    dense = config.data.packing and device.type != "cuda"  # see tt_models.decoder
    more = "; it has no flex_attention, so packed rows need memory quadratic in data.max_seq_len" if dense else ""
    return [f"device: auto took {device} ({name}){more}"]


def mistakes(config: RunConfig, device: torch.device | None, *, ranks: int = 1) -> list[str]:
    """A line for each thing that the device, the optimizer, the loss or the loggers cannot do in so many processes."""
    found = _device_mistakes(config, device) if device is not None else []
    found += _optimizer_mistakes(config, device if device is not None and not found else torch.device("cpu"), ranks)
    found += parallel_mistakes(config, ranks)
    return found + _loss_mistakes(config) + logger_mistakes(config) + _data_mistakes(config)


def _device_mistakes(config: RunConfig, device: torch.device) -> list[str]:
    wants_bf16 = [key for key, section in (("model.dtype", config.model), ("adapter.dtype", config.adapter))
                  if section is not None and section.dtype == "bf16"]  # fmt: skip
    if device.type == "cuda" and wants_bf16 and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            what = f"{torch.cuda.get_device_name(device)} (compute capability {'.'.join(map(str, capability))})"
            return [f"{key}: {what} does not compute in bf16; use {key}=fp32" for key in wants_bf16]
    if device.type != "cpu":
        try:
            torch.ones(1, device=device, dtype=torch.bfloat16 if wants_bf16 else torch.float32).add_(1)
        except (RuntimeError, TypeError) as error:
            return [f"device: {device} does not answer: {str(error).splitlines()[0]}"]
    return []


def parallel_mistakes(config: RunConfig, size: int) -> list[str]:
    """What does not fit the ``size`` processes of the run."""
    if size == 1:
        return []
    try:
        _, shard = ways(config, size)
    except ValueError as error:
        return [f"parallel: {error}"]
    found, adapter = [], config.adapter
    if config.parallel.cpu_offload and shard == 1:
        found.append(
            "parallel.cpu_offload: offloads shards, and nothing is sharded; set parallel.shard, or leave it out"
        )
    if shard > 1 and adapter is not None and adapter.dtype == "bf16":
        found.append(
            "adapter.dtype: shards train in fp32 and are not rounded to bf16; leave it out, or set parallel.shard=1"
        )
    return found


def _optimizer_mistakes(config: RunConfig, device: torch.device, size: int) -> list[str]:
    """What the optimizer says to its arguments, to a step of one number, and to a step in the backward pass."""
    name, batch, micro = config.optimizer.name, config.batch_size, config.micro_batch_size
    found = []
    if config.optimizer_in_backward and batch > micro * size:
        found.append(
            f"optimizer_in_backward: batch_size {batch} is accumulated over micro-batches of {micro}, and each would "
            f"be a step of its own; set micro_batch_size={batch // size} or batch_size={micro * size}"
        )
    section, parameters = config.optimizer, _like_trained(config, device)
    key, cure = ("optimizer.options", "correct or leave out an option") if section.options else (
        "optimizer", "use another one")  # fmt: skip
    try:
        optimizer = make_optimizer(decayed(parameters), section)
    except ConfigError as error:
        return found + error.problems
    except Exception as error:  # whatever torch's, or somebody's own, constructor raises
        return [*found, f"{key}: {name} cannot be made of these values: {_said(error)}; {cure}"]
    if device.type != "cpu" and name.startswith("adamw") and name != "adamw":
        return found  # torchao's would be compiled
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except Exception as error:
        where = str(device)
        if is_dtensor(parameters[0]):
            key, where, cure = "optimizer", f"shards on {device}", "set parallel.shard=1, or use another one"
        found.append(f"{key}: {name} cannot make a step on {where}: {_said(error)}; {cure}")
    return found


def _like_trained(config: RunConfig, device: torch.device) -> list[torch.nn.Parameter]:
    """A parameter of each number of dimensions that the run trains: some optimizers take matrices alone."""
    adapter = config.adapter
    vectors = adapter is None or adapter.use_dora or bool(adapter.modules_to_save)
    tensors = [torch.zeros(shape, device=device) for shape in ([(1, 1), (1,)] if vectors else [(1, 1)])]
    return [torch.nn.Parameter(tensor) for tensor in _as_shards(config, tensors)]


def _as_shards(config: RunConfig, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """These tensors as shards of this rank, if it has any and the optimizer is one's own, which may not know shards.

    Those of torch and torchao know them.
    """
    try:
        replicate, shard = ways(config, world().size)
    except ValueError:  # _parallel_mistakes says so
        return tensors
    if shard == 1 or config.optimizer.name in OPTIMIZERS:
        return tensors
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh(tensors[0].device.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))["shard"]
    return [DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False) for tensor in tensors]


def _said(error: Exception) -> str:
    """The first line of an error, with its kind if that is all that it says."""
    line = next(iter(str(error).splitlines()), "")
    return line if line and not isinstance(error, KeyError) else f"{type(error).__name__} {line}".strip()


def _loss_mistakes(config: RunConfig) -> list[str]:
    """Keys of the section ``loss`` that the function does not take; what a registered one takes is known before."""
    loss: Any = config.loss
    accepted: Any = inspect.signature(resolve(loss.name, losses_of(loss))).parameters
    if any(value.kind is value.VAR_KEYWORD for value in accepted.values()):
        return []
    return [f"loss.{key}: {loss.name} takes none; leave it out" for key in PREFERENCE_KEYS
            if key not in accepted and getattr(loss, key, None) != getattr(type(loss), key, None)]  # fmt: skip


def _data_mistakes(config: RunConfig) -> list[str]:
    if config.data.cache_dir is not None and Path(config.data.cache_dir).is_file():
        return [f"data.cache_dir: {config.data.cache_dir} is a file; name a folder"]
    return []


def logger_mistakes(config: RunConfig) -> list[str]:
    """A line for each logger whose package is not installed, or that is named twice."""
    names = list(config.loggers or ())
    found = [f"loggers: {name} is named twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    options = logger_options(config)
    for name in options:
        package = LOGGER_PACKAGES.get(name)
        if package is not None and not is_installed(package):
            found.append(f"loggers: {name} is not installed; pip install {package.replace('_', '-')}, or leave it out")
        found += _call_mistakes(name, options[name]) if name not in LOGGER_PACKAGES else []
    for name, variable in _RECEIVES_KEY.items():
        if name in options and (url := options[name].get("tracking_uri") or os.environ.get(variable)):
            if name == "mlflow" and not {"MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"} & os.environ.keys():
                continue  # a server without a login, a folder or a database
            try:
                check_url(variable, str(url))
            except ValueError as error:
                found.append(str(error))
    return found


def _call_mistakes(name: str, options: dict[str, Any]) -> list[str]:
    """A line if a logger of one's own does not take its options."""
    try:
        inspect.signature(resolve(name, LOGGERS)).bind(None, {}, 0, **options)
    except TypeError as error:
        return [f"loggers.{name}: cannot be called with (run, config, step) and its options: {error}"]
    return []


# where the client of a logger sends its key
_RECEIVES_KEY = {"wandb": "WANDB_BASE_URL", "mlflow": "MLFLOW_TRACKING_URI", "comet": "COMET_URL_OVERRIDE"}


def is_installed(package: str) -> bool:
    """Whether a module can be imported; a folder that is only called so, as wandb leaves one, does not count."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
