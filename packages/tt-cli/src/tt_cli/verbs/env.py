"""``tt env``: what a bug report needs, and what is wrong with this machine. Starts no program, asks no network."""

import importlib.metadata
import locale
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from tt_ckpt.redaction import redact
from tt_ckpt.shown import format_size
from tt_cli.group import Verb
from tt_cli.options import json_option
from tt_cli.terminal import print_json

FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "sve", "i8mm")
VARIABLES = re.compile(
    r"(HF_|HUGGINGFACE_|TRANSFORMERS_|CUDA_|HIP_|ROCR_|NCCL_|GLOO_|OMP_|GOMP_|KMP_|MKL_|ONEDNN_|DNNL_|ATEN_|PYTORCH_|TORCH|TOKENIZERS_|SLURM_(NTASKS|PROCID|"
    r"JOB_NUM_NODES)$|(HTTPS?|ALL|NO)_PROXY$|(WORLD_SIZE|RANK|LOCAL_RANK|MASTER_ADDR|TERM|NO_COLOR|LANG|LC_ALL|TMPDIR)$)",
    re.IGNORECASE,
)
TORCH_BUILDS = "https://pytorch.org/get-started/locally/"
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}  # of a CUDA: https://docs.nvidia.com/deploy/cuda-compatibility/
LOW_DISK, LOW_MEMORY, LOW_SHARED = 10 * 2**30, 2 * 2**30, 2**28  # bytes
DECODING = {"amx": "the weight as left factor", "avx512_bf16": "a rearranged copy", "other": "as in training"}
SHARED = Path("/dev/shm")  # noqa: S108  (only its size is read)
WHEELS = ("tt-cli", "tt-train", "tt-models", "tt-peft", "tt-data", "tt-ckpt", "torchao", "torchvision", "torchaudio",
          "transformers", "peft", "trl", "datasets", "huggingface_hub", "tokenizers", "lm-eval")  # fmt: skip


@click.command(
    "env",
    cls=Verb,
    examples=[
        "tt env",
        "tt env --json",
    ],
)
@json_option
def command(as_json: bool) -> None:
    """Show versions, devices, memory, disk and settings as a block for a bug report, and what is wrong with them.

    Secrets are blanked, and the home folder is shown as ~.
    """
    facts = collect()
    problems = [problem for check in CHECKS for problem in check(facts)]
    if as_json:
        print_json({**facts, "checks": {"passed": not problems, "problems": problems}})
        return
    rows = list(_flat(facts))
    width = max(len(name) for name, _ in rows)
    click.echo("```text")  # so that a page of Markdown shows it as it is
    for name, value in rows:
        click.echo(f"{name.ljust(width)}  {value}")
    for problem in problems:
        click.echo(f"problem: {problem}")
    click.echo(f"{len(problems) or 'no'} problem{'' if len(problems) == 1 else 's'} found\n```")


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield prefix + name, ", ".join(map(str, value)) or "none"
        elif isinstance(value, int) and prefix in ("memory.", "disk."):
            yield prefix + name, format_size(value)
        else:
            yield prefix + name, "none" if value is None else str(value)


# ---- the facts -------------------------------------------------------------------------------------------------------


