"""A model is asked, and its answers grow: what ``tt chat`` and ``tt generate`` share."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from tt_cli.reply import Finish, Reply, Stats, Text
from tt_cli.terminal import answer, tell
from tt_train.models.prompt_form import prompt_form, trained_on

Messages = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn, and where an answer ends; the names are those of the options."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    @property
    def drawn(self) -> dict[str, Any]:
        """The arguments of ``tt_models.generate`` that choose the next token."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        return {name: getattr(self, name) for name in names}


class Speaker:
    """A model with its tokenizer, asked in the form in which its run was trained. The weights load at ``load``."""

    def __init__(
        self, path: str | None, *, adapter: bool = True, base: Sequence[str] = (), device: str = "auto"
    ) -> None:
        from tt_train.run.dir import find_run

        self.path = str(path if path is not None else find_run())
        from tt_train.inputs.components import pick_device
        from tt_train.models.generation_config import sampling_defaults  # loads torch: an absent run is told before
        from tt_train.models.load import model_config
        from tt_train.models.origin import find_origin, load_tokenizer

        self._adapter, self._base, self._device = adapter, base or None, pick_device(device)
        origin = find_origin(self.path, self._base)
        self.defaults = sampling_defaults(origin.places)
        self.tokenizer: Any = load_tokenizer(origin)
        self.has_adapter = adapter and origin.adapter is not None
        self.limit: int | None = None  # tokens that it can read; of a model without files known once it is loaded
        if origin.model is not None:
            self.limit = model_config(origin.model, quantized=True).max_position_embeddings
        self.stats = Stats()
        self.model: Any = None
        report, template = trained_on(Path(self.path))
        self.form = prompt_form(report, template, has_chat_template=self.tokenizer.has_chat_template)

    def load(self) -> None:
        """Load the weights, unless they are."""
        if self.model is None:
            from tt_train import load

            self.model, self.tokenizer = load(
                self.path, device=self._device, adapter=self._adapter, base=self._base, tell=tell
            )
            self.limit = self.model.config.max_position_embeddings

    def sampling(self, given: Mapping[str, Any]) -> Sampling:
        """The options, and where one is left out what generation_config.json says; the latter is told."""
        ours = self.defaults
        chosen = dict(vars(Sampling()))
        known = {one.name: getattr(ours, one.name) for one in fields(ours) if one.name != "notes"}
        chosen |= {name: value for name, value in known.items() if value is not None}
        chosen |= {name: value for name, value in given.items() if value not in (None, ())}
        if not chosen["top_k"]:  # 0: all
            chosen["top_k"] = None
        asked = [name for name in ("top_k", "top_p", "min_p") if given.get(name)]
        if asked and not chosen["temperature"]:
            option = f"--{asked[0].replace('_', '-')}"
            raise ValueError(f"{option} has no effect at temperature 0, which takes the likeliest token; "
                             "add --temperature 0.8, or another")  # fmt: skip
        for note in ours.notes:
            tell(note)
        followed = {name: known[name] for name in known if known[name] == chosen[name] != _PLAIN.get(name)}
        if not chosen["temperature"]:
            followed = {name: value for name, value in followed.items() if name not in ("top_k", "top_p", "min_p")}
        if followed:
            tell(f"generation_config.json: {', '.join(f'{name} {value}' for name, value in followed.items())}")
        if "" in chosen["stop"]:
            raise ValueError("--stop: an empty text, which is in every answer (an unset shell variable?); leave it out")
        found = Sampling(**chosen)
        from tt_models.sampling import Sampling as Drawn

        Drawn(**found.drawn)  # its mistakes are told before the weights load
        return found

    def raw_ids(self, text: str) -> list[int]:
        """``text`` as it stands, as the beginning of a document."""
        ids: list[int] = self.tokenizer.encode(text, add_bos=self.tokenizer.adds_bos, add_eos=False)
        return ids

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The conversation up to the model's turn; of what is no chat, the last message alone."""
        if self.form == "chat":
            ids: list[int] = self.tokenizer.encode_prompt(messages)
            return ids
        if messages[0]["role"] == "system":
            raise ValueError(
                f"{self.path} has no chat template, so it cannot take a system message; leave out --system"
            )
        if len(messages) > 1:
            raise ValueError(f"{self.path} has no chat template, so it can take one message, not {len(messages)}")
        text = messages[-1]["content"]
        if isinstance(text, list):  # parts, which a chat template would read; all are text
            text = "".join(part["text"] for part in text)
        if self.form != "text":
            from tt_data.template.prompts import get_instruct_template

            template = get_instruct_template(self.form)
            text = template.format({template.columns[0]: text})
        prompt: list[int] = self.tokenizer.encode_text_prompt(text)
        return prompt

    def too_long(self, ids: Sequence[int]) -> str | None:
        """Why ``ids`` cannot be answered, if they cannot."""
        if not ids:
            return f"the prompt has no tokens; write one that the template and tokenizer of {self.path} keep"
        if self.limit is None or len(ids) < self.limit:
            return None
        return f"the prompt has {len(ids)} tokens, and {self.path} can read {self.limit} with the answer; shorten it"

    def replies(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, numbers: Sequence[Sequence[int]] | None = None,
        adapter: bool = True,
    ) -> Iterator[tuple[int, Reply, str]]:  # fmt: skip
        """Answers to all prompts at once: (which, the answer, a piece of it), as soon as that is known to be whole.

        ``numbers``: what a row's seed is mixed with, so that it does not depend on the batch (default: its place).
        ``adapter``: False answers as the base does. Every reply is yielded at least once, with its end.
        """
        self.load()
        import tt_models
        from tt_peft import disable_adapter
        from tt_train.evaluate import end_ids
        from tt_train.memory import peak_memory_gib

        for ids in prompts:
            if (problem := self.too_long(ids)) is not None:
                raise ValueError(problem)
        assert self.limit is not None
        most = [min(sampling.max_new_tokens, self.limit - len(ids)) for ids in prompts]
        replies = [
            Reply(len(ids), count, Text(self.tokenizer.decode, sampling.stop))
            for ids, count in zip(prompts, most, strict=True)
        ]
        numbers = [[row] for row in range(len(prompts))] if numbers is None else numbers
        seeds = None if sampling.seed is None else [tt_models.row_seed(sampling.seed, *own) for own in numbers]
        ends = end_ids(self.model, self.tokenizer)
        began = time.perf_counter()
        first = None
        with nullcontext() if adapter else disable_adapter(self.model):
            try:
                for row, token in tt_models.stream_rows(
                    self.model, prompts, max_new_tokens=most, eos_ids=ends, seed=seeds,
                    stop=lambda row: replies[row].text.stopped, **sampling.drawn,
                ):  # fmt: skip
                    first = time.perf_counter() - began if first is None else first
                    reply = replies[row]
                    reply.tokens += 1
                    piece = "" if token in ends else reply.text.add(token)
                    reply.finish = self._finish(reply, token in ends, sampling)
                    yield row, reply, piece if reply.finish is None else piece + reply.text.end()
            finally:
                if first is not None:
                    self._count(replies, first, time.perf_counter() - began)
                self.stats.peak_memory_gib = peak_memory_gib(self.model.output_weight.device)

    def _finish(self, reply: Reply, ended: bool, sampling: Sampling) -> Finish | None:
        if ended or reply.text.stopped:
            return "end" if ended else "stop"
        if reply.tokens < reply.most:
            return None
        return "length" if reply.most == sampling.max_new_tokens else "context"

    def _count(self, replies: Sequence[Reply], first: float, seconds: float) -> None:
        stats = self.stats
        stats.prompt_tokens += sum(reply.prompt_tokens for reply in replies)
        stats.tokens += sum(reply.tokens for reply in replies)
        stats.prompt_seconds += first
        stats.seconds += seconds
        stats.first_token_seconds = first if stats.first_token_seconds is None else stats.first_token_seconds


