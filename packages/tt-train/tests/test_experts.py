"""Adapters on stacked expert weights, where a family stores them [experts, in, out]."""

import torch

import tt_models
import tt_peft

CONFIG = {
    "model_type": "gpt_oss", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
    "layer_types": ["full_attention"], "sliding_window": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0, "tie_word_embeddings": False, "attention_bias": True, "hidden_act": "silu",
}  # fmt: skip


def test_transposed_experts_are_adapted_along_their_own_axes():
    torch.manual_seed(0)
    model = tt_models.build(tt_models.config_from_hf(CONFIG)).eval()
    ids = torch.randint(0, 64, (1, 6))
    with torch.no_grad():
        before = model(ids)
        names = tt_peft.apply_lora_(
            model, tt_peft.LoRAConfig(rank=2, target_modules=(), target_parameters=("mlp.experts.down_proj",))
        )
        torch.testing.assert_close(model(ids), before)
        state = tt_peft.adapter_state_dict(model)
        shapes = sorted(tuple(tensor.shape) for tensor in state.values())
        tt_peft.load_adapter_state_(model, {key: torch.randn_like(tensor) for key, tensor in state.items()})
        adapted = model(ids)
        assert not torch.allclose(adapted, before)
        tt_peft.merge_lora_(model)
        torch.testing.assert_close(model(ids), adapted, rtol=1e-4, atol=1e-4)
    assert names
    assert 24 in {size for shape in shapes for size in shape}  # in: the intermediate size, not the hidden one twice
