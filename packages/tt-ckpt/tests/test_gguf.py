"""GGUF files: the model and tokenizer that transformers reads from them, or that they were made from."""

import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tt_ckpt

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

# ---- files as llama.cpp's converter writes them; names come from the gguf package's own table

Kind = gguf.GGMLQuantizationType


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """q and k rows as files of architecture llama have them: each head's pairs side by side."""
    half = rows.shape[0] // heads // 2
    order = [head * 2 * half + part * half + i for head in range(heads) for i in range(half) for part in (0, 1)]
    return rows[order]


def raw_blocks(kind, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random blocks of a kind that the package decodes but does not make, with finite scales."""
    _, width = gguf.GGML_QUANT_SIZES[kind]
    size = gguf.quant_shape_to_byte_shape(shape, kind)
    blocks = np.random.default_rng(seed).integers(0, 256, (int(np.prod(size)) // width, width), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.01).tobytes(), dtype=np.uint8)
    places = {"Q6_K": [208], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q2_K": [80, 82], "Q3_K": [108], "IQ4_NL": [0]}[kind.name]
    for place in places:
        blocks[:, place : place + 2] = scale
    return blocks.reshape(size)


def add_tensors(writer, state: dict[str, torch.Tensor], arch: str, config, kinds: dict[str, str]) -> None:
    """``kinds``: part of a GGUF name -> quantization; every other matrix is F32."""
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    table = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for key, tensor in stacked(state).items():
        name = table.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, key
        if arch.startswith("gemma") and key.endswith("norm.weight"):
            tensor = tensor + 1
        if arch in ("llama", "smollm3") and ".q_proj." in key:
            tensor = interleave(tensor, config.num_attention_heads)
        if arch in ("llama", "smollm3") and ".k_proj." in key:
            tensor = interleave(tensor, config.num_key_value_heads)
        add(writer, name, tensor, next((kind for part, kind in kinds.items() if part in name), "F32"))


def add(writer, name: str, tensor: torch.Tensor, kind: str) -> None:
    array = tensor.detach().float().contiguous().numpy()
    if kind == "F32" or array.ndim == 1:
        writer.add_tensor(name, array)
    elif kind == "F16":
        writer.add_tensor(name, array.astype(np.float16))
    elif kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16"):
        writer.add_tensor(name, gguf.quantize(array, Kind[kind]), raw_dtype=Kind[kind])
    else:
        writer.add_tensor(name, raw_blocks(Kind[kind], array.shape), raw_dtype=Kind[kind])


def stacked(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts of a layer in one tensor, as files have them; transformers' fused gate_up apart."""
    found = {}
    for key, tensor in state.items():
        if key.endswith("experts.gate_up_proj"):
            base = key.removesuffix("gate_up_proj")
            found[base + "gate_proj.weight"], found[base + "up_proj.weight"] = tensor.chunk(2, 1)
        elif key.endswith("experts.down_proj"):
            found[key + ".weight"] = tensor
        else:
            found[key] = tensor
    return found


def write_gguf(path: Path, model, arch: str, *, kinds: dict[str, str] | None = None, extra=None, tokens=None) -> Path:
    """``model``: a transformers model. ``extra(writer)`` adds keys. ``tokens(writer)`` adds a vocabulary."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if extra:
        extra(writer)
    if tokens:
        tokens(writer)
    state = dict(model.state_dict())
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    add_tensors(writer, state, arch, config, kinds or {})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---- models

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}


def small(config) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits(model, length: int = 40) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(torch.randint(3, 96, (2, length))).logits


def llama3_factors(writer) -> None:
    """rope_freqs.weight as llama.cpp's converter computes it."""
    inverse = 500000.0 ** (-torch.arange(0, 16, 2) / 16)
    wavelength = 2 * torch.pi / inverse
    smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
    between = 1 / ((1 - smooth) / 8.0 + smooth)
    factors = torch.where(wavelength < 64 / 4.0, 1.0, torch.where(wavelength > 64 / 1.0, 8.0, between))
    writer.add_tensor("rope_freqs.weight", factors.numpy())


def experts(used: int, count: int, width: int | None = None):
    def extra(writer) -> None:
        writer.add_expert_count(count)
        writer.add_expert_used_count(used)
        if width:
            writer.add_expert_feed_forward_length(width)

    return extra


def neutral(writer) -> None:
    """Keys that say what is computed anyway, and those of how the file was made."""
    writer.add_causal_attention(True)
    writer.add_string("llama.tensor_data_layout", "Meta AI original pth")
    writer.add_rope_scaling_finetuned(False)
    writer.add_string("general.name", "small")
    writer.add_array("general.tags", ["a", "b"])
    writer.add_bool("quantize.imatrix.used", True)


def linear_rope(writer) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def yarn_rope(writer) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(64)


def gemma2_keys(writer) -> None:
    writer.add_sliding_window(16)
    writer.add_attn_logit_softcapping(20.0)
    writer.add_final_logit_softcapping(10.0)


def gemma3_keys(writer) -> None:
    writer.add_sliding_window(16)
    linear_rope(writer)


LONG, SHORT = [2.0 + i for i in range(8)], [1.0 + i / 8 for i in range(8)]


def longrope(writer) -> None:
    writer.add_rope_scaling_orig_ctx_len(32)
    writer.add_rope_scaling_attn_factors((1 + math.log(256 / 32) / math.log(32)) ** 0.5)
    writer.add_tensor("rope_factors_long.weight", np.float32(LONG))
    writer.add_tensor("rope_factors_short.weight", np.float32(SHORT))


GEMMA = {**SIZES, "head_dim": 32, "query_pre_attn_scalar": 32}
T = transformers
CASES = {
    "llama": ("llama", T.LlamaConfig(**SIZES, rope_theta=5e4), neutral),
    "llama tied, wide heads": ("llama", T.LlamaConfig(**SIZES, head_dim=32, tie_word_embeddings=True), None),
    "llama with biases": ("llama", T.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True), None),
    "llama 3.1": ("llama", T.LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE), llama3_factors),
    "llama linear": (
        "llama",
        T.LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
        linear_rope,
    ),
    "mistral": ("llama", T.MistralConfig(**SIZES, sliding_window=16), lambda writer: writer.add_sliding_window(16)),
    "mixtral": ("llama", T.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2), experts(2, 4)),
    "qwen2": ("qwen2", T.Qwen2Config(**SIZES, rope_theta=1e6), None),
    "qwen3": ("qwen3", T.Qwen3Config(**SIZES, head_dim=32, rope_theta=1e6), None),
    "qwen3 yarn": (
        "qwen3",
        T.Qwen3Config(
            **SIZES,
            head_dim=32,
            rope_parameters={
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 1e6,
            },
        ),
        yarn_rope,
    ),
    "qwen3 moe": (
        "qwen3moe",
        T.Qwen3MoeConfig(
            **SIZES, head_dim=32, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True
        ),
        experts(2, 4, 32),
    ),
    "gemma": ("gemma", T.GemmaConfig(**SIZES, head_dim=32), None),
    "gemma 2": (
        "gemma2",
        T.Gemma2Config(**GEMMA, sliding_window=16, attn_logit_softcapping=20.0, final_logit_softcapping=10.0),
        gemma2_keys,
    ),
    "gemma 3": (
        "gemma3",
        T.Gemma3TextConfig(
            **{**GEMMA, "num_hidden_layers": 7},
            sliding_window=16,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
        gemma3_keys,
    ),
    "phi 3": ("phi3", T.Phi3Config(**SIZES, sliding_window=16), lambda writer: writer.add_sliding_window(16)),
    "phi 3 long": (
        "phi3",
        T.Phi3Config(
            **SIZES,
            original_max_position_embeddings=32,
            rope_parameters={
                "rope_type": "longrope",
                "long_factor": LONG,
                "short_factor": SHORT,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 32,
            },
        ),
        longrope,
    ),
    "phi 4 mini": (
        "phi3",
        T.Phi3Config(**SIZES, partial_rotary_factor=0.75, tie_word_embeddings=True),
        lambda writer: writer.add_rope_dimension_count(12),
    ),
    "olmo 2": ("olmo2", T.Olmo2Config(**SIZES), None),
    "smollm 3": ("smollm3", T.SmolLM3Config(**{**SIZES, "num_hidden_layers": 4}, no_rope_layer_interval=4), None),
}


