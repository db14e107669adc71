"""What is read of a checkpoint: configuration, weights, tokenizer, processor."""
