"""What each way to save memory saves: peak resident memory of a process that trains a model of 42 million parameters.

Prints a table: the growth of peak memory in MiB over three steps of 4 x 512 tokens in fp32.
"""

import json
import resource
import subprocess
import sys

CONFIG = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip
WAYS = {
    "plain": {},
    "activation_checkpointing: full": {"how": "full"},
    "activation_checkpointing: 2": {"how": 2},
    "activation_checkpointing: selective": {"how": "selective"},
    "optimizer_in_backward": {"in_backward": True},
    "optimizer adamw8bit": {"optimizer": "adamw8bit"},
    "optimizer adamw4bit": {"optimizer": "adamw4bit"},
    "full, and in backward": {"how": "full", "in_backward": True},
    "full, adamw8bit, and in backward": {"how": "full", "optimizer": "adamw8bit", "in_backward": True},
}


def measure(how: str | int | None = None, optimizer: str = "adamw", in_backward: bool = False) -> int:
    """Growth of the peak in MiB, in this process."""
    import torch

    import tt_models
    from tt_train.config import OptimizerSection
    from tt_train.losses.cross_entropy import cross_entropy
    from tt_train.memory import checkpoint_activations_
    from tt_train.optim.optimizers import decayed, make_optimizer
    from tt_train.step import train_step

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    make_optimizer([{"params": [torch.nn.Parameter(torch.zeros(64, 128))]}], OptimizerSection(name=optimizer))
    before = peak()
    model = tt_models.build(tt_models.config_from_hf(CONFIG)).train()
    if how is not None:
        checkpoint_activations_(model, how)
    chosen = make_optimizer(decayed(model.parameters()), OptimizerSection(name=optimizer), in_backward=in_backward)
    ids = torch.randint(0, 8192, (4, 512))
    for _ in range(3):
        train_step(model, [{"input_ids": ids, "labels": ids}], cross_entropy, chosen)
    return round(peak() - before)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(measure(**json.loads(sys.argv[1])))
    else:
        for name, way in WAYS.items():
            ran = subprocess.run(
                [sys.executable, __file__, json.dumps(way)], capture_output=True, text=True, check=True
            )
            print(f"{name:40} {ran.stdout.strip().splitlines()[-1]}", flush=True)
