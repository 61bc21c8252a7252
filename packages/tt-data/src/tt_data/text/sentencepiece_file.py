"""A sentencepiece ``tokenizer.model``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tt_data.template.spans import AddedTokens, Encoded, MarkedText, Span, token_spans
from tt_data.text.trial import try_out
from tt_data.wording import said


class SentencePieceTokenizer:
    """Encodes the text between control tokens piece by piece, and adds control tokens by their ids.

    ``prefix_once``: only the beginning of a text gets sentencepiece's dummy prefix, not what follows each control token
    (Hugging Face's files, unless they say ``"legacy": true``).
    """

    def __init__(
        self, model: bytes, *, added: Mapping[str, int] | None = None, prefix_once: bool = False,
        name: str = "tokenizer.model",
    ) -> None:  # fmt: skip
        import sentencepiece

        try_out("sentencepiece", model, name)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:
            raise ValueError(f"{name}: not a sentencepiece model ({said(error)}); download the file again") from None
        size = self._model.get_piece_size()
        self.added: dict[str, int] = {
            self._model.id_to_piece(i): i for i in range(size) if self._model.is_control(i) or self._model.is_unknown(i)
        }
        self.added.update(added or {})
        self.control = dict(self.added)
        self.vocab_size = max(size, max(self.added.values(), default=-1) + 1)
        self.prefix_once = prefix_once
        self._names = {index: token for token, index in self.added.items()}
        self._tokens = AddedTokens(self.added, self.control)
        self._newline = self._model.encode("\n")

    def with_control(self, control: dict[str, int]) -> SentencePieceTokenizer:
        """The same model with other control tokens, which typed text never becomes."""
        other = SentencePieceTokenizer.__new__(SentencePieceTokenizer)
        other.__dict__.update(self.__dict__, control=control)
        other._tokens = AddedTokens(self.added, control)
        return other

    def token_id(self, token: str) -> int | None:
        if token in self.added:
            return self.added[token]
        index = self._model.piece_to_id(token)
        return None if self._model.is_unknown(index) else int(index)

    def special_names(self) -> dict[str, str]:
        """The strings of bos_token, eos_token, pad_token and unk_token, as far as the model itself has them."""
        model = self._model
        ids = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id(), "unk": model.unk_id()}
        found = [(f"{name}_token", index) for name, index in ids.items() if index >= 0]
        return {name: self._names.get(index) or str(model.id_to_piece(index)) for name, index in found}

    def to_str(self) -> str:
        import hashlib

        digest = hashlib.sha256(self._model.serialized_model_proto()).hexdigest()
        return f"{digest} {sorted(self.added.items())} {self.prefix_once}"

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """As sentencepiece: an unknown piece is " \u2047 ", and an id outside of the vocabulary an IndexError."""
        pieces: list[str] = []
        run: list[int] = []
        unknown = self._model.unk_id()
        for index in ids:
            if index in self._names and index != unknown:
                pieces.append(self._model.decode(run) if run else "")
                run = []
                if not skip_special:
                    pieces.append(self._names[index])
            else:
                run.append(int(index))
        return "".join([*pieces, self._model.decode(run) if run else ""])

    def encode_batch(self, rows: Sequence[MarkedText]) -> list[Encoded]:
        return [self._encode(row) for row in rows]

    def _encode(self, row: MarkedText) -> Encoded:
        spans = self._tokens.spans(row)
        ids: list[int] = []
        places: list[Span] = []
        position = 0
        for start, end in [*spans, (len(row.text), len(row.text))]:
            if position < start:
                self._append(row.text[position:start], position, ids, places)
            if start < end:
                ids.append(self.added[row.text[start:end]])
                places.append((start, end))
            position = end
        return Encoded(ids, token_spans(places, row.trained))

    def _append(self, text: str, offset: int, ids: list[int], places: list[Span]) -> None:
        """Encode plain text at character ``offset``, with the characters of each of its tokens."""
        if offset and self.prefix_once:
            found = self._model.encode("\n" + text, out_type="offset_mapping")
            skip, shift = len(self._newline), offset - 1
        else:
            found = self._model.encode(text, out_type="offset_mapping")
            skip, shift = 0, offset
        ids += found["ids"][skip:]
        # The bytes of one character all come at its beginning but for the last one: widen the empty ones to it.
        offsets = [(a + shift, b + shift) for a, b in found["offsets"][skip:]]
        for i in range(len(offsets) - 2, -1, -1):
            if offsets[i][0] == offsets[i][1]:
                offsets[i] = (offsets[i][0], offsets[i + 1][1])
        places += offsets
