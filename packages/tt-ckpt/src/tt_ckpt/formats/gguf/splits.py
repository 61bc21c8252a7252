"""How text is split before merging, according to ``tokenizer.ggml.pre`` of a GGUF file.

The names are llama.cpp's; the expressions are those of the models' own ``tokenizer.json``.
"""

import difflib
import logging
from collections.abc import Sequence

from tt_ckpt.formats.gguf.file import GGUF
from tt_ckpt.shown import quoted

logger = logging.getLogger(__name__)

_MARKS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _MARKS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _MARKS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{0}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{0}}"
_SLASHED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = _CASED.replace("{0}", "") + r"|\p{N}" + _SLASHED
_GPT4O = _CASED.replace("{0}", _MARKS + "?") + r"|\p{N}{1,3}" + _SLASHED
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
GPT2 = ("gpt-2", "default", "mpt", "olmo", "jais", "phi-2", "roberta-bpe", "granite-docling", "gigachat")
DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
# tokenizer.ggml.pre -> regular expressions that split a text, one after the other
SPLITS: dict[str, Sequence[str]] = (
    dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"), (_LLAMA3,))
    | dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), (_LLAMA3,))
    | dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "kormo"), (_QWEN2,))
    | {"tekken": (_TEKKEN,), "gpt-4o": (_GPT4O,), "llama4": (_GPT4O,), "deepseek-v3": _DEEPSEEK3}
)
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2", "tekken", "gpt-4o")
COMPOSED = ("qwen2", "deepseek-r1-qwen", "megrez", "kormo")  # Qwen's own tokenizer normalizes text to NFC first
BOS_FIRST = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2", "tekken")  # unless a key says otherwise


def split_name(gguf: GGUF, count: int) -> str:
    pre = gguf.values.get("tokenizer.ggml.pre")
    if pre is None:  # not in files from before May 2024
        architecture = gguf.values.get("general.architecture")
        pre = "qwen2" if architecture == "qwen2" else "llama-bpe" if count >= 128_000 else "default"
    known = [*SPLITS, *GPT2, *DIGITS]
    if pre not in known:
        close = difflib.get_close_matches(str(pre)[:80], known, 1, 0.5)
        hint = f", nearest {close[0]}" if close else ""
        raise ValueError(
            f"{gguf.path}: tokenizer.ggml.pre {quoted(pre)} is not known here{hint}; give config=DIR of the original "
            "model to use its tokenizer"
        )
    if pre == "default":
        logger.warning(
            "%s does not say how text is split before merging: it is split as in GPT-2. If the ids differ from the "
            "original model's, give config=DIR with its tokenizer",
            gguf.path,
        )
    return str(pre)
