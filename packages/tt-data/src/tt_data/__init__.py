"""Training rows to token ids and labels: tokenizers, chat templates, masks, packing, and an order that resumes."""

from tt_data.batching.collate import collate, padded_collate, padded_collate_dpo
from tt_data.batching.loader import Batch, batches
from tt_data.examples import Completion, Conversation, Judged, Pair, Text, Tokens
from tt_data.loading.datasets import (
    alpaca_cleaned_dataset,
    alpaca_dataset,
    chat_dataset,
    grammar_dataset,
    instruct_dataset,
    preference_dataset,
    samsum_dataset,
    slimorca_dataset,
    stack_exchange_paired_dataset,
    stack_exchanged_paired_dataset,
)
from tt_data.loading.load import load_dataset
from tt_data.messages import Message, validate_messages
from tt_data.report import Report, summary_lines
from tt_data.rows.conversations import sharegpt_to_llama2_messages
from tt_data.rows.hub import DATASETS, NamedDataset, register_dataset
from tt_data.rows.schemas import Schema, register_schema
from tt_data.show import as_text, show, stats, stats_as_text
from tt_data.stream.packed import PackedMix, PackedStream
from tt_data.stream.shuffled import StreamDataset
from tt_data.stream.stream import Stream
from tt_data.template.chat_template import TemplateError
from tt_data.template.prompts import (
    AlpacaInstructTemplate,
    ChatMLFormat,
    GrammarErrorCorrectionTemplate,
    InstructTemplate,
    Llama2ChatFormat,
    MistralChatFormat,
    StackExchangedPairedTemplate,
    SummarizeTemplate,
    register_instruct_template,
)
from tt_data.template.sources import CHAT_TEMPLATES, register_chat_template
from tt_data.template.spans import AddedTokens, Encoded, MarkedText, token_spans
from tt_data.text.backend import Backend
from tt_data.text.load import choose_template, load_tokenizer
from tt_data.text.tokenizer import Tokenizer
from tt_data.token_rows.dataset import IGNORE_INDEX, Dataset, Row, TokenDataset
from tt_data.token_rows.order import rows_at, steps_per_epoch
from tt_data.token_rows.packing import pack
from tt_data.token_rows.views import JoinedDataset, MixedDataset, PackedDataset, Subset

__version__ = "0.1.0"

__all__ = [
    # text and conversations to ids
    "load_tokenizer", "choose_template", "Tokenizer", "Message", "validate_messages", "sharegpt_to_llama2_messages",
    "TemplateError", "MarkedText", "Encoded",
    # a tokenizer of a different kind
    "Backend", "AddedTokens", "token_spans",
    # rows to ids and labels
    "load_dataset", "Dataset", "TokenDataset", "PackedDataset", "MixedDataset", "JoinedDataset", "Subset", "Stream",
    "StreamDataset", "PackedStream", "PackedMix", "Row", "Report", "pack",
    # ids and labels to batches
    "batches", "Batch", "rows_at", "steps_per_epoch", "collate", "padded_collate", "padded_collate_dpo", "IGNORE_INDEX",
    # looking at them
    "show", "stats", "as_text", "stats_as_text", "summary_lines",
    # templates, formats and kinds of rows
    "InstructTemplate", "AlpacaInstructTemplate", "GrammarErrorCorrectionTemplate", "SummarizeTemplate",
    "StackExchangedPairedTemplate", "register_instruct_template", "CHAT_TEMPLATES", "register_chat_template",
    "Llama2ChatFormat", "MistralChatFormat", "ChatMLFormat", "Schema", "register_schema",
    # what a row says
    "Conversation", "Completion", "Text", "Tokens", "Pair", "Judged",
    # data sets with a name
    "DATASETS", "NamedDataset", "register_dataset", "instruct_dataset", "chat_dataset", "preference_dataset",
    "alpaca_dataset", "alpaca_cleaned_dataset", "grammar_dataset", "samsum_dataset", "slimorca_dataset",
    "stack_exchange_paired_dataset", "stack_exchanged_paired_dataset",
]  # fmt: skip
