"""Which experts the coming requests need: predictors behind small protocols (docs/architecture.md)."""
