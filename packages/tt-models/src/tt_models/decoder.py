"""The decoder: embedding, blocks, final norm, output projection, under the parameter names of Hugging Face.

B: batch, S: sequence, E: hidden size, V: vocabulary.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tt_models.attention import Attention
from tt_models.config import ModelConfig
from tt_models.kv_cache import KVCache, LayerCache
from tt_models.masks import document_starts, interval_mask
from tt_models.rope import Rope


class Block(nn.Module):
    """``x + attention(norm x)``, then ``x + mlp(norm x)``."""

    def __init__(
        self, self_attn: Attention, mlp: nn.Module, input_norm: nn.Module, post_attention_norm: nn.Module
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm = input_norm
        self.post_attention_layernorm = post_attention_norm

    def forward(
        self,
        x_BSE: Tensor,
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        length: int = 0,
    ) -> Tensor:
        """[B, S, E] to the same shape; the other arguments are those of ``Attention``."""
        x_BSE = x_BSE + self.self_attn(self.input_layernorm(x_BSE), rope=rope, mask=mask, cache=cache, length=length)
        return x_BSE + self.mlp(self.post_attention_layernorm(x_BSE))  # type: ignore[no-any-return]


class Stack(nn.Module):
    """Everything below the output projection (``model.`` in Hugging Face names)."""

    def __init__(
        self, embed_tokens: nn.Embedding, layers: Iterable[nn.Module], norm: nn.Module, *, max_positions: int
    ) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.max_positions = max_positions
        attentions: list[Any] = [layer.self_attn for layer in self.layers]
        self.ropes: list[Rope | None] = [attention.rope for attention in attentions]
        self.windows: list[int | None] = [attention.window for attention in attentions]

    def forward(
        self, input_ids_BS: Tensor, position_ids_BS: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """[B, S, E], after the final norm."""
        batch, seq_len = input_ids_BS.shape
        length = self.check_length(batch, seq_len, cache)
        x_BSE = self.embed_tokens(input_ids_BS)
        positions, starts = locate(input_ids_BS, position_ids_BS, cache)
        tables = {rope: rope.tables(positions, x_BSE.dtype) for rope in set(self.ropes) if rope is not None}
        masks = {
            window: self.mask(window, seq_len, starts, cache, x_BSE.device) for window in dict.fromkeys(self.windows)
        }
        for index, layer in enumerate(self.layers):
            rope = self.ropes[index]
            x_BSE = layer(
                x_BSE,
                rope=None if rope is None else tables[rope],
                mask=masks[self.windows[index]],
                cache=None if cache is None else cache.layers[index],
                length=length,
            )
        if cache is not None:
            cache.length += seq_len
            cache.first = None if starts is None else starts[:, -1]
        return self.norm(x_BSE)  # type: ignore[no-any-return]

    def check_length(self, batch: int, seq_len: int, cache: KVCache | None) -> int:
        """How many tokens came before; ValueError where there are too many."""
        length = 0
        if cache is not None:
            cache.check_room(batch, seq_len)
            length = cache.length
        stretches = any(rope is not None and rope.kind == "dynamic" for rope in self.ropes)
        if length + seq_len > self.max_positions and not stretches:
            raise ValueError(
                f"{length + seq_len} tokens are more than max_position_embeddings {self.max_positions}: "
                "shorten them, or raise it in the config"
            )
        return length

    def mask(
        self, window: int | None, seq_len: int, starts: Tensor | None, cache: KVCache | None, device: torch.device
    ) -> Tensor | None:
        """The mask that layers with this window share; None where the causal flag says all."""
        length = 0 if cache is None else cache.length
        queries = torch.arange(length, length + seq_len, device=device)
        keys = queries
        if cache is not None:
            keys = cache.layers[self.windows.index(window)].columns_after(length, seq_len, device)
        aligned = seq_len == 1 or keys.numel() == seq_len
        narrow = window is not None and keys.numel() > window
        if starts is None and aligned and not narrow:
            return None
        return interval_mask(starts, queries, keys, window)


def locate(input_ids_BS: Tensor, position_ids_BS: Tensor | None, cache: KVCache | None) -> tuple[Tensor, Tensor | None]:
    """The position of each token [B or 1, S], and the column where its document begins (None: column 0 for all)."""
    length, first = (0, None) if cache is None else (cache.length, cache.first)
    columns = torch.arange(length, length + input_ids_BS.shape[1], device=input_ids_BS.device)[None]
    if position_ids_BS is not None:
        if position_ids_BS.dim() != 2 or position_ids_BS.shape[1] != columns.shape[1]:
            raise ValueError(
                f"position_ids {list(position_ids_BS.shape)} do not fit input_ids {list(input_ids_BS.shape)}"
            )
        starts = document_starts(position_ids_BS, offset=length, first_B=first)
        return position_ids_BS, starts if bool(starts.any()) else None
    if first is None:
        return columns, None
    return columns - first[:, None], first[:, None].expand(-1, columns.shape[1])


class Decoder(nn.Module):
    """A causal language model. ``model.layers`` are the blocks, ``output_weight`` is the output projection."""

    lm_head: nn.Linear | None

    def __init__(self, config: ModelConfig, layers: Iterable[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.config = config
        embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.model = Stack(embed_tokens, layers, norm, max_positions=config.max_position_embeddings)
        if config.tie_word_embeddings:
            self.lm_head = None
            self.register_load_state_dict_pre_hook(drop_tied_head)  # type: ignore[no-untyped-call]
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def output_weight(self) -> Tensor:
        """[V, E]: the output projection, tied or not."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def hidden_states(
        self, input_ids: Tensor, position_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """[B, S, E] after the final norm; arguments as in ``forward``."""
        return self.model(input_ids, position_ids, cache)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., E] to [..., V], in the dtype of ``hidden``."""
        if self.lm_head is None:
            return F.linear(hidden, self.output_weight)
        return self.lm_head(hidden)  # type: ignore[no-any-return]

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        logits_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Logits [B, S, V].

        ``position_ids`` [B, S] are needed where several documents share a row: a position that does not go on by one
        begins a document, and no token sees another document. With a ``cache`` the tokens go on from those in it.
        ``logits_dtype`` asks for another dtype than the model computes in.
        """
        logits = self.logits(self.hidden_states(input_ids, position_ids, cache))
        return logits if logits_dtype is None else logits.to(logits_dtype)


def drop_tied_head(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Tied models have no ``lm_head.weight``; files may repeat it."""
    state_dict.pop(f"{prefix}lm_head.weight", None)


def init_weights_(model: nn.Module, std: float) -> None:
    """Normal matrices, zero biases, neutral norms, in place, from torch's global random numbers."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                with torch.no_grad():
                    module.weight[module.padding_idx].zero_()
        elif any(True for _ in module.parameters(recurse=False)):
            module.reset_parameters()  # type: ignore[operator]
