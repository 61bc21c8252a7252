"""Generation: read the prompts, then one token at a time. B: batch, S: prompt, V: vocabulary."""

import functools
import itertools
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, TypedDict, Unpack, overload

import torch
from torch import Tensor, nn

from tt_models.cpu.products import PACK_FROM, Packed, being_read, reading
from tt_models.decoder import Decoder
from tt_models.kv_cache import KVCache
from tt_models.prompts import Prompts, checked_lengths, left_padded, left_padded_positions
from tt_models.sampling import Draws, EndIds, Sampling, is_token_id, numbers_of, sample, seen_tokens
from tt_models.shown import shown


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


PACK_AFTER = 8  # steps, since many answers are short


class Step(NamedTuple):
    """The next token of each row that is still in the batch, and the logits that it was drawn from."""

    rows: list[int]  # the number of each row among the prompts
    tokens: Tensor  # int64[len(rows)]
    logits: Tensor  # [len(rows), V]


@torch.no_grad()
def steps(
    model: Decoder,
    input_ids_BS: Tensor,
    lengths_B: Tensor | None,
    *,
    num_steps: int,
    sampling: Sampling,
    draws: Draws,
    compile: bool,
    finished: Collection[int],
) -> Iterator[Step]:
    """Up to ``num_steps`` steps. Rows whose number is in ``finished`` leave before the next one is computed."""
    weight = model.model.embed_tokens.weight
    batch, room = input_ids_BS.shape  # and one column more than is filled: a full cache would be compiled once more
    room += num_steps
    cache = KVCache(model.config, batch_size=batch, max_seq_len=room, device=weight.device, dtype=weight.dtype)
    decode = compiled_decode_one_token() if compile else decode_one_token
    seen_BV = seen_tokens(input_ids_BS, lengths_B, weight.shape[0]) if sampling.repetition_penalty != 1.0 else None
    modules, rows, packed = list(model.modules()), list(range(batch)), being_read()
    with evaluating(modules):
        logits = prefill(model, input_ids_BS, cache, left_padded_positions(input_ids_BS, lengths_B))
    for step in range(num_steps):
        uniform = draws.next(rows) if sampling.temperature else None
        token = sample(logits, sampling, seen_BV=seen_BV, uniform_B=uniform)
        yield Step(rows, token, logits)
        if step + 1 == num_steps or all(row in finished for row in rows):
            return
        if seen_BV is not None:
            seen_BV.scatter_(1, token[:, None], True)
        input_ids_BS = torch.cat((input_ids_BS, token[:, None]), dim=1)
        if any(row in finished for row in rows):
            places = cache.keep_([place for place, row in enumerate(rows) if row not in finished])
            rows, kept = [rows[place] for place in places], torch.tensor(places, device=token.device)
            input_ids_BS, token, seen_BV = input_ids_BS[kept], token[kept], None if seen_BV is None else seen_BV[kept]
        if step + 1 == PACK_AFTER and num_steps >= PACK_FROM and packed is None and not compile:
            packed = Packed(model)
        with evaluating(modules), reading(packed):
            outgrown = model.model.outgrows_context(cache, 1)
            logits = reread(model, input_ids_BS, cache) if outgrown else decode(model, token, cache)


