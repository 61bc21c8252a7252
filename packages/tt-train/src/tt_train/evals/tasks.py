"""Tasks of lm-evaluation-harness, found before weights load, and run for a model; ``tt eval --tasks``."""

import contextlib
import importlib.util
import logging
import os
import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tt_ckpt.shown import plain
from tt_train.errors import ConfigError, did_you_mean, one_line, shell_word
from tt_train.evals.results import Figure, figures_of

_PATTERN = re.compile(r"[*?\[]")
_NAMED = re.compile(rb"^\s*(?:task|group|tag):[ \t]*[\"']?([A-Za-z0-9_.-]+)", re.MULTILINE)
Tell = Callable[[str], None]
Loaded = dict[str, dict[str, Any]]  # tasks, groups and group_map, as lm-eval's TaskManager gives them


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How tasks are run; the names and meanings are lm-eval's."""

    tasks: tuple[str, ...]
    limit: float | None = None  # rows of each task; below 1: the share of them
    num_fewshot: int | None = None
    include_path: tuple[Path, ...] = ()
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    system_instruction: str | None = None
    gen_kwargs: str | None = None
    seed: int | None = None  # None: lm-eval's own, with which its published figures are made
    confirm_run_unsafe_code: bool = False
    log_samples: bool = False


@dataclass(kw_only=True)
class Evaluation:
    """``raw``: what lm-eval returned, without its samples; those are in ``samples``, by task."""

    figures: list[Figure]
    raw: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def require_lm_eval() -> None:
    """ConfigError if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            ["--tasks needs lm-evaluation-harness, which is not installed: pip install 'lm-eval>=0.4.13'"]
        )


def find_tasks(settings: Settings) -> Any:
    """A TaskManager that knows every task that is named; ConfigError names those that do not exist.

    lm-eval's own tasks, some 14,000 files, are read only if a name is not found in ``include_path``.
    """
    require_lm_eval()
    if lacking := [path for path in settings.include_path if not path.is_dir()]:
        raise ConfigError([f"--include-path: {plain(path)} is not a folder of task files (YAML)" for path in lacking])
    _refuse_unmentioned(settings)
    quiet_libraries()
    from lm_eval.tasks import TaskManager

    paths = [str(path) for path in settings.include_path]
    manager = TaskManager(include_path=paths, include_defaults=False) if paths else None
    if manager is None or not all(_matches(manager, name) for name in settings.tasks):
        manager = TaskManager(include_path=paths or None)
    unknown = [name for name in settings.tasks if not _matches(manager, name)]
    if unknown:
        raise ConfigError([f"--tasks: there is no task {name!r}{_meant(name, manager.all_tasks)}" for name in unknown])
    return manager


def _refuse_unmentioned(settings: Settings) -> None:
    """ConfigError for a name that is in the text of no task file. lm-eval takes longer to know all names."""
    spec = importlib.util.find_spec("lm_eval")
    own = [Path(folder) / "tasks" for folder in (spec.submodule_search_locations or ())] if spec else []
    wanted = [name for name in settings.tasks if not _PATTERN.search(name)]
    known: set[bytes] = set()
    for root in (*settings.include_path, *own):
        for place, _, files in os.walk(root):
            for file in files:
                path = Path(place, file)
                if path.suffix not in (".py", ".md") and path.is_file():  # a file that is included has any name
                    text = path.read_bytes()
                    wanted = [name for name in wanted if name.encode() not in text]
                    known.update(_NAMED.findall(text))
            if not wanted:
                return
    names = sorted(name.decode() for name in known)
    raise ConfigError([f"--tasks: there is no task {name!r}{_meant(name, names)}" for name in wanted])


def _matches(manager: Any, name: str) -> list[str]:
    """The tasks that ``name``, which may be a pattern such as ``mmlu_*``, stands for."""
    found: list[str] = manager.match_tasks([name])
    return found


def _meant(name: str, known: Sequence[str]) -> str:
    """What an unknown name may mean. A file is not taken: it may name Python, which only --include-path allows."""
    if name.endswith((".yaml", ".yml")):
        return f"; give the name in the file, and its folder: --include-path {shell_word(Path(name).parent)}"
    return did_you_mean(name, known) or "; lm_eval ls tasks lists them all"


def load_tasks(manager: Any, settings: Settings) -> Loaded:
    """The tasks with their rows. ConfigError says which rows cannot be had, and which tasks would run code."""
    names = [match for name in settings.tasks for match in _matches(manager, name)]
    loaded: Loaded = {"tasks": {}, "groups": {}, "group_map": {}}
    if settings.confirm_run_unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # what metrics that run code ask for, too
    for name in dict.fromkeys(names):
        entry = manager.task_index.get(name)
        _check_safe(name, settings, bool(entry is not None and (entry.cfg or {}).get("unsafe_code")))
        try:
            found = manager.load([name])
        except Exception as error:
            raise ConfigError([f"task {name}: {_why(error)}"]) from error
        for kind, of_kind in loaded.items():
            of_kind |= found.get(kind) or {}
    for task, one in loaded["tasks"].items():
        _check_safe(task, settings, getattr(one, "UNSAFE_CODE", False))
    return loaded


def _check_safe(task: str, settings: Settings, unsafe: bool) -> None:
    if unsafe and not settings.confirm_run_unsafe_code:
        where = "if you want that, on a machine where it can do no harm, add --confirm-run-unsafe-code"
        raise ConfigError([f"task {task}: it runs code that the model writes; {where}"])


def _why(error: Exception) -> str:
    """One line about a task that does not load."""
    text = one_line(str(error)) or type(error).__name__
    if isinstance(error, ConnectionError) or "Offline" in text or "offline" in text:
        return (
            f"its rows are not on this machine, and the hub cannot be reached: {text}; load the task once where there "
            "is a network, or name a task over local rows with --include-path"
        )
    return f"{type(error).__name__}: {text}"


def evaluate(model: Any, loaded: Loaded, settings: Settings, *, tell: Tell) -> Evaluation:
    """Run tasks with a model of lm-eval (``TT``). What lm-eval prints goes to stderr.

    The same as ``lm_eval.simple_evaluate``, which would also start git and pip to describe the machine.
    """
    import numpy
    from lm_eval import evaluate as run
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.utils import set_torch_seed

    if settings.apply_chat_template:
        model.apply_chat_template([{"role": "user", "content": "?"}])  # a model without a template is told here
    other = DEFAULT_OTHER_SEED if settings.seed is None else settings.seed % 2**32
    random.seed(DEFAULT_RANDOM_SEED if settings.seed is None else settings.seed)
    numpy.random.seed(other)
    set_torch_seed(other)
    _set_up(loaded["tasks"], settings, other, tell)
    with contextlib.redirect_stdout(sys.stderr):
        raw = run(
            lm=model,
            task_dict=loaded,
            limit=settings.limit,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.fewshot_as_multiturn,
            system_instruction=settings.system_instruction,
            confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
            log_samples=settings.log_samples,
        )
    assert raw is not None, "lm-eval itself runs on rank 0 only, which it takes for the only one"
    samples = raw.pop("samples", None) or {}
    return Evaluation(figures=figures_of(raw), raw={**raw, "model": model.get_model_info()}, samples=samples)


def _set_up(tasks: dict[str, Any], settings: Settings, seed: int, tell: Tell) -> None:
    """Solved examples, their seed, and arguments of generation: over what the files of the tasks say."""
    from lm_eval.utils import simple_parse_args_string

    for name, task in tasks.items():
        if settings.gen_kwargs and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value=simple_parse_args_string(settings.gen_kwargs), update=True)
        stated = task.get_config("num_fewshot")
        if settings.num_fewshot is not None and stated == 0 and settings.num_fewshot:
            tell(f"{name}: is always asked without solved examples, as its file says, also with --num-fewshot")
        elif settings.num_fewshot is not None:
            task.set_config(key="num_fewshot", value=settings.num_fewshot)
        elif stated is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)


def quiet_libraries() -> None:
    """No log lines of lm-eval: what matters of them is told here."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
