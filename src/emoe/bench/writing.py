"""Where benchmarks find the writer of safetensors files: `emoe.checkpoint.writing`."""

from emoe.checkpoint.writing import Progress, TensorToWrite, write_sharded

__all__ = ["Progress", "TensorToWrite", "write_sharded"]
