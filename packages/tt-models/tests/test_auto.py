"""Names, sizes, and config.json read strictly in both generations."""

import ast
import dataclasses
import inspect
import json
import pickle
import random
import string

import pytest
import torch
from torch import nn

import tt_models
from tt_models.auto import FAMILIES, Family
from tt_models.llama import LlamaConfig, llama

LLAMA = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 61}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | {
    "original_max_position_embeddings": 16
}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4} | {
    "original_max_position_embeddings": 16
}


def test_checklist_models_are_listed():
    assert {"llama2_7b", "llama2_13b", "mistral_7b", "gemma_2b", "qwen3_8b"} <= set(tt_models.list_models())


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'llama2_7b'"):
        tt_models.get_config("lama2_7b")
    with pytest.raises(AttributeError, match="no attribute"):
        tt_models.lama2_7b  # noqa: B018


@pytest.mark.parametrize("wrong", [LLAMA, None, tt_models.ModelConfig()])
def test_only_configs_of_a_family_are_built(wrong):
    with pytest.raises(ValueError, match="build takes a name, or a config from config_from_hf"):
        tt_models.build(wrong)


def test_named_functions_are_build(monkeypatch):
    assert tt_models.gemma_2b(device="meta").config == tt_models.get_config("gemma_2b")
    assert "gemma_2b" in dir(tt_models)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_of_transformers(model_type):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoConfig.for_model(model_type)
    ours = tt_models.config_from_hf({"model_type": model_type})
    assert ours == FAMILIES[model_type].config(**({"num_experts": 128} if model_type == "qwen3_moe" else {}))
    theirs = reference.to_dict()
    written = tt_models.config_to_hf(ours)
    shared = (written.keys() & theirs.keys()) - {"architectures", "head_dim", "layer_types"}
    shared -= {"sliding_window"} if getattr(reference, "use_sliding_window", True) is False else set()  # not used: null
    assert {key: written[key] or None for key in shared} == {key: theirs[key] or None for key in shared}
    assert written.get("layer_types", theirs.get("layer_types")) == theirs.get(
        "layer_types", written.get("layer_types")
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("model_type", FAMILIES)
def test_both_generations_say_the_same_and_are_accepted_back(model_type, seed, random_hf_config, reference_of, close):
    transformers = pytest.importorskip("transformers")
    old = random_hf_config(model_type, seed)
    reference = reference_of(old)
    config = tt_models.config_from_hf(old)
    new = json.loads(reference.config.to_json_string(use_diff=False))
    assert "rope_parameters" in new
    assert "rope_theta" not in new
    again = tt_models.config_from_hf(new)
    if not getattr(config, "use_sliding_window", True):  # transformers forgets a window that is not used
        config, again = (dataclasses.replace(one, sliding_window=None) for one in (config, again))
    assert again == config
    written = tt_models.config_to_hf(config)
    assert tt_models.config_from_hf(json.loads(json.dumps(written))) == config
    back = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**written)).eval()
    back.load_state_dict(reference.state_dict())
    ids = torch.randint(0, old["vocab_size"], (1, 30))
    close(back(ids).logits, reference(ids).logits, 256)


def test_writing_hands_out_copies():
    config = tt_models.get_config("llama3_1_8b")
    tt_models.config_to_hf(config)["rope_scaling"]["factor"] = 99.0
    tt_models.config_to_hf(config)["rope_parameters"]["factor"] = 99.0
    assert config.rope_scaling["factor"] == 8.0


