"""What generation is given: prompts as one tensor, the ids that end a text, room for it. B: batch, S: prompt."""

import operator
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from tt_models.decoder import Decoder

Prompts = Tensor | Sequence[Sequence[int]]
EndIds = int | Collection[int] | Tensor | None


def left_padded(
    prompts: Prompts, prompt_lengths: Tensor | Sequence[int] | None, pad_id: int, model: Decoder
) -> tuple[Tensor, Tensor | None]:
    """Prompts as one tensor [B, S] on the model's device, and their lengths where they differ; ValueError if wrong."""
    weight = model.model.embed_tokens.weight
    device, vocab_size = weight.device, weight.shape[0]
    if not isinstance(prompts, Tensor):
        lengths = [len(prompt) if hasattr(prompt, "__len__") else 0 for prompt in prompts]
        if 0 in lengths:
            wrong = prompts[lengths.index(0)]
            raise ValueError(f"prompt {lengths.index(0)} must be a list with at least one token id, got {wrong!r}")
        if len({*lengths}) > 1 and not 0 <= pad_id < vocab_size:
            raise ValueError(f"pad_id must lie in [0, {vocab_size}) where prompts are padded, got {pad_id}")
        prompt_lengths = torch.tensor(lengths)
        prompts = torch.tensor([[pad_id] * (max(lengths) - len(prompt)) + list(prompt) for prompt in prompts])
    if prompts.dim() != 2 or prompts.numel() == 0:
        raise ValueError(f"prompts must be [batch, tokens] with at least one token, got {list(prompts.shape)}")
    if prompts.is_floating_point() or prompts.is_complex() or prompts.dtype == torch.bool:
        raise ValueError(f"prompts must be integers, the ids of tokens, got {prompts.dtype}")
    prompts = prompts.long()
    if int(prompts.min()) < 0 or int(prompts.max()) >= vocab_size:
        raise ValueError(f"token ids must lie in [0, {vocab_size}), got {int(prompts.min())} to {int(prompts.max())}")
    prompt_lengths = None if prompt_lengths is None else torch.as_tensor(prompt_lengths)
    if prompt_lengths is None or bool((prompt_lengths == prompts.shape[1]).all()):
        return prompts.to(device), None
    if prompt_lengths.shape != prompts.shape[:1] or not bool(
        ((prompt_lengths > 0) & (prompt_lengths <= prompts.shape[1])).all()
    ):
        raise ValueError(f"prompt_lengths must be {prompts.shape[0]} numbers from 1 to {prompts.shape[1]}")
    return prompts.to(device), prompt_lengths.to(device)


def left_padded_positions(input_ids_BS: Tensor, lengths_B: Tensor | None) -> Tensor | None:
    """Position ids of rows padded on the left: each prompt counts from 0, and every padding token is alone."""
    if lengths_B is None:
        return None
    seq_len = input_ids_BS.shape[1]
    columns = torch.arange(seq_len, device=input_ids_BS.device)
    return (columns - (seq_len - lengths_B[:, None])).clamp(min=0)


def check_room(model: Decoder, seq_len: int, max_new_tokens: int) -> None:
    """ValueError where the text would become longer than the model can read."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    longest = model.config.max_position_embeddings
    scaling = model.config.rope_scaling or {}
    if seq_len + max_new_tokens - 1 > longest and scaling.get("rope_type") != "dynamic":
        raise ValueError(
            f"{seq_len} prompt tokens and max_new_tokens={max_new_tokens} exceed max_position_embeddings {longest}: "
            f"at most {max(0, longest - seq_len + 1)} new tokens fit"
        )


def numbers_of(eos_ids: EndIds) -> list[int]:
    """One id or several, None for none, as plain numbers."""
    if eos_ids is None:
        return []
    try:
        return [operator.index(eos_ids)]  # type: ignore[arg-type]
    except TypeError:  # several
        return [operator.index(one) for one in eos_ids]  # type: ignore[union-attr]
