"""Fine-tuning: texts, blocks of tokens, the training loop."""
