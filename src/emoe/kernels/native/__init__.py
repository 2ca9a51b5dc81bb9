"""The C kernels: their source, how it is compiled on first use, and how it is called."""
