"""Faults against real clusters, and the demo that survives them."""
