"""Writing GGUF files: the tokenizer, what is refused by name, and that a file is whole or absent."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tt_ckpt.formats.gguf.blocks import is_within
from tt_ckpt.formats.gguf.plan import plan_adapter, plan_model, read_back_tokenizer
from tt_ckpt.formats.gguf.splits import SPLITS
from tt_ckpt.formats.gguf.writer import write_gguf
from tt_ckpt.hf.weights import Weights, in_pieces
from tt_ckpt.safetensors_file import spec_of

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
source = importlib.util.spec_from_file_location("gguf_tokenizers", Path(__file__).with_name("test_gguf_tokenizer.py"))
assert source is not None
assert source.loader is not None
made = importlib.util.module_from_spec(source)
source.loader.exec_module(made)
CONTROL, USER = made.CONTROL, made.USER

CONFIG = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 1e4, "rope_scaling": None, "tie_word_embeddings": True, "hidden_act": "silu", "vocab_size": 720,
}  # fmt: skip
ROWS = 720


def weights(config=None, **changes) -> Weights:
    torch.manual_seed(0)
    shapes = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32)}
    tensors = {f"self_attn.{name}_proj.weight": torch.randn(shape) for name, shape in shapes.items()}
    tensors |= {f"mlp.{name}_proj.weight": torch.randn(32, 32) for name in ("gate", "up", "down")}
    tensors |= {f"{name}_layernorm.weight": torch.randn(32) for name in ("input", "post_attention")}
    tensors = {f"model.layers.0.{name}": tensor for name, tensor in tensors.items()}
    tensors |= {"model.embed_tokens.weight": torch.randn(ROWS, 32), "model.norm.weight": torch.randn(32)}
    tensors |= changes
    specs = {name: spec_of(tensor) for name, tensor in tensors.items()}
    return Weights(
        specs=specs, get=tensors.__getitem__, pieces=lambda name: in_pieces(tensors[name]), config=config or CONFIG,
        format="hf", files=(),
    )  # fmt: skip


def split_as(name):
    parts = tokenizers.pre_tokenizers
    regex = tokenizers.Regex(SPLITS[name][0])
    bytes_only = parts.ByteLevel(add_prefix_space=False, use_regex=False)
    return lambda: parts.Sequence([parts.Split(regex, "isolated"), bytes_only])


def save(folder, own, **settings) -> None:
    folder.mkdir(exist_ok=True)
    own.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": CONTROL[1], **settings}))


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "hf", made.byte_level(made.as_gpt2())[3])
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("pre", "split", "composed", "whole"),
    [
        ("smollm", made.digits_apart, False, False),
        ("gpt-2", made.as_gpt2, False, False),
        ("llama-bpe", split_as("llama-bpe"), False, True),
        ("dbrx", split_as("llama-bpe"), False, False),
        ("qwen2", split_as("qwen2"), True, False),
        ("stablelm2", split_as("qwen2"), False, False),
        ("tekken", split_as("tekken"), False, True),
    ],
)
def test_a_byte_level_tokenizer_gets_its_name_and_comes_back_with_the_same_ids(tmp_path, pre, split, composed, whole):
    own = made.byte_level(split())[3]
    own.model.ignore_merges = whole
    if composed:
        own.normalizer = tokenizers.normalizers.NFC()
    save(tmp_path, own)
    plan = plan_model(weights(), tmp_path)
    assert plan.values["tokenizer.ggml.pre"] == pre
    assert any("NFC" in note for note in plan.notes) == composed
    again = tokenizers.Tokenizer.from_str(read_back_tokenizer(plan, CONFIG)["tokenizer.json"])
    for text in made.texts():
        assert again.encode(text).ids == own.encode(text).ids
    types = dict(zip(plan.values["tokenizer.ggml.tokens"], plan.values["tokenizer.ggml.token_type"], strict=True))
    assert (types[CONTROL[0]], types[USER[0]], types[f"[PAD{ROWS - 1}]"]) == (3, 4, 5)


def test_pieces_get_scores_in_the_order_of_their_merges(tmp_path):
    body = json.loads(made.byte_level(made.as_gpt2())[3].to_str())
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "a", "b", "\u2581a", "ab", "\u2581ab"]
    body["added_tokens"] = []
    body["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    body["pre_tokenizer"] = None
    body["model"] |= {
        "byte_fallback": True,
        "unk_token": "<unk>",
        "vocab": {piece: i for i, piece in enumerate(pieces)},
    }
    body["model"]["merges"] = [["a", "b"], ["\u2581", "a"], ["\u2581", "ab"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    values = plan_model(weights(), tmp_path).values
    scores = dict(zip(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.scores"], strict=True))
    assert scores["ab"] > scores["\u2581a"] > scores["\u2581ab"] > scores["a"]
    assert (values["tokenizer.ggml.model"], values["tokenizer.ggml.add_space_prefix"]) == ("llama", False)
    assert values["tokenizer.ggml.token_type"][5] == 6


def test_every_end_token_the_template_and_the_first_token_are_in_the_file(folder, tmp_path):
    own = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    start, end = own.token_to_id(CONTROL[0]), own.token_to_id(CONTROL[1])
    settings = {"bos_token": CONTROL[0], "pad_token": CONTROL[1], "add_bos_token": True}
    save(folder, own, **settings)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, end, 9]}))
    (folder / "chat_template.jinja").write_text(made.TEMPLATE)
    write_gguf(plan_model(weights(), folder), tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    found = {key.removeprefix("tokenizer.ggml."): field.contents() for key, field in fields.items()}
    ids = [found[f"{name}_token_id"] for name in ("bos", "eos", "eot", "eom", "padding")]
    assert ids == [start, end, 7, 9, end]
    assert (found["add_bos_token"], found["add_eos_token"]) == (True, False)
    assert found["tokenizer.chat_template"] == made.TEMPLATE
    again = json.loads(read_back_tokenizer(plan_model(weights(), folder), CONFIG)["generation_config.json"])
    assert again["eos_token_id"] == [end, 7, 9]


def changed(folder, change) -> None:
    body = json.loads((folder / "tokenizer.json").read_text())
    change(body)
    (folder / "tokenizer.json").write_text(json.dumps(body))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda body: body["model"].update(type="Unigram"), "model of type 'Unigram'"),
        (lambda body: body.update(normalizer={"type": "Lowercase"}), "no name for how this tokenizer splits text"),
        (lambda body: body["pre_tokenizer"].update(add_prefix_space=True), "no name for how"),
        (lambda body: body["model"].update(byte_fallback=True), "cannot prepare text as this tokenizer does"),
        (lambda body: body["model"]["vocab"].update(more=ROWS), f"the model has {ROWS} embeddings"),
        (lambda body: body["model"].update(dropout=0.1), "dropout"),
    ],
)
def test_a_tokenizer_that_llama_cpp_cannot_follow_is_refused(folder, change, words):
    changed(folder, change)
    with pytest.raises(ValueError, match=words):
        plan_model(weights(), folder)


def test_a_model_is_called_phi_3_only_if_its_tokenizer_strips_as_llama_cpp_does_by_that_name(folder):
    def name(given):
        return plan_model(weights(), folder, values={"general.name": given}).values["general.name"]

    assert name("my-Phi3-run") == "my-phi 3-run"  # llama.cpp would look for tokens of Phi 3, and fail
    flags = {"single_word": False, "lstrip": False, "normalized": False, "special": True}

    def strips(body):
        words = ["<unk>", "<s>", "<|endoftext|>", "<|user|>"]
        body["added_tokens"] = [
            {"id": 700 + i, "content": word, "rstrip": i == 3, **flags} for i, word in enumerate(words)
        ]

    changed(folder, strips)
    assert name("my-run") == "my-run (phi-3)"


def test_without_a_tokenizer_the_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        plan_model(weights(), tmp_path)


def test_a_file_is_whole_or_absent(folder, tmp_path, monkeypatch):
    plan = plan_model(weights(), folder, kind="Q8_0")
    names = list(plan.shapes)

    def fails(name):
        if name == names[-1]:
            raise KeyboardInterrupt
        return plan.rows(name)

    with pytest.raises(KeyboardInterrupt):
        write_gguf(replace(plan, rows=fails), tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(OSError, match="free"):
        write_gguf(plan, tmp_path / "m.gguf")
    monkeypatch.undo()
    steps = []
    write_gguf(plan, tmp_path / "m.gguf", progress=lambda done, total: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1] == 2 * plan.nbytes
    with pytest.raises(FileExistsError, match="choose another file"):
        write_gguf(plan, tmp_path / "m.gguf")


def test_a_byte_that_the_disk_changed_is_found_when_the_file_is_read_back(folder, tmp_path, monkeypatch):
    from tt_ckpt.formats.gguf import writer

    plan, read = plan_model(weights(), folder, kind="Q8_0"), writer.read_rows
    monkeypatch.setattr(writer, "read_rows", lambda *words: read(*words) * 1.1)
    with pytest.raises(ValueError, match="differs by more than"):
        write_gguf(plan, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_values_that_overflow_or_are_not_finite_are_named(folder, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match="overflow F16; use --type bf16"):
        write_gguf(plan_model(weights(**{name: torch.full((32, 32), 1e5)}), folder, kind="F16"), tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=f"{name}: 1,024 values are not finite"):
        write_gguf(plan_model(weights(**{name: torch.full((32, 32), torch.nan)}), folder), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_the_allowed_error_is_that_of_the_format(kind):
    torch.manual_seed(0)
    number = gguf.GGMLQuantizationType[kind]
    scales = torch.logspace(-12, 4, 64).repeat_interleave(4)[:, None]
    meant = torch.randn(256, 64) * scales
    found = torch.from_numpy(gguf.dequantize(gguf.quantize(meant.numpy(), number), number))
    assert is_within(found, meant, kind)
    step = {"F16": 2**-10, "BF16": 2**-7, "Q8_0": 1 / 127, "Q4_0": 1 / 7}[kind]
    assert not is_within(found + 1.2 * step * meant.abs().amax(1, keepdim=True), meant, kind)


def test_layers_with_scales_of_their_own_share_one_alpha_in_an_adapter_file(tmp_path):
    torch.manual_seed(0)
    names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qv"]
    layers = {
        names[0]: (torch.randn(4, 32), torch.randn(32, 4), 2.0),
        names[1]: (torch.randn(2, 32), torch.randn(16, 2), 0.5),
    }
    write_gguf(plan_adapter(CONFIG, layers), tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    for key, name in zip(names, ("attn_q", "attn_v"), strict=True):
        a, b = tensors[f"blk.0.{name}.weight.lora_a"], tensors[f"blk.0.{name}.weight.lora_b"]
        if name == "attn_q":  # rows in pairs, as llama.cpp has them: back to halves
            b = b.view(2, 8, 2, 4).transpose(1, 2).reshape(32, 4)
        ours_a, ours_b, scale = layers[key]
        torch.testing.assert_close(alpha / len(a) * b @ a, scale * ours_b @ ours_a)
    with pytest.raises(ValueError, match="does not adapt model.embed_tokens"):
        plan_adapter(CONFIG, {"model.embed_tokens.weight": layers[names[0]]})
