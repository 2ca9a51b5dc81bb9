"""One module for each figure and table of the paper; each has an `EXPERIMENT`."""
