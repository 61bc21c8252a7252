"""Prompts as one tensor, padded on the left, or refused: a file beside generate.py, which has the loop.

B: batch, S: the longest prompt.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tt_models.decoder import Decoder
from tt_models.sampling import is_token_id
from tt_models.shown import shown

Prompts = Tensor | Sequence[Sequence[int]]


def left_padded(
    prompts: Prompts, prompt_lengths: Tensor | Sequence[int] | None, pad_id: int, model: Decoder
) -> tuple[Tensor, Tensor | None]:
    """Prompts as one tensor [B, S] on the model's device, and their lengths if they differ; ValueError if invalid."""
    weight = model.model.embed_tokens.weight
    device, vocab_size = weight.device, weight.shape[0]
    if weight.is_meta:
        raise ValueError("the model is on the meta device, without weights: load them before generating")
    if not isinstance(prompts, Tensor):
        given: Any = prompts
        if isinstance(given, str) or not isinstance(given, Sequence) or not len(given):
            raise ValueError(f"prompts must be lists of token ids, at least one, got {shown(prompts)}")
        lengths = [len(prompt) if isinstance(prompt, Sequence | Tensor) else 0 for prompt in prompts]
        if 0 in lengths:
            wrong = prompts[lengths.index(0)]
            raise ValueError(f"prompt {lengths.index(0)} must be a list with at least one token id, got {shown(wrong)}")
        if len({*lengths}) > 1 and not 0 <= pad_id < vocab_size:
            raise ValueError(f"pad_id must be in [0, {vocab_size}) if prompts are padded, got {pad_id}")
        prompt_lengths = torch.tensor(lengths)
        for number, prompt in enumerate(prompts):
            odd = [one for one in prompt if not is_token_id(one)]
            if odd:
                raise ValueError(f"prompt {number}: a token id must be a whole number, got {shown(odd[0])}")
        prompts = torch.tensor([[pad_id] * (max(lengths) - len(prompt)) + list(prompt) for prompt in prompts])
    if prompts.dim() != 2 or prompts.numel() == 0:
        raise ValueError(f"prompts must be [batch, tokens] with at least one token, got {list(prompts.shape)}")
    if prompts.is_floating_point() or prompts.is_complex() or prompts.dtype == torch.bool:
        raise ValueError(f"prompts must be integers, the ids of tokens, got {prompts.dtype}")
    prompts = prompts.long()
    if int(prompts.min()) < 0 or int(prompts.max()) >= vocab_size:
        raise ValueError(f"token ids must be in [0, {vocab_size}), got {int(prompts.min())} to {int(prompts.max())}")
    prompt_lengths = None if prompt_lengths is None else torch.as_tensor(prompt_lengths)
    if prompt_lengths is None or bool((prompt_lengths == prompts.shape[1]).all()):
        return prompts.to(device), None
    rows, longest = prompts.shape
    if prompt_lengths.shape != (rows,) or not bool(((prompt_lengths > 0) & (prompt_lengths <= longest)).all()):
        raise ValueError(f"prompt_lengths must be {rows} numbers from 1 to {longest}")
    return prompts.to(device), prompt_lengths.to(device)


def left_padded_positions(input_ids_BS: Tensor, lengths_B: Tensor | None) -> Tensor | None:
    """Position ids of rows padded on the left: each prompt counts from 0, and every padding token is alone."""
    if lengths_B is None:
        return None
    seq_len = input_ids_BS.shape[1]
    columns = torch.arange(seq_len, device=input_ids_BS.device)
    return (columns - (seq_len - lengths_B[:, None])).clamp(min=0)


def checked_lengths(
    model: Decoder, input_ids_BS: Tensor, lengths_B: Tensor | None, max_new_tokens: int | Sequence[int]
) -> list[int]:
    """The most new tokens of each row; ValueError if a text would become longer than the model can read."""
    rows, seq_len = input_ids_BS.shape
    one_each = isinstance(max_new_tokens, Sequence) and not isinstance(max_new_tokens, str)
    most: list[int] = list(max_new_tokens) if one_each else [max_new_tokens] * rows  # type: ignore[arg-type, list-item]
    if len(most) != rows:
        raise ValueError(f"max_new_tokens must be one number or one per row, got {len(most)} for {rows} rows")
    wrong = [one for one in most if not is_token_id(one) or not 1 <= one <= 2**31]
    if wrong:
        raise ValueError(f"max_new_tokens must be at least 1 and at most 2**31, got {shown(wrong[0])}")
    longest = model.config.max_position_embeddings
    scaling = model.config.rope_scaling or {}
    for length, new in zip([seq_len] * rows if lengths_B is None else lengths_B.tolist(), most, strict=True):
        if length + new - 1 > longest and scaling.get("rope_type") != "dynamic":
            raise ValueError(
                f"{length} prompt tokens and max_new_tokens={new} exceed max_position_embeddings {longest}: "
                f"at most {max(0, longest - length + 1)} new tokens fit"
            )
    return most
