"""Runs a bound model to learn what its profile holds (docs/profile.md)."""
