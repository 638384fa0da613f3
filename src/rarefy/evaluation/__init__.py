"""What a model is worth: perplexity, divergence from the dense model, zero-shot tasks."""
