"""What generation is given: prompts as one tensor, the ids that end a text, room for it. B: batch, S: prompt."""

import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from tt_models.decoder import Decoder
from tt_models.sampling import is_whole_number
from tt_models.shown import shown

Prompts = Tensor | Sequence[Sequence[int]]
EndIds = int | Collection[int] | Tensor | None


def left_padded(
    prompts: Prompts, prompt_lengths: Tensor | Sequence[int] | None, pad_id: int, model: Decoder
) -> tuple[Tensor, Tensor | None]:
    """Prompts as one tensor [B, S] on the model's device, and their lengths where they differ; ValueError if wrong."""
    weight = model.model.embed_tokens.weight
    device, vocab_size = weight.device, weight.shape[0]
    if weight.is_meta:
        raise ValueError("the model is on the meta device, without weights: load them before it generates")
    if not isinstance(prompts, Tensor):
        given: Any = prompts
        if isinstance(given, str) or not isinstance(given, Sequence) or not len(given):
            raise ValueError(f"prompts must be lists of token ids, at least one, got {shown(prompts)}")
        lengths = [len(prompt) if isinstance(prompt, Sequence | Tensor) else 0 for prompt in prompts]
        if 0 in lengths:
            wrong = prompts[lengths.index(0)]
            raise ValueError(f"prompt {lengths.index(0)} must be a list with at least one token id, got {shown(wrong)}")
        if len({*lengths}) > 1 and not 0 <= pad_id < vocab_size:
            raise ValueError(f"pad_id must lie in [0, {vocab_size}) where prompts are padded, got {pad_id}")
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


def is_token_id(value: Any) -> bool:
    """A whole number, of numpy or torch too, that a tensor holds."""
    try:
        return not isinstance(value, bool) and -(2**63) <= operator.index(value) < 2**63
    except TypeError:
        return False


def check_seed(seed: Any) -> None:
    """ValueError for what torch takes for no seed."""
    if seed is not None and (not is_whole_number(seed) or not 0 <= seed < 2**64):
        raise ValueError(f"seed must be a whole number from 0 to 2**64 - 1, or None, got {shown(seed)}")


def check_room(model: Decoder, seq_len: int, max_new_tokens: int) -> None:
    """ValueError if the text would become longer than the model can read."""
    if not is_whole_number(max_new_tokens) or not 1 <= max_new_tokens <= 2**31:
        raise ValueError(f"max_new_tokens must be at least 1 and at most 2**31, got {shown(max_new_tokens)}")
    longest = model.config.max_position_embeddings
    scaling = model.config.rope_scaling or {}
    if seq_len + max_new_tokens - 1 > longest and scaling.get("rope_type") != "dynamic":
        raise ValueError(
            f"{seq_len} prompt tokens and max_new_tokens={max_new_tokens} exceed max_position_embeddings {longest}: "
            f"at most {max(0, longest - seq_len + 1)} new tokens fit"
        )


def numbers_of(eos_ids: EndIds, vocab_size: int) -> list[int]:
    """One id or several, None for none, as plain numbers; ValueError for what no token of the model is."""
    if eos_ids is None:
        return []
    ids: Any = eos_ids
    several = ids.dim() > 0 if isinstance(ids, Tensor) else isinstance(ids, Collection) and not isinstance(ids, str)
    given: list[Any] = [*ids] if several else [ids]
    wrong = [one for one in given if not is_token_id(one) or not 0 <= operator.index(one) < vocab_size]
    if wrong:
        raise ValueError(
            f"eos_ids: {shown(wrong[0])} is not a token of the model, whose ids are 0 to {vocab_size - 1}; leave it out"
        )
    return [operator.index(one) for one in given]