def test_rope_theta_is_read_from_wherever_it_stands():
    assert tt_models.config_from_hf(LLAMA).rope_theta == 10000.0
    assert tt_models.config_from_hf(LLAMA | {"rope_theta": 5.0}).rope_theta == 5.0
    assert tt_models.config_from_hf(LLAMA | {"rope_parameters": {"rope_theta": 6.0}}).rope_theta == 6.0
    assert tt_models.config_from_hf(LLAMA | {"rope_scaling": {"rope_theta": 7.0, "type": "default"}}).rope_theta == 7.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "architectures .'BertModel'."),
        ({"model_type": None}, "has no model_type"),
        ({"hiden_size": 32}, "unknown key 'hiden_size' with value 32, nearest known key 'hidden_size'"),
        ({"qk_clip": 3.0}, "unknown key 'qk_clip'"),
        ({"rope_scaling": {"type": "yarm", "factor": 2.0}}, "did you mean 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}}, "does not know beta_fast"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must"),
        ({"rope_scaling": 3}, "rope_scaling must be a mapping"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be positive, got 0: expected 1e-09 to 1e.09"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor must be a positive number, got True"),
        ({"rope_scaling": YARN | {"beta_fast": 0}}, "beta_fast must be positive, got 0"),
        ({"rope_scaling": YARN | {"truncate": 1}}, "truncate must be true or false, got 1"),
        ({"rope_scaling": LONGROPE | {"long_factor": 1.0}}, "long_factor must be a list of positive numbers"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 5.0}}, "low_freq_factor 5.0 is above high_freq_factor 4.0"),
        ({"rope_theta": 0.0}, "rope_theta must be positive, got 0.0"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must not be negative"),
        ({"intermediate_size": -3}, "intermediate_size must be positive, got -3"),
        ({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, "rope_theta is given twice"),
        ({"rope_theta": "1e4"}, "rope_theta must be float, got '1e4'"),
        ({"hidden_size": "32"}, "hidden_size must be int, got '32'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be bool"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"num_attention_heads": 0}, "num_attention_heads must be positive"),
        ({"hidden_act": "silou"}, "did you mean 'silu'"),
        ({"attention_dropout": 1.5}, "attention_dropout is out of range, got 1.5: expected 0 to 1"),
        ({"pad_token_id": 61}, "pad_token_id 61 is outside vocab_size 61"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder = True is not supported"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config: bitsandbytes"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
    ],
)
def test_wrong_config_is_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        tt_models.config_from_hf(LLAMA | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("gemma3_text", {"attn_logit_softcapping": 3.0}, "attn_logit_softcapping must be null"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not supported"),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_theta": 3.0}},
            "must name full_attention and sliding_attention",
        ),
        ("gemma2", {"layer_types": ["full_attention"]}, "for each of 26 layers"),
        ("gemma2", {"layer_types": ["dense"] * 26}, "layer_types must be"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop = 0.1 is not supported"),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0]}}, "lacks long_factor"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers must have 36"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval must be positive"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be positive"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern must be positive"),
        ("mistral", {"sliding_window": 0}, "sliding_window must be positive, got 0"),
        ("phi3", {"sliding_window": -1}, "sliding_window must be positive, got -1"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be positive"),
        ("qwen3_moe", {"num_experts_per_tok": 129}, "between 1 and the 128 experts, got 129"),
        ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok must be positive, got 0"),
        ("gpt_oss", {"num_experts_per_tok": 200}, "between 1 and the 128 experts, got 200"),
        (
            "phi3",
            {"partial_rotary_factor": 0.5, "rope_parameters": {"rope_theta": 50.0, "partial_rotary_factor": 0.75}},
            "partial_rotary_factor is given twice and differently: 0.5 and 0.75",
        ),
    ],
)
def test_wrong_family_config_is_refused(model_type, change, message):
    with pytest.raises(ValueError, match=message):
        tt_models.config_from_hf({"model_type": model_type, "pad_token_id": None} | change)


def test_multimodal_config_names_its_text_part():
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}, "vision_config": {}}
    with pytest.raises(ValueError, match="only its text_config .'gemma3_text'. can be read"):
        tt_models.config_from_hf(config)


def test_mlp_width_of_llama_2():
    assert [tt_models.llama_mlp_width(hidden) for hidden in (4096, 5120, 64)] == [11008, 13824, 256]
    assert tt_models.llama_mlp_width(64, multiple_of=16) == 176


