"""One ``Tokenizer`` over any kind of tokenizer file (``Backend``), with the model's chat template."""

from __future__ import annotations

import copy
import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from tt_data.messages import Message
from tt_data.template.chat_template import TO_JSON, ChatTemplate, Job, TemplateError, template_dict
from tt_data.template.spans import BLANKS, Encoded, MarkedText, Span, SpecialTokens, check_unicode
from tt_data.text.backend import Backend

AnyMessage: TypeAlias = Message | Mapping[str, Any]
Tools: TypeAlias = Sequence[Mapping[str, Any]] | None
_OPENING, _CLOSING = ("<|", "<\uff5c"), ("|>", "\uff5c>")
_PAD_NAMES = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|finetune_right_pad|>", "<|padding|>")


class Tokenizer:
    """Text and conversations to ids and back. Text is data: a control token typed in it stays text.

    ``bos_id`` and ``eos_id`` are None if the model has none. ``pad_id`` is always a valid id. ``vocab_size`` includes
    added tokens. ``adds_bos``: whether this model's documents begin with ``bos_id``. ``special_tokens``: their strings.
    ``templates``: Jinja sources of chat templates by name, ``default`` among them, or nothing.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    adds_bos: bool
    special_tokens: list[str]
    templates: dict[str, str]

    def __init__(
        self, backend: Backend, *, names: Mapping[str, Any], adds_bos: bool, templates: Mapping[str, str] | None = None,
        template_name: str = "chat template", extra_eos_ids: Sequence[int] = (), text_specials: Sequence[str] = (),
        more_specials: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """``names``: the strings of ``bos_token``, ``eos_token``, ``pad_token``, ..., which chat templates read, too.
        ``template_name``: where ``templates`` came from, for messages. ``extra_eos_ids``: more ids that end an answer.
        ``text_specials``: control tokens that text may become. ``more_specials``: added tokens that are special, too.
        """
        self._backend, self._names, self._extra_eos_ids = backend, dict(names), tuple(extra_eos_ids)
        self._template_name, self.templates = template_name, dict(templates or {})
        self.vocab_size = backend.vocab_size
        self.bos_id, self.eos_id = self._named_id("bos_token"), self._named_id("eos_token")
        pads = [self._names.get("pad_token"), *_PAD_NAMES, self._names.get("unk_token")]
        ids = [*(backend.token_id(token) for token in pads if isinstance(token, str)), self.eos_id]
        self.pad_id = next((i for i in ids if i is not None and 0 <= i < self.vocab_size), 0)
        self.adds_bos = adds_bos and self.bos_id is not None
        self._eos_ids: tuple[int, ...] | None = None
        self._blank: dict[int, bool] = {}  # whether a token is white space, of those that were asked for
        # what generation_config.json adds must not change token rows, so it is not among these
        named = [self._names.get(name) for name in ("eos_token", "eot_token")]
        self._ends = [token for token in named if isinstance(token, str) and backend.token_id(token) is not None]
        # the tokens that are flagged special, and those that the tokenizer's own files call special
        called = [token for key, token in self._names.items() if key.endswith("_token") and isinstance(token, str)]
        known = [token for token in (*called, *more_specials) if token in backend.added]
        self._enders = [token for token in dict.fromkeys([*backend.control, *known]) if token]
        if unknown := [token for token in text_specials if token not in backend.added]:
            raise ValueError(f"text_specials: {unknown[0]!r} is not a token of this tokenizer")
        # tokens with which a template opens turns although no flag says so (DeepSeek's <\uff5cUser\uff5c>)
        sources, enders = "".join(self.templates.values()), set(self._enders)
        spelt = [t for t in backend.added if t[:2] in _OPENING and t[-2:] in _CLOSING and t not in enders]
        self.special_tokens = [*self._enders, *(token for token in spelt if token in sources)]
        self._keep_apart([token for token in self.special_tokens if token not in text_specials])
        self._compiled = {name: self._made(source) for name, source in self.templates.items()}

    def _made(self, source: str) -> ChatTemplate:
        return ChatTemplate(
            source, variables=self._names, special=self._enders, ends=self._ends, name=self._template_name
        )

    def _named_id(self, name: str) -> int | None:
        token = self._names.get(name)
        return self._backend.token_id(token) if isinstance(token, str) else None

    def _keep_apart(self, tokens: Sequence[str]) -> None:
        """``tokens`` are made if a template writes them, and never from text that someone typed."""
        self._backend = self._backend.with_control({token: self._backend.added[token] for token in tokens})
        self._apart = SpecialTokens(tokens)

    # Text -----------------------------------------------------------------------------------------------------

    def encode(
        self, text: str, add_bos: bool = True, add_eos: bool = True, *, trim_leading_whitespace: bool = False,
        prefix: str | None = None,
    ) -> list[int]:  # fmt: skip
        """Ids of ``text``. ``trim_leading_whitespace`` leaves out the white space that sentencepiece puts before a text
        (the text is encoded behind ``prefix``, a newline unless given)."""
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

    def encode_text_prompt(self, text: str) -> list[int]:
        """Ids of the beginning of a document that the model continues. Blanks at its end are left to the model: in
        training they made one token with the word that follows."""
        start = [self.bos_id] if self.adds_bos and self.bos_id is not None else []
        return [*start, *self._encode_plain(text.rstrip(BLANKS))]

    def _encode_plain(self, text: str) -> list[int]:
        return self.encode_texts([MarkedText(text, controls=[])])[0].ids

    def _encode_after(self, prefix: str, text: str) -> list[int]:
        before, both = self._encode_plain(prefix), self._encode_plain(prefix + text)
        return both[len(before) :] if both[: len(before)] == before else self._encode_plain(text)

    def encode_texts(self, rows: Sequence[MarkedText]) -> list[Encoded]:
        """Ids and trained token spans of many texts at once. No bos or eos is added."""
        try:
            encoded = self._backend.encode_batch(rows)
        except Exception:  # each library has its own for text that is not Unicode
            for row in rows:
                check_unicode(row.text)
            raise
        for row, found in zip(rows, encoded, strict=True):
            found.notes = row.notes
        return encoded

    def ends_turn(self, ids: Sequence[int]) -> bool:
        """Whether a model that learns to write ``ids`` learns to stop: only white space may follow the end token."""
        for index in reversed(ids):
            if index == self.eos_id or index in self.eos_ids:
                return True
            if index not in self._blank:
                self._blank[index] = self.decode([index], skip_special=False).isspace()
            if not self._blank[index]:
                return False
        return False

    def notes_of(self, text: str) -> tuple[str, ...]:
        """What a report says of the special tokens that ``text`` spells."""
        return self._apart.notes(text)

    # Conversations --------------------------------------------------------------------------------------------

    @property
    def has_chat_template(self) -> bool:
        return bool(self.templates)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer: eos, those of generation_config.json, the template's end of turn."""
        if self._eos_ids is None:
            ends = self._template(None).turn_ends if self.templates else self._ends
            ids = [self.eos_id, *self._extra_eos_ids, *map(self._backend.token_id, ends)]
            self._eos_ids = tuple(dict.fromkeys(i for i in ids if i is not None))
        return self._eos_ids

    @property
    def template_notes(self) -> list[str]:
        """What a report says of the chat template itself."""
        if not self.templates:
            return []
        template = self._template(None)
        template.start()
        return template.notes

    def with_template(self, templates: Mapping[str, str], name: str) -> Tokenizer:
        """A copy with other chat templates (``default`` and, if tools need another, ``tool_use``)."""
        if templates == self.templates and name == self._template_name:
            return self  # and its process
        other = copy.copy(self)
        other.templates, other._template_name, other._eos_ids = dict(templates), name, None
        other._compiled = {name: other._made(source) for name, source in templates.items()}
        return other

    def with_special_tokens_in_text(self) -> Tokenizer:
        """A copy that reads a special token typed in text as that token."""
        other = copy.copy(self)
        other._keep_apart([])
        return other

    def render(
        self, messages: Sequence[AnyMessage], tools: Tools = None, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """The conversation as the model's chat template writes it. ``variables`` reach the template
        (``enable_thinking=False``). Raises TemplateError."""
        content = {"messages": [template_dict(m) for m in messages], "tools": tools or None, "extra": variables}
        written, template = TO_JSON.encode({**content, "prompt": add_generation_prompt}), self._template(tools)
        answer = template.run([Job(written, len(messages))])[0]
        if "error" in answer:
            raise template.error(answer)
        return str(answer["text"])

    def render_spans(self, messages: Sequence[Message], tools: Tools = None, **variables: Any) -> MarkedText:
        """The conversation as text, with the spans of the messages that are not ``masked``: an answer from the end of
        the generation prompt, with its end-of-turn token. Raises TemplateError."""
        found = self.render_conversations([(messages, tools, variables)])[0]
        if isinstance(found, TemplateError):
            raise found
        return found

    def encode_prompt(self, messages: Sequence[AnyMessage], tools: Tools = None, **variables: Any) -> list[int]:
        """Ids of the conversation up to the turn that the model writes next, without blanks at the end as in
        ``encode_text_prompt``. Raises TemplateError."""
        found = self.render_conversations([(messages, tools, variables)], prompt=True)[0]
        if isinstance(found, TemplateError):
            raise found
        return self.encode_texts([replace(found, text=found.text.rstrip(BLANKS))])[0].ids

    def render_conversations(
        self, rows: Sequence[tuple[Sequence[AnyMessage], Tools, Mapping[str, Any]]], *, prompt: bool = False
    ) -> list[MarkedText | TemplateError]:
        """Many (messages, tools, variables) as ``render_spans``, or why one failed. ``prompt``: with the generation
        prompt, and nothing trained."""
        results: list[MarkedText | TemplateError] = [MarkedText("")] * len(rows)
        sent: dict[bool, list[tuple[int, Job, tuple[str, ...]]]] = {}  # with tools, without
        nonce = f"q{secrets.token_hex(16)}q"  # letters that no data contains
        for place, (messages, tools, variables) in enumerate(rows):
            trained = [isinstance(message, Message) and not message.masked for message in messages]
            given = {"messages": [template_dict(m) for m in messages], "tools": tools or None, "extra": dict(variables)}
            content = {**given, "prompt": True} if prompt else {**given, "trained": trained}
            try:
                written, notes = TO_JSON.encode(content), tuple[str, ...]()
                if self._apart.suspect.search(written):
                    safe, notes = self._apart.broken(content, nonce)
                    written = written if safe is content else TO_JSON.encode(safe)
            except RecursionError:
                results[place] = TemplateError("messages, tools or variables are nested too deeply to be rendered")
                continue
            sent.setdefault(bool(tools), []).append((place, Job(written, len(messages)), notes))
        for with_tools, jobs in sorted(sent.items()):
            template = self._template(with_tools)
            for (place, job, notes), answer in zip(jobs, template.run([job for _, job, _ in jobs]), strict=True):
                if "error" in answer:
                    results[place] = template.error(answer, nonce)
                    continue
                row = MarkedText(answer["text"], [(a, b) for a, b in answer.get("spans", ())])
                if nonce in job.text:
                    row = self._apart.mended(row.text, row.trained, nonce)
                results[place] = replace(row, notes=(*notes, *answer.get("notes", ())))
        return results

    def tokenize_messages(
        self, messages: Sequence[Message], max_seq_len: int | None = None
    ) -> tuple[list[int], list[bool]]:
        """Ids of a conversation, and for each whether it is masked (no loss). A cut is a prefix: no end is added to it.

        Without a chat template: each message on its own, bos before each turn, eos after each assistant message.
        """
        if not messages:
            raise ValueError("tokenize_messages: an empty list of messages")
        encoded = self.encode_texts([self.render_spans(messages)])[0] if self.templates else self.encode_turns(messages)
        masked = [True] * len(encoded.ids)
        for start, end in encoded.trained:
            masked[start:end] = [False] * (end - start)
        return encoded.ids[:max_seq_len], masked[:max_seq_len]

    def encode_turns(self, messages: Sequence[Message]) -> Encoded:
        """Each message on its own: ``<bos> user assistant <eos> <bos> user assistant <eos>``."""
        ids: list[int] = []
        trained: list[Span] = []
        opens, spaced = True, False
        for message in messages:
            content, start = message.content.rstrip(" "), len(ids)
            words = self._encode_plain(content) if opens or spaced else self._encode_after("\n", content)
            if opens and self.bos_id is not None and words[:1] != [self.bos_id]:
                ids.append(self.bos_id)
            ids += words
            opens, spaced = message.role == "assistant", message.content.endswith(" ")
            if opens and self.eos_id is not None and ids[-1:] != [self.eos_id]:
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
            raise ValueError(f"{self._template_name}: no template named 'default', only {sorted(self.templates)[:8]}")
        return self._compiled[name]

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes ids: the vocabulary, the control tokens, the chat templates."""
        special = (self.special_tokens, self._apart.strings, self.adds_bos, self.bos_id, self.eos_id)
        names, templates = sorted(self._names.items(), key=str), sorted(self.templates.items())
        parts = [self._backend.to_str(), repr(names), repr(templates), repr(special)]
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
