"""Traces served on a virtual clock: what each policy would have missed, beside the best possible.

lookups    a trace as look-ups in the order in which they are served
banks      per-layer banks for all capacities at once (fast, numpy)
shared     one bank for all layers, through the engine's own slot table
policies   eviction rules, scorers and planned predictors by name
learning   what policies learn from before
asking     when a predictor is asked, and what it is told
bindings   where a miss is loaded, and where it is rerouted
runs       policies x capacities over a trace, with Belady's rule beside them
prompts    per-prompt counts, where the order of tokens is not known
clock      latency, of loads on a link and layers that compute
replay     an engine's own trace through the engine's own pool
generate   traces routed at random
plot       Belady ratio and hit rate against capacity
"""
