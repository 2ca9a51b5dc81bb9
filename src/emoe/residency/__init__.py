"""Experts in fast memory: budget arithmetic, slots and their states, eviction rules, banks, loader threads."""
