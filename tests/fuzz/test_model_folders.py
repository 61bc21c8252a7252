"""What tt_ckpt reads of a model folder: configs, indexes, params, GGUF, pickles."""

import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tt_ckpt
from tt_ckpt.files import read_json
from tt_ckpt.formats.dcp import DistributedFolder
from tt_ckpt.formats.pickles import read_pickled
from tt_ckpt.formats.source import open_model
from tt_ckpt.hf.stored_tensors import open_tensors

CONFIG = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 1,
    "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "vocab_size": 10, "torch_dtype": "float32",
    "tie_word_embeddings": False, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "layer_types": ["full"],
}  # fmt: skip
LAYER = {
    "self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8), "self_attn.o_proj": (8, 8),
    "mlp.gate_proj": (12, 8), "mlp.up_proj": (12, 8), "mlp.down_proj": (8, 12), "input_layernorm": (8,),
    "post_attention_layernorm": (8,),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    shapes = {"lm_head": (10, 8), "model.embed_tokens": (10, 8), "model.norm": (8,)}
    shapes |= {f"model.layers.0.{name}": shape for name, shape in LAYER.items()}
    path = tmp_path / "model"
    path.mkdir()
    save_file({f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({**CONFIG, "rope_scaling": None, "layer_types": None}))
    return path


def as_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def test_any_bytes_are_json_or_one_of_our_errors(tmp_path: Path, fuzz: Any) -> None:
    file = tmp_path / "config.json"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        read_json(file)

    fuzz(read, fuzz.mutated(json.dumps(CONFIG).encode(), json.dumps(CONFIG, indent=1).encode()))


@pytest.mark.parametrize("to", ["hf", "meta", "torchtune"])
def test_any_config_is_converted_or_refused(folder: Path, tmp_path: Path, fuzz: Any, to: Any) -> None:
    def convert(config: Any) -> None:
        as_json(folder / "config.json", config)
        tt_ckpt.read_config(folder)
        tt_ckpt.convert(folder, tmp_path / "out", to, overwrite=True)

    fuzz(convert, fuzz.mutated_json(CONFIG))


def test_any_params_are_converted_or_refused(folder: Path, tmp_path: Path, fuzz: Any) -> None:
    as_json(folder / "config.json", {**CONFIG, "rope_scaling": None, "layer_types": None})
    tt_ckpt.convert(folder, tmp_path / "meta", "meta")
    (tmp_path / "meta" / "config.json").unlink()
    params = json.loads((tmp_path / "meta" / "params.json").read_text()) | {"use_scaled_rope": True}

    def convert(value: Any) -> None:
        as_json(tmp_path / "meta" / "params.json", value)
        tt_ckpt.convert(tmp_path / "meta", tmp_path / "out", allow_pickle=True, overwrite=True)

    fuzz(convert, fuzz.mutated_json(params))


def test_any_index_is_read_or_refused(folder: Path, tmp_path: Path, fuzz: Any) -> None:
    tt_ckpt.convert(folder, tmp_path / "sharded", max_shard_size="1KB")
    path = tmp_path / "sharded" / "model.safetensors.index.json"
    whole = path.read_bytes()

    def read(value: Any) -> None:
        path.write_bytes(value) if isinstance(value, bytes) else as_json(path, value)
        open_tensors(tmp_path / "sharded")

    fuzz(read, fuzz.mutated_json(json.loads(whole)) | fuzz.mutated(whole))


def test_any_weights_are_opened_or_refused(folder: Path, fuzz: Any) -> None:
    file = folder / "model.safetensors"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        weights = open_model(folder)
        for name in weights.specs:
            weights.get(name)

    fuzz(read, fuzz.mutated(file.read_bytes()))


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf_file() -> bytes:
    """A llama of one block, with a tokenizer."""
    whole = {
        "block_count": 1, "context_length": 64, "embedding_length": 8, "feed_forward_length": 12,
        "attention.head_count": 2, "attention.head_count_kv": 1,
    }  # fmt: skip
    values = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    values += [text(f"llama.{key}") + struct.pack("<II", 4, value) for key, value in whole.items()]
    values.append(text("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-5))
    tokens = ["a", "b", "ab", "<s>", "</s>", "c", "d", "e", "f", "g"]
    values.append(text("tokenizer.ggml.model") + struct.pack("<I", 8) + text("gpt2"))
    values.append(text("tokenizer.ggml.pre") + struct.pack("<I", 8) + text("llama-bpe"))
    values.append(text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 10) + b"".join(map(text, tokens)))
    values.append(text("tokenizer.ggml.merges") + struct.pack("<IIQ", 9, 8, 1) + text("a b"))
    values.append(text("tokenizer.ggml.eos_token_id") + struct.pack("<II", 4, 4))
    values.append(text("tokenizer.chat_template") + struct.pack("<I", 8) + text("{{ messages }}"))
    names = {
        "attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8), "ffn_gate": (12, 8),
        "ffn_up": (12, 8), "ffn_down": (8, 12), "attn_norm": (8,), "ffn_norm": (8,),
    }  # fmt: skip
    tensors = {f"blk.0.{name}.weight": shape for name, shape in names.items()}
    tensors |= {"token_embd.weight": (10, 8), "output_norm.weight": (8,), "output.weight": (10, 8)}
    infos, data = b"", b""
    for name, shape in tensors.items():
        infos += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        infos += struct.pack("<IQ", 0, len(data))
        data += bytes(torch.ones(shape).numpy())
        data += bytes(-len(data) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values)) + b"".join(values) + infos
    return head + bytes(-len(head) % 32) + data


def test_any_gguf_file_is_converted_or_refused(tmp_path: Path, fuzz: Any) -> None:
    pytest.importorskip("gguf")
    file = tmp_path / "m.gguf"

    def convert(data: bytes) -> None:
        file.write_bytes(data)
        tt_ckpt.convert(file, tmp_path / "out", overwrite=True)

    convert(gguf_file())
    fuzz(convert, fuzz.mutated(gguf_file()))


# ---- pickles ---------------------------------------------------------------------------------------------------------


def pth_file() -> bytes:
    out = io.BytesIO()
    torch.save({"a": torch.ones(2, 3), "b": torch.nn.Parameter(torch.ones(2).bfloat16()), "c": torch.arange(3)}, out)
    return out.getvalue()


def test_any_archive_is_tensors_or_one_of_our_errors(tmp_path: Path, fuzz: Any) -> None:
    file = tmp_path / "f.pth"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        read_pickled(file, allow_pickle=True)

    read(pth_file())
    fuzz(read, fuzz.mutated(pth_file()))


def test_any_pickle_in_an_archive_is_tensors_or_one_of_our_errors(tmp_path: Path, fuzz: Any) -> None:
    file = tmp_path / "f.pth"
    with zipfile.ZipFile(io.BytesIO(pth_file())) as archive:
        held = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    (name,) = (one for one in held if one.endswith("data.pkl"))

    def read(data: bytes) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            for one, content in held.items():
                archive.writestr(one, data if one == name else content)
        read_pickled(file, allow_pickle=True)

    read(held[name])
    fuzz(read, fuzz.mutated(held[name]))


def test_any_metadata_of_dcp_is_read_or_refused(tmp_path: Path, fuzz: Any) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"a": torch.ones(2, 3), "b": {"c": torch.ones(2)}, "d": 1}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    whole = (tmp_path / "dcp" / ".metadata").read_bytes()

    def read(data: bytes) -> None:
        (tmp_path / "dcp" / ".metadata").write_bytes(data)
        dict(DistributedFolder(tmp_path / "dcp"))

    read(whole)
    fuzz(read, fuzz.mutated(whole))
