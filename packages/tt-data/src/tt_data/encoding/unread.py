"""What a report says of rows: keys that no template writes, turns that are not trained, rows that cannot be used.

A file apart from ``encode``: rows in good order never need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tt_data.examples import BadRowError, Conversation, Turns, is_empty
from tt_data.messages import Message, TrainOn, mask_messages
from tt_data.report import Tally
from tt_data.rows.schemas import Settings
from tt_data.template.spans import Encoded
from tt_data.text.tokenizer import Tokenizer
from tt_data.wording import counted

_ALL = "train_on=all trains all turns but those with weight: 0"
_TRAINED = {
    "assistant": f"train_on=assistant trains the assistant's turns; {_ALL}",
    "last": f"train_on=last trains the last answer; {_ALL}",
    "all": "the prompts of compared and judged answers are not",
}
_SOUGHT = {"content", "tool_calls", "tool_call_id", "reasoning", "reasoning_content", "thinking"}


def leave_unwritten(turns: Sequence[tuple[str, Conversation | Turns]], tokenizer: Tokenizer, tally: Tally) -> None:
    """Count the keys of messages without which the text is the same. Rendering itself finds those of ``_SOUGHT``."""
    sources = tokenizer.templates.values()
    without: list[tuple[str, str]] = []
    rows: list[tuple[list[Message], Any, Any]] = []
    for where, part in turns:
        keys = {key for message in part.messages for key, value in message.extra.items() if not is_empty(value)}
        for key in sorted(keys if isinstance(part, Turns) else keys - _SOUGHT):
            if isinstance(part, Turns) or not any(key in source for source in sources):
                tally.leave(f"messages.{key}", where)
                continue
            without.append((where, key))
            plain = [replace(message, masked=True) for message in part.messages]
            rows.append((plain, part.tools, part.variables))
            rows.append(([_without(message, key) for message in plain], part.tools, part.variables))
    texts = [getattr(row, "text", None) for row in tokenizer.render_conversations(rows)] if rows else []
    for (where, key), one, other in zip(without, texts[::2], texts[1::2], strict=True):
        if one == other and one is not None:  # None: the template fails, and the row's own error says so
            tally.leave(f"messages.{key}", where)


def _without(message: Message, key: str) -> Message:
    return replace(message, extra={name: value for name, value in message.extra.items() if name != key})


def not_trained(chats: Sequence[Conversation | Turns], train_on: TrainOn) -> list[str]:
    """A note if a message says itself that it is trained, and ``train_on`` leaves it out."""
    for chat in chats:
        masked = mask_messages(chat.messages, train_on)
        if any(old.asked and new.masked for old, new in zip(chat.messages, masked, strict=True)):
            return [f"some messages with weight: 1, train: true or their like are not trained: {_TRAINED[train_on]}"]
    return []


def untrainable(parts: Sequence[Encoded], limit: int | None, tally: Tally) -> BadRowError:
    """The error for a row, cut at ``limit``, in which no token after the first (which nothing predicts) is trained."""
    if all(any(end > max(start, 1) for start, end in part.trained) for part in parts):
        prompt = max(part.trained[0][0] if part.trained else len(part.ids) for part in parts)
        tally.longest_prompt = max(tally.longest_prompt, prompt)
        return BadRowError("no trainable token", f"no trainable token at max_seq_len {limit} (its prompt has {prompt})")
    why = [note for part in parts for note in part.notes] or ["none of its answers is trained"]
    return BadRowError("no trainable token", f"no trainable token: {'; '.join(dict.fromkeys(why))}")


def bad_rows(names: Sequence[str], kept: int, tally: Tally, settings: Settings) -> ValueError:
    """The error for a source with bad rows, of which none can be used or whose bad rows the settings refuse."""
    name, bad, rows = ", ".join(names[:3]), tally.dropped.total(), counted(tally.seen, "row").replace(",", "")
    hidden = tally.dropped["no trainable token"]
    if hidden and hidden == bad and tally.longest_prompt:
        return ValueError(
            f"{name}: {hidden} of {rows} {'has' if hidden == 1 else 'have'} no trainable token at max_seq_len "
            f"{settings.max_seq_len} (longest prompt {tally.longest_prompt}); raise max_seq_len"
        )
    what = "on_bad_row is error" if kept else "none can be used"
    return ValueError(
        f"{name}: {bad} of {rows} {'is' if bad == 1 else 'are'} bad ({tally.summary()}), {what}: "
        f"{'; '.join(tally.problems[:3])}"
    )
