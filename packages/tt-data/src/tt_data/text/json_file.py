"""``tokenizer.json`` through the ``tokenizers`` library."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Sequence
from typing import Any

from tt_data.files import json_kind, parse_json
from tt_data.template.spans import Encoded, MarkedText, Span, alternatives, check_unicode, join_spans, substitute
from tt_data.text.json_checks import check_tokenizer, first_token, regex_letters
from tt_data.text.trial import try_out
from tt_data.text.word_cache import make_word_cache
from tt_data.wording import said

MAX_BYTES = 64 << 20  # the largest known, Gemma 3's, has 34 MB
_log = logging.getLogger(__name__)
_MAX_CONTAINERS = 4_000_000  # lists and objects in it: each takes 30 times its text in memory


class JsonTokenizer:
    """Encodes with the library; text that merely looks like a control token goes through a copy without them.

    In that copy every control token is spelt as a marker that nobody can have typed. Markers replace the control tokens
    of the template, so that typed ones are plain text. Ids, merges and the treatment of white space are the same.
    """

    def __init__(self, source: str, *, name: str = "tokenizer.json") -> None:
        from tokenizers import Tokenizer, processors

        data = _parse(source, name)
        if not check_tokenizer(data, name):
            try_out("json", source.encode("utf-8", "surrogatepass"), name, regex_letters(data))
        try:
            self._tokenizer = Tokenizer.from_str(source)
        except BaseException as error:
            raise library_error(error, f"{name}: not a tokenizer.json that this version of tokenizers reads") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.first = first_token(data.get("post_processor"))
        self._tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
        added = self._tokenizer.get_added_tokens_decoder()
        _warn_of_other_ids(data.get("added_tokens", []), added, name)
        self.added: dict[str, int] = {token.content: index for index, token in added.items()}
        self.control: dict[str, int] = {token.content: index for index, token in added.items() if token.special}
        self._typed = alternatives(self.control)
        vocab = data["model"].get("vocab")
        last = max(vocab.values(), default=-1) if isinstance(vocab, dict) else len(vocab or ()) - 1
        self.vocab_size = max(last, max(added, default=-1)) + 1  # ids may have holes
        self._name = name
        self._marked: Any = None
        self._markers: dict[str, str] = {}
        self._words = make_word_cache(self._tokenizer, data)

    def with_control(self, control: dict[str, int]) -> JsonTokenizer:
        """The same vocabulary with other control tokens, which typed text never becomes."""
        other = JsonTokenizer.__new__(JsonTokenizer)
        other.__dict__.update(self.__dict__, control=control, _marked=None, _typed=alternatives(control))
        return other

    def token_id(self, token: str) -> int | None:
        if not token.isascii() and any("\ud800" <= letter <= "\udfff" for letter in token):
            return None  # half of a surrogate pair is not a token
        index: int | None = self._tokenizer.token_to_id(token)
        return index

    def token(self, index: int) -> str | None:
        text: str | None = self._tokenizer.id_to_token(index)
        return text

    def to_str(self) -> str:
        text: str = self._tokenizer.to_str()
        return text

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        try:
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        except BaseException as error:
            raise library_error(error, f"{self._name}: ids from {list(ids[:8])} cannot be decoded") from None
        return text

    def encode_batch(self, rows: Sequence[MarkedText]) -> list[Encoded]:
        encoded: list[Encoded | None] = [None] * len(rows)
        plain: list[int] = []
        marked: list[int] = []
        for i, row in enumerate(rows):
            if row.controls is not None and self._typed.search(row.text) is not None:
                marked.append(i)
                continue
            if self._words:
                try:
                    encoded[i] = self._words.encode(row.text, row.trained)
                except Exception as error:
                    raise self._failure(error, [row.text]) from None
            if encoded[i] is None:
                plain.append(i)
        if plain:
            self._encode_into(encoded, plain, [rows[i] for i in plain], self._tokenizer)
        if marked:
            tokenizer = self._with_markers()
            self._encode_into(encoded, marked, [self._mark(rows[i]) for i in marked], tokenizer)
        return [row for row in encoded if row is not None]

    def _encode_into(
        self, encoded: list[Encoded | None], places: list[int], rows: list[MarkedText], tokenizer: Any
    ) -> None:
        """Encode ``rows`` with the library and put the results at ``places``."""
        texts = [row.text for row in rows]
        try:
            found = tokenizer.encode_batch(texts, add_special_tokens=False)
        except BaseException as error:
            raise self._failure(error, texts) from None
        for i, row, encoding in zip(places, rows, found, strict=True):
            ids = encoding.ids
            encoded[i] = Encoded(ids, _token_spans(encoding, row.trained, len(ids)))

    def _failure(self, error: BaseException, texts: Sequence[str]) -> BaseException:
        for text in texts:
            check_unicode(text)
        about = f"{texts[0][:40]!a}" if len(texts) == 1 else f"one of {len(texts)} texts, the first {texts[0][:40]!a}"
        return library_error(error, f"{self._name}: the tokenizers library cannot encode {about}")

    def _mark(self, row: MarkedText) -> MarkedText:
        edits = [(a, b, self._markers[row.text[a:b]]) for a, b in row.controls or ()]
        text, trained = substitute(row.text, edits, row.trained)
        return MarkedText(text, trained)

    def _with_markers(self) -> Any:
        if self._marked is None:
            from tokenizers import Tokenizer

            nonce = secrets.token_hex(8)
            self._markers = {token: f"\U000ffffe{nonce}{i}\U000ffffe" for i, token in enumerate(self.control)}
            self._marked = Tokenizer.from_str(_rename_tokens(self._tokenizer.to_str(), self._markers))
        return self._marked

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_marked": None, "_markers": {}, "_words": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._words = make_word_cache(self._tokenizer, json.loads(self.to_str()))


def _parse(source: str, name: str) -> dict[str, Any]:
    if (count := source.count("[") + source.count("{")) > _MAX_CONTAINERS:
        raise ValueError(f"{name}: {count:,} lists and objects, expected at most {_MAX_CONTAINERS:,}; not a tokenizer")
    data = parse_json(source, name)
    if not isinstance(data, dict):
        raise ValueError(f"{name}: expected a JSON object with model and added_tokens, found {json_kind(data)}")
    return data


def library_error(error: BaseException, about: str) -> BaseException:
    """The error to raise for one of the tokenizers library: a panic of Rust is not an Exception, and has many lines."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        return error  # an interrupt
    return ValueError(f"{about} ({said(error)}); download the file again, or do not trust it")


