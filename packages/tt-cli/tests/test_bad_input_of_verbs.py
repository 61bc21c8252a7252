"""Planned mistakes of the verbs that use a model or a run: one line that says what to do, in under 5 seconds."""

import json
import shutil
import time
from pathlib import Path

import pytest

GOOD = {"prompt": "a", "completion": "b"}


@pytest.fixture(scope="module")
def kit(tmp_path_factory, model_dir, rows_file, lora_run) -> Path:
    """A model, a run, its adapter, and damaged copies of them."""
    here = tmp_path_factory.mktemp("kit")
    shutil.copytree(model_dir, here / "model")
    shutil.copytree(lora_run, here / "runs" / "one")
    for name in ("lama", "bert", "nan", "loose", "no-base", "empty"):
        source = model_dir if name in ("lama", "bert", "nan") else lora_run / "adapter"
        shutil.copytree(source, here / name)
    for name, change in (("lama", {"model_type": "lama"}), ("bert", {"model_type": "bert"})):
        _edit(here / name / "config.json", change)
    _edit(here / "no-base" / "adapter_config.json", {"base_model_name_or_path": "./gone"})
    (here / "loose" / "adapter_config.json").unlink()
    shutil.rmtree(here / "empty")
    (here / "empty").mkdir()
    _put_nan(here / "nan" / "model.safetensors")
    shutil.copytree(here / "runs" / "one", here / "runs" / "bare")
    (here / "runs" / "bare" / "metrics.jsonl").unlink()
    shutil.copy(rows_file, here / "rows.jsonl")
    (here / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    (here / "prompts.jsonl").write_text('{"promt": "a"}\n')
    (here / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (here / "axolotl.yaml").write_text("base_model: x\nadapter: lora\n")
    (here / "list.yaml").write_text("model: [1\n")
    return here


def _edit(file: Path, change: dict) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def _put_nan(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})


MISTAKES = {
    "chat runs/oen": "runs/oen: no such run; did you mean 'runs/one'?; tt ls runs lists them",
    "chat modle": "modle: no such directory; did you mean model?",
    "chat empty": "empty: no tokenizer, expected tokenizer.json or tokenizer.model, found nothing",
    "chat no/where": "HF_HUB_OFFLINE is set; correct the name, or unset HF_HUB_OFFLINE and run tt download",
    "chat model --temperature hot": "'hot' is not a valid number (see tt chat --help)",
    "chat model --base other": "model is neither a run nor an adapter, so it has no base; leave out --base",
    "chat no-base": "adapter_config.json: names the base model ./gone, which does not exist; if it is elsewhere, give",
    "generate lama hi": "model_type 'lama': did you mean 'llama'? architectures ['LlamaForCausalLM']; supported: llama",
    "generate bert hi": "model_type 'bert': architectures ['LlamaForCausalLM']; supported: llama, mistral",
    "generate nan hi": "nan: 1 tensor is not finite: model.norm.weight (1 of 32 values); download again",
    "generate loose hi": "loose: an adapter without adapter_config.json; save or download the adapter again",
    "generate model hi there": "got unexpected extra argument (there); put a prompt of several words in quotes",
    "generate model --prompts promts.jsonl": "no such file (looked in ",
    "generate model --prompts row.jsonl": "; did you mean rows.jsonl?",
    "generate model --prompts prompts.jsonl": "messages, got only 'promt'; did you mean 'prompt'?",
    "generate model --prompts broken.jsonl": "broken.jsonl, line 2, column 12: expecting value, near",
    "generate model hi --device gpu": "device: unknown device 'gpu'; did you mean 'cuda'?; known: auto, cpu",
    "merge runs/one": "no output: name the directory to write, as in -o DIR",
    "merge runs/one -o model": "model: exists and is not empty; choose another -o",
    "merge runs/one -o out --base nowhere": "nowhere: not completely in the cache",
    "merge runs/one -o out --dtype fp8": "--dtype: 'fp8' is not one of 'fp32', 'bf16', 'fp16'",
    "export model -o x --to ggfu": "--to: unknown format 'ggfu'; did you mean 'gguf'?; known: hf, gguf, ollama",
    "export model -o x --to gguf": "x: --to gguf writes one file, whose name ends in .gguf, such as x.gguf",
    "export model -o x --to ollama --type q9": "--type: unknown type 'q9'; known: f32, f16, bf16, q8_0, q4_0",
    "export model -o x --adapter": "--adapter: model has no adapter; leave out --adapter",
    "export nan -o x.gguf --to gguf": "model.norm.weight: 1 value is not finite; use another checkpoint",
    "quantize model -o q --to int9": "--to: unknown format 'int9'; did you mean 'int8'?; known: int8",
    "quantize model -o q --to 4w-gptq": "so it is not offered; the nearest is int4",
    "quantize model -o q --to int4 --group-size 7": "--group-size 7: int4 has kernels for 32, 64, 128 and 256",
    "quantize model -o q --to int8 --data pairs.jsonl": "pairs.jsonl: preference rows compare answers; give rows of",
    "quantize model -o q --to int8 --data row.jsonl": "; did you mean rows.jsonl?",
    "convert empty out": "empty: no weights: expected model.safetensors",
    "convert model out --to metta": "did you mean 'meta'?",
    "convert model model --to meta": "model: already contains model.safetensors; choose another directory, or pass",
    "watch runs/oen": "runs/oen: no such run; did you mean 'runs/one'?; tt ls runs lists them",
    "watch model": "tokenizer.json, tokenizer_config.json); tt ls runs lists them",
    "watch runs/one --wait x": "invalid value for '--wait': 'x' is not a valid whole number",
    "report model": "model: not a run directory (no config.yaml and manifest.json; found: ",
    "report runs/bare": "no metrics.jsonl in runs/bare: expected a run directory",
    "report runs/one -o x.pdf": "x.pdf: a report is an .html page or a folder, found '.pdf'",
    "migrate lst.yaml": "lst.yaml: no such file (looked in ",
    "migrate list.yml": "; did you mean 'list.yaml'?",
    "migrate list.yaml": "list.yaml:2:1: not YAML: '[' is not closed",
    "migrate axolotl.yaml": "(for axolotl and LLaMA-Factory: docs/coming-from.md)",
    "rm-checkpoints runs/oen": "runs/oen: no such run; did you mean 'runs/one'?; tt ls runs lists them",
    "rm-checkpoints runs/one --keep-best": "runs/one has no held-out loss, so no step is the best; use --keep-last N",
    "rm-checkpoints runs/one --keep-lsat 1": "no option --keep-lsat; did you mean '--keep-last'?",
    "eval runs/one --data pairs.jsonl": "pairs.jsonl: preference rows compare answers; give rows of one answer each",
    "eval runs/one --data rows.jsonl --metric os:system": "to let it be imported, add --allow-import os",
    "eval model": "give either --tasks NAMES or --data ROWS",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_with_what_to_do_in_under_5_seconds(tt, kit, monkeypatch, words):
    if words.endswith("--to gguf"):
        pytest.importorskip("gguf")
    monkeypatch.chdir(kit)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    there = sorted(kit.rglob("*"))
    start = time.process_time()
    answer = tt(*words.split())
    assert time.process_time() - start < 5
    assert (answer.code, answer.out) == (2, "")
    [line] = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert MISTAKES[words] in line
    assert "Traceback" not in answer.err
    assert sorted(kit.rglob("*")) == there


def test_a_model_without_an_adapter_is_not_merged_in_silence(tt, kit, tmp_path):
    answer = tt("merge", str(kit / "model"), "-o", str(tmp_path / "out"))
    assert answer.code == 0
    assert "model has no adapter to merge; its weights are written as they are" in answer.err


def test_a_finished_run_without_figures_is_not_called_finished_after_step_0(tt, kit):
    answer = tt("watch", str(kit / "runs" / "bare"))
    assert answer.out.startswith("finished, but ")
    assert answer.out.endswith("metrics.jsonl has no step that can be read\n")


def test_what_a_report_leaves_out_is_said_on_the_terminal_as_well(tt, kit, tmp_path):
    run = shutil.copytree(kit / "runs" / "one", tmp_path / "one")
    (run / "metrics.jsonl").write_text('{"step": 1, "lo\n')
    (run / "config.yaml").write_text("a: [1\n")
    answer = tt("report", str(run))
    assert answer.code == 0
    assert "warning: config.yaml: left out" in answer.err
    assert "warning: one: no step was recorded" in answer.err
