"""docs/bad-input.md, row by row: what is broken, and the line that answers it. Nothing is trained or written."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Edit = Callable[[Path], object]
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 4900000000\n"
PAGE = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_dir: Path, rows_file: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copytree(model_dir, tmp_path / "model")
    shutil.copy(rows_file, tmp_path / "rows.jsonl")
    return tmp_path


@pytest.fixture
def refused(tt: Any, here: Path) -> Callable[..., str]:
    """The lines that answer ``tt WORDS``; "..." stands for a model and rows that are good."""

    def call(*words: str, parts: tuple[str, ...], code: int = 2) -> str:
        good = ["model.path=model", "data.train=rows.jsonl", "model.dtype=fp32", "batch_size=4", "max_steps=1"]
        there = sorted(path.name for path in here.iterdir())
        given = [word for item in words for word in (good if item == "..." else [item])]
        answer = tt(*given)
        assert (answer.code, answer.out) == (code, ""), answer
        lines = [line for line in answer.err.splitlines() if line.startswith("error: ")]
        assert lines, answer.err
        assert all(line.isprintable() and len(line) < 2000 for line in lines)
        assert "Traceback" not in answer.err
        assert "fault in tt" not in answer.err
        for part in parts:
            assert part in "\n".join(lines)
        assert sorted(path.name for path in here.iterdir()) == there
        return "\n".join(lines)

    return call


def changed(file: str, **changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        values = json.loads((folder / file).read_text()) | changes
        kept = {key: value for key, value in values.items() if value is not None}
        (folder / file).write_text(json.dumps(kept))

    return edit


def config(**changes: Any) -> Edit:
    return changed("config.json", **changes)


def cut(file: str, size: int) -> Edit:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def text(file: str, content: str) -> Edit:
    return lambda folder: (folder / file).write_text(content)


def without(file: str) -> Edit:
    return lambda folder: (folder / file).unlink()


def tensors(edit: Callable[[dict[str, Any]], object]) -> Edit:
    """Change the weights of the model."""

    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def shards(folder: Path) -> None:
    """The model in four files with an index."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {}
    for number in range(4):
        file = f"model-{number + 1:05}-of-00004.safetensors"
        part = {name: weights[name] for name in list(weights)[number::4]}
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(x.nbytes for x in weights.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lost_shards(folder: Path) -> None:
    shards(folder)
    for number in (2, 3):
        (folder / f"model-0000{number}-of-00004.safetensors").unlink()


def index_out_of_the_folder(folder: Path) -> None:
    shards(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../../secret"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickles(folder: Path) -> None:
    import torch

    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(2)}, folder / "pytorch_model.bin")


def of_meta(folder: Path) -> None:
    import torch

    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    torch.save({"a": torch.zeros(2)}, folder / "consolidated.00.pth")
    (folder / "params.json").write_text('{"dim": 32, "n_layers": 2, "n_heads": 4}')


def quantized(method: str) -> Edit:
    return config(quantization_config={"quant_method": method, "bits": 4})


def nan(weights: dict[str, Any]) -> None:
    weights["model.layers.1.mlp.up_proj.weight"][3, 4:6] = float("nan")


MODEL: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "mistyped type": (config(model_type="lama"), ("model_type 'lama'", "did you mean 'llama'?")),
    "mistyped type, other case": (config(model_type="Qwne2"), ("did you mean 'qwen2'?", "supported: ")),
    "unknown type": (config(model_type="bert", architectures=["BertModel"]), ("'bert'", "'BertModel'", "supported: ")),
    "no config": (without("config.json"), ("config.json: missing", "the directory contains model.safetensors")),
    "config cut": (cut("config.json", 60), ("config.json:5:3",)),
    "config empty": (text("config.json", ""), ("config.json: 0 bytes",)),
    "config is a list": (text("config.json", "[]"), ("config.json", "object")),
    "config is a pointer": (text("config.json", POINTER), ("config.json: a git-lfs pointer", "git lfs pull")),
    "config is a page": (text("config.json", PAGE), ("config.json: a web page", "download it again")),
    "tokenizer is a pointer": (text("tokenizer.json", POINTER), ("tokenizer.json", "git-lfs pointer", "git lfs pull")),
    "tokenizer is a page": (text("tokenizer.json", PAGE), ("tokenizer.json", "web page")),
    "its config is a pointer": (text("tokenizer_config.json", POINTER), ("tokenizer_config.json", "git-lfs pointer")),
    "no tokenizer": (without("tokenizer.json"), ("no tokenizer, expected tokenizer.json",)),
    "heads do not divide": (config(num_attention_heads=5), ("hidden_size 32 is not a multiple", "heads 5")),
    "negative": (config(num_hidden_layers=-1), ("num_hidden_layers must be positive, got -1",)),
    "a text for a number": (config(hidden_size="many"), ("hidden_size",)),
    "code in the repository": (config(auto_map={"AutoModel": "x.Y"}, model_type="x"), ("model_type 'x'",)),
    "quantized by bitsandbytes": (quantized("bitsandbytes"), ("quantization_config", "bitsandbytes")),
    "quantized by gptq": (quantized("gptq"), ("quantization_config", "gptq")),
    "of Meta": (of_meta, ("tt convert",)),
    "a million layers": (config(num_hidden_layers=10**8), ("num_hidden_layers",)),
    "endless rows": (config(hidden_size=10**12, num_attention_heads=10), ("hidden_size",)),
    "too small a vocabulary": (config(vocab_size=100), ("vocab_size", "100")),
}  # fmt: skip


