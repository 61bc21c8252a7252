"""Random small configurations of every family, with nothing left at its default, as a ``config.json`` says them."""

import copy
import random

import pytest
import torch

from tt_models.cpu import blocks, elementwise

ROPES = ["default", "linear", "dynamic", "llama3", "yarn"]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def rope_scaling(kind, draw, half_dim):
    numbers = {
        "default": {},
        "linear": {"factor": draw.choice([2.0, 3.5])},
        "dynamic": {"factor": draw.choice([2.0, 3.0])},
        "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": draw.choice([3.0, 4.0])}
        | {"original_max_position_embeddings": 16},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 16}
        | draw.choice(
            [{}, {"beta_fast": 6.0, "beta_slow": 2.0}, {"mscale": 0.7, "mscale_all_dim": 0.4}, {"truncate": False}]
        )
        | draw.choice([{}, {"attention_factor": 1.3}]),
        "longrope": {"original_max_position_embeddings": draw.choice([16, 64])}
        | {name: [draw.uniform(1, 4) for _ in range(half_dim)] for name in ("short_factor", "long_factor")},
    }
    return {"rope_type": kind, **numbers[kind]}


def common(draw):
    kv_heads, groups = draw.choice([(1, 4), (2, 2), (2, 3), (3, 1)])
    return {
        "vocab_size": draw.randint(60, 90),
        "hidden_size": 16 * kv_heads * groups,
        "intermediate_size": draw.choice([32, 40, 56]),
        "num_hidden_layers": draw.choice([2, 3]),
        "num_attention_heads": kv_heads * groups,
        "num_key_value_heads": kv_heads,
        "head_dim": draw.choice([8, 16]),
        "max_position_embeddings": 128,
        "initializer_range": 0.05,
        "rms_norm_eps": draw.choice([1e-3, 3e-4]),
        "tie_word_embeddings": draw.random() < 0.5,
        "pad_token_id": draw.choice([None, 3]),
        "bos_token_id": 4,
        "eos_token_id": draw.choice([5, [5, 6]]),
    }


def windows(draw):
    return {"sliding_window": draw.choice([3, 7])}


def experts(draw):
    return {"num_local_experts": draw.choice([4, 5]), "num_experts_per_tok": draw.choice([2, 3])}


def layered(draw, layers):
    return {"layer_types": [draw.choice(["sliding_attention", "full_attention"]) for _ in range(layers)]}


