import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import tt_peft
from tt_peft import LoRAConfig, apply_lora_


def names(model, **changes):
    return apply_lora_(model, LoRAConfig(rank=2, **changes))


def both(leaf):
    return [f"model.layers.{i}.{leaf}" for i in range(2)]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj",), both("self_attn.q_proj")),
        (("self_attn.q_proj",), both("self_attn.q_proj")),
        (("model.layers.1.mlp.up_proj",), ["model.layers.1.mlp.up_proj"]),
        (r".*layers\.0\..*(q|v)_proj", ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]),
        ("q_proj", both("self_attn.q_proj")),
        (("lm_head", "embed_tokens"), ["model.embed_tokens", "lm_head"]),
        (
            r".*\.[ud][a-z]*_proj",
            [n for i in range(2) for n in (f"model.layers.{i}.mlp.up_proj", f"model.layers.{i}.mlp.down_proj")],
        ),
    ],
)
def test_names_mean_whole_dotted_parts_from_the_right_and_expressions_whole_names(targets, expected, make_lm):
    assert names(make_lm(), target_modules=targets) == expected


def test_all_linear_leaves_out_the_output_projection(make_lm, make_llama):
    for model in (make_lm(), make_llama()):
        found = names(model, target_modules="all-linear")
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        assert found == [n for n in linear if n != "lm_head"]


def test_an_output_projection_of_another_name_is_left_out_too(make_lm):
    model = make_lm()
    model.embed_out, model.lm_head = model.lm_head, nn.Identity()
    model.get_output_embeddings = lambda: model.embed_out
    assert "embed_out" not in names(model, target_modules="all-linear")


def test_part_of_a_name_is_no_match(make_lm):
    with pytest.raises(ValueError, match=r"target_modules: 'proj' matches no module"):
        names(make_lm(), target_modules=("proj",))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("target_modules", ("q_proj", "v_prj"), r"target_modules: 'v_prj' matches no module; did you mean 'v_proj'\?"),
        ("target_modules", "nothing.*", r"target_modules: 'nothing.\*' matches no module \(there are: model, "),
        (
            "target_modules",
            (".*q_proj",),
            r"'.\*q_proj' matches no module: a list contains names; write an expression as one",
        ),
        (
            "target_modules",
            "layers.*q_proj",
            r"matches no module; write '\.\*\\\\\.\(layers\.\*q_proj\)': it must match a wh",
        ),
        ("exclude_modules", ("qproj",), r"exclude_modules: 'qproj' matches no module; did you mean 'q_proj'\?"),
        ("modules_to_save", ("lm_hed",), r"modules_to_save: 'lm_hed' matches no module; did you mean 'lm_head'\?"),
        (
            "rank_pattern",
            {"up_proj": 4},
            r"rank_pattern: 'up_proj' matches no adapted module; .*\(there are: q_proj, v_proj\)",
        ),
        ("alpha_pattern", {"up_proj": 4}, r"alpha_pattern: 'up_proj' matches no"),
        (
            "target_parameters",
            ("experts.up",),
            r"target_parameters: 'experts.up' matches no module \(there are: none\)",
        ),
        ("target_modules", "q_proj(", r"'q_proj\(' is not a valid regular expression"),
        ("layers_to_transform", (7,), r"nothing is left after exclude_modules and layers_to_transform"),
    ],
)
def test_a_name_that_matches_nothing_is_refused_with_the_nearest_and_the_model_stays(field, value, message, make_lm):
    model = make_lm()
    with pytest.raises(ValueError, match=message):
        apply_lora_(model, LoRAConfig(**{field: value}))
    assert all(p.requires_grad for p in model.parameters())
    assert not tt_peft.adapter_names(model)


def test_quantize_skip_must_match_too(make_lm):
    model = make_lm()
    with pytest.raises(ValueError, match=r"quantize_skip: 'up_prj' matches no module; did you mean 'up_proj'"):
        names(model, quantize_base=True, quantize_skip=("up_prj",))
    assert not tt_peft.adapter_names(model)


def test_excluded_modules_and_other_layers_get_no_adapter(make_lm):
    assert names(make_lm(), target_modules="all-linear", exclude_modules=r".*mlp.*|.*[kov]_proj") == both(
        "self_attn.q_proj"
    )
    assert names(make_lm(), layers_to_transform=(1,)) == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]


def test_patterns_give_each_module_its_rank_and_alpha(make_lm):
    model = make_lm()
    apply_lora_(model, LoRAConfig(rank=4, alpha=8, rank_pattern={"v_proj": 2}, alpha_pattern={r"layers\.1\..*": 3}))
    found = {
        name.split("layers.")[1]: (m.adapters.default.spec.rank, m.adapters.default.spec.scaling)
        for name, m in model.named_modules()
        if isinstance(m, tt_peft.LoRALinear)
    }
    assert found == {
        "0.self_attn.q_proj": (4, 2.0),
        "0.self_attn.v_proj": (2, 4.0),
        "1.self_attn.q_proj": (4, 0.75),
        "1.self_attn.v_proj": (2, 1.5),
    }
    assert model.model.layers[0].self_attn.v_proj.adapters.default.lora_A.shape == (2, 32)


