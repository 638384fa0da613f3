"""Training that keeps every zero: masks, the distance from the dense model, parametrisations, and the loop."""
