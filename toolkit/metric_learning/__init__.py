"""Metric learning: losses that shape an embedding, and measures of what it is good for."""
