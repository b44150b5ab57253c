"""The quick start: real medical images out of Python packages, a tiny model, three phases."""
