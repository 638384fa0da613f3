"""Smaller models: what can be removed from one, which of it to remove, and the model without it."""
