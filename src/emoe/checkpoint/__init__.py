"""Experts at rest: where each expert's bytes lie in a safetensors checkpoint, and readers that fetch them."""
