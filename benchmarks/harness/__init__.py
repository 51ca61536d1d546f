"""Measures providers of the losses side by side, and reports the results."""
