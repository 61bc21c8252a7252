"""Steps of training on a CUDA device that is not there: a tensor on a wrong device or with a wrong shape shows.

A CUDA build of torch without a GPU computes shapes, dtypes and devices (``conftest``). What a GPU computes, whether
its compiled kernels work, and copies between devices need one: ``nox -s gpu``. TT_TRACE_DEVICE=cpu traces the same on
any build of torch.
"""

import os
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

import tt_models
import tt_peft
from tt_models.masks import block_mask
from tt_peft.nf4_linear import NF4Base
from tt_train.build import preference_loss
from tt_train.config import OptimizerSection, PreferenceSection, QuantizationSection
from tt_train.devices.sharding import shard_
from tt_train.inputs.fake_quantize import fake_quantize_
from tt_train.losses.answers import judged_objective, pair_objective
from tt_train.losses.cross_entropy import cross_entropy
from tt_train.losses.distill import distillation
from tt_train.losses.preferences import PAIR_LOSSES
from tt_train.memory import Offload, checkpoint_activations_, offload_activations_
from tt_train.optim.optimizers import decayed, make_optimizer
from tt_train.references.reference import adapter_off, prepared
from tt_train.step import train_step

DEVICE = os.environ.get("TT_TRACE_DEVICE", "cuda")
ELSEWHERE = "cpu" if DEVICE == "cuda" else "meta"
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and torch.version.cuda is None, reason=f"torch {torch.__version__} is built without CUDA"
)
ROWS, LENGTH, VOCABULARY = 2, 24, 128
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "sliding_window": 16,
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
}  # fmt: skip
FAMILIES = ["llama2_7b", "llama3_1_8b", "mistral_7b", "mixtral_8x7b", "gemma_2b", "gemma2_2b", "gemma3_1b",
            "qwen2_5_7b", "qwen3_8b", "qwen3_30b_a3b", "phi3_mini", "phi3_5_mini", "olmo2_7b", "smollm3_3b",
            "gpt_oss_20b"]  # fmt: skip
LORA = {"rank": 4, "dropout": 0.1, "target_modules": "all-linear", "dtype": torch.float32}
ADAPTERS = {
    "full": None,
    "lora": LORA,
    "dora": LORA | {"use_dora": True},
    "pissa": LORA | {"init": "pissa", "use_rslora": True},
    "qlora": LORA | {"quantize_base": True},
    "qdora": LORA | {"quantize_base": True, "use_dora": True},
}
HEADS = {
    "trained": None,
    "frozen": LORA,
    "adapted": LORA | {"target_modules": ("q_proj", "lm_head")},
    "saved": LORA | {"modules_to_save": ("lm_head",)},
    "nf4": LORA | {"quantize_base": True, "quantize_skip": ()},
}


def small(name, adapter=None, *, dtype=torch.bfloat16):
    """The family of ``name`` with two small layers, on the meta device."""
    config = tt_models.config_to_hf(tt_models.get_config(name))
    config |= {key: value for key, value in SMALL.items() if key in config} | {"pad_token_id": None}
    for key in ("layer_types", "no_rope_layers"):
        if config.get(key):
            config[key] = config[key][:2]
    for key in ("rope_scaling", "rope_parameters"):
        if config.get(key):
            config[key] = {k: v[:8] if isinstance(v, list) else v for k, v in config[key].items()}
    model = tt_models.build(tt_models.config_from_hf(config), device="meta", dtype=dtype)
    if adapter is not None:
        tt_peft.apply_lora_(model, tt_peft.LoRAConfig(**adapter))
    return model.train()


def rows(*, packed=False, answers=False):
    """A micro-batch on the device, as the loop gives it to an objective."""
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.int64, device=DEVICE)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if packed:
        batch["position_ids"] = torch.arange(LENGTH, device=DEVICE).expand(ROWS, -1).clone()
    return batch | ({"answer_ids": ids.clone()} if answers else {})


