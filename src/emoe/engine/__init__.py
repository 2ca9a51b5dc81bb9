"""Continuous batching over the bound model."""
