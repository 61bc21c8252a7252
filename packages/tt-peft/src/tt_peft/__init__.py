"""LoRA, QLoRA and DoRA on any nn.Module, in place; merge; PEFT adapter files both ways."""

__version__ = "0.1.0"
