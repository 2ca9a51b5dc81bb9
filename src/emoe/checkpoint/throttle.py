"""A store as slow as one says, for benchmarks."""

from __future__ import annotations

import threading
import time


class Throttle:
    """Makes all threads together read no faster than a bandwidth."""

    def __init__(self, bytes_per_s: float) -> None:
        """No reads yet."""
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0

    def take(self, nbytes: int) -> None:
        """Wait until a store of that bandwidth would have delivered `nbytes` more."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + nbytes / self._bytes_per_s
            wait = self._free_at - time.monotonic()
        time.sleep(max(wait, 0))
