"""Hugging Face models: adapters for capture, data, and the fine-tuning recipe."""
