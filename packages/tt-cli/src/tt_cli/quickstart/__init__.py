"""The story that ``tt quickstart`` tells: data, tokenizer, base model, fine-tune, scores, all made on the spot."""
