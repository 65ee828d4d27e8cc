"""What a researcher changes: formulas by name, one entry each, with what the rest must know of them."""
