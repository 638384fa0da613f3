"""All that differs between models: where their blocks are, and how checkpoints are read and written."""
