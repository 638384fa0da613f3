"""From text to hidden states: where the calibration text comes from, and how it is fed through the model."""
