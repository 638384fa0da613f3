"""What a model is worth and whether its files keep their promise."""
