"""Several processes that work on one run: who they are, who solves what, what they sum, how they start and end."""
