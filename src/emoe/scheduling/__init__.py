"""Which request runs next: Algorithm 1 of the paper, the baselines, and the cost of a step."""
