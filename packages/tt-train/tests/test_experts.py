"""Adapters on stacked expert weights, where a family stores them [experts, in, out]."""

import torch
from safetensors.torch import load_file

import tt_ckpt
import tt_models
import tt_peft
from tt_train.config import OptimizerSection

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


def save_whole(model_dir, file, start):
    """Train two steps, and save the adapter's tensors as a file has them."""
    from tt_train.devices.distributed import world
    from tt_train.devices.sharding import shard_
    from tt_train.losses.cross_entropy import cross_entropy
    from tt_train.optim.optimizers import make_optimizer
    from tt_train.step import train_step

    here = world()
    model = tt_models.build(tt_models.config_from_hf(CONFIG), device="meta")
    targets = ("mlp.experts.down_proj", "mlp.experts.gate_up_proj")
    tt_peft.apply_lora_(model, tt_peft.LoRAConfig(rank=2, target_modules=("q_proj",), target_parameters=targets))
    if here.size > 1:
        shard_(model, device=torch.device("cpu"), shard=2, replicate=here.size // 2)
    tt_ckpt.load_weights(model, model_dir, device="cpu")
    torch.manual_seed(1)
    tt_peft.init_adapter_(model)
    tt_peft.load_adapter_state_(model, torch.load(start))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer([{"params": parameters}], OptimizerSection(lr=1e-2))
    ids = torch.randint(0, 64, (4, 6), generator=torch.Generator().manual_seed(2))[here.rank :: here.size]
    for _ in range(2):
        train_step(model, [{"input_ids": ids, "labels": ids}], cross_entropy, optimizer)
    tt_peft.save_adapter(model, file.parent / file.stem)
    state = {key: getattr(t, "full_tensor", lambda t=t: t)() for key, t in tt_peft.adapter_state_dict(model).items()}
    if here.is_main:
        torch.save(state, file)


def test_adapters_of_experts_are_trained_saved_and_read_as_shards(ranks, tmp_path):
    torch.manual_seed(0)
    model = tt_models.build(tt_models.config_from_hf(CONFIG))
    tt_ckpt.save_hf(model, tmp_path / "model", config=CONFIG)
    targets = ("mlp.experts.down_proj", "mlp.experts.gate_up_proj")
    tt_peft.apply_lora_(model, tt_peft.LoRAConfig(rank=2, target_modules=("q_proj",), target_parameters=targets))
    state = {key: torch.randn_like(tensor) * 0.1 for key, tensor in tt_peft.adapter_state_dict(model).items()}
    torch.save(state, tmp_path / "start.pt")
    for size in (1, 2):
        ranks(size, save_whole, tmp_path / "model", tmp_path / f"{size}.pt", tmp_path / "start.pt")
    one, two = (torch.load(tmp_path / f"{size}.pt") for size in (1, 2))
    files = [load_file(tmp_path / str(size) / "adapter_model.safetensors") for size in (1, 2)]
    assert one.keys() == two.keys() == state.keys()
    for key, tensor in one.items():
        assert not torch.equal(tensor, state[key])
        torch.testing.assert_close(two[key], tensor, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(files[1][f"base_model.model.{key}"], tensor, rtol=1e-5, atol=1e-5)
