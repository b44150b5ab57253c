"""Runnable examples; started from the repository root with `python -m examples.NAME`."""
