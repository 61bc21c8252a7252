"""Two processes with FSDP2 on the CPU: the same adapter, the same gradients and the same file as one process."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import tt_peft
from tt_peft import LoRAConfig


def build(sharded, quantize_base, use_dora):
    """A small stack of linear layers; sharded on the meta device first, as large models are."""
    torch.manual_seed(0)
    weights = {f"{i}.weight": torch.randn(256, 256) * 0.05 for i in (0, 2)}
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.ReLU(), nn.Linear(256, 256, bias=False))
    config = LoRAConfig(rank=4, target_modules="all-linear", quantize_base=quantize_base, use_dora=use_dora)
    if not sharded or quantize_base:
        model.to_empty(device="cpu").load_state_dict(weights)
        torch.manual_seed(3)  # before sharding every rank draws for itself
        tt_peft.apply_lora_(model, config)
    return model, config, weights


def shard(model):
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


def train(model):
    x = torch.linspace(-1, 1, 256 * 256).reshape(256, 256)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        F.mse_loss(model(x), x.flip(0)).backward()
        optimizer.step()


def one_rank(rank, port, quantize_base, use_dora, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    try:
        model, config, weights = build(True, quantize_base, use_dora)
        if quantize_base:
            shard(model)
        else:
            tt_peft.apply_lora_(model, config)
            shard(model).to_empty(device="cpu")
            for name, tensor in weights.items():
                parameter = model.get_parameter(name)
                with torch.no_grad():
                    parameter.copy_(distribute_tensor(tensor, parameter.device_mesh, parameter.placements))
            torch.manual_seed(3 + rank)  # after sharding the draws of rank 0 count
            tt_peft.init_adapter_(model)
        train(model)
        tt_peft.save_adapter(model, Path(folder) / "adapter")
    finally:
        distributed.destroy_process_group()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize(("quantize_base", "use_dora"), [(False, False), (False, True), (True, False)])
def test_two_ranks_train_and_save_what_one_process_does(quantize_base, use_dora, tmp_path):
    if quantize_base:
        tt_peft.to_nf4(torch.randn(1, 64))  # import torchao once, before the fork
    torch.multiprocessing.start_processes(
        one_rank, args=(free_port(), quantize_base, use_dora, str(tmp_path)), nprocs=2, start_method="fork"
    )
    model, _, weights = build(False, quantize_base, use_dora)
    train(model)
    expected = tt_peft.adapter_state_dict(model)
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(found) == len(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[f"base_model.model.{key}"], tensor, rtol=1e-5, atol=1e-6)
    plain = nn.Sequential(nn.Linear(256, 256, bias=False), nn.ReLU(), nn.Linear(256, 256, bias=False))
    plain.load_state_dict(weights)
    tt_peft.load_adapter(plain, tmp_path / "adapter", quantize_base=quantize_base)
    x = torch.randn(3, 256)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-6)


def merge_on_one_rank(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1")
    distributed.init_process_group("gloo")
    try:
        model, _, _ = build(False, False, True)
        shard(model)
        with pytest.raises(ValueError, match="DoRA of a sharded model cannot be merged"):
            tt_peft.merge_lora_(model)
        assert len(tt_peft.adapter_state_dict(model)) == 6
        Path(folder, "done").touch()
    finally:
        distributed.destroy_process_group()


def test_merging_dora_where_it_is_sharded_is_refused(tmp_path):
    torch.multiprocessing.start_processes(merge_on_one_rank, args=(free_port(), str(tmp_path)), start_method="fork")
    assert (tmp_path / "done").exists()


def quantize_own_blocks(rank, port, size, dtype):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    try:
        torch.manual_seed(0)
        weight = (torch.randn(6, 96) * 0.05).to(dtype)  # 9 blocks: rows and ranks end within one
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(96, 6, bias=False, dtype=dtype))
        tt_peft.quantize_nf4_(model, skip=())
        tt_peft.spread_nf4_(model)
        fully_shard(model)
        read = model[0].load_slice_(weight, device=torch.device("cpu"), dtype=dtype)
        assert read.shape[0] == len(model[0].codes.to_local()) <= -(-9 // size)
        assert [*model[0].file_parameters()] == ["weight"]
        x = torch.randn(4, 96, dtype=dtype)
        expected = tt_peft.to_nf4(weight)
        assert torch.equal(model[0].weight.quantized_data, expected.quantized_data)  # outside of the forward too
        assert torch.equal(model[0].weight.quantized_scalers, expected.quantized_scalers)
        assert torch.equal(model(x), F.linear(x, expected.get_original_weight().to(dtype)))
        model.reshard()
        nan = weight.clone()
        nan[0, 0] = torch.nan  # among the blocks of rank 0: every rank must know
        with pytest.raises(ValueError, match="NaN or infinite"):
            model[0].load_slice_(nan, device=torch.device("cpu"), dtype=dtype)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(("size", "dtype"), [(2, torch.float32), (4, torch.bfloat16)])
def test_ranks_quantize_their_own_blocks_into_the_matrix_of_one_process(size, dtype):
    tt_peft.to_nf4(torch.randn(1, 64))
    args = (free_port(), size, dtype)
    torch.multiprocessing.start_processes(quantize_own_blocks, args=args, nprocs=size, start_method="fork")