@pytest.mark.parametrize("case", CASES)
def test_a_converted_file_computes_what_the_model_does_that_it_was_made_from(tmp_path, case):
    arch, config, extra = CASES[case]
    model = small(config)
    file = write_gguf(tmp_path / "model.gguf", model, arch, extra=extra)
    report = tt_ckpt.convert(file, tmp_path / "hf")
    assert (report.source_format, report.to, report.verified, report.dtypes) == ("gguf", "hf", True, ["float32"])
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ours, theirs = again.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    for name in theirs:
        tight = 0.0 if "norm" not in name else 2**-22  # Gemma's norms went through w + 1
        torch.testing.assert_close(ours[name], theirs[name], rtol=0.0, atol=tight)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


def as_transformers_reads(file: Path) -> torch.nn.Module:
    settings = transformers.GgufConfig(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=settings, dtype=torch.float32
    ).eval()


QUANTIZED = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q6_K", "Q4_K", "Q5_K", "Q2_K", "Q3_K", "IQ4_NL"]


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights_and_logits_are_those_that_transformers_reads(tmp_path, kind):
    sizes = {**SIZES, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    model = small(T.LlamaConfig(**sizes))
    kinds = {"attn": kind, "ffn": kind, "token_embd": "Q8_0" if "_" in kind else kind}
    file = write_gguf(tmp_path / "model.gguf", model, "llama", kinds=kinds)
    report = tt_ckpt.convert(file, tmp_path / "hf", "hf")
    theirs = as_transformers_reads(file)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    for name, tensor in theirs.state_dict().items():
        ties = "norm" in name and kind in ("F16", "BF16")  # the norms of a half-precision file are rounded to it
        expected = tensor.to(getattr(torch, report.dtypes[0])).float() if ties or "lm_head" in name else tensor
        assert torch.equal(ours.state_dict()[name], expected), name
    assert report.dtypes == [{"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")]
    if report.dtypes == ["float32"]:
        assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("case", ["mistral", "qwen2", "qwen3", "gemma 2", "gemma 3"])
def test_quantized_weights_of_a_family_are_those_that_transformers_reads(tmp_path, case):
    """(Head sizes of Qwen 3 and sizes of experts it takes from its own defaults: those are compared with the model.)"""
    arch, config, extra = CASES[case]
    if case == "qwen3":
        config = T.Qwen3Config(**SIZES, head_dim=128)
    kinds = {"attn": "Q8_0", "ffn": "Q4_0", "token_embd": "Q8_0"}
    file = write_gguf(tmp_path / "model.gguf", small(config), arch, extra=extra, kinds=kinds)
    tt_ckpt.convert(file, tmp_path / "hf")
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).state_dict()
    theirs = as_transformers_reads(file).state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_quantized_file_is_rounded_once_to_the_dtype_that_is_asked_for(tmp_path):
    file = write_gguf(tmp_path / "model.gguf", small(T.Qwen2Config(**SIZES)), "qwen2", kinds={"ffn": "Q8_0"})
    tt_ckpt.convert(file, tmp_path / "exact")
    report = tt_ckpt.convert(file, tmp_path / "half", dtype=torch.bfloat16)
    assert report.dtypes == ["bfloat16"]
    assert tt_ckpt.read_config(tmp_path / "half")["torch_dtype"] == "bfloat16"
    exact, half = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto").state_dict()
        for name in ("exact", "half")
    )
    assert all(torch.equal(half[name], exact[name].bfloat16()) for name in exact)


