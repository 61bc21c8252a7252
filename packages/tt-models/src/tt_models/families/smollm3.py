"""SmolLM 3: https://huggingface.co/blog/smollm3."""

from dataclasses import dataclass
from typing import Any, ClassVar

from tt_models.config import FULL, SLIDING, LayeredConfig
from tt_models.decoder import Block, Decoder
from tt_models.llama import attention_of, mlp_of, norm_of, rope_of
from tt_models.shown import shown


@dataclass(frozen=True, kw_only=True)
class SmolLM3Config(LayeredConfig):
    """``config.json`` of a SmolLM 3."""

    model_type: ClassVar[str] = "smollm3"
    architecture: ClassVar[str] = "SmolLM3ForCausalLM"

    vocab_size: int = 128256
    hidden_size: int = 2048
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = True
    rope_theta: float = 2e6
    no_rope_layer_interval: int = 4  # every n-th layer has no positions
    no_rope_layers: tuple[int, ...] | None = None  # per layer: 1, or 0 without positions; None: by the interval
    use_sliding_window: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    pad_token_id: int | None = 128004
    bos_token_id: int | None = 128000
    eos_token_id: int | tuple[int, ...] | None = 128001

    def __post_init__(self) -> None:
        super().__post_init__()
        usual = tuple(int((layer + 1) % self.no_rope_layer_interval != 0) for layer in range(self.num_hidden_layers))
        if self.no_rope_layers == usual:
            object.__setattr__(self, "no_rope_layers", None)
        if len(self.no_rope_layers or usual) != self.num_hidden_layers:
            count, found = self.num_hidden_layers, shown(self.no_rope_layers)
            raise ValueError(f"no_rope_layers must have {count} numbers, got {found}")

    @property
    def layers_with_rope(self) -> tuple[bool, ...]:
        """Per layer, whether it knows positions."""
        if self.no_rope_layers is not None:
            return tuple(bool(number) for number in self.no_rope_layers)
        return tuple((layer + 1) % self.no_rope_layer_interval != 0 for layer in range(self.num_hidden_layers))

    def usual_layer_types(self) -> tuple[str, ...]:
        """Layers without positions have the window, if it is used."""
        windowed = self.window is not None
        return tuple(SLIDING if windowed and not has_rope else FULL for has_rope in self.layers_with_rope)

    def to_hf(self) -> dict[str, Any]:
        """With what each layer has."""
        return super().to_hf() | {"no_rope_layers": [int(has_rope) for has_rope in self.layers_with_rope]}


def smollm3(config: SmolLM3Config) -> Decoder:
    """Llama's blocks, one in four without positions."""
    rope, bias = rope_of(config), config.attention_bias
    layers = [
        Block(
            attention_of(config, layer, rope=rope if has_rope else None, qkv_bias=bias, output_bias=bias),
            mlp_of(config, bias=config.mlp_bias),
            norm_of(config),
            norm_of(config),
        )
        for layer, has_rope in enumerate(config.layers_with_rope)
    ]
    return Decoder(config, layers, norm_of(config))


SIZES = {"smollm3_3b": SmolLM3Config(max_position_embeddings=65536, rope_theta=5e6)}
