"""Generation: prefill, one token at a time, sampling. B: batch, S: prompt, V: vocabulary."""

import functools
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, overload

import torch
from torch import Tensor, nn

from tt_models.decoder import Decoder
from tt_models.kv_cache import KVCache
from tt_models.prompts import (
    EndIds,
    Prompts,
    check_room,
    check_seed,
    is_token_id,
    left_padded,
    left_padded_positions,
    numbers_of,
)
from tt_models.sampling import Sampling, sample
from tt_models.shown import shown


def prefill(model: Decoder, input_ids_BS: Tensor, cache: KVCache, position_ids_BS: Tensor | None = None) -> Tensor:
    """Read prompts into the cache; the logits of what comes next, [B, V]."""
    return model.logits(model.hidden_states(input_ids_BS, position_ids_BS, cache)[:, -1])


def decode_one_token(model: Decoder, token_B: Tensor, cache: KVCache) -> Tensor:
    """Read one more token of each row; the logits of what comes next, [B, V]."""
    return model.logits(model.hidden_states(token_B[:, None], None, cache)[:, -1])


@functools.cache
def compiled_decode_one_token() -> Callable[[Decoder, Tensor, KVCache], Tensor]:
    """The same through the compiler."""
    return torch.compile(decode_one_token)


def reread(model: Decoder, input_ids_BS: Tensor, cache: KVCache) -> Tensor:
    """Read everything once more, because longer documents are rotated differently; the next logits, [B, V]."""
    first = cache.first
    cache.reset()
    if first is None:
        return prefill(model, input_ids_BS, cache)
    columns = torch.arange(input_ids_BS.shape[1], device=input_ids_BS.device)
    return prefill(model, input_ids_BS, cache, (columns - first[:, None]).clamp(min=0))


_LOCK = threading.Lock()
_READERS: dict[nn.Module, int] = {}  # modules in training mode -> how many generations have them in evaluation mode now


@contextmanager
def evaluating(modules: Collection[nn.Module]) -> Iterator[None]:
    """No dropout inside. What is in training mode is so again once the last thread that generates with it has left."""
    with _LOCK:
        held = [module for module in modules if module.training or module in _READERS]
        for module in held:
            _READERS[module] = _READERS.get(module, 0) + 1
            module.__dict__["training"] = False  # what eval() does, without the price of a module's attributes
    try:
        yield
    finally:
        with _LOCK:
            for module in held:
                _READERS[module] -= 1
                if not _READERS[module]:
                    del _READERS[module]
                    module.__dict__["training"] = True


