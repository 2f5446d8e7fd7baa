"""A model's weights and its optimizer's state as others read them: whole tensors by name, and files."""
