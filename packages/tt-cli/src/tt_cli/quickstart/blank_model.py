"""The blank model, as a Hugging Face directory to pretrain: a tokenizer trained on the rows, and random weights.

Apart from the story, whose readers may skip how it is made.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Digits stand alone, so that numbers are read digit by digit; a word takes the space before it along.
PIECES = r"\d| ?[A-Za-z]+|\s+|[^\sA-Za-z\d]"


def train_tokenizer(texts: Iterable[str], folder: Path, *, vocab_size: int = 512, max_length: int = 128) -> int:
    """Train a byte-level BPE on ``texts`` and write its files to ``folder``. Returns the size of the vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # any text can be encoded
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": PAD,
            "chat_template": CHAT_TEMPLATE,
            "model_max_length": max_length,
            "clean_up_tokenization_spaces": False,
        },
    )
    ids = {"eos_token_id": tokenizer.token_to_id(END), "pad_token_id": tokenizer.token_to_id(PAD)}
    _write_json(folder / "generation_config.json", ids)
    return int(tokenizer.get_vocab_size())


def llama_config(*, vocab_size: int, hidden_size: int, num_hidden_layers: int, max_length: int = 128) -> dict[str, Any]:
    """config.json of a Llama with tied embeddings and heads of 32."""
    num_heads = max(hidden_size // 32, 1)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": max_length,
        "initializer_range": 0.05,  # the usual 0.02 is for wide models: at this width it learns several times slower
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }


def write_blank_model(folder: Path, config: dict[str, Any], *, seed: int) -> int:
    """Write random weights and ``config`` beside the tokenizer files in ``folder``. Returns the parameter count."""
    import torch

    import tt_ckpt
    import tt_models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tt_models.build(tt_models.config_from_hf(config), dtype=torch.float32)
    tt_ckpt.save_hf(model, folder, config=config)
    return sum(parameter.numel() for parameter in model.parameters())


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
