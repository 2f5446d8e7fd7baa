"""A model's values on their way into chunks and buffers: from modules, from files, quantised."""