@pytest.mark.parametrize("case", MODEL)
def test_a_bad_model_is_found_before_weights_load(refused, here, case):
    edit, parts = MODEL[case]
    edit(here / "model")
    refused("validate", "sft", "...", parts=parts)


WEIGHTS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "shards missing": (lost_shards, ("2 of 4 shards missing: model-00002-of-00004.safetensors", "tt download")),
    "index leads out": (index_out_of_the_folder, ("model.safetensors.index.json", "lm_head.weight", "'../../secret'")),
    "cut": (cut("model.safetensors", 9000), ("model.safetensors: ", "cut short: 9000 bytes, its header says ")),
    "pointer": (text("model.safetensors", POINTER), ("model.safetensors: a git-lfs pointer", "4.9 GB", "git lfs pull")),
    "page": (text("model.safetensors", PAGE), ("model.safetensors: a web page", "download it again")),
    "empty": (text("model.safetensors", ""), ("model.safetensors: 0 bytes",)),
    "none": (without("model.safetensors"), ("no weights: expected model.safetensors",)),
    "pickles": (pickles, ("pytorch_model.bin", "--allow-pickle")),
    "vocabulary": (config(vocab_size=321), ("config.vocab_size=321 vs embedding rows ", "model.embed_tokens.weight")),
    "more layers": (config(num_hidden_layers=3), ("model.layers.2.*: 9 tensors", "the files contain 2 whole layers")),
    "fewer layers": (config(num_hidden_layers=1), ("9 unexpected (model.layers.1.*: 9 tensors)",)),
    "width": (config(hidden_size=64), ("of another shape (", "model.embed_tokens.weight", ", ...)")),
    "key heads": (config(num_key_value_heads=4), ("config.num_key_value_heads=4 vs 2 in the file",)),
    "a name too many": (tensors(lambda w: w.update({"lm_head.wieght": w.pop("lm_head.weight")})),
                        ("lm_head.weight", "lm_head.wieght")),
    "nan": (tensors(nan), ("model.layers.1.mlp.up_proj.weight", "2 ")),
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHTS)
def test_bad_weights_are_found_before_step_1(refused, here, case):
    edit, parts = WEIGHTS[case]
    edit(here / "model")
    if case != "nan":  # for which weights must be read
        refused("validate", "sft", "...", parts=parts)
        refused("run", "sft", "...", "adapter.rank=2", parts=parts)
    refused("generate", "model", "red", parts=parts)


def test_a_flipped_bit_of_a_checkpoint_is_found_by_its_hash(tt_process, lora_run, tmp_path):
    run = Path(shutil.copytree(lora_run, tmp_path / "run"))
    files = sorted(run.glob("checkpoints/*/*.safetensors"))
    for file in files:
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
    answer = tt_process("run", str(run / "config.yaml"), "-o", str(run), "--resume", "auto", "max_steps=5")
    assert answer.code in (1, 2)
    assert "sha256" in answer.err or "hash" in answer.err
    assert files[0].name in answer.err


# ---- adapters ------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(here: Path, lora_run: Path) -> Path:
    return Path(shutil.copytree(lora_run / "adapter", here / "adapter"))


