"""What a researcher changes: formulas by name, one entry each, with what the rest of the house must know of them."""
