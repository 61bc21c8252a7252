"""A 1.3 GB Hugging Face directory read and written back: seconds and memory, ours and the peers', alternated.

"there and back" writes another format and then a Hugging Face directory again; "load, save" goes through a model. The
marks are plain copies of the same directory, with fsync and without. Each contestant is a process of its own on one
thread; the directory is in the page cache. Memory is sampled from outside, above what it was after imports: RssAnon is
what a process holds, RssFile the mapped file. torchtune and litgpt take part where CKPT_BENCH_TORCHTUNE and
CKPT_BENCH_LITGPT hold the path under which they can be imported.

Usage: python benchmarks/ckpt_convert.py [--rounds 5] [--layers 12] [--only NAME] [--folder DIR]
"""

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPE = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16,
         "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "head_dim": 128,
         "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
         "rope_theta": 10000.0}  # fmt: skip
MIB = 2**20


# ---- the contestants: each is called with the source and an empty folder, after "ready" ----


def copy(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder / "there")


def copy_twice(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder / "there")
    shutil.copytree(folder / "there", folder / "back")


def _synced(folder: Path) -> None:
    for file in folder.rglob("*"):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def copy_fsync(source: Path, folder: Path) -> None:
    copy(source, folder)
    _synced(folder / "there")


def copy_twice_fsync(source: Path, folder: Path) -> None:
    copy_fsync(source, folder)
    shutil.copytree(folder / "there", folder / "back")
    _synced(folder / "back")


def ours_load_save(source: Path, folder: Path):
    import torch

    import tt_ckpt
    import tt_models

    def run() -> None:
        config = tt_ckpt.read_config(source)
        model = tt_models.build(tt_models.config_from_hf(config), device="meta", dtype=torch.bfloat16)
        tt_ckpt.load_weights(model, source)
        tt_ckpt.save_hf(model, folder / "there", config=config, source=source)

    return run


def ours_meta(source: Path, folder: Path):
    return _ours(source, folder, "meta")


def ours_torchtune(source: Path, folder: Path):
    return _ours(source, folder, "torchtune")


def ours_hf(source: Path, folder: Path):
    import tt_ckpt

    return lambda: tt_ckpt.convert(source, folder / "there", "hf")


def _ours(source: Path, folder: Path, to: str):
    import tt_ckpt

    def run() -> None:
        tt_ckpt.convert(source, folder / "between", to)
        tt_ckpt.convert(folder / "between", folder / "back", "hf", allow_pickle=True)

    return run


def transformers_load_save(source: Path, folder: Path):
    import torch
    import transformers

    def run() -> None:
        model = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        model.save_pretrained(folder / "there", max_shard_size="450MB")

    return run


def torchtune_there_and_back(source: Path, folder: Path):
    from torchtune.training import FullModelHFCheckpointer

    def run() -> None:
        files = sorted(file.name for file in source.glob("*.safetensors"))
        (folder / "back").mkdir()
        checkpointer = FullModelHFCheckpointer(
            checkpoint_dir=str(source), checkpoint_files=files, model_type="LLAMA2", output_dir=str(folder / "back")
        )
        checkpointer.save_checkpoint(checkpointer.load_checkpoint(), epoch=0)

    return run


def litgpt_there_and_back(source: Path, folder: Path):
    from litgpt import config as names
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
    from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint

    settings = json.loads((source / "config.json").read_text())
    names.name_to_config["bench"] = {
        "name": "bench", "hf_config": {"org": "meta-llama", "name": "Llama-2-bench"}, "block_size": 2048,
        "vocab_size": settings["vocab_size"], "padded_vocab_size": settings["vocab_size"], "n_head": 16,
        "n_layer": settings["num_hidden_layers"], "n_embd": 2048, "n_query_groups": 4, "rotary_percentage": 1.0,
        "parallel_residual": False, "bias": False, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP",
        "intermediate_size": 5504,
    }  # fmt: skip

    def run() -> None:
        between = folder / "between"
        between.mkdir()
        for file in source.iterdir():
            (between / file.name).symlink_to(file)
        convert_hf_checkpoint(between, model_name="bench")
        convert_lit_checkpoint(between, folder / "back")

    return run