_PLAIN: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0, "stop": ()}  # worth no word


def is_asked(option: str) -> bool:
    """Whether the user gave this option."""
    return click.get_current_context().get_parameter_source(option) != click.core.ParameterSource.DEFAULT


def tell_room(speaker: Speaker, ids: Sequence[int], sampling: Sampling) -> None:
    """Say before the answer that the context is too short for the length that was asked for."""
    if speaker.limit is not None and is_asked("max_new_tokens"):
        room = speaker.limit - len(ids)
        if 0 < room < sampling.max_new_tokens:
            tell(f"(the prompt has {len(ids)} tokens: {room} of the {sampling.max_new_tokens} new tokens fit into the "
                 f"model's context of {speaker.limit})")  # fmt: skip


def tell_cut(reply: Reply) -> None:
    """Say on stderr that the answer was cut."""
    after = f"cut after {reply.tokens} token{'s' if reply.tokens > 1 else ''}"
    if reply.finish == "context":
        tell(f"({after}: the model's context is full)")
    elif reply.finish == "length":
        tell(f"({after}{'' if is_asked('max_new_tokens') else '; --max-new-tokens allows more'})")


def show_answer(parts: Iterator[tuple[int, Reply, str]]) -> Reply:
    """Write the answer to stdout while it grows: in a pipe or file exactly as the model says it."""
    replies = []
    for _, reply, part in parts:
        replies.append(reply)
        answer(part, nl=False)
    answer("")
    return replies[-1]  # every reply is yielded with its end
