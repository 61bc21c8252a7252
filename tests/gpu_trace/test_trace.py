"""Forward passes on a CUDA device that is not there: a tensor on a wrong device or with a wrong shape shows.

A CUDA build of torch without a GPU computes shapes and devices only (FakeTensorMode). The backward pass, compiled
kernels (flex_attention, and so packed rows) and everything that reads a number need a GPU: ``nox -s gpu``.
TT_TRACE_DEVICE=cpu traces the same on any build of torch.
"""

import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import tt_models
import tt_peft

DEVICE = os.environ.get("TT_TRACE_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and torch.version.cuda is None, reason=f"torch {torch.__version__} is built without CUDA"
)
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip
FAMILIES = ["llama2_7b", "llama3_1_8b", "mistral_7b", "qwen2_5_7b", "qwen3_8b", "gemma_2b", "gemma2_2b", "phi3_mini"]
ADAPTERS = {
    "none": None,
    "lora": {"rank": 4, "target_modules": "all-linear", "dropout": 0.1},
    "dora": {"rank": 4, "target_modules": "all-linear", "use_dora": True},
    "rslora": {"rank": 4, "target_modules": "all-linear", "use_rslora": True},
}


def small(name):
    """The family of ``name`` with two small layers."""
    config = tt_models.config_to_hf(tt_models.get_config(name)) | SMALL
    config["pad_token_id"] = None
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:2]
    return tt_models.build(tt_models.config_from_hf(config)).train()


def to_fake_(model, mode):
    """Replace parameters and buffers one by one: ``module.to`` inside of the mode does not work."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                fake = torch.nn.Parameter(mode.from_tensor(parameter.detach()).to(DEVICE), parameter.requires_grad)
                module._parameters[name] = fake
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer).to(DEVICE)


def traced(model, *, seq_len=24):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        to_fake_(model, mode)
        ids = torch.zeros(2, seq_len, dtype=torch.int64, device=DEVICE)
        return model(ids)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_forward_pass_stays_on_the_device(name, adapter):
    model = small(name)
    if ADAPTERS[adapter] is not None:
        tt_peft.apply_lora_(model, tt_peft.LoRAConfig(**ADAPTERS[adapter]))
    logits = traced(model)
    assert (logits.device.type, tuple(logits.shape)) == (DEVICE, (2, 24, 128))


@pytest.mark.parametrize("how", [True, 2, "selective"])
def test_checkpointed_blocks_stay_on_the_device(how):
    from tt_train.memory import checkpoint_activations_

    model = small("qwen3_8b")
    checkpoint_activations_(model, how)
    assert traced(model).device.type == DEVICE
