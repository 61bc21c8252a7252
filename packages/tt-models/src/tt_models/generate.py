"""Generation: prefill, one token at a time, sampling. B: batch, S: prompt, V: vocabulary."""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from tt_models.decoder import Decoder
from tt_models.kv_cache import KVCache


def prefill(model: Decoder, input_ids_BS: Tensor, cache: KVCache, position_ids_BS: Tensor | None = None) -> Tensor:
    """Read the prompts into the cache; the logits of what comes next, [B, V]."""
    return model.logits(model.hidden_states(input_ids_BS, position_ids_BS, cache)[:, -1])


def decode_one_token(model: Decoder, token_B: Tensor, cache: KVCache) -> Tensor:
    """Read one more token of each row; the logits of what comes next, [B, V]."""
    return model.logits(model.hidden_states(token_B[:, None], None, cache)[:, -1])


def reread(model: Decoder, input_ids_BS: Tensor, cache: KVCache) -> Tensor:
    """Read everything once more, because longer documents are rotated differently; the next logits, [B, V]."""
    first = cache.first
    cache.reset()
    if first is None:
        return prefill(model, input_ids_BS, cache)
    columns = torch.arange(input_ids_BS.shape[1], device=input_ids_BS.device)
    return prefill(model, input_ids_BS, cache, (columns - first[:, None]).clamp(min=0))


def sample(
    logits_BV: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A token per row, int64[B]; ``temperature=0`` takes the most probable one."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV.float() / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        least = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, -torch.inf)
    if top_p is not None and top_p < 1.0:
        logits_BV = keep_nucleus(logits_BV, top_p)
    return torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=generator)[:, 0]


def keep_nucleus(logits_BV: Tensor, top_p: float) -> Tensor:
    """Only the most probable tokens that together reach ``top_p``: https://arxiv.org/abs/1904.09751."""
    ordered, index = logits_BV.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    ahead = probabilities.cumsum(dim=-1) - probabilities  # of more probable tokens; the first one is always kept
    ordered = ordered.masked_fill(ahead >= top_p, -torch.inf)
    return torch.empty_like(logits_BV).scatter_(-1, index, ordered)


def check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """ValueError for settings outside of their range."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")


@torch.no_grad()
def tokens(
    model: Decoder,
    input_ids_BS: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    prompt_lengths: Tensor | None = None,
) -> Iterator[Tensor]:
    """The tokens of each step, int64[B], ``max_new_tokens`` times."""
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    weight = model.output_weight
    generator = None if seed is None else torch.Generator(weight.device).manual_seed(seed)
    batch, seq_len = input_ids_BS.shape
    cache = KVCache(
        model.config, batch_size=batch, max_seq_len=seq_len + max_new_tokens, device=weight.device, dtype=weight.dtype
    )
    logits = prefill(model, input_ids_BS, cache, left_padded_positions(seq_len, prompt_lengths))
    for step in range(max_new_tokens):
        token = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        yield token
        if step + 1 == max_new_tokens:
            return
        input_ids_BS = torch.cat((input_ids_BS, token[:, None]), dim=1)
        if model.model.outgrows_context(cache, 1):
            logits = reread(model, input_ids_BS, cache)
        else:
            logits = decode_one_token(model, token, cache)


def left_padded_positions(seq_len: int, prompt_lengths: Tensor | None) -> Tensor | None:
    """Position ids of rows padded on the left: each prompt counts from 0, and every padding token is alone."""
    if prompt_lengths is None:
        return None
    columns = torch.arange(seq_len, device=prompt_lengths.device)
    return (columns - (seq_len - prompt_lengths[:, None])).clamp(min=0)


def generate(
    model: Decoder,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_ids: Collection[int] = (),
    seed: int | None = None,
    pad_id: int | None = None,
    prompt_lengths: Tensor | None = None,
) -> Tensor:
    """Continue prompts: [B, S] to [B, S + n], prompts included, n up to ``max_new_tokens``.

    ``temperature=0`` is greedy. A row ends with one of ``eos_ids`` (kept) and is filled up with ``pad_id`` (default:
    the first end id, else 0). Rows of unequal length are padded on the left and give their ``prompt_lengths`` [B].
    ``seed`` makes it repeatable; None draws from torch's global generator.
    """
    ends = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=input_ids.device)
    fill = pad_id if pad_id is not None else next(iter(eos_ids), 0)
    finished = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    columns = [input_ids]
    was_training = model.training
    model.eval()
    try:
        for token in tokens(
            model,
            input_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            prompt_lengths=prompt_lengths,
        ):
            columns.append(torch.where(finished, fill, token)[:, None])
            finished = finished | torch.isin(token, ends)
            if bool(finished.all()):
                break
    finally:
        model.train(was_training)
    return torch.cat(columns, dim=1)


def stream(
    model: Decoder,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_ids: Collection[int] = (),
    seed: int | None = None,
) -> Iterator[int]:
    """Continue one prompt [1, S] token by token, up to an end id, which is not yielded."""
    was_training = model.training
    model.eval()
    try:
        for token in tokens(
            model,
            input_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        ):
            if token.item() in eos_ids:
                return
            yield int(token.item())
    finally:
        model.train(was_training)
