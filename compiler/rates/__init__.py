"""How fast machines are: presets of known cards, measurements of this machine, and the file that keeps them."""