def test_a_split_model_is_read_from_all_of_its_parts(tmp_path):
    model = small(T.LlamaConfig(**SIZES))
    whole = write_gguf(tmp_path / "whole.gguf", model, "llama")
    (tmp_path / "parts").mkdir()
    reader = gguf.GGUFReader(whole)
    for i, half in enumerate((reader.tensors[::2], reader.tensors[1::2])):
        writer = gguf.GGUFWriter(tmp_path / "parts" / f"m-{i + 1:05d}-of-00002.gguf", "llama")
        if i == 0:
            for key, found in reader.fields.items():
                if key.startswith("llama.") and found.types:
                    writer.add_key_value(key, found.contents(), found.types[0])
        writer.add_uint16("split.count", 2)
        for tensor in half:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    tt_ckpt.convert(whole, tmp_path / "one")
    tt_ckpt.convert(tmp_path / "parts", tmp_path / "two")  # a directory with one model in it
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"give the first part, NAME-00001-of-N\.gguf"):
        tt_ckpt.convert(tmp_path / "parts/m-00002-of-00002.gguf", tmp_path / "three")
    (tmp_path / "parts/m-00002-of-00002.gguf").unlink()
    with pytest.raises(FileNotFoundError, match="is the first of 2 parts"):
        tt_ckpt.convert(tmp_path / "parts", tmp_path / "three")


# ---- what is refused


def one_line(error: BaseException) -> bool:
    return "\n" not in str(error)


def test_what_no_config_can_say_is_refused_by_name(tmp_path):
    model = small(T.LlamaConfig(**SIZES))
    for i, (extra, words) in enumerate(
        [
            (lambda w: w.add_uint32("llama.rope.scaling.yarn_log_multiplierr", 1), "is not known here"),
            (lambda w: w.add_rope_dimension_count(8), "rope.dimension_count 8 is not converted: a head has 16"),
            (lambda w: w.add_tensor("blk.0.attn_q_norm.weight", np.ones(16, np.float32)), "has no place in a llama"),
            (lambda w: w.add_tensor("blk.3.attn_norm.weight", np.ones(64, np.float32)), "block 3 is not like"),
            (
                lambda w: w.add_tensor("rope_freqs.weight", np.float32([1, 3] * 4)),
                "rope_freqs.weight does not follow Llama",
            ),
            (lambda w: w.add_token_list([f"t{i}" for i in range(97)]), "97 tokens, but token_embd.weight has 96"),
            (lambda w: w.add_causal_attention(False), "attention.causal False is not converted"),
            (lambda w: w.add_string("general.type", "adapter"), "of type 'adapter', not a model"),
        ]
    ):
        file = write_gguf(tmp_path / f"{i}.gguf", model, "llama", extra=extra)
        with pytest.raises(ValueError, match=words) as caught:
            tt_ckpt.convert(file, tmp_path / "hf")
        assert one_line(caught.value)
        assert not (tmp_path / "hf").exists()


