"""``tokenizer.json`` and the files beside it, from the key-value pairs of a GGUF file.

The file says how text is split before merging (``tokenizer.ggml.pre``), or that pieces of sentencepiece are merged by
their scores (``tokenizer.ggml.model`` = llama). Tokens keep their numbers.
"""

import json
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tt_ckpt.formats.gguf.config import token_id
from tt_ckpt.formats.gguf.file import GGUF
from tt_ckpt.formats.gguf.splits import BOS_FIRST, COMPOSED, DIGITS, SPLITS, WHOLE_WORDS, split_name
from tt_ckpt.shown import quoted

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # types of tokens
SPACE = "\u2581"
_LONGEST_TOKEN, _MAX_CHARACTERS = 1024, 1 << 24  # far beyond any vocabulary: every split of a token is tried as a merge
_ENDS = ("eos", "eot", "eom")


def tokenizer_files(gguf: GGUF, config: dict[str, Any]) -> dict[str, str]:
    """File name -> text: the tokenizer, its chat template and the end tokens; only the last if it has no tokenizer."""
    values = gguf.values
    kind = values.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab") and "tokenizer.ggml.tokens" not in values:
        return {"generation_config.json": _json(_generation(gguf, config))}
    tokens, types, scores = _vocabulary(gguf)
    if kind == "gpt2":
        body, bos_first = _byte_level(gguf, tokens, types)
    elif kind == "llama":
        body, bos_first = _sentencepiece(gguf, tokens, types, scores), True
    else:
        raise ValueError(
            f"{gguf.path}: a tokenizer of kind {quoted(kind)} is not converted (known: gpt2, llama); "
            "give config=DIR of the original model to use its tokenizer"
        )
    ends = [_token_text(gguf, tokens, key) for key in ("bos", "eos")]
    adds = [values.get(f"tokenizer.ggml.add_{key}_token", key == "bos" and bos_first) for key in ("bos", "eos")]
    frame = [end if add else None for end, add in zip(ends, adds, strict=True)]
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": _added(tokens, types), **body}
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer["post_processor"] = _frame(tokenizer["post_processor"], frame, ids)
    settings: dict[str, Any] = {
        "add_bos_token": bool(adds[0]) and ends[0] is not None,
        "add_eos_token": bool(adds[1]) and ends[1] is not None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (text := _token_text(gguf, tokens, key)) is not None:
            settings[f"{name}_token"] = text
    if template := _chat_template(gguf):
        settings["chat_template"] = template
    return {
        "tokenizer.json": json.dumps(tokenizer, indent=1, ensure_ascii=False) + "\n",
        "tokenizer_config.json": _json(settings),
        "generation_config.json": _json(_generation(gguf, config)),
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _generation(gguf: GGUF, config: dict[str, Any]) -> dict[str, Any]:
    """The special tokens; the end tokens include all that end a turn."""
    ends = [value for value in dict.fromkeys(token_id(gguf, key) for key in _ENDS) if value is not None]
    ids = {key: config[key] for key in ("bos_token_id", "pad_token_id") if config[key] is not None}
    return ids | ({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {})


def _chat_template(gguf: GGUF) -> Any:
    """The chat template, or all by name if the file has several."""
    prefix = "tokenizer.chat_template"
    own = [(key, value) for key, value in gguf.values.items() if key.startswith(f"{prefix}.")]
    named = {key.removeprefix(f"{prefix}."): value for key, value in own}
    default = gguf.values.get(prefix)
    if not all(isinstance(text, str) for text in [*named.values(), default or ""]):
        raise ValueError(f"{gguf.path}: {prefix} is not text; download it again")
    if not named:
        return default
    every = ({"default": default} if default else {}) | named
    return [{"name": name, "template": text} for name, text in every.items()]


def _vocabulary(gguf: GGUF) -> tuple[list[str], list[int], list[float]]:
    """The texts, types and scores of all tokens, without the padding at the end."""
    values, path = gguf.values, gguf.path
    tokens = values.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens) or not tokens:
        raise ValueError(f"{path}: tokenizer.ggml.tokens: expected a list of strings; download it again")
    longest = max(map(len, tokens))
    if longest > _LONGEST_TOKEN or sum(map(len, tokens)) > _MAX_CHARACTERS:
        raise ValueError(f"{path}: tokenizer.ggml.tokens: texts of up to {longest} characters; download it again")
    rows = gguf.tensors["token_embd.weight"].shape[0]
    if len(tokens) > rows:
        raise ValueError(f"{path}: {len(tokens)} tokens, but token_embd.weight has {rows} rows; download it again")
    lists: dict[str, Any] = {"token_type": [1] * len(tokens), "scores": [0.0] * len(tokens)}
    for key, filler in lists.items():
        lists[key] = value = values.get(f"tokenizer.ggml.{key}", filler)
        if not isinstance(value, list) or len(value) != len(tokens) or not all(map(_is_number, value)):
            raise ValueError(f"{path}: tokenizer.ggml.{key}: expected {len(tokens)} numbers; download it again")
    types, scores = lists["token_type"], lists["scores"]
    count = len(tokens)
    while count and types[count - 1] == UNUSED and tokens[count - 1] == f"[PAD{count - 1}]":
        count -= 1
    tokens = tokens[:count]
    if len(set(tokens)) != len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        cannot = "which tokenizer.json cannot express"
        raise ValueError(f"{path}: tokenizer.ggml.tokens: {quoted(twice)} appears twice, {cannot}")
    return tokens, types[:count], scores[:count]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _token_text(gguf: GGUF, tokens: list[str], key: str) -> str | None:
    index = token_id(gguf, key)
    return None if index is None or index >= len(tokens) else tokens[index]


def _added(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": index, "content": token, **plain, "special": kind != USER}
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (UNKNOWN, CONTROL, USER) and token
    ]


def _frame(processor: dict[str, Any] | None, frame: list[str | None], ids: dict[str, int]) -> dict[str, Any] | None:
    """The post-processor that adds the token before and the token after every text."""
    before, after = ([] if one is None else [{"SpecialToken": {"id": one, "type_id": 0}}] for one in frame)
    if not before and not after:
        return processor
    single = [*before, {"Sequence": {"id": "A", "type_id": 0}}, *after]
    second = [{name: {**item, "type_id": 1} for name, item in part.items()} for part in single]
    second = [{"Sequence": {"id": "B", "type_id": 1}} if "Sequence" in part else part for part in second]
    special = {one: {"id": one, "ids": [ids[one]], "tokens": [one]} for one in frame if one is not None}
    template = {"type": "TemplateProcessing", "single": single, "pair": [*single, *second], "special_tokens": special}
    return template if processor is None else {"type": "Sequence", "processors": [processor, template]}


# ---- byte-level BPE --------------------------------------------------------------------------------------------------


def _byte_level(gguf: GGUF, tokens: list[str], types: list[int]) -> tuple[dict[str, Any], bool]:
    pre = split_name(gguf, len(tokens))
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    if pre in SPLITS:
        how = {"behavior": "Isolated", "invert": False}
        steps = [{"type": "Split", "pattern": {"Regex": one}, **how} for one in SPLITS[pre]]
        steps.append(bytes_only)
    else:
        steps = [{"type": "Digits", "individual_digits": True}] if pre in DIGITS else []
        steps.append({**bytes_only, "use_regex": True})
    merges = gguf.values.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise ValueError(f"{gguf.path}: lacks tokenizer.ggml.merges; give config=DIR of the original model")
    vocab = {_respelt(token, kind): index for index, (token, kind) in enumerate(zip(tokens, types, strict=True))}
    body = {
        "normalizer": {"type": "NFC"} if pre in COMPOSED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": {**bytes_only, "trim_offsets": False},
        "decoder": {**bytes_only, "add_prefix_space": True, "use_regex": True},
        "model": _bpe(vocab, [_two(merge, vocab, gguf.path) for merge in merges], whole_words=pre in WHOLE_WORDS),
    }
    return body, pre in BOS_FIRST


def _bpe(
    vocab: dict[str, int], merges: list[list[str]], *, whole_words: bool = False, **options: Any
) -> dict[str, Any]:
    """The model of a tokenizer.json; ``whole_words``: a word that is a token is not merged."""
    absent = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": whole_words}
    return {"type": "BPE", **absent, **flags, **options, "vocab": vocab, "merges": merges}


def _two(merge: object, vocab: Collection[str], path: Path) -> list[str]:
    left, _, right = str(merge).partition(" ")
    if left not in vocab or right not in vocab or left + right not in vocab:
        what = f"{quoted(merge)} does not make a token of two"
        raise ValueError(f"{path}: tokenizer.ggml.merges: {what}; download it again")
    return [left, right]


def _spellings() -> dict[int, str]:
    """A visible character for each byte, as in GPT-2: the byte itself if it is visible, else the next above 255."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


_SPELLINGS = _spellings()
_SPELT = re.compile(f"[{re.escape(''.join(_SPELLINGS.values()))}]*")


def _respelt(token: str, kind: int) -> str:
    """A token in the alphabet that the merges use, if the file has it as plain text."""
    if kind in (UNKNOWN, CONTROL, USER) or _SPELT.fullmatch(token):
        return token
    return "".join(_SPELLINGS[byte] for byte in token.encode())


# ---- sentencepiece ---------------------------------------------------------------------------------------------------


def _sentencepiece(gguf: GGUF, tokens: list[str], types: list[int], scores: list[float]) -> dict[str, Any]:
    """Pieces, merged by the best score first: https://github.com/google/sentencepiece (BPE)."""
    prefix = gguf.values.get("tokenizer.ggml.add_space_prefix", True)
    gemma = str(gguf.values.get("general.architecture")).startswith("gemma")
    spaces: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        spaces = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces]}
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    vocab = {token: index for index, token in enumerate(tokens)}
    given = gguf.values.get("tokenizer.ggml.merges")
    if isinstance(given, list):
        merges = [_two(merge, vocab, gguf.path) for merge in given]
    else:
        merges = _merges(tokens, types, [-float(i) for i in range(len(tokens))] if gemma else scores)
    return {
        "normalizer": spaces,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": _bpe(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in types),
    }


def _merges(tokens: list[str], types: list[int], scores: list[float]) -> list[list[str]]:
    """Every way to make a piece of two others, the best piece first. Gemma ranks pieces by number, not by score."""
    plain = {token for token, kind in zip(tokens, types, strict=True) if kind in (NORMAL, USER, UNUSED)}
    found: list[tuple[float, int, int, str]] = []
    for token, score in zip(tokens, scores, strict=True):
        if token in plain:
            pairs = ((token[:at], token[at:]) for at in range(1, len(token)))
            found += [(-score, -len(a), -len(b), token) for a, b in pairs if a in plain and b in plain]
    found.sort(key=lambda one: one[:3])
    return [[token[:-left], token[-left:]] for _, left, _, token in found]
