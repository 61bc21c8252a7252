"""Against torchtune itself, where it is installed (0.6.1 with torchao 0.15): both ways, for every family it has."""

import pytest
import torch
from safetensors.torch import load_file

import tt_ckpt

transformers = pytest.importorskip("transformers")
training = pytest.importorskip("torchtune.training")

SIZES = {
    "vocab_size": 65, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "Llama": ("LLAMA2", {}),
    "Llama tied": ("LLAMA3_2", {"tie_word_embeddings": True}),
    "Mistral": ("MISTRAL", {}),
    "Gemma": ("GEMMA", {"head_dim": 16}),
    "Gemma2": ("GEMMA2", {"head_dim": 16}),
    "Qwen2": ("QWEN2", {}),
    "Phi3": ("PHI3_MINI", {"num_key_value_heads": 4, "pad_token_id": 0}),
}


@pytest.fixture(params=FAMILIES)
def case(request, tmp_path):
    model_type, more = FAMILIES[request.param]
    name = request.param.split()[0]
    torch.manual_seed(0)
    settings = getattr(transformers, f"{name}Config")(**{**SIZES, **more})
    model = getattr(transformers, f"{name}ForCausalLM")(settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(tmp_path / "hf")
    return model_type, tmp_path


def load_theirs(kind, directory, files, model_type, output):
    checkpointer = getattr(training, kind)(
        checkpoint_dir=str(directory), checkpoint_files=files, model_type=model_type, output_dir=str(output)
    )
    return checkpointer, checkpointer.load_checkpoint()["model"]


def test_their_reading_of_the_hf_directory_is_what_we_write(case):
    model_type, path = case
    _, theirs = load_theirs("FullModelHFCheckpointer", path / "hf", ["model.safetensors"], model_type, path / "out")
    tt_ckpt.convert(path / "hf", path / "ours", "torchtune")
    _, ours = load_theirs(
        "FullModelTorchTuneCheckpointer", path / "ours", ["torchtune_model_0.pt"], model_type, path / "out"
    )
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_what_they_save_comes_back(case):
    model_type, path = case
    tt_ckpt.convert(path / "hf", path / "ours", "torchtune")
    checkpointer, model = load_theirs(
        "FullModelTorchTuneCheckpointer", path / "ours", ["torchtune_model_0.pt"], model_type, path / "out"
    )
    checkpointer.save_checkpoint({"model": model}, epoch=0)
    tt_ckpt.convert(path / "out", path / "back", "hf", allow_pickle=True, config=path / "hf")
    before, after = (load_file(path / name / "model.safetensors") for name in ("hf", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
