"""A model's weights and its optimizer's state in the form others read: whole tensors by name, and files."""