class Options(TypedDict, total=False):
    """What ``generate`` accepts besides ``return_logits``."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    eos_ids: EndIds
    seed: int | Sequence[int] | None
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
    seed: int | Sequence[int] | None = None,
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
    id, else 0); it leaves the batch then, and the others take less time.

    ``seed`` makes it repeatable: a number, or one per row, and a row draws the same tokens in whatever batch it is (as
    far as its logits are the same); None draws from torch's global generator. ``compile`` compiles the step
    of one token. ``until`` is asked after each token, with bool[B] for the rows that have stopped, whether that is
    enough; by default when all have. Processes that share a model's weights must agree on it, since each token is
    theirs together. ``return_logits`` returns the logits [B, n, V] of each step too.
    """
    end_ids = numbers_of(eos_ids, model.model.embed_tokens.num_embeddings)
    if pad_id is not None and not is_token_id(pad_id):
        raise ValueError(f"pad_id must be a token id, or None, got {shown(pad_id)}")
    fill = pad_id if pad_id is not None else next(iter(end_ids), 0)
    ids, lengths = left_padded(input_ids, prompt_lengths, fill, model)
    num_steps = checked_lengths(model, ids, lengths, max_new_tokens)[0]
    sampling = Sampling(
        repetition_penalty=repetition_penalty, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    batch, ends = ids.shape[0], torch.tensor(end_ids, dtype=torch.int64, device=ids.device)
    finished = torch.zeros(batch, dtype=torch.bool, device=ids.device)
    left: set[int] = set()
    columns, kept = [ids], []
    for rows, token, logits in steps(
        model, ids, lengths, num_steps=num_steps, sampling=sampling, draws=Draws(seed, batch), compile=compile,
        finished=left,
    ):  # fmt: skip
        if len(rows) < batch:
            token = ids.new_full((batch,), fill).index_copy_(0, torch.tensor(rows, device=ids.device), token)
        columns.append(torch.where(finished, fill, token)[:, None])
        if return_logits:
            kept.append(logits)
        if ends.numel():
            finished = finished | torch.isin(token, ends)
        if until(finished) if until is not None else ends.numel() and bool(finished.all()):
            break
        if ends.numel() and not return_logits:  # which has the logits of every row
            left.update(finished.nonzero()[:, 0].tolist())
            if len(left) == batch:
                left.discard(rows[0])  # all have stopped, and more is asked for
    text = torch.cat(columns, dim=1)
    return (text, torch.stack(kept, dim=1)) if return_logits else text


class StreamOptions(TypedDict, total=False):
    """What ``stream`` and ``stream_rows`` accept besides the number of tokens."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    eos_ids: EndIds
    compile: bool


def stream(
    model: Decoder,
    input_ids: Prompts,
    *,
    max_new_tokens: int,
    seed: int | None = None,
    **options: Unpack[StreamOptions],
) -> Iterator[int]:
    """Continue one prompt [1, S] token by token, up to an end id, which is not yielded; see ``generate``."""
    found = stream_rows(model, input_ids, max_new_tokens=max_new_tokens, seed=seed, **options)
    if len(input_ids) != 1:
        raise ValueError(f"stream continues one prompt, got {len(input_ids)}")
    end_ids = frozenset(numbers_of(options.get("eos_ids", ()), model.model.embed_tokens.num_embeddings))
    return itertools.takewhile(lambda number: number not in end_ids, (token for _, token in found))


def stream_rows(
    model: Decoder,
    input_ids: Prompts,
    *,
    max_new_tokens: int | Sequence[int],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_ids: EndIds = (),
    seed: int | Sequence[int] | None = None,
    compile: bool = False,
    stop: Callable[[int], bool] | None = None,
) -> Iterator[tuple[int, int]]:
    """Continue prompts together: (row, token) for each token as it comes, end ids included.

    A row leaves the batch after an end id, after its ``max_new_tokens`` (one number, or one per row), or if
    ``stop(row)``, which is asked once the row's token was taken from the iterator. ``seed`` and the others: see
    ``generate``.
    """
    end_ids = frozenset(numbers_of(eos_ids, model.model.embed_tokens.num_embeddings))
    ids, lengths = left_padded(input_ids, None, next(iter(end_ids), 0), model)
    most = checked_lengths(model, ids, lengths, max_new_tokens)
    sampling = Sampling(
        repetition_penalty=repetition_penalty, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    left: set[int] = set()
    found = steps(
        model, ids, lengths, num_steps=max(most), sampling=sampling, draws=Draws(seed, ids.shape[0]), compile=compile,
        finished=left,
    )  # fmt: skip

    def pairs() -> Iterator[tuple[int, int]]:
        for number, step in enumerate(found, start=1):
            for row, token in zip(step.rows, step.tokens.tolist(), strict=True):
                yield row, token
                if token in end_ids or number >= most[row] or (stop is not None and stop(row)):
                    left.add(row)

    return pairs()
