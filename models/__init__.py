"""Hugging Face: adapters for capture, data, and the fine-tuning recipe."""
