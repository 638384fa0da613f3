"""Runs and sweeps on one HTML page that opens without a network."""
