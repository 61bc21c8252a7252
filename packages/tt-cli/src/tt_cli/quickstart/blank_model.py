"""A small Llama with random weights, as a Hugging Face directory to pretrain."""

from pathlib import Path
from typing import Any


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
