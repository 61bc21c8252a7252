"""The formats of quantized weights, by the names that ``tt quantize --to`` takes. Nothing here loads torch."""

from dataclasses import dataclass

from tt_train.errors import ConfigError, did_you_mean

GROUP_SIZES = (128, 64, 32)  # in the order in which one is chosen; what the int4 kernels of torch accept, with 256


@dataclass(frozen=True, kw_only=True)
class Format:
    """``grouped``: each row of a weight has several scales, one for ``group_size`` inputs."""

    name: str
    about: str
    grouped: bool = False


FORMATS: dict[str, Format] = {
    found.name: found
    for found in (
        Format(name="int8", about="8-bit weights, a scale for each row"),
        Format(name="int8-dynamic", about="as int8, and the inputs of a layer are rounded to 8 bits for each token"),
        Format(name="int4", about="4-bit weights, two in a byte, a scale and a zero for each group", grouped=True),
        Format(name="int4-unpacked", about="4-bit weights, one in a byte, a scale for each group", grouped=True),
        Format(name="int8-dynamic-int4", about="as int4-unpacked, and inputs are rounded to 8 bits", grouped=True),
        Format(name="int8-grouped", about="8-bit weights, a scale for each group", grouped=True),
        Format(name="int8-dynamic-grouped", about="as int8-grouped, and inputs are rounded to 8 bits", grouped=True),
        Format(name="fp8", about="8-bit floating-point weights, a scale for each row"),
        Format(name="fp8-dynamic", about="as fp8, and inputs are rounded to fp8 for each token"),
    )
}
# the names of torchtune, of torchao's scripts and of vLLM's papers
ALIASES = {
    "8w": "int8", "int8wo": "int8", "w8a16": "int8", "int8dq": "int8-dynamic", "w8a8": "int8-dynamic",
    "4w": "int4", "int4wo": "int4", "w4a16": "int4", "8da4w": "int8-dynamic-int4",
    "fp8wo": "fp8", "float8": "fp8", "float8wo": "fp8", "float8dq": "fp8-dynamic", "w8a8-fp8": "fp8-dynamic",
}  # fmt: skip
_REFUSED = {
    "4w-gptq": "torchao's GPTQ runs on CUDA only and its int4 needs mslk, so it is not offered; the nearest is int4",
    "gptq": "torchao's GPTQ runs on CUDA only and its int4 needs mslk, so it is not offered; the nearest is int4",
    "nf4": "NF4 is for a base under an adapter (adapter.quantize_base: true) and is stored nowhere; take int4",
}


def find_format(name: str) -> Format:
    """The format called ``name``, by its own name or another tool's; ConfigError with the nearest names."""
    word = name.lower().replace("_", "-")
    if word in _REFUSED:
        raise ConfigError([f"--to {name}: {_REFUSED[word]}"])
    if (found := FORMATS.get(ALIASES.get(word, word))) is not None:
        return found
    near = did_you_mean(name, [*FORMATS, *ALIASES])
    raise ConfigError([f"--to: unknown format {name!r}{near}; known: {', '.join(FORMATS)}"])
