"""What updates the weights: optimizers, fp32 weights behind bf16, and the learning rate."""
