"""The loop over blocks, and what may happen to a block in it: collected, solved, written, advanced."""
