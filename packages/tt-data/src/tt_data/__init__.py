"""From any rows to exactly the right labels: tokenizers, chat templates, masks, packing, resumable order."""

from tt_data.chat_formats import (
    CHAT_TEMPLATES,
    ChatMLFormat,
    Llama2ChatFormat,
    MistralChatFormat,
    register_chat_template,
)
from tt_data.chat_template import TemplateError
from tt_data.collate import collate, padded_collate, padded_collate_dpo
from tt_data.converters import Schema, register_schema
from tt_data.dataset import TokenDataset
from tt_data.instruct_templates import (
    AlpacaInstructTemplate,
    GrammarErrorCorrectionTemplate,
    InstructTemplate,
    StackExchangedPairedTemplate,
    SummarizeTemplate,
    register_instruct_template,
)
from tt_data.load import load_dataset
from tt_data.loader import batches
from tt_data.messages import Message, validate_messages
from tt_data.model_files import load_tokenizer
from tt_data.order import rows_at, steps_per_epoch
from tt_data.packing import PackedDataset
from tt_data.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "load_tokenizer",
    "Tokenizer",
    "load_dataset",
    "TokenDataset",
    "PackedDataset",
    "batches",
    "collate",
    "rows_at",
    "steps_per_epoch",
    "Message",
    "validate_messages",
    "TemplateError",
    "AlpacaInstructTemplate",
    "GrammarErrorCorrectionTemplate",
    "InstructTemplate",
    "StackExchangedPairedTemplate",
    "SummarizeTemplate",
    "register_instruct_template",
    "CHAT_TEMPLATES",
    "Llama2ChatFormat",
    "MistralChatFormat",
    "ChatMLFormat",
    "register_chat_template",
    "Schema",
    "register_schema",
    "padded_collate",
    "padded_collate_dpo",
]
