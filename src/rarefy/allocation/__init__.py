"""Sparsity of each layer: rules that say where zeros cost least, at the same total."""
