"""How large the quickstart is: chosen so that one core of a laptop tells the story in under two minutes."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training stage: rows, and the settings that differ between the two stages."""

    num_rows: int
    max_steps: int
    learning_rate: float
    batch_size: int = 32


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of the model, of its two training stages and of the held-out rows."""

    hidden_size: int = 128
    num_hidden_layers: int = 3
    vocab_size: int = 512
    rank: int = 16
    num_held_out: int = 200
    num_base_held_out: int = 100
    pretrain: Stage = Stage(num_rows=3570, max_steps=700, learning_rate=2e-3)
    finetune: Stage = Stage(num_rows=9600, max_steps=600, learning_rate=4e-3)
