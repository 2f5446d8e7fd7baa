"""Brings a model's values into chunks and buffers: from modules, from files, or quantised."""
