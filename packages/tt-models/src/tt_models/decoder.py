"""The decoder: embedding, blocks, final norm, output projection, under the parameter names of Hugging Face.

B: batch, S: sequence, E: hidden size, V: vocabulary.
"""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tt_models.attention import Attention, kept_rows, leaves_out, take
from tt_models.config import ModelConfig
from tt_models.cpu.attention import FEWEST
from tt_models.cpu.products import linear, product
from tt_models.kv_cache import KVCache
from tt_models.masks import Intervals, Mask, block_mask, document_lengths, document_starts, interval_mask
from tt_models.rope import Rope


class Block(nn.Module):
    """``x + attention(norm x)``, then ``x + mlp(norm x)``."""

    def __init__(self, self_attn: Attention, mlp: nn.Module, input_norm: nn.Module, post_norm: nn.Module) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm = input_norm
        self.post_attention_layernorm = post_norm

    def forward(self, x_BSE: Tensor, *, rows: Tensor | None = None, **shared: Any) -> Tensor:
        """[B, S, E] to the same shape, or [1, N, E] for ``rows``; the keywords are those of ``Attention.forward``."""
        x_BSE = take(x_BSE, rows) + self.self_attn(self.input_layernorm(x_BSE), rows=rows, **shared)
        return x_BSE + self.mlp(self.post_attention_layernorm(x_BSE))  # type: ignore[no-any-return]