@torch.no_grad()
def steps(
    model: Decoder,
    input_ids_BS: Tensor,
    lengths_B: Tensor | None,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int | None,
    compile: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens of each step, int64[B], and the logits [B, V] that they were drawn from."""
    weight = model.model.embed_tokens.weight
    generator = None if seed is None else torch.Generator(weight.device).manual_seed(seed)
    batch, room = input_ids_BS.shape  # and one column more than is filled: a full cache would be compiled once more
    room += max_new_tokens
    cache = KVCache(model.config, batch_size=batch, max_seq_len=room, device=weight.device, dtype=weight.dtype)
    decode = compiled_decode_one_token() if compile else decode_one_token
    seen_BV = seen_tokens(input_ids_BS, lengths_B, weight.shape[0]) if sampling.repetition_penalty != 1.0 else None
    modules = list(model.modules())
    with evaluating(modules):
        logits = prefill(model, input_ids_BS, cache, left_padded_positions(input_ids_BS, lengths_B))
    for step in range(max_new_tokens):
        token = sample(logits, sampling, seen_BV=seen_BV, generator=generator)
        yield token, logits
        if step + 1 == max_new_tokens:
            return
        if seen_BV is not None:
            seen_BV.scatter_(1, token[:, None], True)
        input_ids_BS = torch.cat((input_ids_BS, token[:, None]), dim=1)
        with evaluating(modules):
            outgrown = model.model.outgrows_context(cache, 1)
            logits = reread(model, input_ids_BS, cache) if outgrown else decode(model, token, cache)


def seen_tokens(input_ids_BS: Tensor, lengths_B: Tensor | None, vocab_size: int) -> Tensor:
    """bool[B, V]: which tokens stand in each prompt, padding apart."""
    batch, seq_len = input_ids_BS.shape
    real = torch.ones_like(input_ids_BS, dtype=torch.int8)
    if lengths_B is not None:
        columns = torch.arange(seq_len, device=input_ids_BS.device)
        real = (columns >= seq_len - lengths_B[:, None]).to(torch.int8)
    counts = torch.zeros(batch, vocab_size, dtype=torch.int8, device=input_ids_BS.device)
    return counts.scatter_reduce(1, input_ids_BS, real, "amax").bool()


@overload
def generate(
    model: Decoder,
    input_ids: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    min_p: float | None = ...,
    repetition_penalty: float = ...,
    eos_ids: EndIds = ...,
    seed: int | None = ...,
    pad_id: int | None = ...,
    prompt_lengths: Tensor | Sequence[int] | None = ...,
    compile: bool = ...,
    return_logits: Literal[False] = ...,
) -> Tensor: ...


@overload
def generate(
    model: Decoder,
    input_ids: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    min_p: float | None = ...,
    repetition_penalty: float = ...,
    eos_ids: EndIds = ...,
    seed: int | None = ...,
    pad_id: int | None = ...,
    prompt_lengths: Tensor | Sequence[int] | None = ...,
    compile: bool = ...,
    return_logits: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def generate(
    model: Decoder,
    input_ids: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_ids: EndIds = (),
    seed: int | None = None,
    pad_id: int | None = None,
    prompt_lengths: Tensor | Sequence[int] | None = None,
    compile: bool = False,
    return_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Continue prompts: [B, S] to [B, S + n], prompts included, n up to ``max_new_tokens``.

    ``input_ids`` may be lists of unequal length; as a tensor, rows of unequal length are padded on the left and give
    their ``prompt_lengths`` [B]. ``temperature=0`` is greedy; for the other numbers see ``Sampling``. A row ends with
    one of ``eos_ids`` (an id, several or None; it is kept) and is filled up with ``pad_id`` (default: the first end
    id, else 0). ``seed`` makes it repeatable; None draws from torch's global generator. ``compile`` compiles the step
    of one token. ``return_logits`` gives the logits [B, n, V] of each step too.
    """
    check_seed(seed)
    end_ids = numbers_of(eos_ids, model.model.embed_tokens.num_embeddings)
    if pad_id is not None and not is_token_id(pad_id):
        raise ValueError(f"pad_id must be a token id, or None, got {shown(pad_id)}")
    fill = pad_id if pad_id is not None else next(iter(end_ids), 0)
    ids, lengths = left_padded(input_ids, prompt_lengths, fill, model)
    check_room(model, ids.shape[1], max_new_tokens)
    sampling = Sampling(
        repetition_penalty=repetition_penalty, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    ends = torch.tensor(end_ids, dtype=torch.int64, device=ids.device)
    finished = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    columns, kept = [ids], []
    for token, logits in steps(
        model, ids, lengths, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, compile=compile
    ):
        columns.append(torch.where(finished, fill, token)[:, None])
        if return_logits:
            kept.append(logits)
        if ends.numel():
            finished = finished | torch.isin(token, ends)
            if bool(finished.all()):
                break
    found = torch.cat(columns, dim=1)
    return (found, torch.stack(kept, dim=1)) if return_logits else found


def stream(
    model: Decoder,
    input_ids: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_ids: EndIds = (),
    seed: int | None = None,
    compile: bool = False,
) -> Iterator[int]:
    """Continue one prompt [1, S] token by token, up to an end id, which is not yielded; see ``generate``."""
    check_seed(seed)
    end_ids = frozenset(numbers_of(eos_ids, model.model.embed_tokens.num_embeddings))
    ids, lengths = left_padded(input_ids, None, 0, model)
    if ids.shape[0] != 1:
        raise ValueError(f"stream continues one prompt, got {ids.shape[0]}")
    check_room(model, ids.shape[1], max_new_tokens)
    sampling = Sampling(
        repetition_penalty=repetition_penalty, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    found = steps(model, ids, lengths, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, compile=compile)
    return until_end(found, end_ids)


def until_end(found: Iterator[tuple[Tensor, Tensor]], ends: Collection[int]) -> Iterator[int]:
    """The tokens as numbers, up to an end id."""
    for token, _ in found:
        number = int(token[0])
        if number in ends:
            return
        yield number
