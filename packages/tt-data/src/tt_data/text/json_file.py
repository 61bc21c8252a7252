"""``tokenizer.json`` through the ``tokenizers`` library."""

from __future__ import annotations

import json
import re
import secrets
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

from tt_data.files import json_kind, parse_json
from tt_data.template.spans import Encoded, MarkedText, Span, alternatives, check_unicode, join_spans, substitute
from tt_data.text.json_checks import check_tokenizer, first_token, regex_letters, warn_of_other_ids
from tt_data.text.patterns import byte_letters, splitting_pattern
from tt_data.text.stretches import CUT, ODD, has_few_odd, stretches
from tt_data.text.trial import try_out
from tt_data.wording import said

MAX_BYTES = 64 << 20  # the largest known, Gemma 3's, has 34 MB
_MAX_WORDS = 200_000  # in the cache of words
_MAX_LETTERS = 100  # of a word that is kept: a longer one hardly comes twice
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
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
        warn_of_other_ids(data.get("added_tokens", []), added, name)
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


class _Words(dict[str, tuple[int, ...]]):
    """The ids of words, made by the model when they are first asked for, and of stretches with odd characters, made by
    the library. ``lengths``: the characters of each id of a word."""

    def __init__(self, tokenizer: Any, added: dict[str, int]) -> None:
        super().__init__({token: (index,) for token, index in added.items()})
        self.lengths = {index: len(token) for token, index in added.items()}
        self._library, self._model, self._letters = tokenizer, tokenizer.model, byte_letters()

    def __missing__(self, word: str) -> tuple[int, ...]:
        if ODD.search(word):
            ids = tuple(self._library.encode(word, add_special_tokens=False).ids)
        else:
            tokens = self._model.tokenize(word.translate(self._letters))
            ids = tuple(token.id for token in tokens)
            self.lengths.update((token.id, len(token.value)) for token in tokens)
        if len(self) < _MAX_WORDS and len(word) <= _MAX_LETTERS:
            self[word] = ids
        return ids

    def tokens_of(self, stretch: str, span: Span) -> Span | None:
        """The first and the last token of ``stretch`` with a character of ``span``; None if no token has one."""
        encoding = self._library.encode(stretch, add_special_tokens=False)
        found = _token_spans(encoding, [span], len(encoding.ids))
        return (found[0][0], found[-1][1] - 1) if found else None


class WordCache:
    """Text through a byte-level BPE, each distinct word once: several times faster than the library, same ids.

    Byte-level BPE splits text into words by a regular expression and merges within each word alone, so the ids of a
    word do not depend on its place. A word that is not plain ASCII is encoded by the library, together with the words
    up to a place where the text can be cut (``stretches``). ``encode`` gives None for text that the library must
    encode.
    """

    def __init__(self, tokenizer: Any, pattern: re.Pattern[str], added: dict[str, int]) -> None:
        self._words = _Words(tokenizer, added)
        self._pattern = pattern
        ordered = sorted(added, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, ordered))})") if ordered else None
        self._cuts = not any(CUT.search(token) for token in added)  # else a cut may be inside a token

    def encode(self, text: str, spans: Sequence[Span]) -> Encoded | None:
        """Ids, and the tokens that contain a character of each span."""
        plain = text.isascii() and not _CONTROLS.search(text)
        if not plain and not (self._cuts and has_few_odd(text)):
            return None
        words: list[str] = []
        for number, piece in enumerate(self._split.split(text) if self._split else [text]):
            if number % 2:
                words.append(piece)
            elif plain:
                words += self._pattern.findall(piece)
            else:
                for place, part in enumerate(stretches(piece)):
                    words += (part,) if place % 2 else self._pattern.findall(part)
        parts = list(map(self._words.__getitem__, words))
        ids = list(chain.from_iterable(parts))
        if sum(map(len, words)) != len(text):
            return None
        if not spans or spans == [(0, len(text))]:
            return Encoded(ids, [(0, len(ids))] if spans and ids else [])
        ends = list(accumulate(map(len, words)))  # the characters up to the end of each word
        passed = count = 0  # words, and their tokens
        joined: list[Span] = []
        for start, end in spans:
            edges: list[int] = []
            for place in (start, end - 1) if start < end else ():
                word = bisect_right(ends, place)
                begin = ends[word] - len(words[word])
                if place == begin and parts[word] and words[word].isascii():
                    token = 0
                elif plain or not ODD.search(words[word]):
                    reached = accumulate(self._words.lengths[index] for index in parts[word])
                    token = next(number for number, length in enumerate(reached) if place < begin + length)
                else:
                    tokens = self._words.tokens_of(
                        words[word], (max(start, begin) - begin, min(end, ends[word]) - begin)
                    )
                    if tokens is None:
                        return None
                    token = tokens[len(edges)]
                count, passed = count + sum(map(len, parts[passed:word])), word
                edges.append(count + token)
            if edges and joined and edges[0] <= joined[-1][1]:
                edges[0] = joined.pop()[0]
            joined += [(edges[0], edges[1] + 1)] if edges else []
        return Encoded(ids, joined)


def make_word_cache(tokenizer: Any, data: dict[str, Any]) -> WordCache | None:
    """A cache for the tokenizer of a file with ``data``, if it is a byte-level BPE with a known pattern, else None."""
    model = data["model"]
    plain = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model.get("type") != "BPE" or any(model.get(key) for key in plain) or model.get("byte_fallback"):
        return None
    if (normalizer := data.get("normalizer")) and normalizer.get("type") not in ("NFC", "NFKC", "NFD", "NFKD"):
        return None
    pattern = splitting_pattern(data.get("pre_tokenizer"))
    flags = ("single_word", "lstrip", "rstrip")
    if pattern is None or any(token.get(flag) for token in data.get("added_tokens", ()) for flag in flags):
        return None
    added = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()}
    return WordCache(tokenizer, pattern, added)


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