CONTESTANTS = {
    "copy": copy,
    "copy, fsync": copy_fsync,
    "tt load, save": ours_load_save,
    "tt convert hf to hf": ours_hf,
    "transformers load, save": transformers_load_save,
    "copy there and back": copy_twice,
    "copy there and back, fsync": copy_twice_fsync,
    "tt hf, meta, hf": ours_meta,
    "tt hf, torchtune, hf": ours_torchtune,
    "torchtune load, convert, save": torchtune_there_and_back,
    "litgpt there and back": litgpt_there_and_back,
}
PATHS = {"torchtune load, convert, save": "CKPT_BENCH_TORCHTUNE", "litgpt there and back": "CKPT_BENCH_LITGPT"}


# ---- running them ----------------------------------------------------------------------------------------------------


def contestant(name: str, source: Path, folder: Path) -> None:
    made = CONTESTANTS[name]
    run = made(source, folder) if not name.startswith("copy") else lambda: made(source, folder)
    print("ready", flush=True)
    sys.stdin.readline()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}), flush=True)


def memory(pid: int) -> tuple[float, float]:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return tuple(int(fields[key].split()[0]) / 1024 if key in fields else 0.0 for key in ("RssAnon", "RssFile"))


def measure(name: str, source: Path) -> dict[str, object]:
    folder = Path(tempfile.mkdtemp(dir=source.parent))
    extra = os.environ.get(PATHS.get(name, ""), "")
    paths = os.pathsep.join(filter(None, [extra, os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, __file__, "--contestant", name, "--source", str(source), "--folder", str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen(command, text=True, env=environment, **pipes)
    try:
        while (line := child.stdout.readline()) and line.strip() != "ready":
            pass
        before = memory(child.pid)
        child.stdin.write("go\n")
        child.stdin.flush()
        anon = mapped = 0.0
        while child.poll() is None:
            now = memory(child.pid)
            anon, mapped = max(anon, now[0] - before[0]), max(mapped, now[1] - before[1])
            time.sleep(0.004)
        lines = [line for line in child.stdout.read().splitlines() if line.startswith('{"wall"')]
        if child.returncode or not lines:
            raise RuntimeError(f"{name} failed")
        equal = any(same(source, folder / back) for back in ("back", "there"))
        return {**json.loads(lines[-1]), "anon": anon, "mapped": mapped, "equal": equal}
    finally:
        child.kill()
        shutil.rmtree(folder)


def same(a: Path, b: Path) -> bool:
    names = sorted(file.name for file in a.iterdir())
    return b.is_dir() and not any(map(len, filecmp.cmpfiles(a, b, names, shallow=False)[1:]))


def make(folder: Path, layers: int) -> Path:
    import torch

    import tt_ckpt
    import tt_models

    source = folder / "source"
    config = {**SHAPE, "num_hidden_layers": layers, "model_type": "llama", "architectures": ["LlamaForCausalLM"],
              "torch_dtype": "bfloat16"}  # fmt: skip
    model = tt_models.build(tt_models.config_from_hf(config), dtype=torch.bfloat16)
    tt_ckpt.save_hf(model, source, config=config, max_shard_size="450MB")
    return source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--only", action="append")
    parser.add_argument("--folder", type=Path, help="where the files lie; a temporary folder by default")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        contestant(arguments.contestant, arguments.source, arguments.folder)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source = make(Path(folder), arguments.layers)
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        print(f"{size / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} shards, {arguments.rounds} rounds\n")
        names = [name for name in CONTESTANTS if not arguments.only or name in arguments.only]
        names = [name for name in names if name not in PATHS or os.environ.get(PATHS[name])]
        found: dict[str, list[dict[str, object]]] = {name: [] for name in names}
        for round_number in range(arguments.rounds):
            for name in names:
                found[name].append(measure(name, source))
                print(f"round {round_number}: {name}", file=sys.stderr, flush=True)
    print("| | wall s | CPU s | RssAnon MiB | RssFile MiB | byte-equal |\n|---|---|---|---|---|---|")
    for name, runs in found.items():
        wall, cpu = (statistics.median(run[key] for run in runs) for key in ("wall", "cpu"))
        anon, mapped = (max(run[key] for run in runs) for key in ("anon", "mapped"))
        equal = "yes" if all(run["equal"] for run in runs) else "no"
        print(f"| {name} | {wall:.2f} | {cpu:.2f} | {anon:.0f} | {mapped:.0f} | {equal} |")


if __name__ == "__main__":
    main()
