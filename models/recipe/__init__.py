"""Fine-tuning: texts, blocks of tokens, the loop."""
