"""One ``Tokenizer`` over ``tokenizer.json``, sentencepiece and tiktoken files, with the model's chat template."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tt_data.chat_template import ChatTemplate, Job, TemplateError, escape_controls, new_nonce
from tt_data.messages import Message
from tt_data.rendered import Encoded, Rendered, Span, alternatives, substitute

_PAD_NAMES = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|finetune_right_pad|>", "<|padding|>")


class Backend(Protocol):
    """What a tokenizer file must be able to do."""

    added: dict[str, int]
    control: dict[str, int]
    vocab_size: int

    def set_control(self, control: dict[str, int]) -> None: ...
    def token_id(self, token: str) -> int | None: ...
    def token(self, index: int) -> str | None: ...
    def to_str(self) -> str: ...
    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str: ...
    def encode_batch(self, rows: Sequence[Rendered]) -> list[Encoded]: ...


class Tokenizer:
    """Text and conversations to ids and back. Text is data: a control token typed in it stays text.

    ``bos_id``, ``eos_id`` (None where the model has none), ``pad_id`` (always a valid id), ``vocab_size`` (added tokens
    included), ``adds_bos`` (whether this model's documents begin with ``bos_id``).
    """

    def __init__(
        self, backend: Backend, *, names: Mapping[str, Any], adds_bos: bool, templates: Mapping[str, str] | None = None,
        template_name: str = "chat template", extra_eos_ids: Sequence[int] = (), text_specials: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self._backend = backend
        self._names = dict(names)
        self._extra_eos_ids = tuple(extra_eos_ids)
        self._template_name = template_name
        self._text_specials = tuple(text_specials)
        self.vocab_size = backend.vocab_size
        self.bos_id, self.eos_id = self._named_id("bos_token"), self._named_id("eos_token")
        self.pad_id = self._find_pad()
        self.adds_bos = adds_bos and self.bos_id is not None
        self.templates = dict(templates or {})
        self._compiled: dict[str, ChatTemplate] = {}
        self._protect_control()

    def _named_id(self, name: str) -> int | None:
        token = self._names.get(name)
        return self._backend.token_id(token) if isinstance(token, str) else None

    def _find_pad(self) -> int:
        candidates = [
            self._named_id("pad_token"),
            *map(self._backend.token_id, _PAD_NAMES),
            self._named_id("unk_token"),
        ]
        found = next((i for i in [*candidates, self.eos_id] if i is not None and 0 <= i < self.vocab_size), None)
        return 0 if found is None else found

    def _protect_control(self) -> None:
        """Control tokens are those flagged special, and those that the model uses as such whatever their flag."""
        control = dict(self._backend.control)
        named = [token for key, token in self._names.items() if key.endswith("_token") and isinstance(token, str)]
        for token in [*named, *filter(None, map(self._backend.token, self._extra_eos_ids))]:
            if token in self._backend.added:
                control[token] = self._backend.added[token]
        control = {token: index for token, index in control.items() if token and token not in self._text_specials}
        unknown = [token for token in self._text_specials if token not in self._backend.added]
        if unknown:
            raise ValueError(f"text_specials: {unknown[0]!r} is not a token of this tokenizer")
        self._backend.set_control(control)
        beginnings = {token[:n] for token in control for n in range(1, len(token))}
        self._control = alternatives(control)
        self._breakable = re.compile(f"{self._control.pattern}|(?:{alternatives(beginnings).pattern})\\Z")
        spelt = [json.dumps(token)[1:-1] for token in control] + [json.dumps(token)[1:] for token in beginnings]
        self._suspect = alternatives(spelt)  # in a conversation's JSON: one that may need breaking

    # Text -----------------------------------------------------------------------------------------------------

    def encode(
        self, text: str, add_bos: bool = True, add_eos: bool = True, *, trim_leading_whitespace: bool = False,
        prefix: str | None = None,
    ) -> list[int]:  # fmt: skip
        """Ids of ``text``. ``trim_leading_whitespace`` leaves out the white space that sentencepiece puts before a text
        (by encoding it behind ``prefix``, a newline unless given)."""
        ids = self._encode_after(prefix or "\n", text) if trim_leading_whitespace else self._encode_plain(text)
        start = [self.bos_id] if add_bos and self.bos_id is not None else []
        end = [self.eos_id] if add_eos and self.eos_id is not None else []
        return [*start, *ids, *end]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ``ids``; control tokens are left out unless ``skip_special`` is False."""
        return self._backend.decode([int(i) for i in ids], skip_special=skip_special)

    def token_id(self, token: str) -> int | None:
        """The id of one token as the vocabulary spells it, or None."""
        return self._backend.token_id(token)

    def _encode_plain(self, text: str) -> list[int]:
        return self._backend.encode_batch([Rendered(text, controls=[])])[0].ids

    def _encode_after(self, prefix: str, text: str) -> list[int]:
        before, both = self._encode_plain(prefix), self._encode_plain(prefix + text)
        return both[len(before) :] if both[: len(before)] == before else self._encode_plain(text)

    def encode_rendered(self, rows: Sequence[Rendered]) -> list[Encoded]:
        """Ids and trained token spans of many texts at once, without tokens at either end."""
        return self._backend.encode_batch(rows)

    # Conversations --------------------------------------------------------------------------------------------

    @property
    def has_chat_template(self) -> bool:
        return bool(self.templates)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends what the model writes: eos, generation_config.json's, the template's end of turn."""
        ends = self._template(None).turn_ends if self.has_chat_template else ()
        ids = [self.eos_id, *self._extra_eos_ids, *map(self._backend.token_id, ends)]
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    @property
    def template_keeps_its_prompt(self) -> bool:
        """Whether the chat template's training text begins with its generation prompt (DeepSeek-R1's does not)."""
        return self._template(None).keeps_its_prompt

    def with_template(self, templates: Mapping[str, str], name: str) -> Tokenizer:
        """A copy with other chat templates (``default`` and, where tools need another, ``tool_use``)."""
        other = copy.copy(self)
        other.templates, other._template_name, other._compiled = dict(templates), name, {}
        return other

    def render(
        self, messages: Sequence[Message | Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False, **variables: Any,
    ) -> str:  # fmt: skip
        """The conversation as the model's chat template writes it. ``variables`` reach the template
        (``enable_thinking=False``)."""
        job = {**self._job(messages, tools, variables), "prompt": add_generation_prompt}
        template = self._template(tools)
        answer = template.run([Job(job, len(messages))])[0]
        if "error" in answer:
            raise template.error(answer)
        return str(answer["text"])

    def encode_prompt(
        self, messages: Sequence[Message | Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:  # fmt: skip
        """Ids of the conversation up to where the model writes its next turn."""
        job = {**self._job(messages, tools, variables), "prompt": True}
        rendered = self._rendered([job], tools)[0]
        if isinstance(rendered, TemplateError):
            raise rendered
        return self._backend.encode_batch([rendered])[0].ids

    def render_rows(
        self, rows: Sequence[tuple[Sequence[Message], Sequence[Mapping[str, Any]] | None, Mapping[str, Any]]]
    ) -> list[Rendered | TemplateError]:
        """Many (messages, tools, variables), with the unmasked messages trained; or why one failed."""
        results: list[Rendered | TemplateError] = [Rendered("")] * len(rows)
        for with_tools in (False, True):
            places = [i for i, (_, tools, _) in enumerate(rows) if bool(tools) == with_tools]
            jobs = []
            for i in places:
                messages, tools, variables = rows[i]
                jobs.append({**self._job(messages, tools, variables), "trained": [not m.masked for m in messages]})
            if jobs:
                found = self._rendered(jobs, jobs[0].get("tools"))
                for i, result in zip(places, found, strict=True):
                    results[i] = result
        return results

    def tokenize_messages(
        self, messages: Sequence[Message], max_seq_len: int | None = None
    ) -> tuple[list[int], list[bool]]:
        """Ids of a conversation, and for each whether it is masked (no loss). A cut is a prefix: no end is made up.

        Without a chat template: each message by itself, bos before each turn, eos after each assistant message.
        """
        if not messages:
            raise ValueError("tokenize_messages: an empty list of messages")
        encoded = self._tokenize_with_template(messages) if self.has_chat_template else self.encode_turns(messages)
        masked = [True] * len(encoded.ids)
        for start, end in encoded.trained:
            masked[start:end] = [False] * (end - start)
        return encoded.ids[:max_seq_len], masked[:max_seq_len]

    def _tokenize_with_template(self, messages: Sequence[Message]) -> Encoded:
        rendered = self.render_rows([(messages, None, {})])[0]
        if isinstance(rendered, TemplateError):
            raise rendered
        return self._backend.encode_batch([rendered])[0]

    def encode_turns(self, messages: Sequence[Message]) -> Encoded:
        """Each message by itself: ``<bos> user assistant <eos> <bos> user assistant <eos>``."""
        ids: list[int] = []
        trained: list[Span] = []
        opens, spaced = True, False
        for message in messages:
            content, start = message.content.rstrip(" "), len(ids)
            if opens and self.bos_id is not None:
                ids.append(self.bos_id)
            ids += self._encode_plain(content) if opens or spaced else self._encode_after("\n", content)
            opens, spaced = message.role == "assistant", message.content.endswith(" ")
            if opens and self.eos_id is not None:
                ids.append(self.eos_id)
            if not message.masked:
                trained.append((start, len(ids)))
        return Encoded(ids, trained)

    def _template(self, tools: object) -> ChatTemplate:
        if not self.templates:
            raise ValueError(
                "this tokenizer has no chat template; name a built-in one (chatml, llama2, llama3, mistral, gemma, "
                "zephyr, plain) with template=..."
            )
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise ValueError(f"{self._template_name}: no template named 'default', only {sorted(self.templates)}")
        if name not in self._compiled:
            self._compiled[name] = ChatTemplate(
                self.templates[name], variables=self._names, controls=list(self._backend.added),
                ends=self._end_tokens(),
                name=self._template_name,
            )  # fmt: skip
        return self._compiled[name]

    def _end_tokens(self) -> list[str]:
        ids = [i for i in (self.eos_id, *self._extra_eos_ids) if i is not None]
        return [token for token in map(self._backend.token, dict.fromkeys(ids)) if token]

    def _job(self, messages: Sequence[Any], tools: object, variables: Mapping[str, Any]) -> dict[str, Any]:
        return {"messages": [_plain(message) for message in messages], "tools": tools or None, "extra": dict(variables)}

    def _rendered(self, jobs: Sequence[dict[str, Any]], tools: object) -> list[Rendered | TemplateError]:
        template, nonce = self._template(tools), new_nonce()
        sent: list[Job] = []
        broken: list[bool] = []
        for content in jobs:
            job = Job(content, len(content["messages"]))
            safe = escape_controls(content, self._breakable, nonce) if self._suspect.search(job.text) else content
            broken.append(safe is not content)
            sent.append(Job(safe, job.messages) if broken[-1] else job)
        results: list[Rendered | TemplateError] = []
        for answer, was_broken in zip(template.run(sent), broken, strict=True):
            if "error" in answer:
                results.append(template.error(answer, nonce))
                continue
            spans = [(a, b) for a, b in answer.get("spans", ())]
            if not was_broken:
                results.append(Rendered(answer["text"], spans))
            else:
                results.append(self._unescape(answer["text"], spans, nonce))
        return results

    def _unescape(self, text: str, spans: list[Span], nonce: str) -> Rendered:
        controls = [m.span() for m in self._control.finditer(text)]
        edits = [(m.start(), m.end(), "") for m in re.finditer(nonce, text)]
        clean, moved = substitute(text, edits, [*spans, *controls])
        trained, controls = moved[: len(spans)], moved[len(spans) :]
        seen = [m.span() for m in self._control.finditer(clean)]
        return Rendered(clean, trained, None if seen == controls else controls)

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes ids: the vocabulary, the control tokens, the chat templates."""
        parts = [
            self._backend.to_str(),
            repr(sorted(self._names.items(), key=str)),
            repr(sorted(self.templates.items())),
        ]
        parts.append(repr((self._text_specials, self.adds_bos, self.bos_id, self.eos_id, self._extra_eos_ids)))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _plain(message: Any) -> dict[str, Any]:
    """What a template sees of a message: no None values, the reasoning under each of its names."""
    data = message.to_dict() if isinstance(message, Message) else dict(message)
    data = {key: value for key, value in data.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((data[name] for name in names if data.get(name) is not None), None)
    return data if reasoning is None else {"thinking": reasoning, **data, "reasoning_content": reasoning}
