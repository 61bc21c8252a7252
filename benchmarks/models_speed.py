"""Forward, and forward with backward, of a Llama of 134M: tt-models, transformers and a plain loop, alternated.

    OMP_NUM_THREADS=1 python benchmarks/models_speed.py --rounds 7

CPU seconds of one thread, medians; the ratio is transformers' over ours, so above 1 is faster. Every contestant has the
same weights, and its logits are compared before the clock starts.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import tt_models

SHAPE = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
}
BATCH, SEQ_LEN = 4, 512


class Loop:
    """A Llama by hand: fused query-key-value and gate-up products, SDPA, no modules."""

    def __init__(self, state: dict[str, Tensor], config: dict) -> None:
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config["hidden_size"] // self.heads
        self.layers = []
        for index in range(config["num_hidden_layers"]):
            name = f"model.layers.{index}."
            qkv = torch.cat([state[f"{name}self_attn.{x}_proj.weight"] for x in "qkv"])
            gate_up = torch.cat([state[f"{name}mlp.{x}_proj.weight"] for x in ("gate", "up")])
            rest = [f"{name}self_attn.o_proj", f"{name}mlp.down_proj"]
            norms = [f"{name}input_layernorm", f"{name}post_attention_layernorm"]
            self.layers.append([leaf(x) for x in (qkv, gate_up, *(state[f"{x}.weight"] for x in rest + norms))])
        names = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
        self.embed, self.norm, self.head = (leaf(state[x]) for x in names)
        frequencies = 1.0 / config["rope_theta"] ** (torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = torch.arange(config["max_position_embeddings"])[:, None] * frequencies
        self.cos, self.sin = (x.to(self.embed.dtype) for x in (angles.cos(), angles.sin()))

    def parameters(self) -> list[Tensor]:
        return [self.embed, self.norm, self.head, *(weight for layer in self.layers for weight in layer)]

    def rotate(self, x: Tensor) -> Tensor:
        cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def __call__(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.embed)
        batch, length = ids.shape
        sizes = [self.heads, self.kv_heads, self.kv_heads]
        for qkv, gate_up, out, down, norm_1, norm_2 in self.layers:
            heads = F.linear(F.rms_norm(x, x.shape[-1:], norm_1, 1e-6), qkv).view(batch, length, -1, self.head_dim)
            q, k, v = heads.transpose(1, 2).split(sizes, dim=1)
            grouped = self.heads != self.kv_heads
            y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True, enable_gqa=grouped)
            x = x + F.linear(y.transpose(1, 2).flatten(2), out)
            gate, up = F.linear(F.rms_norm(x, x.shape[-1:], norm_2, 1e-6), gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, down)
        return F.linear(F.rms_norm(x, x.shape[-1:], self.norm, 1e-6), self.head)


def leaf(weight: Tensor) -> Tensor:
    return weight.detach().clone().requires_grad_()


def contestants(dtype: torch.dtype) -> dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]]:
    torch.manual_seed(0)
    ours = tt_models.build(tt_models.config_from_hf(SHAPE), dtype=dtype)
    config = transformers.AutoConfig.for_model(**SHAPE)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype)
    theirs.load_state_dict(ours.state_dict(), assign=True)  # the same memory: where weights lie costs up to 10 %
    loop = Loop(ours.state_dict(), SHAPE)
    return {
        "tt-models": (ours, list(ours.parameters())),
        "transformers": (lambda ids: theirs(ids, use_cache=False).logits, list(theirs.parameters())),
        "loop": (loop, loop.parameters()),
    }


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float]]:
    ids = torch.randint(0, SHAPE["vocab_size"], (BATCH, SEQ_LEN))
    upstream = torch.randn(BATCH, SEQ_LEN, SHAPE["vocab_size"]).to(dtype) / ids.numel()
    models = contestants(dtype)
    check_agreement(models, ids, 1e-4 if dtype == torch.float32 else 5e-2)
    times: dict[str, dict[str, list[float]]] = {"forward": {}, "forward_backward": {}}
    for turn in range(rounds + 1):
        for name in rotated(list(models), turn):
            model, parameters = models[name]
            with torch.no_grad():
                forward = seconds(lambda: model(ids))  # noqa: B023
            both = seconds(lambda: model(ids).backward(upstream))  # noqa: B023
            for parameter in parameters:
                parameter.grad = None
            if turn:  # the first round warms up
                times["forward"].setdefault(name, []).append(forward)
                times["forward_backward"].setdefault(name, []).append(both)
    return {kind: {name: statistics.median(values) for name, values in found.items()} for kind, found in times.items()}


def rotated(names: list[str], turn: int) -> list[str]:
    """Another order in every round."""
    start = turn % len(names)
    return names[start:] + names[:start]


def check_agreement(models: dict, ids: Tensor, tolerance: float) -> None:
    with torch.no_grad():
        logits = [model(ids[:1]).float() for model, _ in models.values()]
    for other in logits[1:]:
        error = ((other - logits[0]).abs().max() / logits[0].abs().max()).item()
        assert error < tolerance, f"the contestants disagree by {error}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "models_speed.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for kind, found in measure(dtype, arguments.rounds).items():
            tokens = {who: round(BATCH * SEQ_LEN / value, 1) for who, value in found.items()}
            ratios = {f"over_{who}": round(found[who] / found["tt-models"], 3) for who in ("transformers", "loop")}
            results[f"{name}_{kind}"] = {"tokens_per_cpu_s": tokens, **ratios}
            print(name, kind, tokens, ratios, flush=True)
    report = {
        "shape": SHAPE | {"batch": BATCH, "seq_len": SEQ_LEN},
        "rounds": arguments.rounds,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": {"processor": processor(), "python": platform.python_version(), "threads": 1},
        "results": results,
    }
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
