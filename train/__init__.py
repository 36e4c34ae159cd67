"""Data set in, adapter folder out."""
