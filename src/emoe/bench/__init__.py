"""Measuring: checkpoints of named shapes, and decoding speed beside transformers and accelerate."""
