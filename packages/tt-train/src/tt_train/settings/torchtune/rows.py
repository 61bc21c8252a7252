"""torchtune's datasets and tokenizers as our ``data`` section.

A file of its own because rows have the most names, and the most that cannot be carried over.
"""

from typing import Any

from tt_train.errors import ConfigError
from tt_train.settings.torchtune import tables
from tt_train.settings.torchtune.carry import Carry


def carry_rows(carry: Carry, *, longest: int) -> None:
    """``data`` and ``model.tokenizer``."""
    cut = carry.take("tokenizer.max_seq_len")
    _carry_tokenizer(carry)
    sources = carry.take("dataset")
    if isinstance(sources, list):
        data = _several(carry, sources)
    else:
        data = _rows(carry, carry.component("dataset"), carry.section("dataset"))
    data["max_seq_len"] = data.pop("own_length", None) or cut or longest
    data["drop_duplicates"] = False  # torchtune keeps every row
    carry.ours["data"] = data
    validation = carry.component("dataset_val")
    options = carry.section("dataset_val")
    if validation:
        carry.set("data.eval", _rows(carry, validation, options)["train"])
    if carry.take("shuffle") is False:
        carry.set("data.shuffle", False)


def _several(carry: Carry, sources: list[Any]) -> dict[str, Any]:
    """The keys of ``data`` for data sets one after the other, which must be read in the same way."""
    if not sources or not all(isinstance(each, dict) for each in sources):
        raise ConfigError(["dataset: expected data sets, each with a _component_"])
    carry.section("dataset")  # what concerns all of them, such as packed, is said below
    every = [_rows(carry, str(each.get("_component_")), {key: value for key, value in each.items()
                                                         if key != "_component_"}) for each in sources]  # fmt: skip
    trains = [train for data in every for train in _listed(data.pop("train"))]
    named = [
        train for train in trains if train in {source for source, _, _ in tables.DATASETS.values()} and "/" not in train
    ]
    if named or any(data != every[0] for data in every):
        why = f"{named[0]} is read in its own way" if named else "they differ in more than their source"
        raise ConfigError(
            [f"dataset: {why}, and a list in data.train is read in one way; write all rows as files of messages, and "
             "name these"]
        )  # fmt: skip
    return {"train": trains, **every[0]}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _carry_tokenizer(carry: Carry) -> None:
    carry.component("tokenizer")
    path, folder = str(carry.take("tokenizer.path") or ""), str(carry.ours["model"].get("path") or "")
    place = path.rpartition("/")[0].removesuffix("/original")
    if path and place.rstrip("/") != folder.rstrip("/"):
        carry.set("model.tokenizer", path)
        carry.say("tokenizer.path", f"{path} is not in the model's directory; model.tokenizer names it")
    if template := carry.take("tokenizer.prompt_template"):
        carry.say("tokenizer.prompt_template", f"{template}: set data.template to a built-in name or a .jinja file")
    for key in [key for key in carry.theirs if key.startswith("tokenizer.prompt_template.")]:
        carry.take(key)
        carry.say(key, "set data.template to a built-in name or a .jinja file")


