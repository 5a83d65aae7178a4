"""The backends: one table of primitives each."""