def other_model(here: Path, write_tiny_model: Callable[..., Path], **changes: Any) -> Path:
    import torch

    import tt_ckpt
    import tt_models

    folder = write_tiny_model(here / "other")
    settings = json.loads((folder / "config.json").read_text()) | changes
    model = tt_models.build(tt_models.config_from_hf(settings), dtype=torch.float32)
    tt_ckpt.save_hf(model, folder, config=settings, overwrite=True)
    return folder


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden_size": 64}, ("this adapter was trained on ", "the model here is different")),
        ({"num_hidden_layers": 3}, ("this adapter was trained on ", "46,944 parameters in 30 tensors")),
        ({"num_hidden_layers": 1}, ("this adapter was trained on ", "28,384 parameters in 12 tensors")),
    ],
    ids=["another width", "one layer more", "one layer less"],
)
def test_an_adapter_of_another_base_is_refused(refused, here, adapter, write_tiny_model, changes, parts):
    other_model(here, write_tiny_model, **changes)
    refused("generate", "adapter", "red", "--base", "other", parts=parts)
    refused("merge", "adapter", "out", "--base", "other", parts=parts)


ADAPTER: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "weights missing": (without("adapter_model.safetensors"), ("adapter_model.safetensors",)),
    "weights cut": (cut("adapter_model.safetensors", 300), ("adapter_model.safetensors",)),
    "weights are a pointer": (text("adapter_model.safetensors", POINTER), ("adapter_model.safetensors", "git-lfs")),
    "weights are a page": (text("adapter_model.safetensors", PAGE), ("adapter_model.safetensors", "web page")),
    "config is a pointer": (text("adapter_config.json", POINTER), ("adapter_config.json", "git-lfs")),
    "rank 0": (changed("adapter_config.json", r=0), ("adapter_config.json", "r")),
    "negative rank": (changed("adapter_config.json", r=-4), ("adapter_config.json", "r")),
    "endless rank": (changed("adapter_config.json", r=10**9), ("adapter_config.json", "r")),
    "a feature that we lack": (changed("adapter_config.json", use_qalora=True), ("use_qalora",)),
    "another kind": (changed("adapter_config.json", peft_type="IA3"), ("adapter_config.json", "IA3")),
    "mistyped target": (changed("adapter_config.json", target_modules=["q_prj"]), ("q_prj", "q_proj")),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTER)
def test_a_bad_adapter_is_one_line(refused, here, adapter, case):
    edit, parts = ADAPTER[case]
    edit(adapter)
    refused("generate", "adapter", "red", parts=parts)


ADAPTER_KEYS = {
    "all targets mistyped": (["adapter.target_modules=[q_prj]"], ("q_prj", "did you mean 'q_proj'?")),
    "one of two mistyped": (["adapter.target_modules=[q_proj,v_prj]"], ("v_prj", "v_proj")),
    "rank 0": (["adapter.rank=0"], ("adapter", "got 0")),
    "negative rank": (["adapter.rank=-3"], ("got -3",)),
    "a rank that is no number": (["adapter.rank=big"], ("adapter.rank: expected a whole number",)),
    "endless rank": (["adapter.rank=10000000"], ("rank",)),
    "no adapter there": (["adapter.path=nowhere"], ("adapter.path", "nowhere")),
    "nf4 of a size that does not fit": (["adapter.quantize_base=true", "model.path=narrow"], ("64",)),
}


@pytest.mark.parametrize("case", ADAPTER_KEYS)
def test_a_bad_key_of_an_adapter_is_found_before_weights_load(refused, here, write_tiny_model, case):
    words, parts = ADAPTER_KEYS[case]
    if "model.path=narrow" in words:
        narrow = other_model(here, write_tiny_model, hidden_size=20, intermediate_size=33, num_attention_heads=2)
        narrow.rename(here / "narrow")
    refused("validate", "sft", "...", *([] if "adapter.rank" in words[0] else ["adapter.rank=2"]), *words, parts=parts)


# ---- rows ----------------------------------------------------------------------------------------------------------


def rows(*values: Any) -> str:
    return "".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values)


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"the {role} speaks"} for role in roles]}


