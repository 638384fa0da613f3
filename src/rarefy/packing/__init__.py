"""Packed checkpoints: only the weights that are not zero and a mask of one bit a weight, on disk and in memory."""
