"""The ``tokenizer.ggml`` keys from the tokenizer files of a model directory: the inverse of ``tokenizer.py``.

Byte-level BPE gets its merges and the name of how text is split before merging; sentencepiece gets scores, since
llama.cpp merges the best piece first. A tokenizer that llama.cpp has no name for is refused.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tt_ckpt.files import read_json, read_text
from tt_ckpt.formats.gguf.splits import COMPOSED, DIGITS, GPT2, SPLITS, WHOLE_WORDS
from tt_ckpt.formats.gguf.tokenizer import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER
from tt_ckpt.shown import listed, quoted

_LIMIT = 64_000_000
_NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_KEEP_SPACE = {"<unk>", "<s>", "<|endoftext|>"}  # of the added tokens of Phi 3


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """``values``: keys of the file. ``notes``: a sentence for each thing that llama.cpp does differently.

    ``strips_as_phi3``: whether white space after added tokens is taken away as llama.cpp does by the name of a model.
    """

    values: dict[str, Any]
    notes: tuple[str, ...]
    strips_as_phi3: bool


def vocabulary_of(folder: Path, rows: int, ends: object = None) -> Vocabulary:
    """The keys of the tokenizer in ``folder``, for ``rows`` embeddings. ``ends``: the end tokens, if no file names any.

    Raises:
        ValueError: no tokenizer.json, or one that llama.cpp cannot follow.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"{folder}: no tokenizer.json, of which a GGUF tokenizer is made; save the tokenizer with transformers"
        )
    body = read_json(file, folder, limit=_LIMIT)
    model = body.get("model") if isinstance(body, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        kind = quoted(model.get("type")) if isinstance(model, dict) else "none"
        raise ValueError(f"{file}: a model of type {kind}: only BPE can be written as GGUF")
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError(f"{file}: dropout, continuing_subword_prefix and end_of_word_suffix have no place in GGUF")
    tokens, types, notes = _tokens(file, body, rows)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or ()]
    if any(len(merge) != 2 for merge in merges):
        raise ValueError(f"{file}: a merge that is not of two tokens; download it again")
    values: dict[str, Any] = {}
    if model.get("byte_fallback"):
        values |= _sentencepiece(file, body, tokens, merges)
    else:
        pre = _split_name(file, body)
        values |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre}
        values["tokenizer.ggml.merges"] = [" ".join(merge) for merge in merges]
        if pre in COMPOSED:
            notes.append("llama.cpp does not compose accents (NFC) before it splits text, the tokenizer does")
        if model.get("ignore_merges", False) is not (pre in WHOLE_WORDS):
            notes.append(
                "llama.cpp treats words that are tokens, but that no merge makes, otherwise than the tokenizer"
            )
    values |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    ids = {token: index for index, token in enumerate(tokens)}
    values |= _special(folder, body, ids, ends, notes)
    strips = {one["content"] for one in body.get("added_tokens") or () if one.get("rstrip") and not one.get("lstrip")}
    others = {one["content"] for one in body.get("added_tokens") or ()} - strips
    as_phi3 = bool(strips) and others == _KEEP_SPACE
    if not as_phi3 and any(one.get("rstrip") or one.get("lstrip") for one in body.get("added_tokens") or ()):
        notes.append("the tokenizer takes white space away beside some added tokens, llama.cpp keeps it")
    return Vocabulary(values=values, notes=tuple(notes), strips_as_phi3=as_phi3)


def _tokens(file: Path, body: Mapping[str, Any], rows: int) -> tuple[list[str], list[int], list[str]]:
    """A token and its type for every embedding. Tokens beyond the embeddings are left out and reported."""
    vocab, added = body["model"]["vocab"], body.get("added_tokens") or []
    bytes_ = {f"<0x{byte:02X}>" for byte in range(256)} if body["model"].get("byte_fallback") else set()
    ids = {index: token for token, index in vocab.items()} | {one["id"]: one["content"] for one in added}
    if not all(type(index) is int and index >= 0 and isinstance(token, str) for index, token in ids.items()):
        raise ValueError(f"{file}: ids that are not whole numbers; download it again")
    beyond = [token for index, token in sorted(ids.items()) if index >= rows]
    notes = [f"tokens without an embedding are left out: {listed(beyond, 3)}"] if beyond else []
    if any(token in vocab and vocab[token] >= rows for token in beyond):
        raise ValueError(f"{file}: {len(ids)} tokens, the model has {rows} embeddings; use the tokenizer of the model")
    tokens = [ids.get(index, f"[PAD{index}]") for index in range(rows)]
    types = [(BYTE if ids[index] in bytes_ else NORMAL) if index in ids else UNUSED for index in range(rows)]
    for one in added:
        if one["id"] < rows:
            special, unknown = one.get("special", False), one["content"] == body["model"].get("unk_token")
            types[one["id"]] = UNKNOWN if unknown else CONTROL if special else USER
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"{file}: a token with two ids; a GGUF file cannot contain it")
    return tokens, types, notes


# ---- byte-level BPE --------------------------------------------------------------------------------------------------


