"""Cached teacher features."""
