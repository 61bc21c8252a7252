"""A model that is asked for log-probabilities and answers, many at once, by one process for several."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

import tt_ckpt
import tt_data
import tt_models
from tt_models.cpu.products import PACK_FROM, Packed, reading
from tt_train.devices.distributed import world
from tt_train.errors import ConfigError
from tt_train.evals.answer import Answer, Wanted, answer
from tt_train.evals.likelihood import Group, Ids, Scored, in_one_row, score
from tt_train.inputs.components import pick_device
from tt_train.memory import DTYPES
from tt_train.models.load import load
from tt_train.models.origin import Origin, find_origin, load_tokenizer

AT_ONCE = 64  # rows of a batch, if its size is chosen here
TOKENS_AT_ONCE = {"cpu": 2048}  # tokens of such a batch, padding included
TOKENS_ELSEWHERE = 32_768
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a model is loaded and asked. ``base`` and ``adapter`` are those of ``tt_train.load``.

    batch_size: texts of a batch; None: as many as a device of its kind reads at its full speed. max_length: the most
    tokens of a text, if fewer than the model reads.
    """

    device: str = "auto"
    dtype: str | None = None
    base: tuple[str, ...] = ()
    adapter: bool = True
    batch_size: int | None = None
    max_length: int | None = None


class Scorer:
    """A model that is asked by rank 0; the batches of each question are shared between the ranks.

    ``load`` is called once, on each rank, when the first question comes: mistakes in the questions are found before.
    """

    def __init__(
        self,
        load: Callable[[], tt_models.Decoder],
        tokenizer: tt_data.Tokenizer,
        *,
        options: ModelOptions,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """``progress`` is called with (what was done, parts done, parts)."""
        self._load, self.tokenizer = load, tokenizer
        self._max_length, self.batch_size = options.max_length, options.batch_size
        self._progress = progress or (lambda what, done, total: None)
        self._model: tt_models.Decoder | None = None
        self._busy = False

    # ---- rank 0 asks -------------------------------------------------------------------------------------------------

    def log_probs(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Scored]:
        """For each (context, continuation): how likely the continuation is behind the context.

        A context that is too long loses its beginning, so that all but the last token fit into ``max_length``.
        ConfigError if one of them is empty, or a continuation is longer than ``max_length``.
        """
        for context, continuation in pairs:
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ConfigError(
                    [
                        f"a continuation must have 1 to {self.max_length} tokens, as many as the model reads, and a "
                        f"context at least one; got {len(continuation)} and {len(context)}"
                    ]
                )
        found: list[Scored] = self._on_all_ranks(self._log_probs, pairs)
        return found

    def answers(self, prompts: Sequence[Sequence[int]], wanted: Wanted) -> list[Answer]:
        """The answer to each prompt; one that leaves no room for it loses its beginning.

        Sampling draws from torch's global generator, and gives the same answers on any number of ranks.
        ConfigError if ``max_new_tokens`` leaves no room for a prompt.
        """
        if not 0 < wanted.max_new_tokens < self.max_length:
            raise ConfigError(
                [
                    f"an answer of up to {wanted.max_new_tokens} tokens (max_gen_toks) leaves no room for its prompt: "
                    f"the model reads {self.max_length} tokens; ask for fewer"
                ]
            )
        seed = None if wanted.sampling.temperature == 0 else int(torch.randint(2**31, ()))
        found: list[Answer] = self._on_all_ranks(self._answers, prompts, wanted, seed)
        return found

    def serve(self) -> None:
        """On another rank than 0: take part in what rank 0 asks until it leaves."""
        _ = self.model  # is loaded while rank 0 makes its questions
        while (call := world().from_main(None)) is not None:
            name, arguments = call
            getattr(self, name)(*arguments)

    def leave(self) -> None:
        """On rank 0: let the other ranks end, unless they are in the middle of a question that failed here."""
        if not self._busy:
            world().from_main(None)

    def _on_all_ranks(self, method: Callable[..., Any], *arguments: Any) -> Any:
        self._busy = True
        world().from_main((method.__name__, arguments))
        found = method(*arguments)
        self._busy = False
        return found

    def _share(self, what: str, batches: Sequence[Any], work: Callable[[Any], dict[int, Any]]) -> list[Any]:
        """Every result in the order of the questions. ``batches`` begin with the longest, so that shares are equal."""
        here = world()
        own: dict[int, Any] = {}
        for number in range(here.rank, len(batches), here.size):
            own |= work(batches[number])
            self._progress(what, min(len(batches), number + here.size), len(batches))
        found = {index: value for part in here.gather(own) for index, value in part.items()}
        return [found[index] for index in sorted(found)]

    @property
    def model(self) -> tt_models.Decoder:
        """In evaluation mode."""
        if self._model is None:
            self._model = self._load().eval()
        return self._model

    @property
    def max_length(self) -> int:
        """The most tokens of a text, its continuation but the last one included."""
        longest = self.model.config.max_position_embeddings
        stretches = any(rope is not None and rope.kind == "dynamic" for rope in self.model.model.ropes)
        if self._max_length is not None and self._max_length > longest and not stretches:
            raise ConfigError([f"max_length: {self._max_length} tokens are more than the model reads, {longest}"])
        return self._max_length or longest

    # ---- log-probabilities -------------------------------------------------------------------------------------------

    def _log_probs(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Scored]:
        asked: dict[tuple[Ids, Ids], list[int]] = {}  # the same question is read once
        for index, (context, continuation) in enumerate(pairs):
            room = self.max_length + 1 - len(continuation)
            asked.setdefault((tuple(context)[-room:], tuple(continuation)), []).append(index)

        def work(batch: Sequence[Group]) -> dict[int, Scored]:
            keys = [(context, after) for context, conts in batch for after in conts]
            scored = zip(keys, score(self.model, batch), strict=True)
            return {index: score for key, score in scored for index in asked[key]}

        return self._share("scored", list(self._groups(list(asked))), work)

    def _groups(self, pairs: Sequence[tuple[Ids, Ids]]) -> Iterator[list["Group"]]:
        """Batches of contexts, each with its continuations; of each kind the longest first."""
        rows = self.batch_size or AT_ONCE
        groups: dict[Any, Group] = {}
        shares = not any(rope.by_length for rope in self.model.model.ropes if rope is not None)
        for context, after in pairs:  # where a token is rotated to may depend on the length of its text
            groups.setdefault(context if shares else (context, after), (context, []))[1].append(after)
        parts = [
            (context, part[start : start + rows])
            for context, conts in groups.values()
            for part in [sorted(conts, key=lambda after: (-len(after), after))]
            for start in range(0, len(part), rows)
        ]
        parts.sort(key=lambda group: (-len(group[0]) - len(group[1][0]), group))

        def fits(batch: list[Group]) -> bool:
            before, after = (
                max(map(len, texts)) for texts in zip(*((one[0], one[1][0]) for one in batch), strict=True)
            )
            read = sum(1 if in_one_row(group) else len(group[1]) for group in batch)
            return before + after - 1 <= self.max_length and self._fits(read, before + after)

        for kind in (True, False):
            yield from _batched([group for group in parts if in_one_row(group) == kind], fits)

    def _fits(self, rows: int, length: int) -> bool:
        """Whether a batch of ``rows`` texts of up to ``length`` tokens is not too large."""
        if self.batch_size is not None:
            return rows <= self.batch_size
        tokens = TOKENS_AT_ONCE.get(self.model.output_weight.device.type, TOKENS_ELSEWHERE)
        return rows <= AT_ONCE and rows * length <= tokens

    # ---- answers -----------------------------------------------------------------------------------------------------

    def _answers(self, prompts: Sequence[Sequence[int]], wanted: Wanted, seed: int | None) -> list[Answer]:
        room = self.max_length - wanted.max_new_tokens
        kept = [(tuple(prompt)[-room:], index) for index, prompt in enumerate(prompts)]
        kept.sort(key=lambda one: (-len(one[0]), one))

        def work(batch: Sequence[tuple[Ids, int]]) -> dict[int, Answer]:
            seeds = None if seed is None else [tt_models.row_seed(seed, index) for _, index in batch]
            texts = answer(self.model, self.tokenizer, [prompt for prompt, _ in batch], wanted, seeds)
            return {index: text for (_, index), text in zip(batch, texts, strict=True)}

        batches = list(_batched(kept, lambda batch: self._fits(len(batch), len(batch[0][0]) + wanted.max_new_tokens)))
        many = len(batches) * wanted.max_new_tokens >= PACK_FROM * world().size
        with reading(Packed(self.model) if many else None):  # one copy for all batches
            return self._share("answered", batches, work)


def open_model(
    path: str,
    options: ModelOptions,
    *,
    tell: Callable[[str], None],
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Scorer, Origin]:
    """The run, model directory, adapter or hub id at ``path``: its tokenizer is read, and its weights on demand."""
    origin = find_origin(path, options.base or None)
    if origin.model is not None:
        tt_ckpt.read_config(origin.model)
    kind = None if options.dtype is None else DTYPES.get(options.dtype)
    if options.dtype is not None and kind is None:
        raise ConfigError([f"dtype: {options.dtype!r} is not one of {', '.join(DTYPES)}"])

    def weights() -> tt_models.Decoder:
        device = pick_device(options.device)
        found, _ = load(path, device=device, dtype=kind, adapter=options.adapter, base=options.base or None, tell=tell)
        return found

    return Scorer(weights, load_tokenizer(origin), options=options, progress=progress), origin


def _batched(items: Sequence[T], fits: Callable[[list[T]], bool]) -> Iterator[list[T]]:
    """``items``, the longest first, in batches that fit; one item may be too large for that."""
    batch: list[T] = []
    for item in items:
        if batch and not fits([*batch, item]):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
