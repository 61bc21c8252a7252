"""A prompt becomes ids, and ids become text while they are generated: what ``tt chat`` and ``tt generate`` share."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tt_cli.terminal import answer, tell
from tt_train.models.prompt_form import prompt_form, trained_on

Messages = list[dict[str, str]]
LONGEST = 1 << 20  # bytes of a prompt: a hundred pages, more than most models read


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; the names are those of the options."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None


class Speaker:
    """A loaded model with its tokenizer, asked in the form in which its run was trained."""

    def __init__(self, path: str | None, *, adapter: bool = True, base: Sequence[str] = ()) -> None:
        from tt_train.run.dir import find_run

        self.path = str(path if path is not None else find_run())
        from tt_train import load  # loads torch: a run that is not there is told before

        self.cut = 0  # tokens of the last answer, if it ended at its length and not at a token that ends a turn
        self.model: Any
        self.tokenizer: Any
        self.model, self.tokenizer = load(self.path, adapter=adapter, base=base or None, tell=tell)
        report, template = trained_on(Path(self.path))
        self.form = prompt_form(report, template, has_chat_template=self.tokenizer.has_chat_template)

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
        text = messages[-1]["content"]
        if self.form != "text":
            from tt_data.template.prompts import get_instruct_template

            template = get_instruct_template(self.form)
            text = template.format({template.columns[0]: text})
        prompt: list[int] = self.tokenizer.encode_text_prompt(text)
        return prompt

    def reply(self, ids: Sequence[int], sampling: Sampling) -> Iterator[str]:
        """The answer to ``ids`` in pieces of text, as soon as each is known to be whole characters."""
        import torch

        import tt_models
        from tt_train.evaluate import end_ids

        self.cut = 0
        limit = self.model.config.max_position_embeddings
        if len(ids) >= limit:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, and {self.path} can read {limit} with the answer; shorten it"
            )
        tokens = tt_models.stream(
            self.model,
            torch.tensor([list(ids)], device=self.model.output_weight.device),
            max_new_tokens=min(sampling.max_new_tokens, limit - len(ids)),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            eos_ids=end_ids(self.model, self.tokenizer),
            seed=sampling.seed,
        )
        return pieces(self._counted(tokens, min(sampling.max_new_tokens, limit - len(ids))), self.tokenizer.decode)

    def _counted(self, tokens: Iterator[int], most: int) -> Iterator[int]:
        """``tokens``; ``cut`` says afterwards whether there would have been more."""
        number = 0
        for token in tokens:
            number += 1
            yield token
        self.cut = number if number == most else 0

    def tell_cut(self, sampling: Sampling) -> None:
        """Say on stderr that the answer was cut, unless its length was asked for."""
        after = f"cut after {self.cut} token{'s' if self.cut > 1 else ''}"
        asked = click.get_current_context().get_parameter_source("max_new_tokens")
        if self.cut and self.cut < sampling.max_new_tokens:
            tell(f"({after}: the model's context is full)")
        elif self.cut and asked == click.core.ParameterSource.DEFAULT:
            tell(f"({after}; --max-new-tokens allows more)")


def show_answer(parts: Iterator[str]) -> str:
    """Write the answer to stdout while it grows: in a pipe or file exactly as the model says it."""
    said = []
    for part in parts:
        said.append(part)
        answer(part, nl=False)
    answer("")
    return "".join(said)


def read_prompt() -> str:
    """All of standard input."""
    return _decoded(_stdin_bytes(-1), "standard input")


def read_prompts() -> Iterator[str]:
    """The lines of standard input that are not blank."""
    number = 0
    while line := _stdin_bytes(1):
        number += 1
        if line.strip():
            yield _decoded(line, f"standard input, line {number}").rstrip("\r\n")


def _stdin_bytes(lines: int) -> bytes:
    """What is there, or a line of it, with one byte more than is accepted at the most."""
    source = getattr(sys.stdin, "buffer", None)
    if source is None:  # a stand-in without bytes
        return (sys.stdin.read() if lines < 0 else sys.stdin.readline()).encode("utf-8", "surrogateescape")
    data: bytes = source.read(LONGEST + 1) if lines < 0 else source.readline(LONGEST + 1)
    return data


def _decoded(data: bytes, where: str) -> str:
    if len(data) > LONGEST:
        raise ValueError(f"{where}: the prompt is longer than {LONGEST >> 20} MiB; shorten it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = f"byte {error.start + 1} (0x{data[error.start]:02x})"
        raise ValueError(f"{where}: {at} is not UTF-8; convert the text, for example with iconv") from None


def check_text(text: str, where: str) -> str:
    """``text``; ValueError if it was made of bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: character {error.start + 1} is not UTF-8; convert the text, for example with iconv"
        ) from None
    return text


def pieces(tokens: Iterator[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Text as it grows. A character whose bytes are not all there yet is held back."""
    ids: list[int] = []
    shown = ""
    text = ""
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        if not text.endswith("\ufffd") and text.startswith(shown):
            yield text[len(shown) :]
            shown = text
    if text != shown:
        yield text[len(shown) :]
