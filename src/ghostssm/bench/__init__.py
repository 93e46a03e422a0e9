"""Measurement of what a smaller state buys."""
