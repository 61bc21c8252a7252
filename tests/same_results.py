"""Whether a change of the code changed a result: small runs, adapters, merges, conversions, rows and reports, as files.

    python tests/same_results.py make BEFORE         with the old code
    python tests/same_results.py make AFTER          with the new code, on the same machine
    python tests/same_results.py compare BEFORE AFTER

Everything that does not depend on the clock must be equal to the byte. Only the command line and public names are used,
so that a script of today runs on the code of yesterday.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", NO_COLOR="1", COLUMNS="120")

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau".split()
CLOCK = ("tokens_per_s", "memory_gib", "elapsed_s", "eta_s")  # of a row of metrics.jsonl
SHAPE = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "initializer_range": 0.05, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": None, "torch_dtype": "float32",
}  # fmt: skip
MODELS = {
    "llama": SHAPE | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 1e4},
    "qwen3": SHAPE | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 8, "rope_theta": 1e5},
    "mistral": SHAPE
    | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 24, "rope_theta": 1e4},
    "phi3": SHAPE
    | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "sliding_window": None, "rope_theta": 1e4},
    "gemma2": SHAPE
    | {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8,
        "sliding_window": 16, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1e4,
    },
    "mixtral": SHAPE
    | {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4,
        "num_experts_per_tok": 2, "sliding_window": None, "rope_theta": 1e6,
    },
}  # fmt: skip
LORA = ["adapter.rank=4", "adapter.alpha=8"]
RUNS: dict[str, tuple[str, list[str]]] = {
    "full-fp32": ("llama", []),
    "full-bf16": ("llama", ["model.dtype=bf16"]),
    "full-packed-eval": ("llama", ["data.packing=true", "data.eval=0.2", "eval_every=2", "save_every=3"]),
    "full-checkpointing": ("llama", ["activation_checkpointing=true", "micro_batch_size=2"]),
    "lora": ("llama", LORA),
    "lora-dropout-all-linear": ("llama", [*LORA, "adapter.target_modules=all-linear", "adapter.dropout=0.1"]),
    "lora-bf16-qwen3": ("qwen3", [*LORA, "model.dtype=bf16", "adapter.target_modules=all-linear"]),
    "dora-mistral": ("mistral", [*LORA, "adapter.use_dora=true", "data.packing=true"]),
    "qlora-phi3": ("phi3", [*LORA, "adapter.quantize_base=true", "adapter.target_modules=all-linear"]),
    "lora-gemma2": ("gemma2", [*LORA, "adapter.use_rslora=true"]),
    "full-mixtral": ("mixtral", ["max_steps=3"]),
    "streamed": ("llama", [*LORA, "data.streaming=true", "max_steps=4"]),
    "workers-last-turn": ("llama", [*LORA, "data.num_workers=1", "data.train_on=last", "data.max_seq_len=72"]),
}
ROWS: dict[str, dict[str, Any]] = {
    "plain": {}, "packed": {"packing": True, "max_seq_len": 96}, "all": {"train_on": "all"},
    "last-cut": {"train_on": "last", "max_seq_len": 20, "max_dropped_share": 1.0},
}  # fmt: skip


def answer(index: int) -> tuple[str, str]:
    chosen = [WORDS[(index * step + step) % len(WORDS)] for step in range(1, 3 + index % 4)]
    return "say " + " ".join(chosen), " ".join(reversed(chosen)) + (" \u00e9\U0001f600" if index % 5 == 0 else "")


def write_inputs(folder: Path) -> None:
    """Rows in each schema, a tokenizer and a model of each kind."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    import tt_ckpt
    import tt_models

    pairs = [answer(index) for index in range(41)]
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    longer = [[{"role": "system", "content": "be brief"}, *chats[i], *chats[(i * 7) % 41]] for i in range(41)]
    rows = {
        "messages": [{"messages": longer[i] if i % 3 == 0 else chats[i]} for i in range(41)],
        "alpaca": [{"instruction": q, "input": "" if len(q) % 2 else "now", "output": a} for q, a in pairs],
        "sharegpt": [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in pairs],
        "completion": [{"prompt": q, "completion": a} for q, a in pairs],
        "text": [{"text": f"{q} {a}"} for q, a in pairs],
        "preference": [{"prompt": q, "chosen": a, "rejected": q} for q, a in pairs],
    }
    for name, kind in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kind), encoding="utf-8")
    source = folder / "tokenizer"
    source.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([" ".join(WORDS), "say user assistant system"] * 20, trainer)
    tokenizer.save(str(source / "tokenizer.json"))
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (source / "tokenizer_config.json").write_text(json.dumps(names))
    for name, config in MODELS.items():
        torch.manual_seed(5)
        model = tt_models.build(tt_models.config_from_hf(config))
        tt_ckpt.save_hf(model, folder / name, config=config, source=source)


def tt(*words: str) -> str:
    """What a command prints on stdout; it must succeed."""
    from tt_cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(words))
    if status:
        raise RuntimeError(f"tt {' '.join(words)}: exit code {status}\n{out.getvalue()}{err.getvalue()}")
    return out.getvalue()