class Stack(nn.Module):
    """Everything below the output projection (``model.`` in Hugging Face names)."""

    def __init__(self, config: ModelConfig, layers: Iterable[nn.Module], norm: nn.Module, scale: float | None) -> None:
        super().__init__()
        weight = torch.empty(config.vocab_size, config.hidden_size)  # drawing it on meta would load torch._dynamo
        self.embed_tokens = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]
            weight, freeze=False, padding_idx=config.pad_token_id
        )
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.embed_scale = scale
        self.max_positions = config.max_position_embeddings
        self.dropout = config.attention_dropout
        self.read_layers()

    def read_layers(self) -> None:
        """The rope and the window of each layer."""
        attentions: list[Any] = [layer.self_attn for layer in self.layers]
        self.ropes: list[Rope | None] = [attention.rope for attention in attentions]
        self.windows: list[int | None] = [attention.window for attention in attentions]

    def forward(
        self,
        input_ids_BS: Tensor,
        position_ids_BS: Tensor | None = None,
        cache: KVCache | None = None,
        keep_BS: Tensor | None = None,
    ) -> Tensor:
        """[B, S, E], after the final norm; [N, E] of the tokens where ``keep_BS`` is True.

        The last block computes nothing for other tokens behind its attention, if they are many.
        """
        if len(self.layers) != len(self.windows):  # layers were removed
            self.read_layers()
        length = self.check_length(input_ids_BS, cache, position_ids_BS)
        x_BSE = self.embed_tokens(input_ids_BS)
        if self.embed_scale is not None:
            x_BSE = x_BSE * torch.tensor(self.embed_scale, dtype=x_BSE.dtype)  # rounded to that dtype first
        positions, starts = locate(input_ids_BS, position_ids_BS, cache)
        tables = self.tables(positions, starts, length, x_BSE.dtype)
        masks = {window: self.mask(window, x_BSE, starts, cache) for window in set(self.windows)}
        rows = None if keep_BS is None else kept_rows(keep_BS, input_ids_BS)
        for index, layer in enumerate(self.layers):
            shared: dict[str, Any] = {"rope": tables[self.ropes[index]], "mask": masks[self.windows[index]]}
            if cache is not None:
                shared |= {"cache": cache.layers[index], "length": length}
            if rows is not None and layer is self.layers[-1] and leaves_out(layer, rows, input_ids_BS.numel()):
                shared["rows"], rows = rows, None
            x_BSE = layer(x_BSE, **shared)
        if cache is not None:
            cache.rows, cache.length = input_ids_BS.shape[0], cache.length + input_ids_BS.shape[1]
            cache.first = None if starts is None else starts[:, -1]
        x_BSE = self.norm(take(x_BSE, rows))
        return x_BSE if keep_BS is None else x_BSE.flatten(0, 1)  # type: ignore[no-any-return]

    def check_length(self, input_ids_BS: Tensor, cache: KVCache | None, position_ids_BS: Tensor | None = None) -> int:
        """How many tokens came before; ValueError if there are too many. Packed rows may be longer than a document."""
        if input_ids_BS.dim() != 2 or 0 in input_ids_BS.shape:
            shape = list(input_ids_BS.shape)
            raise ValueError(f"input_ids must be [batch, tokens] with at least one token, got {shape}")
        batch, seq_len = input_ids_BS.shape
        length = 0
        if cache is not None:
            cache.check_room(batch, seq_len)
            cache.check_dtype(self.embed_tokens.weight)
            cache.check_layers(len(self.layers))
            length = cache.length
        stretches = any(rope.kind == "dynamic" for rope in self.ropes if rope is not None)
        too_long = length + seq_len > self.max_positions and not stretches
        if too_long and cache is None and position_ids_BS is not None:
            too_long = position_ids_BS.device.type == "cpu" and int(position_ids_BS.max()) >= self.max_positions
        if too_long and cache is not None and cache.first is not None:  # left padding takes no positions
            too_long = length + seq_len - int(cache.first.min()) > self.max_positions
        if too_long:
            raise ValueError(
                f"{length + seq_len} tokens are more than max_position_embeddings {self.max_positions}: "
                "shorten them, or raise it in the config"
            )
        if cache is not None and self.outgrows_context(cache, seq_len):
            raise ValueError(
                "beyond original_max_position_embeddings every position is rotated differently: "
                "reset the cache and read the whole sequence again"
            )
        return length

    def outgrows_context(self, cache: KVCache, seq_len: int) -> bool:
        """Whether ``seq_len`` more tokens make what is in the cache wrong (longrope, at its original context)."""
        original = [rope.original_max_positions for rope in self.ropes if rope is not None and rope.kind == "longrope"]
        if not original or cache.length == 0 or cache.length + seq_len <= original[0]:
            return False
        before = torch.tensor(cache.length) if cache.first is None else cache.length - cache.first
        return bool(((before > 0) & (before <= original[0]) & (before + seq_len > original[0])).any())

    def tables(
        self, positions: Tensor, starts: Tensor | None, length: int, dtype: torch.dtype
    ) -> dict[Rope | None, tuple[Tensor, Tensor] | None]:
        """cos and sin of each kind of layer."""
        lengths = None
        if any(rope.by_length for rope in self.ropes if rope is not None):
            lengths = document_lengths(positions, starts, offset=length)
        return {rope: None if rope is None else rope.tables(positions, dtype, lengths) for rope in set(self.ropes)}

    def mask(self, window: int | None, x_BSE: Tensor, starts: Tensor | None, cache: KVCache | None) -> Mask:
        """The mask that layers with this window share; None if SDPA's causal flag is enough."""
        length, seq_len, device = 0 if cache is None else cache.length, x_BSE.shape[1], x_BSE.device
        num_keys = length + seq_len
        keys = None
        if cache is not None:
            keys = cache.layers[self.windows.index(window)].columns_after(length, seq_len, device)
            num_keys = keys.numel()
        narrow = window is not None and num_keys > window
        if starts is None and not narrow and (seq_len == 1 or seq_len == num_keys):
            return None
        fresh = length == 0 and seq_len > 1  # queries and keys are the same columns
        if fresh and device.type == "cuda" and not (self.training and self.dropout):
            return block_mask(starts, seq_len, window, device)
        if device.type == "cpu" and seq_len >= FEWEST:
            hidden = length + seq_len - num_keys  # columns that a ring has forgotten
            return Intervals(starts if starts is None or not hidden else (starts - hidden).clamp(min=0), window)
        queries = torch.arange(length, length + seq_len, device=device)
        return interval_mask(starts, queries, queries if keys is None else keys, window)