def collect() -> dict[str, Any]:
    """Plain data about this machine; sizes are bytes."""
    import torch

    from tt_models.cpu import attention, blocks, products
    from tt_train.run.environment import collect as of_a_run

    facts = of_a_run()
    names = {name: _installed(name) for name in WHEELS if name not in facts["packages"]}
    facts["packages"] |= {name: version for name, version in names.items() if version}
    address = {name: value for name, value in facts["variables"].items() if name == "HF_ENDPOINT"}  # without its login
    facts["variables"] = _variables() | address
    cache = _cache()
    return facts | {
        "cpu_flags": _cpu_flags(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_usable": _usable_cpus(),
        "cpu_load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "kernels": {"decode": DECODING[products.kernel()], "tiles": bool(attention.FASTER_IN), "block": blocks.BLOCK,
                    "fp32": "oneDNN" if products.BY_ONEDNN else "as torch"},
        "accelerators": [_accelerator(index) for index in range(torch.accelerator.device_count())],
        "nvidia_driver": _nvidia_driver(),
        "amd_gpu": Path("/dev/kfd").exists(),
        "memory": {**_memory(), "shared": _free(SHARED)},
        "disk": {"here": _free(Path.cwd()), "hub_cache": _free(cache), "temporary": _free(Path(_tmp()))},
        "hub_cache": _tilde(cache), "hub_token": _has_token(),
        "encoding": locale.getencoding(),
    }  # fmt: skip


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _variables() -> dict[str, str]:
    """Settings that change what torch and the hub do. Of one that may be a secret, only that it is set."""
    found = {name: value for name, value in sorted(os.environ.items()) if VARIABLES.match(name)}
    secret = re.compile("TOKEN$|KEY|SECRET|PASS", re.IGNORECASE)
    return {
        name: "[set]" if secret.search(name) else _tilde(re.sub(r"//[^/@]*@", "//[redacted]@", redact(value)))
        for name, value in found.items()
    }


def _tilde(path: str | Path) -> str:
    """A path without the name of the user."""
    home = os.path.expanduser("~")  # noqa: PTH111  (Path.home() fails for a user without one)
    return str(path).replace(home, "~") if len(home) > 1 else str(path)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _cpu_flags() -> list[str]:
    rows = (line.partition(":") for line in _lines("/proc/cpuinfo"))
    held = next((value.split() for name, _, value in rows if name.strip() in ("flags", "Features")), [])
    return [flag for flag in FLAGS if flag in held]


def _usable_cpus() -> float:
    """CPUs that this process may use: its affinity, or the quota of its container if that is less."""
    usable = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota = " ".join(_lines("/sys/fs/cgroup/cpu.max")[:1]).split()
    if len(quota) == 2 and quota[0].isdecimal() and int(quota[1]):
        usable = min(usable, int(quota[0]) / int(quota[1]))
    return usable


def _memory() -> dict[str, int | None]:
    rows = {name: value.split() for name, _, value in (line.partition(":") for line in _lines("/proc/meminfo"))}
    sizes = {name: int(value[0]) * 1024 for name, value in rows.items() if value and value[0].isdecimal()}
    limit = "".join(_lines("/sys/fs/cgroup/memory.max")[:1])
    return {"total": sizes.get("MemTotal"), "available": sizes.get("MemAvailable"),
            "container_limit": int(limit) if limit.isdecimal() else None}  # fmt: skip


