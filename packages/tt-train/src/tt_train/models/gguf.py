"""A finished run, an adapter or a model as a GGUF file, which llama.cpp, Ollama and LM Studio read."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from torch import Tensor

import tt_ckpt
import tt_data
import tt_models
import tt_peft
from tt_ckpt import commit
from tt_ckpt.files import copy, read_text
from tt_ckpt.formats.gguf.keys import values_of
from tt_ckpt.formats.gguf.plan import DTYPES, plan_adapter, plan_model, read_back_tokenizer, tensors_of
from tt_ckpt.formats.gguf.writer import GGUFPlan, GGUFWritten, check_new_file, write_gguf
from tt_ckpt.hf.directory import copy_companions
from tt_ckpt.hf.save import stored_weights, weights_of
from tt_ckpt.hf.stored_tensors import open_tensors
from tt_ckpt.hf.weights import EMBEDDING, Weights
from tt_ckpt.shown import plain, quoted
from tt_peft.adapter_files.folder import read_adapter_config, read_adapter_weights
from tt_peft.adapter_files.peft_config import config_from_peft
from tt_peft.lowrank import spec_of
from tt_train.errors import ConfigError
from tt_train.models.load import model_config
from tt_train.models.merge import RefusedError, merged_model, merged_tensors, serving_files_of
from tt_train.models.origin import Origin, load_tokenizer

Tell = Callable[[str], None] | None
Progress = Callable[[int, int], None] | None
TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
_FACTORS = (".lora_A.weight", ".lora_B.weight")
_CARD_BYTES = 1_000_000
_LONGEST = 200  # characters of a text from a model card
# what a tokenizer may treat in its own way
_SAMPLES = (
    "The quick brown fox jumps over 12345 lazy dogs, don't you think? WE'LL see.", "  leading, inner   and trailing  ",
    "def f(x):\n\treturn {'a': x ** 2}\r\n\n\n", "na\u00efve stra\u00dfe \u4eca\u65e5\u306f \u043c\u0438\u0440",
    "<s> </s> <|im_start|> [INST]", "", " ", "https://example.org/a?b=c%20d&e=3.14",
)  # fmt: skip


def write_model(
    origin: Origin,
    file: Path,
    kind: str | None,
    *,
    add_bos: bool | None = None,
    dry_run: bool = False,
    tell: Tell = None,
    progress: Progress = None,
) -> GGUFWritten | None:
    """The model, with adapters merged in fp32, as the new file ``file``. None if ``dry_run``: only checks are made.

    ``add_bos``: whether the tokenizer puts the first token before a prompt (default: as the model's own does).

    Raises:
        ConfigError, ValueError: what a GGUF file cannot express, before weights are read.
    """
    check_new_file(file, 0)
    weights = _streamed(origin)
    if weights is None and origin.model is not None:
        values_of(_config(origin), tensors_of(_config(origin), open_tensors(origin.model).specs)[1])
    if weights is None:
        if dry_run:
            return None
        model = merged_model(origin, torch.float32, tell=tell)
        weights = weights_of(model, None, tt_models.config_to_hf(model.config))
    plan = _plan(origin, weights, kind, add_bos)
    check_new_file(file, plan.nbytes)
    try:
        return None if dry_run else write_gguf(plan, file, progress=progress)
    except RefusedError as error:
        raise ValueError(str(error.__cause__)) from None


def _streamed(origin: Origin) -> Weights | None:
    """The tensors of the merged model, each read when it is written. None if the whole model must be in memory."""
    if origin.model is None or origin.stopped is not None:
        return None
    if origin.adapter is None:
        config = _config(origin)
        tt_ckpt.check_weights(tt_models.build(model_config(origin.model), device="meta"), origin.model)
        return stored_weights(origin.model, config)
    merged = merged_tensors(origin, torch.float32)
    return None if merged is None else replace(merged.weights, config=_config(origin))


def _config(origin: Origin) -> dict[str, Any]:
    """config.json of the base with every default spelled out."""
    assert origin.model is not None
    stated = tt_ckpt.read_config(origin.model)
    if stated.get("quantization_config"):
        raise ConfigError([f"{plain(origin.model)}: its weights are quantized; export the model that it was made from"])
    return tt_models.config_to_hf(model_config(origin.model))


def _plan(origin: Origin, weights: Weights, kind: str | None, add_bos: bool | None) -> GGUFPlan:
    tokenizer = load_tokenizer(origin)
    if kind is None and origin.model is not None:  # that of the base: what is merged here is in fp32
        kind = DTYPES.get(open_tensors(origin.model).specs[EMBEDDING].dtype)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if origin.model is not None and origin.places == (origin.model,):
            folder = origin.model
        else:
            files = serving_files_of(origin, tokenizer)
            _write_files(folder, files)
            if origin.model is not None:
                copy_companions(origin.model, folder, leave=files)
        plan = plan_model(weights, folder, kind=kind and kind.upper(), values=card_values(origin))
    _compare_tokenizers(tokenizer, plan, weights.config, origin)
    if add_bos is None:
        return plan
    return replace(plan, values={**plan.values, "tokenizer.ggml.add_bos_token": add_bos})


def _write_files(folder: Path, files: Mapping[str, str | Path | None]) -> None:
    for name, content in files.items():
        if isinstance(content, str):
            commit.write_bytes(folder / name, content.encode())
        elif content is not None:
            copy(content, folder / name)


def _compare_tokenizers(
    tokenizer: tt_data.Tokenizer, plan: GGUFPlan, config: Mapping[str, Any], origin: Origin
) -> None:
    """ValueError unless the tokenizer that is read from the keys gives the same ids, ends and chat template."""
    with TemporaryDirectory() as scratch:
        _write_files(Path(scratch), read_back_tokenizer(plan, config))
        again = tt_data.load_tokenizer(Path(scratch))
    for text in _SAMPLES:
        if tokenizer.encode(text, add_bos=False, add_eos=False) != again.encode(text, add_bos=False, add_eos=False):
            raise ValueError(
                f"{plain(origin.path)}: the tokenizer in the GGUF file would give other ids for {quoted(text)}; "
                "export with --to hf"
            )
    same = (tokenizer.adds_bos, tokenizer.templates.get("default")) == (again.adds_bos, again.templates.get("default"))
    if not same or (tokenizer.adds_bos and tokenizer.bos_id != again.bos_id):
        raise ValueError(f"{plain(origin.path)}: GGUF cannot express its first token or chat template; use --to hf")
    if lost := set(tokenizer.eos_ids) - set(again.eos_ids):
        raise ValueError(f"{plain(origin.path)}: GGUF cannot express the end tokens {sorted(lost)}; use --to hf")


# ---- the model card --------------------------------------------------------------------------------------------------


def card_values(origin: Origin) -> dict[str, Any]:
    """``general.`` keys: the name, and license, languages, tags and base from the README of the model or its base."""
    path = origin.path.resolve()
    found: dict[str, Any] = {
        "general.name": _text(path.parent.name if path.name == "adapter" else path.name) or "model"
    }
    card = next(filter(None, (_front_matter(place) for place in origin.places if place.is_dir())), {})
    for key, words in (("license", "license"), ("license_name", "license.name"), ("license_link", "license.link")):
        if text := _text(card.get(key)):
            found[f"general.{words}"] = text
    for key, words in (("language", "languages"), ("tags", "tags")):
        given = card.get(key)
        if texts := [text for one in (given if isinstance(given, list) else [given]) if (text := _text(one))]:
            found[f"general.{words}"] = texts
    if origin.run is not None and origin.model is not None and origin.adapter is not None:
        found |= {"general.base_model.count": 1, "general.base_model.0.name": _text(origin.model.name) or "base"}
    return found


def _front_matter(folder: Path) -> dict[str, Any]:
    file = folder / "README.md"
    if not file.is_file():
        return {}
    match = re.match(r"---\n(.*?)\n---\n", read_text(file, folder, limit=_CARD_BYTES), re.DOTALL)
    try:
        found = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value.isprintable() and 0 < len(value) <= _LONGEST else None


# ---- an adapter ------------------------------------------------------------------------------------------------------


def write_adapter(
    origin: Origin, file: Path, kind: str | None, *, dry_run: bool, progress: Progress = None
) -> GGUFWritten | None:
    """The adapter of a run or folder as a GGUF file, to be used with a GGUF file of its base.

    Raises:
        ConfigError: the adapter has what llama.cpp refuses: DoRA, whole modules, tokens, embeddings, experts.
    """
    assert origin.adapter is not None
    assert origin.model is not None
    layers = adapter_layers(origin.adapter)
    values = card_values(origin)
    plan = plan_adapter(_config(origin), layers, kind=(kind or "f32").upper(), values=values)
    shapes = {name: spec.shape for name, spec in stored_weights(origin.model, {}).specs.items()}
    for name, (a, b, _) in layers.items():
        if tuple(shapes.get(name, ())) != (len(b), a.shape[1]):
            what = f"{plain(name)} of the base has another shape"
            raise ConfigError([f"{plain(origin.adapter)}: {what}; give its own base: --base DIR"])
    check_new_file(file, plan.nbytes)
    return None if dry_run else write_gguf(plan, file, progress=progress)


def adapter_layers(folder: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Name of a base weight -> A, B and their scale; ConfigError names what is more than that."""
    config = config_from_peft(read_adapter_config(folder), folder / "adapter_config.json")
    if problems := unusual(read_adapter_config(folder), config):
        what = f"llama.cpp does not load an adapter with {', '.join(problems)}"
        raise ConfigError([f"{plain(folder)}: {what}; leave out --adapter to merge it"])
    state, _ = read_adapter_weights(folder)
    layers: dict[str, tuple[Tensor, Tensor, float]] = {}
    for key, a in state.items():
        if not key.endswith(_FACTORS):
            what = f"{plain(key)} is not of a linear layer"
            raise ConfigError([f"{plain(folder)}: {what}; leave out --adapter to merge it"])
        name = key.removesuffix(_FACTORS[0])
        if name != key:
            b = state.get(name + _FACTORS[1])
            if b is None or a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1]:
                raise ConfigError([f"{plain(folder)}: the factors of {plain(name)} do not fit; save the adapter again"])
            spec = spec_of(name, config)
            if spec.rank != len(a):
                raise ConfigError([f"{plain(folder)}: {plain(name)} has rank {len(a)}, its config says {spec.rank}"])
            layers[f"{name}.weight"] = (a, b, spec.scaling)
    if not layers:
        raise ConfigError([f"{plain(folder)}: an adapter without layers; save the adapter again"])
    return layers


def unusual(settings: Mapping[str, Any], config: tt_peft.LoRAConfig) -> list[str]:
    """What an adapter has beside low-rank changes of linear layers; other programs refuse it."""
    found = {
        "DoRA (use_dora)": config.use_dora,
        "modules_to_save": bool(config.modules_to_save),
        "target_parameters (stacked experts)": bool(config.target_parameters),
        "trainable_token_indices": settings.get("trainable_token_indices") is not None,
        "the start of PiSSA": config.init == "pissa",
    }
    return [words for words, has in found.items() if has]