def locate(input_ids_BS: Tensor, position_ids_BS: Tensor | None, cache: KVCache | None) -> tuple[Tensor, Tensor | None]:
    """The position of each token [B or 1, S], and the column where its document begins (None: column 0 for all)."""
    batch, length, first = input_ids_BS.shape[0], 0, None
    if cache is not None:
        length, first = cache.length, None if cache.first is None else cache.first[:batch]
    columns = torch.arange(length, length + input_ids_BS.shape[1], device=input_ids_BS.device)[None]
    if position_ids_BS is not None:
        if position_ids_BS.shape not in (input_ids_BS.shape, columns.shape):
            shapes = f"position_ids {list(position_ids_BS.shape)} do not fit input_ids {list(input_ids_BS.shape)}"
            raise ValueError(f"{shapes}: give one position per token")
        starts = document_starts(position_ids_BS, offset=length, first_B=first)
        may_look = position_ids_BS.device.type == "cpu" and not torch.compiler.is_compiling()
        return position_ids_BS, None if may_look and not bool(starts.any()) else starts
    if first is None:
        return columns, None
    return columns - first[:, None], first[:, None].expand(-1, columns.shape[1])


class Decoder(nn.Module):
    """A causal language model. ``model.layers`` are the blocks, ``output_weight`` is the output projection.

    ``embed_scale`` multiplies the embeddings; ``logit_softcap`` bounds the logits by ``cap * tanh(logit / cap)``.
    """

    lm_head: nn.Linear | None

    def __init__(
        self,
        config: ModelConfig,
        layers: Iterable[nn.Module],
        norm: nn.Module,
        *,
        embed_scale: float | None = None,
        logit_softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.model = Stack(config, layers, norm, embed_scale)
        self.logit_softcap = logit_softcap
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
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        keep: Tensor | None = None,
    ) -> Tensor:
        """[B, S, E] after the final norm; arguments as in ``forward``.

        ``keep`` [B, S]: booleans; then [N, E], the hidden states of the N tokens where it is True, row by row. The last
        block does less for the others. ValueError for another shape or dtype.
        """
        return self.model(input_ids, position_ids, cache, keep)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., E] to [..., V], in the dtype of ``hidden``."""
        logits = product(hidden, self.output_weight) if self.lm_head is None else linear(self.lm_head, hidden)
        if self.logit_softcap is not None:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        logits_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Logits [B, S, V].

        ``position_ids`` [B, S] are needed if several documents share a row: a position that is not one more than the
        last begins a document, and no token sees another document. With a ``cache`` the tokens continue those in it.
        ``logits_dtype`` asks for a different dtype than the model computes in.
        """
        logits = self.logits(self.hidden_states(input_ids, position_ids, cache))
        return logits if logits_dtype is None else logits.to(logits_dtype)


def drop_tied_head(module: nn.Module, state_dict: dict[str, Any], prefix: str, *lists: Any) -> None:
    """Tied models have no ``lm_head.weight``. A file may repeat the embedding: else transformers unties."""
    head = state_dict.pop(f"{prefix}lm_head.weight", None)
    embedding = state_dict.get(f"{prefix}model.embed_tokens.weight")
    if head is None or embedding is None or head is embedding or head.is_meta or embedding.is_meta:
        return
    if head.shape != embedding.shape or not torch.equal(head, embedding.to(head)):
        errors: list[str] = lists[-1]
        errors.append(
            f"{prefix}lm_head.weight differs from {prefix}model.embed_tokens.weight, but the config ties them: "
            "set tie_word_embeddings to false in it, or remove the head from the file"
        )


@torch.no_grad()
def init_weights_(model: nn.Module, std: float) -> None:
    """Normal matrices of linear layers and embeddings, zero biases; any other module by its ``reset_parameters``.

    In place, from torch's global generator. A ``reset_parameters`` with an argument gets ``std``. ValueError
    for a parameter or buffer that is left as it was: its memory is not initialized.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    versions = {name: tensor._version for name, tensor in tensors.items() if not tensor.is_inference()}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
        else:
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if reset is not None:
                reset(std) if inspect.signature(reset).parameters else reset()
    missed = [name for name, version in versions.items() if tensors[name]._version == version]
    if missed:
        owner = type(model.get_submodule(missed[0].rpartition(".")[0])).__name__
        raise ValueError(
            f"{missed[0]} has no starting value: {owner} needs a method reset_parameters(std), or reset_parameters(), "
            "that fills it in place"
        )