def _rows(carry: Carry, path: str, options: dict[str, Any]) -> dict[str, Any]:
    """The keys of ``data``; ``own_length`` is the length that the data set itself cuts its rows to."""
    name = path.rpartition(".")[2]
    if "multimodal" in path:
        raise ConfigError([f"dataset: {path}: rows with images are not supported"])
    data: dict[str, Any] = {}
    by_default = False
    if name in tables.DATASETS:
        source, more, by_default = tables.DATASETS[name]
        data |= {"train": options.pop("source", None) or source, **more}
        if carry.is_old and name.startswith("alpaca"):
            data |= {"template": "alpaca", "own_length": 512}
        elif name.startswith("alpaca"):
            differs = "without alpaca's preamble; without a chat template it is alpaca's whole prompt"
            carry.say("dataset", f"the prompt is the model's chat template around instruction and input, {differs}")
        elif carry.is_old and name.startswith(("slimorca", "stack_exchange")):
            data["own_length"] = 1024
    elif name in ("instruct_dataset", "chat_dataset", "text_completion_dataset", "preference_dataset"):
        _carry_builder(carry, name, options, data)
    else:
        raise ConfigError([f"dataset: {path} is not known; name its rows under data.train"])
    columns = options.pop("column_map", None)
    if columns:
        data["columns"] = {**data.get("columns", {}), **_columns(name, columns)}
    if subset := options.pop("name", None) or options.pop("subset", None):
        data["train"] = f"{data['train']}:{subset}"
    if (split := options.pop("split", None)) not in (None, "train"):
        data["split"] = split
    for key in ("data_dir", "revision"):
        if key in options:
            data[key] = options.pop(key)
    if files := options.pop("data_files", None):
        if data["train"] in tables.FILE_KINDS:
            data["train"] = files
        else:
            data["data_files"] = files
    data["own_length"] = options.pop("max_seq_len", None) or data.get("own_length")
    if options.pop("packed", False):
        data["packing"] = True
    if options.pop("split_across_pack", False):
        carry.say("dataset.split_across_pack", "documents are never split")
    trains_prompt = options.pop("train_on_input", by_default)
    if name not in ("text_completion_dataset", "cnn_dailymail_articles_dataset", "wikitext_dataset") and (
        "preference" not in str(data.get("schema")) and "stack_exchange" not in name
    ):
        data["train_on"] = "all" if trains_prompt else "assistant"
    if options.pop("add_eos", True) is False:
        carry.say("dataset.add_eos", "the end token is always added")
    for key, value in options.items():
        if value not in (None, False):
            carry.say(f"dataset.{key}", "not known; see docs/data-formats.md for what data takes")
    return data


def _carry_builder(carry: Carry, name: str, options: dict[str, Any], data: dict[str, Any]) -> None:
    """The general builders: their source, and which columns it has."""
    source = options.pop("source", None)
    if source is None:
        raise ConfigError([f"dataset.source: missing; {name} has no rows of its own"])
    data["train"] = source
    template = str(options.pop("template", None) or "").rpartition(".")[2]
    if template:
        known = tables.INSTRUCT_TEMPLATES.get(template)
        if known:
            data["template"] = known
        else:
            carry.say("dataset.template", f"{template} is not known; set data.template to a .jinja file")
    elif name == "instruct_dataset":
        data |= {"schema": "prompt_completion", "columns": {"prompt": "input", "completion": "output"}}
    if name == "chat_dataset":
        style = str(options.pop("conversation_style", "sharegpt"))
        data["schema"] = style if style in ("openai", "sharegpt") else "openai"
        column = options.pop("conversation_column", None)
        theirs = "conversations" if data["schema"] == "sharegpt" else "messages"
        if column not in (None, theirs):
            data["columns"] = {theirs: column}
        chat_format = str(options.pop("chat_format", None) or "").rpartition(".")[2]
        if chat_format in tables.CHAT_FORMATS:
            data["template"] = tables.CHAT_FORMATS[chat_format]
        elif chat_format:
            carry.say("dataset.chat_format", f"{chat_format} is not known; set data.template")
    elif name == "text_completion_dataset":
        data |= {"schema": "text"}
        if (column := options.pop("column", "text")) != "text":
            data["columns"] = {"text": column}
    elif name == "preference_dataset":
        data["schema"] = "preference"
    if new_prompt := options.pop("new_system_prompt", None):
        carry.say(
            "dataset.new_system_prompt", f"{new_prompt!r}: put it into the rows, or into a template (data.template)"
        )


def _columns(name: str, columns: dict[str, Any]) -> dict[str, str]:
    """torchtune's names of columns as ours; both are followed by those of the rows."""
    renamed = {"instruct_dataset": {"input": "prompt", "output": "completion"}}.get(name, {})
    if "instruction" in columns or "sentence" in columns or "dialogue" in columns:  # of an instruct template
        renamed = {}
    return {renamed.get(key, key): str(value) for key, value in columns.items()}
