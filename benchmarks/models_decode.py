"""Greedy decoding of 128 tokens by a Llama of 134M, batch 1: tt-models and transformers' ``generate``, alternated.

    OMP_NUM_THREADS=1 python benchmarks/models_decode.py --rounds 7

Tokens per CPU second of one thread, medians; KV memory is what the caches hold. In fp32 the text must be the same.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from models_speed import SHAPE, processor

import tt_models

PROMPT, NEW = 32, 128


def measure(dtype: torch.dtype, kv_heads: int, rounds: int) -> dict:
    torch.manual_seed(0)
    shape = SHAPE | {"num_key_value_heads": kv_heads}
    ours = tt_models.build(tt_models.config_from_hf(shape), dtype=dtype).eval()
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**shape)).to(dtype).eval()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(0, SHAPE["vocab_size"], (1, PROMPT))
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW}

    def run_ours() -> torch.Tensor:
        return tt_models.generate(ours, ids, max_new_tokens=NEW, temperature=0)

    def run_theirs() -> torch.Tensor:
        return theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)

    runs = {"tt-models": run_ours, "transformers": run_theirs}
    texts = [run() for run in runs.values()]
    assert dtype != torch.float32 or texts[0].equal(texts[1]), "greedy decoding must be the same in fp32"
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            start = time.process_time()
            runs[name]()
            times[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    cache = tt_models.KVCache(ours.config, batch_size=1, max_seq_len=PROMPT + NEW, dtype=dtype)
    return {
        "tokens_per_cpu_s": {name: round(NEW / value, 2) for name, value in medians.items()},
        "over_transformers": round(medians["transformers"] / medians["tt-models"], 3),
        "kv_cache_bytes": cache.nbytes,
        "kv_bytes_per_token": cache.nbytes // (PROMPT + NEW),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "models_decode.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name, dtype, kv_heads in (
        ("bf16", torch.bfloat16, 12),
        ("bf16_kv4", torch.bfloat16, 4),
        ("fp32", torch.float32, 12),
    ):
        results[name] = measure(dtype, kv_heads, arguments.rounds)
        print(name, results[name], flush=True)
    report = {
        "shape": SHAPE | {"prompt": PROMPT, "new_tokens": NEW},
        "rounds": arguments.rounds,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": {"processor": processor(), "python": platform.python_version(), "threads": 1},
        "results": results,
    }
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