def random_hf_config(model_type, seed):
    """A ``config.json`` of the older generation."""
    draw = random.Random(f"{model_type}{seed}")
    config = {"model_type": model_type} | common(draw)
    layers, half = config["num_hidden_layers"], config["head_dim"] // 2
    theta, act = draw.choice([100.0, 700.0]), draw.choice(["silu", "gelu", "gelu_pytorch_tanh"])
    rope = {"rope_theta": theta, "rope_scaling": rope_scaling(ROPES[seed % len(ROPES)], draw, half)}
    biases = {"attention_bias": draw.random() < 0.7}
    qwen = windows(draw) | {"use_sliding_window": draw.random() < 0.7, "max_window_layers": 1}
    own = {
        "llama": {"hidden_act": act, "mlp_bias": draw.random() < 0.7} | rope | biases,
        "mistral": {"hidden_act": act} | rope | draw.choice([windows(draw), {"sliding_window": None}]),
        "mixtral": {"hidden_act": act} | rope | experts(draw) | draw.choice([windows(draw), {"sliding_window": None}]),
        "gemma": {"hidden_act": "gelu_pytorch_tanh"} | rope | biases,
        "gemma2": {"hidden_activation": draw.choice(["gelu_pytorch_tanh", "silu"])}
        | {"query_pre_attn_scalar": 11, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 0.7}
        | rope | windows(draw) | biases | draw.choice([{}, layered(draw, layers)]),
        "gemma3_text": {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 13}
        | {"rope_theta": 900.0, "rope_local_base_freq": 60.0, "sliding_window_pattern": 2}
        | {"rope_scaling": draw.choice([None, {"rope_type": "linear", "factor": 4.0}])}
        | windows(draw) | biases | draw.choice([{}, layered(draw, layers)])
        | draw.choice([{}, {"final_logit_softcapping": 2.0}]),
        "qwen2": {"hidden_act": act} | rope | qwen,
        "qwen3": {"hidden_act": act} | rope | qwen | biases,
        "qwen3_moe": {"hidden_act": act, "moe_intermediate_size": 24, "norm_topk_prob": draw.random() < 0.5}
        | rope | qwen | biases | experts(draw)
        | draw.choice([{"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}, {}]),
        "phi3": {"hidden_act": act, "partial_rotary_factor": draw.choice([0.5, 1.0])}
        | {"rope_theta": theta, "original_max_position_embeddings": draw.choice([16, 20])}
        | draw.choice([windows(draw), {"sliding_window": None}]),
        "olmo2": {"hidden_act": act} | rope | biases,
        "smollm3": {"hidden_act": act, "no_rope_layer_interval": 2, "use_sliding_window": draw.random() < 0.5}
        | rope | windows(draw) | biases | {"mlp_bias": draw.random() < 0.5}
        | draw.choice([{}, {"no_rope_layers": [draw.randint(0, 1) for _ in range(layers)]}]),
        "gpt_oss": {"swiglu_limit": 0.05, "swiglu_alpha": 1.3} | rope | windows(draw) | experts(draw)
        | {"attention_bias": draw.random() < 0.7} | draw.choice([{}, layered(draw, layers)]),
    }  # fmt: skip
    config |= own[model_type]
    if model_type == "phi3":  # its head size is fixed, and the factors count rotated pairs
        config.pop("head_dim")
        rotated = int(16 * config["partial_rotary_factor"])
        config["rope_scaling"] = None if seed % 2 else {"type": "longrope"} | {
            name: [draw.uniform(1, 4) for _ in range(rotated // 2)] for name in ("short_factor", "long_factor")
        }  # fmt: skip
    return config


@pytest.fixture(name="random_hf_config")
def random_hf_config_fixture():
    """The function above."""
    return random_hf_config


def reference_of(config, *, seed=0):
    """A transformers model with random weights and every norm and bias away from its neutral value."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**copy.deepcopy(config))  # which it changes
    attention = "eager" if config.model_type in ("gemma2", "gpt_oss") else "sdpa"  # softcaps and sinks need it
    reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return reference


@pytest.fixture(name="reference_of")
def reference_of_fixture():
    """The function above."""
    return reference_of


@pytest.fixture
def close():
    """A function that asserts that two tensors are the same but for some roundings of their largest value.

    Sums in another order are a few roundings apart after one layer, and 256 at most after a small model or its
    backward pass: transformers itself is up to 90 away from fp64 there. In bf16 few of them are left of a number.
    """

    def check(found, expected, roundings=32):
        roundings = roundings if torch.finfo(expected.dtype).eps < 1e-5 else 4
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert found.isfinite().all() == expected.isfinite().all()
        where = expected.isfinite()
        assert found[~where].equal(expected[~where])
        difference = (found[where].double() - expected[where].double()).abs().max().item()
        unit = torch.finfo(expected.dtype).eps * expected[where].abs().max().item()
        assert difference <= roundings * unit, f"{difference / unit:.0f} roundings apart"

    return check


@pytest.fixture(name="small")
def small_fixture(random_hf_config):
    """A function that builds a small model of a family, in evaluation mode; fields may be given."""
    import tt_models

    def build(model_type="llama", seed=0, **fields):
        config = random_hf_config(model_type, seed) | {"initializer_range": 0.2} | fields
        torch.manual_seed(seed)
        return tt_models.build(tt_models.config_from_hf(config)).eval()

    return build


@pytest.fixture
def in_small_blocks(monkeypatch):
    """A function of a number of elements: kernels are used at every size, in blocks of so many."""

    def change(elements):
        for module, name in ((elementwise, "NORMED"), (elementwise, "ROTATED"), (blocks, "KEPT")):
            monkeypatch.setattr(module, name, 0)
        monkeypatch.setattr(blocks, "BLOCK", elements)
        monkeypatch.setattr(elementwise, "GATED_BLOCK", elements)

    return change
