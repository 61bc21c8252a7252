"""Memory and time of QLoRA on a Llama of 1.1 billion parameters: load, and train three steps with checkpointing. CPU.

Each contestant is a process of its own with one thread and its own imports, over the same files and token ids. Peaks
of resident memory are the kernel's (VmHWM): above what the process has after its imports, and of the whole process with
them. "own" (RssAnon, sampled every 5 ms, above the imports) leaves out mapped file pages, which the system takes back
at need (transformers leaves a bf16 base mapped). `nox -s bench -- peft_qlora`; `--quick`: small.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUICK = "--quick" in sys.argv
SHAPE = {  # TinyLlama-1.1B
    "vocab_size": 32000,
    "hidden_size": 512 if QUICK else 2048,
    "intermediate_size": 1408 if QUICK else 5632,
    "num_hidden_layers": 4 if QUICK else 22,
    "num_attention_heads": 8 if QUICK else 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS, LENGTH, STEPS = 1, 128, 3


def memory_mib(key: str) -> float:
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) / 1024


class Own(threading.Thread):
    """The most memory of its own that the process had since the start, above that at the start."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.begin = memory_mib("RssAnon")
        self.peak = 0.0

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, memory_mib("RssAnon") - self.begin)
            time.sleep(0.005)


def write_model(folder: Path) -> None:
    """Random weights in bf16, as transformers writes them, in files of 500 MB."""
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).bfloat16()
    model.save_pretrained(folder, max_shard_size="500MB")


def with_tt(folder: Path, *, quantize: bool) -> nn.Module:
    import tt_ckpt
    import tt_models
    import tt_peft
    from tt_train.memory import checkpoint_activations_

    config = tt_models.config_from_hf(tt_ckpt.read_config(folder))
    model = tt_models.build(config, device="meta", dtype=torch.bfloat16)
    tt_peft.apply_lora_(model, tt_peft.LoRAConfig(rank=8, target_modules="all-linear", quantize_base=quantize))
    tt_ckpt.load_weights(model, folder, dtype=torch.bfloat16, device="cpu", check_finite=False)
    tt_peft.init_adapter_(model)
    checkpoint_activations_(model)
    return model


def with_torchao(folder: Path) -> nn.Module:
    """torchao's own linear: the same model, but F.linear on its NF4Tensor in place of ours."""
    from tt_peft import lora, nf4

    lora.FUSE_FROM_ROWS = 10**9
    lora.frozen_linear = F.linear  # type: ignore[assignment]
    nf4.frozen_linear = F.linear  # type: ignore[assignment]
    return with_tt(folder, quantize=True)


def with_peft(folder: Path, *, quantize: bool) -> nn.Module:
    import peft
    import transformers

    options = {}
    if quantize:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", **options)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return peft.get_peft_model(
        model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS), autocast_adapter_dtype=False
    )


CONTESTANTS: dict[str, Callable[[Path], nn.Module]] = {
    "tt LoRA bf16": lambda folder: with_tt(folder, quantize=False),
    "tt QLoRA NF4": lambda folder: with_tt(folder, quantize=True),
    "tt, torchao's linear": with_torchao,
    "transformers + peft LoRA bf16": lambda folder: with_peft(folder, quantize=False),
    "transformers + peft + bitsandbytes NF4": lambda folder: with_peft(folder, quantize=True),
}
IMPORTS = {  # torch's optimizers import dynamo at their first step
    "tt": ("torch._dynamo", "tt_ckpt", "tt_models", "tt_peft", "tt_train.memory"),
    "tt QLoRA": ("torchao.quantization",),
    "tt, torchao": ("torchao.quantization",),
    "transformers": ("torch._dynamo", "transformers", "peft"),
    "transformers + peft + bits": ("bitsandbytes",),
}


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    result = model(ids)
    logits: Tensor = result if isinstance(result, Tensor) else result.logits
    return logits


def one(name: str, folder: Path) -> dict[str, float]:
    """Runs inside of its own process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for start, modules in IMPORTS.items():
        for module in modules if name.startswith(start) else ():
            __import__(module)
    imports, most = memory_mib("VmRSS"), memory_mib("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    own = Own()
    own.start()
    begin = time.process_time()
    model = CONTESTANTS[name](folder).train()
    loaded = time.process_time() - begin
    loading_peak = memory_mib("VmHWM") - imports
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    ids = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) * 7919 % SHAPE["vocab_size"]
    seconds, losses = [], []
    for _ in range(STEPS):
        begin = time.process_time()
        loss = F.cross_entropy(logits_of(model, ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - begin)
        losses.append(loss.item())
    return {
        "load_s": loaded,
        "load_mib": loading_peak,
        "peak_mib": memory_mib("VmHWM") - imports,
        "own_mib": own.peak,
        "whole_mib": max(most, memory_mib("VmHWM")),
        "step_s": min(seconds[1:]),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def main() -> None:
    if "--write" in sys.argv:
        write_model(Path(sys.argv[sys.argv.index("--write") + 1]))
        return
    if "--one" in sys.argv:
        index = sys.argv.index("--one")
        print(json.dumps(one(sys.argv[index + 1], Path(sys.argv[index + 2]))))
        return
    flags = ["--quick"] if QUICK else []
    print(f"{SHAPE['hidden_size']} wide, {SHAPE['num_hidden_layers']} layers, batch {ROWS} x {LENGTH}\n")
    print("| | load CPU s | loading MiB | peak MiB | of tt LoRA | own MiB | of | whole MiB | of | step CPU s | loss |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, __file__, "--write", scratch, *flags], check=True)
        base: dict[str, float] = {}
        for name in CONTESTANTS:
            words = [sys.executable, __file__, "--one", name, scratch, *flags]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"| {name} | {done.stderr.strip().splitlines()[-1][:90]} |")
                continue
            found = json.loads(done.stdout.strip().splitlines()[-1])
            base = base or found
            kinds = ("peak_mib", "own_mib", "whole_mib")
            memory = " | ".join(f"{found[kind]:.0f} | {found[kind] / base[kind]:.1%}" for kind in kinds)
            print(
                f"| {name} | {found['load_s']:.1f} | {found['load_mib']:.0f} | {memory} | {found['step_s']:.2f} "
                f"| {found['first_loss']:.3f} -> {found['last_loss']:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
