"""`next-use`: evicts the expert whose next use is farthest, as far as the past tells.

features   what is known of each expert key before a token: recency, frequencies, priors, and what followed earlier
           tokens that were routed alike
network    from there to the chance of use within a few horizons
learning   fitting it to recorded prompts, and to the running ones
scorer     the scorer that engine and simulator share
"""

from emoe.prediction.next_use.scorer import NextUse

__all__ = ["NextUse"]