def _existing(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    path = path.absolute()
    return next((folder for folder in (path, *path.parents) if folder.is_dir()), Path("/"))


def _free(path: Path) -> int | None:
    try:
        return shutil.disk_usage(_existing(path)).free
    except OSError:
        return None


def _tmp() -> str:
    import tempfile

    return tempfile.gettempdir()


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _accelerator(index: int) -> str:
    import torch

    if not torch.cuda.is_available():
        return f"{torch.accelerator.current_accelerator()}:{index}"
    card = torch.cuda.get_device_properties(index)
    return f"{card.name}, {format_size(card.total_memory)}, capability {card.major}.{card.minor}"


def _nvidia_driver() -> str | None:
    """The version of NVIDIA's driver, as the kernel says it, whether or not torch can use it."""
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", " ".join(_lines("/proc/driver/nvidia/version")[:1]))
    return found[1] if found else None


# ---- what is wrong ---------------------------------------------------------------------------------------------------

Facts = Mapping[str, Any]


def gpu(facts: Facts) -> Iterator[str]:
    """A card that is there, and that torch does not use."""
    version, cuda, driver = facts["packages"].get("torch"), facts["cuda"], facts["nvidia_driver"]
    if facts["amd_gpu"] and not facts["accelerators"]:
        yield f"an AMD GPU is here, but torch {version} finds none; install the build for ROCm: {TORCH_BUILDS}"
    if driver is None or facts["accelerators"]:
        return
    hidden = facts["variables"].get("CUDA_VISIBLE_DEVICES")
    needed = OLDEST_DRIVER.get(int(cuda.partition(".")[0]), 0) if cuda else 0
    if cuda is None:
        yield (
            f"an NVIDIA GPU is here (driver {driver}), but torch {version} is built without CUDA; "
            f"install the build for CUDA: {TORCH_BUILDS}"
        )
    elif hidden is not None and hidden.strip() in ("", "-1"):
        yield "CUDA_VISIBLE_DEVICES hides every GPU from torch; unset it"
    elif int(driver.partition(".")[0]) < needed:
        yield f"the NVIDIA driver {driver} is too old for CUDA {cuda} of torch {version}; it needs {needed} or newer"
    else:
        yield f"an NVIDIA GPU is here (driver {driver}), but torch {version} for CUDA {cuda} finds none; try nvidia-smi"


def disk(facts: Facts) -> Iterator[str]:
    for name, where in (("here", "in this folder"), ("hub_cache", f"for the hub's cache {facts['hub_cache']}")):
        free = facts["disk"][name]
        if free is not None and free < LOW_DISK:
            yield f"only {format_size(free)} are free {where}; a model of 7B takes 15 GB"


def cache(facts: Facts) -> Iterator[str]:
    folder = _cache()
    if folder.exists() and not folder.is_dir():
        yield f"the hub's cache {facts['hub_cache']} is a file; set HF_HOME to a folder"
    elif not os.access(_existing(folder), os.W_OK):
        yield f"the hub's cache {facts['hub_cache']} cannot be written; set HF_HOME to a folder of yours"


def endpoint(_: Facts) -> Iterator[str]:
    from tt_ckpt.hub.endpoint import check_endpoint, check_numbers

    for check in (check_endpoint, check_numbers):
        try:
            check()
        except (ValueError, OSError) as error:
            yield redact(str(error))


def memory(facts: Facts) -> Iterator[str]:
    free, shared = facts["memory"]["available"], facts["memory"]["shared"]
    if free is not None and free < LOW_MEMORY:
        yield f"only {format_size(free)} of memory are available; close other programs"
    if shared is not None and shared < LOW_SHARED:
        yield f"{SHARED} has only {format_size(shared)}; data.num_workers needs more (docker run --shm-size=1g)"


def threads(facts: Facts) -> Iterator[str]:
    used, usable, load = facts["torch_threads"], facts["cpu_usable"], facts["cpu_load"] or 0.0
    if used > max(1.0, usable):
        yield f"torch uses {used} threads on {usable:g} CPUs, which is slower; set OMP_NUM_THREADS={int(usable) or 1}"
    elif load > usable and used > 1 and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & facts["variables"].keys():
        yield f"the load is {load:g} on {usable:g} CPUs, and torch's waiting threads spin; set OMP_WAIT_POLICY=PASSIVE"


def wheels(_: Facts) -> Iterator[str]:
    """Packages whose requirements of each other are not met, such as a torchvision for another torch."""
    from packaging.requirements import InvalidRequirement, Requirement

    for name in WHEELS:
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for text in required:
            try:
                need = Requirement(text)
            except InvalidRequirement:
                continue
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            version = _installed(need.name)
            wanted = f"{need.name}{need.specifier}"
            if version is None:
                yield f"{name} needs {wanted}, which is not installed; pip install '{wanted}'"
            elif not need.specifier.contains(version, prereleases=True):
                yield f"{name} needs {wanted}, but {version} is installed; pip install '{wanted}'"


CHECKS: tuple[Callable[[Facts], Iterator[str]], ...] = (gpu, disk, cache, endpoint, memory, threads, wheels)
