"""Adapters of torchtune as PEFT folders: peft computes what torchtune's merged weights compute."""

import json

import pytest
import torch

import tt_ckpt
from tt_ckpt.formats.pickles import read_pickled

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SIZES = {
    "vocab_size": 65, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "Llama": {}, "Mistral": {}, "Gemma": {"head_dim": 16}, "Gemma2": {"head_dim": 16}, "Qwen2": {},
    "Phi3": {"pad_token_id": 0},
}  # fmt: skip
ATTENTION = {"attn.q_proj": "q_proj", "attn.k_proj": "k_proj", "attn.v_proj": "v_proj", "attn.output_proj": "o_proj"}
MLP = {"mlp.w1": "gate_proj", "mlp.w2": "down_proj", "mlp.w3": "up_proj"}
RANK, ALPHA = 3, 12.0


def base_of(name, path):
    torch.manual_seed(0)
    settings = getattr(transformers, f"{name}Config")(**{**SIZES, **FAMILIES[name]})
    model = getattr(transformers, f"{name}ForCausalLM")(settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(path / "hf")
    tt_ckpt.convert(path / "hf", path / "tune", "torchtune")


def adapter_of(path, layers, *, dora=False, output=False):
    """(a state dict as torchtune saves it, the weights with it merged), both under torchtune's names."""
    whole = dict(read_pickled(path / "tune" / "torchtune_model_0.pt", allow_pickle=True))
    generator = torch.Generator().manual_seed(1)
    state = {}
    names = [f"layers.{index}.{layer}" for index in range(2) for layer in layers] + ["output"] * output
    for name in names:
        weight = whole[f"{name}.weight"]
        a = torch.randn(RANK, weight.shape[1], generator=generator) * 0.3
        b = torch.randn(weight.shape[0], RANK, generator=generator) * 0.3
        state |= {f"{name}.lora_a.weight": a, f"{name}.lora_b.weight": b}
        merged = weight + ALPHA / RANK * b @ a
        if dora:
            magnitude = torch.rand(weight.shape[0], generator=generator) + 0.5
            state[f"{name}.magnitude"] = magnitude
            merged = magnitude[:, None] * merged / merged.norm(dim=1, keepdim=True)
        whole[f"{name}.weight"] = merged
    return state, whole


def logits_of_merged(path, whole):
    (path / "merged").mkdir()
    torch.save(whole, path / "merged" / "torchtune_model_0.pt")
    tt_ckpt.convert(path / "merged", path / "merged-hf", allow_pickle=True, config=path / "hf")
    return logits(transformers.AutoModelForCausalLM.from_pretrained(path / "merged-hf"))


@torch.no_grad()
def logits(model):
    return model.eval()(torch.arange(40).reshape(2, 20)).logits


def logits_of_peft(path, folder):
    base = transformers.AutoModelForCausalLM.from_pretrained(path / "hf")
    return logits(peft.PeftModel.from_pretrained(base, folder))


@pytest.mark.parametrize("layers", [[*ATTENTION, *MLP], ["attn.q_proj", "attn.v_proj"]], ids=["all", "q and v"])
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_computes_what_the_merged_weights_of_torchtune_compute(tmp_path, name, layers):
    base_of(name, tmp_path)
    state, whole = adapter_of(tmp_path, layers, output=name in ("Llama", "Mistral"))
    torch.save(state, tmp_path / "adapter_0.pt")
    tt_ckpt.convert_adapter(
        tmp_path / "adapter_0.pt", tmp_path / "peft", config=tmp_path / "hf", alpha=ALPHA, allow_pickle=True
    )
    expected = logits_of_merged(tmp_path, whole)
    torch.testing.assert_close(logits_of_peft(tmp_path, tmp_path / "peft"), expected, rtol=1e-4, atol=1e-4)
    base = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf"))
    assert (base - expected).abs().max() > 0.05  # the adapter does something


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Phi3"])
def test_dora_keeps_its_magnitudes_in_the_order_of_their_rows(tmp_path, name):
    base_of(name, tmp_path)
    state, whole = adapter_of(tmp_path, [*ATTENTION, *MLP], dora=True)
    torch.save(state, tmp_path / "adapter_0.pt")
    done = tt_ckpt.convert_adapter(tmp_path / "adapter_0.pt", tmp_path / "peft", config=tmp_path / "hf", alpha=ALPHA,
                                   allow_pickle=True)  # fmt: skip
    assert done.use_dora
    torch.testing.assert_close(
        logits_of_peft(tmp_path, tmp_path / "peft"), logits_of_merged(tmp_path, whole), rtol=1e-4, atol=1e-4
    )


@pytest.fixture
def llama(tmp_path):
    base_of("Llama", tmp_path)
    state, _ = adapter_of(tmp_path, ["attn.q_proj"])
    return tmp_path, state


def test_the_newest_epoch_is_taken_and_named(llama):
    path, state = llama
    out = path / "out"
    for epoch in (0, 2, 10):
        (out / f"epoch_{epoch}").mkdir(parents=True)
        torch.save({key: value + epoch for key, value in state.items()}, out / f"epoch_{epoch}" / "adapter_model.pt")
        settings = {"r": RANK, "lora_alpha": 12, "target_modules": ["q_proj"], "base_model_name_or_path": "org/base"}
        (out / f"epoch_{epoch}" / "adapter_config.json").write_text(json.dumps(settings))
    done = tt_ckpt.convert_adapter(out, path / "peft", config=path / "hf", allow_pickle=True)
    assert done.epochs == [0, 2, 10]
    assert done.source.endswith("epoch_10/adapter_model.pt")
    written = json.loads((path / "peft" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["target_modules"]) == (RANK, 12, ["q_proj"])
    older = tt_ckpt.convert_adapter(out / "epoch_2", path / "older", config=path / "hf", allow_pickle=True)
    assert (older.epochs, older.alpha) == ([], 12.0)


def test_the_form_of_0_1_needs_alpha_and_says_so(llama):
    path, state = llama
    for epoch in (0, 1):
        torch.save(state, path / "tune" / f"adapter_{epoch}.pt")
    with pytest.raises(ValueError, match=r"0\.1 does not store lora_alpha; give it, as in --alpha 16"):
        tt_ckpt.convert_adapter(path / "tune", path / "peft", config=path / "hf", allow_pickle=True)
    done = tt_ckpt.convert_adapter(path / "tune", path / "peft", alpha=16, allow_pickle=True)  # config.json is beside
    assert (done.epochs, done.alpha) == ([0, 1], 16.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers.0.attn.q_proj.lora_a.weight": None}, "lacks lora_a or lora_b"),
        ({"layers.0.attn.x_proj.lora_a.weight": torch.ones(3, 32)}, "unknown tensor"),
        ({"layers.0.attn.q_proj.weight": torch.ones(3, 32)}, "in a torchtune adapter"),
        ({"layers.0.attn.q_proj.lora_a.weight": torch.ones(2, 32)}, "do not fit each other"),
    ],
)
def test_a_file_that_is_not_a_whole_adapter_is_refused(llama, change, said):
    path, state = llama
    torch.save({k: v for k, v in (state | change).items() if v is not None}, path / "adapter_0.pt")
    with pytest.raises(ValueError, match=said):
        tt_ckpt.convert_adapter(path / "adapter_0.pt", path / "peft", config=path / "hf", alpha=16, allow_pickle=True)
    assert not (path / "peft").exists()


def test_a_pickle_is_read_only_if_allowed_and_runs_nothing(llama):
    path, state = llama
    torch.save(state, path / "adapter_0.pt")
    with pytest.raises(ValueError, match="--allow-pickle"):
        tt_ckpt.convert_adapter(path / "adapter_0.pt", path / "peft", config=path / "hf", alpha=16)
    torch.save({"x": print}, path / "adapter_0.pt")
    with pytest.raises(ValueError, match="refused"):
        tt_ckpt.convert_adapter(path / "adapter_0.pt", path / "peft", config=path / "hf", alpha=16, allow_pickle=True)