GOOD = {"prompt": "a", "completion": "b"}
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "empty file": ("", ("x.jsonl", "0 rows")),
    "blank lines": ("\n\n  \n", ("x.jsonl", "0 rows")),
    "a broken line": (rows(GOOD, '{"prompt": "a", ', GOOD), ("x.jsonl:2",)),
    "a missing comma": (rows(GOOD, GOOD, '{"prompt": "a" "completion": "b"}'), ("x.jsonl:3",)),
    "a column is missing": (rows({"prompt": "a"}), ("x.jsonl:1", "prompt")),
    "columns with other names": (rows({"promt": "a", "answer": "b"}), ("x.jsonl:1", "promt", "answer", "columns")),
    "null": (rows({"prompt": "a", "completion": None}), ("x.jsonl:1", "completion")),
    "empty text": (rows({"prompt": "a", "completion": ""}), ("x.jsonl:1", "completion")),
    "no alternation": (rows(turns("user", "assistant", "assistant", "system")), ("x.jsonl:1", "system")),
    "the user has the last word": (
        rows(turns("user")),
        ("x.jsonl:1: a conversation needs at least 2 messages, got 1",),
    ),
    "an unknown role": (rows(turns("narrator", "gpt")), ("x.jsonl:1", "narrator")),
    "a pair without its loser": (rows({"prompt": "a", "chosen": "b"}), ("x.jsonl:1", "rejected")),
    "ids beyond the vocabulary": (rows({"input_ids": [1, 2, 99999], "labels": [1, 2, 99999]}), ("99999",)),
    "a pointer": (POINTER, ("x.jsonl", "git-lfs pointer")),
    "a page": (PAGE, ("x.jsonl", "web page")),
    "not text": ("\x00\x01\x02\x00", ("x.jsonl",)),
    "a number": (rows(3), ("x.jsonl:1",)),
}


@pytest.mark.parametrize("case", ROWS)
def test_bad_rows_are_named_with_file_and_line(refused, here, case):
    content, parts = ROWS[case]
    (here / "x.jsonl").write_text(content)
    refused("validate", "sft", "...", "data.train=x.jsonl", parts=parts)
    refused("data", "show", "x.jsonl", "--tokenizer", "model", parts=parts)


def test_other_bad_sources_are_named(refused, here):
    refused("validate", "sft", "...", "data.train=rosw.jsonl", parts=("rosw.jsonl", "rows.jsonl"))
    refused("data", "show", "row.jsonl", "--tokenizer", "model", parts=("row.jsonl", "rows.jsonl"))
    refused("validate", "sft", "...", "data.train=text", parts=("text",))
    folder = here / "parts"
    folder.mkdir()
    shutil.copy(here / "rows.jsonl", folder / "train.jsonl")
    refused("data", "show", "parts", "--tokenizer", "model", "--split", "trian", parts=("trian", "train"))
    refused("validate", "sft", "...", "data.train=parts", "data.split=tset", parts=("tset", "train"))


def test_rows_that_leave_nothing_to_train_are_counted_with_the_length(refused, here):
    parts = ("8 of 8 rows", "max_seq_len 4", "longest prompt")
    refused("validate", "sft", "...", "data.max_seq_len=4", parts=parts)


def test_rows_that_are_cut_are_counted(tt, here):
    answer = tt("validate", "sft", "model.path=model", "data.train=rows.jsonl", "data.max_seq_len=27")
    assert "truncated: " in answer.err


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        ("{{ raise_exception('roles must alternate') }}", ("roles must alternate", "rows.jsonl:1")),
        ("{% for m in messages %}{{ m.content }", ("tokenizer_config.json, line 1",)),
        ("{{ ''.__class__.__mro__ }}", ("rows.jsonl:1",)),
        ("{% for i in range(100000000) %}{% endfor %}", ("rows.jsonl:1",)),
        ("{{ 'x' * 100000000 }}", ("rows.jsonl:1",)),
        ("{{ messages[0].nothing.nothing }}", ("rows.jsonl:1",)),
    ],
    ids=["raises", "syntax", "escapes the sandbox", "loops", "grows", "undefined"],
)
def test_a_bad_chat_template_is_named_with_the_row(refused, here, template, parts):
    changed("tokenizer_config.json", chat_template=template)(here / "model")
    refused("data", "show", "rows.jsonl", "--tokenizer", "model", parts=parts)


def test_without_a_chat_template_the_ones_that_are_built_in_are_offered(refused, here):
    changed("tokenizer_config.json", chat_template=None)(here / "model")
    (here / "chat.jsonl").write_text(rows(turns("user", "assistant")))
    refused("validate", "sft", "...", "data.train=chat.jsonl", parts=("chat template", "chatml"))


# ---- configs and the command line ----------------------------------------------------------------------------------

