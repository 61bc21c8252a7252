"""Generation: read the prompts, then one token at a time. B: batch, S: prompt, V: vocabulary."""

import functools
import itertools
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor, nn

from tt_models.decoder import Decoder
from tt_models.kv_cache import KVCache
from tt_models.sampling import EndIds, Sampling, check_seed, is_token_id, numbers_of, sample, seen_tokens
from tt_models.shown import shown

Prompts = Tensor | Sequence[Sequence[int]]


def prefill(model: Decoder, input_ids_BS: Tensor, cache: KVCache, position_ids_BS: Tensor | None = None) -> Tensor:
    """Read prompts into the cache; the logits of the next token, [B, V]."""
    return model.logits(model.hidden_states(input_ids_BS, position_ids_BS, cache)[:, -1])


def decode_one_token(model: Decoder, token_B: Tensor, cache: KVCache) -> Tensor:
    """Read one more token of each row; the logits of the next token, [B, V]."""
    return model.logits(model.hidden_states(token_B[:, None], None, cache)[:, -1])


@functools.cache
def compiled_decode_one_token() -> Callable[[Decoder, Tensor, KVCache], Tensor]:
    """The same through the compiler."""
    return torch.compile(decode_one_token)


def reread(model: Decoder, input_ids_BS: Tensor, cache: KVCache) -> Tensor:
    """Read everything again, because longer documents are rotated differently; the next logits, [B, V]."""
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
    """No dropout inside. Modules return to training mode when the last thread that generates with them has left."""
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


def check_room(model: Decoder, seq_len: int, max_new_tokens: int) -> None:
    """ValueError if the text would become longer than the model can read."""
    if not is_token_id(max_new_tokens) or not 1 <= max_new_tokens <= 2**31:
        raise ValueError(f"max_new_tokens must be at least 1 and at most 2**31, got {shown(max_new_tokens)}")
    longest = model.config.max_position_embeddings
    scaling = model.config.rope_scaling or {}
    if seq_len + max_new_tokens - 1 > longest and scaling.get("rope_type") != "dynamic":
        raise ValueError(
            f"{seq_len} prompt tokens and max_new_tokens={max_new_tokens} exceed max_position_embeddings {longest}: "
            f"at most {max(0, longest - seq_len + 1)} new tokens fit"
        )


class Options(TypedDict, total=False):
    """What ``generate`` accepts besides ``return_logits``."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    eos_ids: EndIds
    seed: int | None
    pad_id: int | None
    prompt_lengths: Tensor | Sequence[int] | None
    compile: bool
    until: Callable[[Tensor], bool] | None


@overload
def generate(
    model: Decoder,
    input_ids: Prompts,
    *,
    max_new_tokens: int,
    return_logits: Literal[False] = ...,
    **_: Unpack[Options],
) -> Tensor: ...


@overload
def generate(
    model: Decoder, input_ids: Prompts, *, max_new_tokens: int, return_logits: Literal[True], **_: Unpack[Options]
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
    until: Callable[[Tensor], bool] | None = None,
    return_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Continue prompts: [B, S] to [B, S + n], prompts included, n up to ``max_new_tokens``.

    ``input_ids`` may be lists of unequal length; rows of unequal length in a tensor are padded on the left and need
    ``prompt_lengths`` [B]. ``temperature=0`` is greedy; for the other numbers see ``Sampling``. A row stops at
    one of ``eos_ids`` (an id, several or None; it is kept) and is filled up with ``pad_id`` (default: the first end
    id, else 0). ``seed`` makes it repeatable; None draws from torch's global generator. ``compile`` compiles the step
    of one token. ``until`` is asked after each token, with bool[B] for the rows that have stopped, whether that is
    enough; by default when all have. Processes that share a model's weights must agree on it, since each token is
    theirs together. ``return_logits`` returns the logits [B, n, V] of each step too.
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
    found = steps(model, ids, lengths, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, compile=compile)
    for token, logits in found:
        columns.append(torch.where(finished, fill, token)[:, None])
        if return_logits:
            kept.append(logits)
        if ends.numel():
            finished = finished | torch.isin(token, ends)
        if until(finished) if until is not None else ends.numel() and bool(finished.all()):
            break
    text = torch.cat(columns, dim=1)
    return (text, torch.stack(kept, dim=1)) if return_logits else text


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
    return itertools.takewhile(lambda number: number not in end_ids, (int(token[0]) for token, _ in found))
