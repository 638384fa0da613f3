"""Calibration: where its text comes from, and how it is fed through the model."""