def test_an_unknown_architecture_is_named_with_the_nearest(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2moe")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="architecture 'qwen2moe' is not converted; the nearest is qwen3moe; known: "):
        tt_ckpt.convert(tmp_path / "model.gguf", tmp_path / "hf")


def test_a_damaged_file_is_an_error_of_one_line_wherever_it_is_cut_or_flipped(tmp_path):
    whole = write_gguf(tmp_path / "model.gguf", small(T.LlamaConfig(**{**SIZES, "num_hidden_layers": 1})), "llama")
    raw = whole.read_bytes()
    header = raw.index(b"blk.0.ffn_down") + 100
    draw = np.random.default_rng(0)
    damaged = [raw[:size] for size in (0, 3, 4, 23, 24, 100, *draw.integers(0, header, 60), len(raw) - 1)]
    for place in draw.integers(0, header, 300):
        damaged.append(raw[:place] + bytes([raw[place] ^ (1 << draw.integers(8))]) + raw[place + 1 :])
    for size in (2**63, 2**40, 2**24):  # counts of tensors and of keys
        damaged += [raw[:at] + size.to_bytes(8, "little") + raw[at + 8 :] for at in (8, 16)]
    refused = []
    for i, data in enumerate(damaged):
        file = tmp_path / f"bad-{i}.gguf"
        file.write_bytes(data)
        try:
            tt_ckpt.convert(file, tmp_path / "hf", dry_run=True)
        except (ValueError, FileNotFoundError) as error:
            refused.append((str(file), error))
        file.unlink()
    assert len(refused) > 200
    assert all(file in str(error) and one_line(error) for file, error in refused)


def test_a_pipe_a_link_to_nothing_and_a_wrong_name_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "nothing")
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="neither a directory nor a regular file"):
        tt_ckpt.convert(tmp_path / "pipe.gguf", tmp_path / "hf")
    for name in ("link.gguf", "modle.gguf"):
        with pytest.raises(FileNotFoundError, match=r"no such file; did you mean .*model\.gguf"):
            tt_ckpt.convert(tmp_path / name, tmp_path / "hf")
    with pytest.raises(ValueError, match=r"0 bytes; download it again"):
        tt_ckpt.convert(tmp_path / "model.gguf", tmp_path / "hf")
    with pytest.raises(ValueError, match=r"run: tt convert .*model\.gguf DIR"):
        tt_ckpt.load_weights(torch.nn.Linear(1, 1), tmp_path / "model.gguf")
    with pytest.raises(FileNotFoundError, match=r"weights only as GGUF; run: tt convert .*gguf DEST"):
        tt_ckpt.load_weights(torch.nn.Linear(1, 1), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"a GGUF file: run tt convert"):
        tt_ckpt.read_config(tmp_path)


def test_without_the_gguf_package_the_error_names_it(tmp_path, monkeypatch):
    from tt_ckpt.formats.gguf.blocks import quant_sizes

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    quant_sizes.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="run: pip install gguf"):
        tt_ckpt.convert(tmp_path / "model.gguf", tmp_path / "hf")


def test_several_models_in_a_directory_are_named(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"several GGUF models \(a.gguf, b.gguf\); give one"):
        tt_ckpt.convert(tmp_path, tmp_path / "hf")


def test_memory_follows_the_largest_tensor_and_not_the_file(tmp_path):
    from tt_ckpt.formats.gguf import file as gguf_file

    tensor = gguf_file.GGUFTensor(
        file=tmp_path / "rows", start=0, kind="Q8_0", shape=(40_000, 1024), row_bytes=1024 // 32 * 34
    )
    rows = gguf.quantize(np.random.default_rng(0).standard_normal((40_000, 1024), dtype=np.float32), Kind.Q8_0)
    rows.tofile(tmp_path / "rows")
    largest = []
    decode = gguf_file.decode

    def watched(raw, kind):
        largest.append(raw.nbytes)
        return decode(raw, kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_file, "decode", watched)
        found = gguf_file.read_rows(tensor, 39_000, 1000, torch.bfloat16)
        gguf_file.read_rows(tensor, 0, 40_000, torch.bfloat16)
    assert torch.equal(found, torch.from_numpy(gguf.dequantize(rows[39_000:], Kind.Q8_0)).bfloat16())
    assert max(largest) < 2**23
