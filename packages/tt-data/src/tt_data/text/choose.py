"""Which chat template a tokenizer gets. Tokenizers with the same template share the process that renders it."""

from __future__ import annotations

from typing import Literal

from tt_data.template.prompts import INSTRUCT_TEMPLATES, our_name
from tt_data.template.sources import named_template
from tt_data.text.tokenizer import Tokenizer

SpecialTokensInText = Literal["text", "tokens"]  # what special tokens that are typed in data become


def choose_template(
    tokenizer: Tokenizer, template: str | None, *, special_tokens: SpecialTokensInText = "text"
) -> Tokenizer:
    """``tokenizer`` with the chat template of that name (or ``.jinja`` file); None keeps its own.

    An instruct template changes rows, not the tokenizer. ``special_tokens="tokens"``: special tokens that are typed in
    data become those tokens. Raises ValueError with the nearest name, or FileNotFoundError.
    """
    if template is not None and our_name(template) not in INSTRUCT_TEMPLATES:
        try:
            tokenizer = tokenizer.with_template(*named_template(template, tokenizer.token_id))
        except ValueError as error:
            all_names = f", {', '.join(INSTRUCT_TEMPLATES)} or a .jinja"
            raise ValueError(str(error).replace(" or a .jinja", all_names)) from None
    return tokenizer.with_special_tokens_in_text() if special_tokens == "tokens" else tokenizer