def forked(action: Any, *given: Any) -> None:
    """In a process of its own: what one run leaves in memory does not reach the next."""
    child = os.fork()
    if child == 0:
        try:
            action(*given)
        except BaseException as error:
            print(f"{action.__name__} {given}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"{action.__name__} {given} failed")


def run(name: str, results: Path) -> None:
    model, words = RUNS[name]
    base = [
        f"model.path={model}", "data.train=messages.jsonl", "model.dtype=fp32", "batch_size=8", "micro_batch_size=4",
        "max_steps=6", "device=cpu", "optimizer.lr=5e-3", "schedule.warmup_steps=2", "samples.max_new_tokens=4",
    ]  # fmt: skip
    folder = Path("runs") / name
    tt("run", "sft", *base, *words, f"output_dir={folder}")
    keep(folder, results / name)
    if words[:2] == LORA and "adapter.quantize_base=true" not in words:
        tt("merge", str(folder), "-o", f"merged/{name}")
        keep(Path("merged") / name, results / f"{name}.merged")


def keep(folder: Path, into: Path) -> None:
    """Hashes of the weights, and the metrics and samples, without what the clock or the place says."""
    lines = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.suffix in (".safetensors", ".pth", ".bin") and path.is_file():
            lines.append(f"{hashlib.sha256(without_place(path)).hexdigest()} {name}\n")
        elif (path.is_file() and name.parts[0] in ("adapter", "model")) or path.name in ("config.json",):
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            if path.name != "README.md":
                (into / name).write_text(path.read_text().replace(str(Path.cwd()), "HERE"))
    into.mkdir(parents=True, exist_ok=True)
    (into / "weights.txt").write_text("".join(lines))
    if (folder / "metrics.jsonl").exists():
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        (into / "metrics.jsonl").write_text("".join(json.dumps(without_clock(row)) + "\n" for row in rows))
        (into / "samples.jsonl").write_bytes((folder / "samples.jsonl").read_bytes())


def without_place(path: Path) -> bytes:
    """The bytes of a file of tensors; the header of an adapter names the folder of its base."""
    data, here = path.read_bytes(), str(Path.cwd()).encode()
    if path.suffix != ".safetensors":
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end].rstrip().replace(here, b"HERE") + data[end:]


def without_clock(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in CLOCK}


def rows(results: Path) -> None:
    """The token rows of every schema, and the batches made of them."""
    import tt_data

    tokenizer = tt_data.load_tokenizer("tokenizer")
    for source in sorted(Path().glob("*.jsonl")):
        for name, options in ROWS.items():
            if source.stem == "preference" and options.get("packing"):
                continue
            data = tt_data.load_dataset(str(source), tokenizer, **options)
            lines = [{key: list(map(int, row)) for key, row in data[i].items()} for i in range(len(data))]
            text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
            (results / f"{source.stem}.{name}.jsonl").write_text(text)
    mixed = tt_data.load_dataset({"messages.jsonl": 0.7, "alpaca.jsonl": 0.3}, tokenizer, max_seq_len=96)
    batches = tt_data.batches(mixed, batch_size=6, seed=3, start_step=2, pad_id=tokenizer.pad_id)
    some = [next(batches) for _ in range(9)]
    (results / "mixed.txt").write_text(repr([{key: part.tolist() for key, part in one.items()} for one in some]))


def conversions(results: Path) -> None:
    for kind in ("meta", "torchtune"):
        tt("convert", "llama", f"to-{kind}", "--to", kind)
        tt("convert", f"to-{kind}", f"from-{kind}", "--to", "hf", "--allow-pickle")
        keep(Path(f"from-{kind}"), results / f"from-{kind}")


def reports(results: Path) -> None:
    """The page of a run and of a comparison, after the clock has been taken out of the run's own files."""
    for name in ("lora", "full-packed-eval"):
        folder = Path("runs") / name
        table = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        fixed = [{key: 1.5 if key in CLOCK else value for key, value in row.items()} for row in table]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in fixed))
        manifest = json.loads((folder / "manifest.json").read_text())
        kept = {key: manifest[key] for key in ("recipe", "base_model", "seed", "data", "state") if key in manifest}
        (folder / "manifest.json").write_text(json.dumps(kept))
        tt("report", str(folder), "-o", f"{name}.html")
        keep_page(Path(f"{name}.html"), results)
    tt("report", "runs/lora", "runs/full-packed-eval", "-o", "both.html")
    keep_page(Path("both.html"), results)


def keep_page(page: Path, results: Path) -> None:
    text = page.read_text()
    text = re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?", "TIME", text).replace(str(Path.cwd()), "HERE")
    (results / page.name).write_text(text)


def answers(results: Path) -> None:
    """What the command line says about configs and rows."""
    said = [tt("cat", "sft", "model.path=llama", "data.train=messages.jsonl"), tt("ls", "configs"), tt("ls", "models")]
    said += [tt("data", "show", "messages.jsonl", "--tokenizer", "tokenizer", "-n", "3")]
    said += [tt("generate", "runs/lora", "-p", "say alpha beta", "--max-new-tokens", "8", "--temperature", "0")]
    (results / "answers.txt").write_text("\n".join(said).replace(str(Path.cwd()), "HERE"))


def make(folder: Path) -> None:
    work, results = folder / "work", folder / "results"
    work.mkdir(parents=True)
    results.mkdir()
    results = results.resolve()
    os.chdir(work)
    forked(write_inputs, Path())
    for name in RUNS:
        forked(run, name, results)
    for action in (rows, conversions, answers, reports):
        forked(action, results)
    print(f"{sum(path.is_file() for path in results.rglob('*'))} files in {results}")


def compare(before: Path, after: Path) -> int:
    """The number of files that differ, each said."""
    old, new = before / "results", after / "results"
    names = {path.relative_to(old) for path in old.rglob("*") if path.is_file()}
    names |= {path.relative_to(new) for path in new.rglob("*") if path.is_file()}
    differ = [name for name in sorted(names) if content(old / name) != content(new / name)]
    for name in differ:
        print(f"differs: {name}")
    print(f"{len(names)} files compared, {len(differ)} differ")
    return len(differ)


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["make", "compare"])
    parser.add_argument("folders", type=Path, nargs="+")
    given = parser.parse_args()
    sys.exit(make(given.folders[0]) if given.do == "make" else compare(*given.folders) > 0)