def test_keys_without_effect_and_nulls_are_passed_over():
    extra = {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float16", "use_cache": True, "auto_map": {"a": "b"}}
    extra |= {"use_sliding_window": False, "attn_pdrop": 0.0, "quantization_config": {}, "max_new_tokens": 512}
    config = tt_models.config_from_hf(LLAMA | extra | {"new_feature": None, "head_dim": None, "rms_norm_eps": None})
    assert config == tt_models.config_from_hf(LLAMA)


def test_the_underscored_pattern_of_gemma_3_says_nothing_like_in_transformers():
    transformers = pytest.importorskip("transformers")
    config = {"model_type": "gemma3_text", "num_hidden_layers": 8, "_sliding_window_pattern": 2}
    reference = transformers.AutoConfig.for_model(**config)
    assert list(tt_models.config_from_hf(config).layer_kinds) == reference.layer_types
    kinds = ["full_attention", "sliding_attention"] * 4
    assert list(tt_models.config_from_hf(config | {"layer_types": kinds}).layer_kinds) == kinds


def test_first_gemma_files_mean_the_tanh_gelu():
    for spelling in ({"hidden_act": "gelu"}, {"hidden_act": "gelu", "hidden_activation": None}, {}):
        assert tt_models.config_from_hf({"model_type": "gemma"} | spelling).hidden_act == "gelu_pytorch_tanh"


def test_a_named_size_can_be_made_small():
    for name in tt_models.list_models():
        small = dataclasses.replace(tt_models.get_config(name), num_hidden_layers=2, **(
            {"no_rope_layers": None} if name.startswith("smollm3") else {}
        ))  # fmt: skip
        assert len(tt_models.build(small, device="meta").model.layers) == 2


def random_json(draw, depth=0):
    kinds = ["none", "bool", "int", "float", "text", "list", "dict"][: 5 if depth > 2 else 7]
    kind = draw.choice(kinds)
    if kind == "list":
        return [random_json(draw, depth + 1) for _ in range(draw.randint(0, 3))]
    if kind == "dict":
        keys = ["type", "rope_type", "factor", "full_attention", "rope_theta", "quant_method", "x"]
        return {draw.choice(keys): random_json(draw, depth + 1) for _ in range(draw.randint(0, 4))}
    scalars = {
        "none": None,
        "bool": draw.random() < 0.5,
        "int": draw.choice([-1, 0, 1, 4, 10**6]),
        "float": draw.choice([-0.5, 0.0, 1.5]),
        "text": draw.choice(["default", "linear", "llama3", "", draw.choice(string.ascii_letters)]),
    }
    return scalars[kind]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_any_json_is_read_or_refused_with_a_value_error(model_type):
    draw = random.Random(model_type)
    keys = [*(field.name for field in dataclasses.fields(FAMILIES[model_type].config)), "rope_parameters", "unknown"]
    messages = []
    for _ in range(300):
        config = {"model_type": model_type, "pad_token_id": None}
        config |= {key: random_json(draw) for key in draw.sample(keys, draw.randint(1, 3))}
        try:
            tt_models.config_from_hf(config)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert not any("\n" in message for message in messages)
    for wrong in (None, [], "llama", 3, {"model_type": ["llama"]}, {"model_type": {}}):
        with pytest.raises(ValueError, match="config.json"):
            tt_models.config_from_hf(wrong)


def test_a_builder_says_what_it_builds_and_from_which_paper():
    for name in tt_models.list_models():
        config, builder = tt_models.get_config(name), getattr(tt_models, name)
        assert all(f"{number:,}" in builder.__doc__ for number in (config.hidden_size, config.vocab_size)), name
        assert name in builder.__doc__
        assert "https://" in builder.__doc__.splitlines()[-1], name
        assert list(inspect.signature(builder).parameters) == ["device", "dtype"]
    assert tt_models.smollm2_135m.__name__ == "smollm2_135m"
    assert pickle.loads(pickle.dumps(tt_models.smollm2_135m)) is tt_models.smollm2_135m
    model = tt_models.smollm2_135m(device="meta", dtype=torch.bfloat16)
    assert model.output_weight.is_meta
    assert model.output_weight.dtype == torch.bfloat16


def test_a_type_checker_sees_every_builder_and_no_other_name():
    root = ast.parse(inspect.getsource(tt_models))
    (block,) = [node for node in root.body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = [target.id for assignment in block.body for target in assignment.targets]
    assert sorted(seen) == sorted(tt_models.list_models())
    assert [node.name for node in block.orelse] == ["__getattr__"]
    assert "__getattr__" not in [getattr(node, "name", None) for node in root.body]
    with pytest.raises(AttributeError, match="no attribute 'genrate'"):
        tt_models.genrate  # noqa: B018


class OwnConfig(LlamaConfig):
    """Of a family that somebody adds."""

    model_type = "own"


def built_with(layer, monkeypatch, **settings):
    """A model of an added family whose final norm is followed by ``layer(hidden_size)``."""

    def own(config):
        model = llama(config)
        model.model.norm = nn.Sequential(model.model.norm, layer(config.hidden_size))
        return model

    monkeypatch.setitem(FAMILIES, "own", Family(OwnConfig, own, {}))
    numbers = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return tt_models.build(OwnConfig(vocab_size=50, **numbers), **settings)


class Gain(nn.Module):
    """A parameter of its own, drawn with the standard deviation of the model."""

    def __init__(self, size):
        super().__init__()
        self.gain = nn.Parameter(torch.empty(size))

    def reset_parameters(self, std):
        nn.init.constant_(self.gain, 1.0 + std)

    def forward(self, x):
        return x * self.gain


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm,
        nn.RMSNorm,
        lambda size: nn.GroupNorm(4, size),
        lambda size: nn.BatchNorm1d(3),
        lambda size: nn.Conv1d(3, 3, 1),
        lambda size: nn.Bilinear(size, size, size),
        lambda size: nn.PReLU(),
        lambda size: nn.GRU(size, size),
        lambda size: nn.MultiheadAttention(size, 2),
        lambda size: nn.EmbeddingBag(7, size),
        lambda size: nn.Embedding(7, size, padding_idx=1),
        lambda size: nn.TransformerEncoderLayer(size, 2, 8),
        Gain,
    ],
)
def test_layers_of_torch_and_of_a_family_itself_are_built_with_their_starting_values(layer, monkeypatch):
    calls = []
    real = torch.empty_like

    def with_garbage(*given, **settings):  # what fresh memory may hold
        calls.append(1)
        made = real(*given, **settings)
        return made.fill_(torch.nan) if made.is_floating_point() and not made.is_meta else made

    monkeypatch.setattr(torch, "empty_like", with_garbage)
    model = built_with(layer, monkeypatch)
    assert calls
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    meta = built_with(layer, monkeypatch, device="meta")
    assert {name: tensor.shape for name, tensor in (*meta.named_parameters(), *meta.named_buffers())} == shapes
    own = model.model.norm[1]
    if isinstance(own, nn.LayerNorm):
        assert own.weight.eq(1).all()
        assert own.bias.eq(0).all()
    if isinstance(own, nn.LayerNorm | nn.PReLU | Gain):
        assert model(torch.zeros(1, 3, dtype=torch.long)).isfinite().all()


class NothingSet(nn.Module):
    """A parameter that nobody fills."""

    def __init__(self, size):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))  # on the meta device: the ones are lost


class LostBuffer(nn.Module):
    """A buffer made on the meta device."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("angles", torch.arange(size))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (NothingSet, "model.norm.1.gain has no starting value: NothingSet needs a method reset_parameters"),
        (LostBuffer, "model.norm.1.angles has no starting value: LostBuffer needs"),
        (
            lambda size: nn.ParameterList([torch.ones(size)]),
            "model.norm.1.0 has no starting value: ParameterList needs",
        ),
    ],
)
def test_a_tensor_without_a_starting_value_is_refused(layer, message, monkeypatch):
    with pytest.raises(ValueError, match=message):
        built_with(layer, monkeypatch)
    assert built_with(layer, monkeypatch, device="meta").model.norm[1]


def test_a_model_is_built_in_inference_mode_too():
    numbers = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    with torch.inference_mode():
        model = tt_models.build(LlamaConfig(vocab_size=50, **numbers))
        assert model(torch.zeros(1, 3, dtype=torch.long)).isfinite().all()