def _steps(part: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer: none, one, or a sequence of them."""
    if part is None:
        return []
    return [one for inner in part[key] for one in _steps(inner, key)] if part.get("type") == "Sequence" else [part]


_ISOLATED, _ISOLATED_TOO = ("Split", "Isolated", False), ("Split", "Removed", True)


def _split_name(file: Path, body: Mapping[str, Any]) -> str:
    """``tokenizer.ggml.pre``: llama.cpp's name for how this tokenizer splits text."""
    whole = bool(body["model"].get("ignore_merges"))
    composed = [one.get("type") for one in _steps(body.get("normalizer"), "normalizers")]
    steps = _steps(body.get("pre_tokenizer"), "pretokenizers")
    last = steps[-1] if steps else {}
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space") and composed in ([], ["NFC"]):
        patterns = [step.get("pattern", {}).get("Regex") for step in steps[:-1]]
        ways = [(step.get("type"), step.get("behavior"), bool(step.get("invert"))) for step in steps[:-1]]
        # the one expression of a tokenizer matches every character: what is between matches is empty
        splits = all(way == _ISOLATED for way in ways) or ways == [_ISOLATED_TOO]
        digits = [step.get("type") == "Digits" and step.get("individual_digits") for step in steps[:-1]]
        names: list[str] = []
        if not last.get("use_regex", True) and splits:
            names = [name for name, known in SPLITS.items() if list(known) == patterns]
        elif last.get("use_regex", True) and digits in ([], [True]):
            names = [DIGITS[0] if digits else GPT2[0]]
        # of names that split alike, the one that also treats accents and whole words alike
        names = [name for name in names if (name in COMPOSED) == bool(composed)] or (names if not composed else [])
        if names:
            return next((name for name in names if (name in WHOLE_WORDS) == whole), names[0])
    shown = quoted(json.dumps([body.get("normalizer"), body.get("pre_tokenizer")]))
    raise ValueError(f"{file}: llama.cpp has no name for how this tokenizer splits text ({shown}); export with --to hf")


# ---- sentencepiece ---------------------------------------------------------------------------------------------------


def _sentencepiece(
    file: Path, body: Mapping[str, Any], tokens: Sequence[str], merges: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Scores from the order of the merges, and whether a space is put before a text."""
    steps = _steps(body.get("normalizer"), "normalizers")
    kinds = [step.get("type") for step in steps]
    replaces = [step.get("content") == SPACE and step.get("pattern") == {"String": " "} for step in steps[-1:]]
    prefix = kinds == ["Prepend", "Replace"] and steps[0].get("prepend") == SPACE
    splitter = body.get("pre_tokenizer") or {}
    if splitter.get("type") == "Metaspace" and not kinds and splitter.get("replacement", SPACE) == SPACE:
        scheme = splitter.get("prepend_scheme", "always" if splitter.get("add_prefix_space", True) else "never")
        prefix, replaces, kinds, splitter = scheme in ("first", "always"), [True], ["Replace"], {}
    is_plain = kinds in (["Replace"], ["Prepend", "Replace"]) and replaces == [True]
    if not is_plain or splitter not in ({}, _MERGED_SPACES):
        shown = quoted(json.dumps([body.get("normalizer"), body.get("pre_tokenizer")]))
        raise ValueError(f"{file}: llama.cpp cannot prepare text as this tokenizer does ({shown}); export with --to hf")
    best: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        best.setdefault(left + right, rank)
    last = float(len(merges))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [-float(best.get(token, last)) for token in tokens],
        "tokenizer.ggml.add_space_prefix": prefix,
    }


_MERGED_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


# ---- special tokens and templates ------------------------------------------------------------------------------------


def _special(
    folder: Path, body: Mapping[str, Any], ids: Mapping[str, int], stated: object, notes: list[str]
) -> dict[str, Any]:
    settings = _json(folder / "tokenizer_config.json")
    generation = _json(folder / "generation_config.json")
    found: dict[str, Any] = {}
    for name, key in _NAMED.items():
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in ids:
            found[f"tokenizer.ggml.{key}_token_id"] = ids[token]
    ends: Any = generation.get("eos_token_id", stated)
    ends = [end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int and 0 <= end < len(ids)]
    eos = found.setdefault("tokenizer.ggml.eos_token_id", ends[0]) if ends else found.get("tokenizer.ggml.eos_token_id")
    others = [end for end in dict.fromkeys(ends) if end != eos]
    found |= {f"tokenizer.ggml.{key}_token_id": end for key, end in zip(("eot", "eom"), others, strict=False)}
    if len(others) > 2:
        notes.append(
            f"a GGUF file names three end tokens, the model has {len(others) + 1}; llama.cpp may not stop at all"
        )
    before, after = _frame(body)
    bos = found.get("tokenizer.ggml.bos_token_id")
    if before is not None and ids.get(before) != bos:
        found["tokenizer.ggml.bos_token_id"] = bos = ids[before]
    adds = {
        "bos": settings.get("add_bos_token", before is not None),
        "eos": settings.get("add_eos_token", after is not None),
    }
    found["tokenizer.ggml.add_bos_token"] = bool(adds["bos"]) and bos is not None
    found["tokenizer.ggml.add_eos_token"] = bool(adds["eos"]) and eos is not None
    return found | _templates(folder, settings)


def _json(file: Path) -> dict[str, Any]:
    found = read_json(file, file.parent) if file.is_file() else {}
    return found if isinstance(found, dict) else {}


def _frame(body: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The tokens that the tokenizer puts before and after a text."""
    for step in _steps(body.get("post_processor"), "processors"):
        if step.get("type") == "TemplateProcessing":
            parts = [part.get("SpecialToken", {}).get("id") for part in step.get("single", ())]
            at = parts.index(None)
            return (parts[at - 1] if at else None), (parts[at + 1] if at + 1 < len(parts) else None)
    return None, None


def _templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The chat template, and others by their names."""
    given = settings.get("chat_template")
    named = {one["name"]: one["template"] for one in given} if isinstance(given, list) else {"default": given}
    if (file := folder / "chat_template.jinja").is_file():
        named["default"] = read_text(file, folder)
    for other in sorted(folder.glob("additional_chat_templates/*.jinja")):
        named[other.stem] = read_text(other, folder)
    prefix = "tokenizer.chat_template"
    return {(prefix if name == "default" else f"{prefix}.{name}"): text for name, text in named.items() if text}