CONFIG: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "a text for a rate": (["optimizer.lr=fast"], ("optimizer.lr: expected a number, got the text 'fast'",)),
    "an infinite rate": (["optimizer.lr=.inf"], ("optimizer.lr",)),
    "a rate that is no number": (["optimizer.lr=nan"], ("optimizer.lr",)),
    "an octal": (["batch_size=0123"], ("batch_size",)),
    "a time": (["max_steps=1:30"], ("max_steps",)),
    "a seed beyond its range": (["seed=99999999999999999999999"], ("seed",)),
    "a mistyped key": (["optimizer.learing_rate=1"], ("unknown key; did you mean 'optimizer.lr'?",)),
    "a key that does not exist": (["lrr=2"], ("lrr: unknown key",)),
    "a device that is not there": (["device=cuda:7"], ("cuda",)),
    "a mistyped dtype": (["model.dtype=bf61"], ("model.dtype", "bf16")),
    "a config in the recipe's place": (["--config", "nowhere.yaml"], ("nowhere.yaml",)),
    "a folder for a config": (["--config", "model"], ("model", "folder")),
}


@pytest.mark.parametrize("case", CONFIG)
def test_a_bad_config_is_one_line_with_the_nearest(refused, case):
    words, parts = CONFIG[case]
    refused("validate", "sft", "...", *words, parts=parts)


@pytest.mark.parametrize("number", ["2e-5", "1e-05", "'3e-4'", "2E-5"])
def test_a_rate_is_a_number_in_every_spelling(tt, here, number):
    (here / "c.yaml").write_text(f"optimizer:\n  lr: {number}\n")
    config = tt("cat", "sft", "--config", "c.yaml", "--json").json["config"]
    assert config["optimizer"]["lr"] == float(number.strip("'"))


def test_a_value_may_contain_an_equals_sign(tt, here):
    words = ["data.train=a=b.jsonl", "model.path=x=y"]
    config = tt("cat", "sft", *words, "--json").json["config"]
    assert (config["data"]["train"], config["model"]["path"]) == ("a=b.jsonl", "x=y")


def test_a_mistyped_key_in_a_file_is_named_with_its_line(refused, here):
    (here / "c.yaml").write_text("optimizer:\n  lr: 1e-4\n\nlearing_rate: 1\n")
    refused("validate", "sft", "...", "--config", "c.yaml", parts=("c.yaml:4: learing_rate",))


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(here: Path, lora_run: Path) -> Path:
    return Path(shutil.copytree(lora_run, here / "run"))


def test_resuming_without_a_training_state_says_what_to_do(refused, run):
    shutil.rmtree(run / "checkpoints")
    refused("run", "run/config.yaml", "-o", "run", "--resume", "auto", "max_steps=9", parts=("run", "checkpoint"))


def test_resuming_with_another_config_shows_the_difference(refused, run):
    words = ["run", "run/config.yaml", "-o", "run", "--resume", "auto", "max_steps=9"]
    for change in ("optimizer.lr=5e-3", "batch_size=2"):
        key = change.partition("=")[0]
        refused(*words, change, parts=(key,))


def test_an_output_that_is_not_empty_is_refused_with_the_ways_out(refused, here, run):
    refused("run", "sft", "...", "-o", "run", parts=("run", "--resume"))
    (here / "mine").mkdir()
    (here / "mine" / "thesis.txt").write_text("")
    refused("run", "sft", "...", "-o", "mine", parts=("mine",))
    refused("merge", "run", "mine", parts=("mine",))


def test_an_output_that_cannot_be_written_is_found_before_step_1(refused, here):
    refused("run", "sft", "...", "-o", "/proc/run", parts=("/proc/run",))
    refused("run", "sft", "...", "-o", "rows.jsonl/run", parts=("rows.jsonl",))


def test_a_header_that_asks_for_more_than_there_is(refused, here):
    (here / "model" / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    refused("generate", "model", "red", parts=("model.safetensors",))


@pytest.mark.parametrize("words", [
    ("generate", "~no-such-user/run", "hi"), ("convert", "~no-such-user/model", "out"),
    ("convert", "{m}", "~no-such-user/out"), ("merge", "{m}", "-o", "~no-such-user/out"),
    ("validate", "~/config.yaml"), ("run", "sft", "model.path={m}", "data.train=x", "-o", "~no-such-user/z"),
])  # fmt: skip
def test_a_home_folder_that_is_not_there_is_wrong_input_and_no_fault_of_ours(tt, model_dir, monkeypatch, words):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for a user who has none
    answer = tt(*(word.format(m=model_dir) for word in words))
    assert (answer.code, answer.out) == (2, "")
    assert "there is no such home folder; write the path without ~" in answer.err