def test_a_layer_that_cannot_be_adapted_is_refused_by_its_kind(make_lm):
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = make_lm()
    model.odd = Odd(4, 4)
    for target, kind in (("odd", "Odd"), ("input_layernorm", "LayerNorm"), ("self_attn", "_Attention")):
        with pytest.raises(ValueError, match=f"is a {kind}: LoRA needs nn.Linear or nn.Embedding"):
            names(model, target_modules=(target,))

    class Scaled(nn.Embedding):
        def forward(self, input_ids):
            return super().forward(input_ids) * 4

    model.scaled = Scaled(4, 4)
    with pytest.raises(ValueError, match="scaled is a Scaled: LoRA needs nn.Linear or nn.Embedding"):
        names(model, target_modules=("scaled",))
    attention = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match="out_proj is a NonDynamicallyQuantizableLinear"):
        names(attention, target_modules=("out_proj",))


def test_a_subclass_that_computes_the_same_is_itself_again_after_merging():
    class Named(nn.Linear):
        pass

    model = nn.ModuleDict({"layer": Named(4, 4)})
    assert names(model, target_modules="all-linear") == ["layer"]
    tt_peft.merge_lora_(model)
    assert type(model["layer"]) is Named


def test_a_rank_above_the_layer_s_is_warned_about_with_the_cap(make_lm):
    with pytest.warns(
        UserWarning, match=r"q_proj: rank 999 is above min\(in, out\) = 32; rank 32 can express just as much"
    ):
        apply_lora_(make_lm(), LoRAConfig(rank=999))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_lora_(make_lm(), LoRAConfig(rank=32))


def test_a_plain_mlp_is_adapted_like_any_model():
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    assert names(mlp, target_modules="all-linear") == ["0", "2"]
    optimizer = torch.optim.Adam(tt_peft.adapter_parameters(mlp).values(), lr=0.05)
    x, y = torch.randn(64, 6), torch.randn(64, 3)
    losses = []
    for _ in range(30):
        loss = ((mlp(x) - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("field", ["target_modules", "rank_pattern", "alpha_pattern"])
def test_an_expression_that_is_none_is_refused(field, make_lm):
    value = {"q_proj(": 2} if field.endswith("pattern") else "q_proj("
    with pytest.raises(ValueError, match=r"'q_proj\(' is not a valid regular expression"):
        apply_lora_(make_lm(), LoRAConfig(**{field: value}))


WRAPPED = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "spectral_norm": nn.utils.spectral_norm,
    "prune": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("target", ["q_proj", "all-linear"])
def test_a_layer_whose_weight_is_computed_is_refused_by_name_and_the_model_stays(kind, target, make_lm, ids):
    model = make_lm()
    WRAPPED[kind](model.model.layers[1].self_attn.q_proj)
    expected = model(ids)
    message = r"layers\.1\.self_attn\.q_proj\.weight is computed by .*: an adapter needs a plain weight"
    with pytest.raises(ValueError, match=message):
        names(model, target_modules=target)
    if kind in ("spectral_norm", "prune"):  # the others are of a class of their own, which stays dense
        with pytest.raises(ValueError, match=message):
            tt_peft.quantize_nf4_(model)
    assert torch.equal(model(ids), expected)
    assert names(model, target_modules="all-linear", exclude_modules="model.layers.1.self_attn.q_proj")
    assert torch.equal(model(ids), expected)


def test_a_layer_whose_bias_is_computed_is_refused_by_name(make_lm):
    model = make_lm()
    model.model.layers[1].self_attn.q_proj.bias = nn.Parameter(torch.zeros(32))
    nn.utils.parametrize.register_parametrization(model.model.layers[1].self_attn.q_proj, "bias", nn.Tanh())
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.bias is computed by Tanh.*a plain bias"):
        names(model, target_modules="q_proj")


def test_a_layer_whose_weight_is_computed_can_be_trained_in_full(make_lm, ids):
    model = make_lm()
    nn.utils.parametrizations.weight_norm(model.lm_head)
    expected = model(ids)
    names(model, target_modules="q_proj", modules_to_save="lm_head")
    torch.testing.assert_close(model(ids), expected)
    model(ids).sum().backward()
    assert all(p.grad is not None for p in model.lm_head.adapters.parameters())


def test_the_output_projection_of_a_tied_model_is_answered_with_the_tie(make_lm):
    model = make_lm()
    model.lm_head = None
    model.config = type("Config", (), {"tie_word_embeddings": True})
    message = r"'lm_head' matches no module: the model ties its output projection to model.embed_tokens"
    for changes in ({"target_modules": ("q_proj", "lm_head")}, {"modules_to_save": ("lm_head",)}):
        with pytest.raises(ValueError, match=rf"{next(iter(changes))}: {message}"):
            names(model, **changes)


@pytest.mark.parametrize("changes", [{"target_modules": "embed_tokens"}, {"modules_to_save": "embed_tokens"}])
def test_half_of_a_tie_is_warned_about_before_training(changes, make_lm):
    model = make_lm()
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.warns(
        UserWarning, match=r"embed_tokens shares its weight with the output projection, .* cannot be merged"
    ):
        names(model, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names(make_lm(), **changes)