def _warn_of_other_ids(tokens: Sequence[dict[str, Any]], added: dict[int, Any], name: str) -> None:
    """Warn about ids: a token that is not in the model's vocabulary gets the next free one, whatever the file says."""
    found = {token.content: index for index, token in added.items()}
    for token in tokens:
        if found.get(token["content"], token["id"]) != token["id"]:
            _log.warning(
                "%s: the added token %a has id %d in the file, but the library gives it %d, which is used here",
                name, token["content"], token["id"], found[token["content"]],
            )  # fmt: skip
            return


def _rename_tokens(source: str, names: dict[str, str]) -> str:
    """A tokenizer.json in which the tokens of ``names`` have other spellings and the same ids."""
    data = json.loads(source)
    for token in data["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = data["model"]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {names.get(token, token): index for token, index in model["vocab"].items()}
    elif model.get("vocab"):
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    data["post_processor"] = None
    return json.dumps(data)


def _token_spans(encoding: Any, spans: Sequence[Span], count: int) -> list[Span]:
    """The tokens that contain a character of each span."""
    found: list[Span] = []
    for start, end in spans:
        first = next((t for t in map(encoding.char_to_token, range(start, end)) if t is not None), None)
        if first is None:
            continue
        last = next(t for t in map(encoding.char_to_token, range(end - 1, start - 1, -1)) if t is not None)
        while last + 1 < count and encoding.token_to_chars(last + 1)[0] < end:
            last += 1
        found.append((first, last + 1))
    return join_spans(found)
