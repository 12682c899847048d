"""Sweeps: thousands of setups estimated, simulated or measured, on one machine or on a Ray cluster."""
