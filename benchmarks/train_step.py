"""Tokens per CPU-second of a training step, ours and transformers' (with peft for LoRA), alternated on one thread.

Both contestants run as their own process on the same token batches, with fused AdamW, no clipping, and must train: the
losses are compared. What trains is fp32 in both, as `tt run` and transformers' Trainer with `bf16=True` have it: with
bf16 a full model here is bf16 with the bits that rounding lost, there fp32 under autocast; adapters are fp32 over bf16.
Usage: python benchmarks/train_step.py [--rounds 3] [--steps 4] [--shape small|base]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

SHAPES = {
    "small": {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "heads": 4},
    "base": {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "heads": 12},
}
CASES = [("full", "fp32"), ("full", "bf16"), ("lora q,v", "bf16"), ("lora all-linear", "bf16")]
BATCH, LENGTH = 4, 512


def hf_config(shape: str) -> dict[str, object]:
    sizes = dict(SHAPES[shape])
    heads = sizes.pop("heads")
    fixed = {
        "model_type": "llama", "rope_theta": 1e4, "max_position_embeddings": LENGTH, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    head_dim = sizes["hidden_size"] // heads
    return {**sizes, **fixed, "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": head_dim}


def targets(method: str) -> list[str]:
    everything = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return everything if method.endswith("all-linear") else ["q_proj", "v_proj"]


def ours(shape: str, method: str, dtype):
    import torch

    import tt_models
    import tt_peft
    from tt_train.config import OptimizerSection
    from tt_train.losses.cross_entropy import cross_entropy
    from tt_train.optim.optimizers import decayed, make_optimizer
    from tt_train.step import train_step

    full = method == "full"
    model = tt_models.build(tt_models.config_from_hf(hf_config(shape)), dtype=torch.float32 if full else dtype).train()
    if not full:
        chosen = tuple(targets(method))
        tt_peft.apply_lora_(model, tt_peft.LoRAConfig(rank=8, target_modules=chosen, dtype=torch.float32))
    groups = decayed(parameter for parameter in model.parameters() if parameter.requires_grad)
    optimizer = make_optimizer(groups, OptimizerSection(lr=1e-3), narrow=full and dtype == torch.bfloat16)
    return lambda ids: train_step(model, [{"input_ids": ids, "labels": ids}], cross_entropy, optimizer).loss


def theirs(shape: str, method: str, dtype):
    import torch
    import transformers

    config = transformers.LlamaConfig(**{k: v for k, v in hf_config(shape).items() if k != "model_type"})
    full = method == "full"
    model = transformers.LlamaForCausalLM(config).to(torch.float32 if full else dtype).train()
    if not full:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets(method)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)

    def step(ids):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def contestant(name: str, shape: str, method: str, dtype: str, steps: int) -> None:
    """One process: warm up, time, and print a line of JSON."""
    import resource

    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    make = {"tt": ours, "transformers": theirs}[name]
    step = make(shape, method, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 4096, (BATCH, LENGTH), generator=generator)
    losses = [step(ids)]
    began = time.process_time()
    losses += [step(ids) for _ in range(steps)]
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"rate": BATCH * LENGTH * steps / seconds, "peak_mb": peak, "losses": losses}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--contestant", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        name, method, dtype = options.contestant
        return contestant(name, options.shape, method, dtype, options.steps)
    print(f"| {options.shape}, {BATCH} x {LENGTH} | tt, tokens/CPU-s | transformers (+ peft) | ratio | peak MB, both |")
    print("|---|---|---|---|---|")
    for method, dtype in CASES:
        found: dict[str, list[dict[str, float]]] = {"tt": [], "transformers": []}
        for _ in range(options.rounds):
            for name, rows in found.items():
                command = [sys.executable, __file__, "--shape", options.shape, "--steps", str(options.steps),
                           "--contestant", name, method, dtype]  # fmt: skip
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
                rows.append(json.loads(answer.splitlines()[-1]))
        first, second = (statistics.median(row["rate"] for row in rows) for rows in found.values())
        peaks = ", ".join(f"{statistics.median(row['peak_mb'] for row in rows):.0f}" for rows in found.values())
        losses = [rows[0]["losses"] for rows in found.values()]
        print(f"| {method} {dtype} | {first:.0f} | {second:.0f} | {first / second:.2f} | {peaks} |", flush=True)
        assert all(row[-1] < row[0] for row in losses), losses


if __name__ == "__main__":
    main()