def step(model, batches, objective, **options):
    """A step of training. Every trained weight gets a gradient, and every state of the optimizer is on the device."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(decayed(trained), OptimizerSection(**options.pop("optimizer", {})), **options)
    result = train_step(model, batches, objective, optimizer, max_grad_norm=1.0)
    assert result.outcome == "updated"
    assert trained
    for parameter in trained:
        assert parameter.device.type == DEVICE
        assert any(torch.is_tensor(value) and value.shape == parameter.shape and value.device == parameter.device
                   for value in optimizer.state[parameter].values())  # fmt: skip


def test_every_family_is_traced():
    def kinds(names):
        return {type(tt_models.get_config(name)) for name in names}

    assert kinds(FAMILIES) == kinds(tt_models.list_models())


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_stays_on_the_device(traced, name, adapter):
    model = small(name, ADAPTERS[adapter])
    with traced(model):
        step(model, [rows(), rows(packed=True)], cross_entropy)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["qwen3_8b", "gemma2_2b"])
def test_cross_entropy_and_distillation_stay_on_the_device(traced, name, head):
    if name == "gemma2_2b" and head not in ("trained", "frozen"):
        return  # its head is its embeddings
    teacher = small("qwen3_8b").requires_grad_(False).eval()
    every = [partial(cross_entropy, label_smoothing=0.1)]
    every += [partial(distillation, teacher=teacher, divergence=divergence) for divergence in ("forward", "reverse")]
    for objective in every:
        model = small(name, HEADS[head])
        with traced(model, teacher):
            step(model, [rows()], objective)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize(
    ("loss", "head"),
    [
        *((loss, "frozen") for loss in [*PAIR_LOSSES, "kto"]),
        *(("sigmoid", head) for head in ("adapted", "saved", "nf4")),
    ],
)
def test_preference_losses_stay_on_the_device(traced, loss, head, packed):
    model, section = small("qwen3_8b", HEADS[head]), PreferenceSection(name=loss, sft_weight=0.5)
    objective = partial(judged_objective if loss == "kto" else pair_objective, loss=preference_loss(section),
                        beta=0.1, sft_weight=0.5)  # fmt: skip
    with traced(model):
        batch = rows(packed=packed, answers=True)
        if loss == "kto":
            batch |= {f"kl_{key}": value for key, value in batch.items()}
            batch["desirable"] = torch.ones(ROWS, dtype=torch.bool, device=DEVICE)
        batches = prepared([batch], model=model, loss=section, reference=adapter_off(model))
        assert {value.device.type for value in batches[0].values()} == {DEVICE}
        step(model, batches, objective)


@pytest.mark.parametrize("how", [True, 2, "selective"])
@pytest.mark.parametrize("adapter", ["full", "qdora"])
def test_checkpointed_blocks_stay_on_the_device(traced, how, adapter):
    model = small("qwen3_8b", ADAPTERS[adapter])
    checkpoint_activations_(model, how)
    with traced(model):
        step(model, [rows()], cross_entropy)


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_optimizers_stay_on_the_device(traced, name, narrow, in_backward):
    section = {"name": name}
    if name == "sgd":  # torch has no shapes for its fused kernel
        section |= {"momentum": 0.9, "options": {"fused": False}}
    model = small("qwen3_8b", dtype=torch.float32)
    with traced(model):
        step(model, [rows()], cross_entropy, optimizer=section, narrow=narrow, in_backward=in_backward)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("adapter", ["full", "qdora"])
def test_offloaded_activations_come_back_to_the_device(traced, idle, monkeypatch, adapter, checkpointed):
    back, unpack = [], Offload.unpack

    def noted(self, packed):
        back.append(packed)
        return unpack(self, packed)

    monkeypatch.setattr("tt_train.memory.Tensor", FakeTensor)  # no tensor has the type of a plain one here
    monkeypatch.setattr(Offload, "SMALLEST", 64)
    monkeypatch.setattr(Offload, "unpack", noted)
    model = small("qwen3_8b", ADAPTERS[adapter])
    if checkpointed:
        checkpoint_activations_(model)
    offload_activations_(model)
    with traced(model):
        step(model, [rows()], cross_entropy)
    copies = [packed for packed in back if isinstance(packed, tuple)]
    assert len(copies) >= 2
    assert {(device.type, copy.device.type) for device, copy in copies} == {(DEVICE, "cpu")}


SHARDED = {  # adapter, replicate, options of shard_
    "full": ("full", 1, {}),
    "full-hsdp": ("full", 2, {"reduce_every_micro_batch": True}),
    "lora": ("lora", 1, {}),
    "qlora-hsdp": ("qlora", 2, {}),
    "qdora": ("qdora", 1, {}),
}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("case", SHARDED)
def test_shards_stay_on_the_device(traced, among, case, checkpointed):
    adapter, replicate, options = SHARDED[case]
    among(2 * replicate)
    model = small("qwen3_8b", ADAPTERS[adapter], dtype=torch.float32 if adapter == "full" else torch.bfloat16)
    if checkpointed:
        checkpoint_activations_(model)
    device, compute_dtype = torch.device(DEVICE), torch.bfloat16 if adapter == "full" else None
    with traced():
        tt_peft.spread_nf4_(model)
        shard_(model, device=device, shard=2, replicate=replicate, compute_dtype=compute_dtype, **options)
        model.to_empty(device=DEVICE)
        for layer in model.modules():
            if isinstance(layer, NF4Base):
                layer.load_slice_(torch.empty(layer.spread.shape), device=device, dtype=torch.bfloat16)
        assert all(parameter.to_local().numel() < parameter.numel() for parameter in model.parameters())
        step(model, [rows(), rows(packed=True)], cross_entropy)


def test_gradients_of_copies_are_added_up_on_the_device(traced, among):
    among(2)
    model = small("qwen3_8b", LORA)
    with traced(model):
        step(model, [rows()], cross_entropy)


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_fake_quantized_layers_stay_on_the_device(traced, weights):
    model = small("qwen3_8b", LORA | {"dropout": 0.0})
    fake_quantize_(model, QuantizationSection(weights=weights, activations="int8"))
    with traced(model):
        step(model, [rows()], cross_entropy)


@pytest.mark.parametrize("name", FAMILIES)
def test_generated_tokens_stay_on_the_device(traced, name):
    model = small(name, LORA).eval()
    with traced(model):
        ids = torch.zeros(ROWS, LENGTH, dtype=torch.int64, device=DEVICE)
        found = tt_models.generate(model, ids, max_new_tokens=4, top_k=5, top_p=0.9, prompt_lengths=[LENGTH, 20])
    assert (found.device.type, tuple(found.shape)) == (DEVICE, (ROWS, LENGTH + 4))


def test_a_tensor_elsewhere_in_a_forward_pass_is_found(traced):
    model = small("qwen3_8b")
    model.model.norm.register_forward_hook(lambda _, __, out: out + torch.zeros(64, device=ELSEWHERE))
    with traced(model), pytest.raises(RuntimeError, match=f"device.*{DEVICE}.*{ELSEWHERE}"):
        step(model, [rows()], cross_entropy)


def test_the_backward_pass_here_gives_the_gradients_of_torch(by_hand):
    backward, _ = by_hand
    torch.manual_seed(0)
    shape = small("qwen3_8b", dtype=torch.float32).config
    model = tt_models.build(shape, dtype=torch.float32).train()
    tt_peft.apply_lora_(model, tt_peft.LoRAConfig(**ADAPTERS["qdora"] | {"dropout": 0.0}))
    checkpoint_activations_(model, 2)
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH))
    found = []
    for way in (torch.Tensor.backward, backward):
        model.zero_grad()
        way(cross_entropy(model, {"input_ids": ids, "labels": ids}).loss)
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() != set()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, msg=name)


def test_attention_by_formula_is_flex_attention(by_hand):
    _, formula = by_hand
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 24, 16), torch.randn(2, 2, 24, 16), torch.randn(2, 2, 24, 16)
    starts = torch.tensor([[0] * 10 + [10] * 14, [0] * 5 + [5] * 19])
    mask = block_mask(starts, 24, 8, torch.device("cpu"))
    options = {"scale": 0.25, "block_mask": mask, "enable_gqa": True, "score_mod": lambda score, *_: torch.tanh(score),
               "return_aux": AuxRequest(lse=True)}  # fmt: skip
    (expected, aux), (found, own) = flex_attention(q, k, v, **options), formula(q, k, v, **options)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(own.lse, aux.lse)
