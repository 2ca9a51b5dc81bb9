"""A process that measures llama.cpp, run by the Python of the cached build.

It imports llama_cpp and numpy, and of emoe only what needs nothing but the standard library: torch is not installed
there. Requests are those of `emoe.bench.worker`:

    {"op": "load", "gguf": ..., "threads": 1, "load_mode": "mmap", "repack": false, "context": 544,
     "record": false}
    {"op": "feed", "prompt": [...], "forced": [...], "seconds": 60}
    {"op": "routes", "tokens": [...]}
    {"op": "stop"}
"""

from __future__ import annotations

import ctypes
import importlib
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from emoe.bench.cores import usable_cores
from emoe.bench.feeding import feed
from emoe.bench.process import memory, reset_peak, storage_bytes_read
from emoe.bench.worker import serve

LOG_ERROR = 4
"""GGML_LOG_LEVEL_ERROR of ggml.h, which the Python package has no name for."""


class Llama:
    """A loaded model with one context, driven through llama.cpp's own C functions."""

    def __init__(self, gguf: str, threads: int, load_mode: str, repack: bool, context: int, record: bool) -> None:
        # Not importable where emoe's other modules are checked and tested.
        self._api: Any = importlib.import_module("llama_cpp")
        self._numpy: Any = importlib.import_module("numpy")
        api = self._api
        self._said: deque[str] = deque(maxlen=3)
        self._log = api.llama_log_callback(self._on_log)
        api.llama_log_set(self._log, None)
        api.llama_backend_init()
        options = api.llama_model_default_params()
        options.n_gpu_layers = 0
        options.load_mode = api.llama_load_mode_from_str(load_mode.encode())
        options.use_extra_bufts = repack
        self._model: Any = api.llama_model_load_from_file(gguf.encode(), options)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {gguf}: {' '.join(self._said)}")
        chosen = api.llama_context_default_params()
        chosen.n_ctx = context
        chosen.n_threads = chosen.n_threads_batch = threads
        self._chosen: list[list[int]] = []  # of the last pass, by layer, where `record` asks for it
        if record:
            self._callback = api.llama_cpp.ggml_backend_sched_eval_callback(self._on_tensor)
            chosen.cb_eval = self._callback
        self._context: Any = api.llama_init_from_model(self._model, chosen)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {context} tokens: {' '.join(self._said)}")
        self._vocabulary = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model)))

    @property
    def threads(self) -> int:
        """As llama.cpp reports them."""
        return int(self._api.llama_n_threads(self._context))

    @property
    def version(self) -> str:
        """Of the Python package, which pins llama.cpp's commit."""
        return str(self._api.__version__)

    def passes(self, prompt: Sequence[int], forced: Sequence[int]) -> Iterator[Any]:
        """The logits [vocabulary], float32, after the prompt and after each forced token, valid until the next.

        Raises:
            ValueError: a token that is not in the vocabulary.
            RuntimeError: llama_decode failed.
        """
        wrong = [token for token in (*prompt, *forced) if not 0 <= token < self._vocabulary]
        if wrong:
            raise ValueError(f"token {wrong[0]} is not one of the model's {self._vocabulary}")
        api = self._api
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        most = int(api.llama_n_batch(self._context))
        for tokens in (prompt, *([token] for token in forced)):
            for start in range(0, len(tokens), most):
                batch = tokens[start : start + most]
                array = (api.llama_token * len(batch))(*batch)
                code = api.llama_decode(self._context, api.llama_batch_get_one(array, len(batch)))
                if code:
                    raise RuntimeError(f"llama_decode of {len(batch)} tokens answered {code}")
            pointer = ctypes.cast(api.llama_get_logits_ith(self._context, -1), ctypes.POINTER(ctypes.c_float))
            yield self._numpy.ctypeslib.as_array(pointer, (self._vocabulary,))

    def routes(self, tokens: Sequence[int]) -> list[list[list[int]]]:
        """[token][layer][k]: the experts that llama.cpp chose for each of `tokens`, fed one by one, best first."""
        found = []
        for _ in self.passes(tokens[:1], tokens[1:]):
            found.append(self._chosen)
            self._chosen = []
        return found

    def _on_log(self, level: int, text: bytes, _: object) -> None:
        """Keep what llama.cpp says last of errors; all of it goes to stderr."""
        words = text.decode(errors="replace")
        sys.stderr.write(words)
        if level == LOG_ERROR:
            self._said.append(words.strip())

    def _on_tensor(self, tensor: int, asked: bool, _: object) -> bool:
        """llama.cpp calls this for each tensor it is about to compute (`asked`: is it wanted?) and has computed."""
        library = self._api.llama_cpp._lib
        library.ggml_get_name.restype = ctypes.c_char_p
        library.ggml_nbytes.restype = ctypes.c_size_t
        pointer = ctypes.c_void_p(tensor)
        if not library.ggml_get_name(pointer).startswith(b"ffn_moe_topk-"):
            return not asked
        if not asked:
            size = library.ggml_nbytes(pointer)
            data = (ctypes.c_int32 * (size // 4))()
            library.ggml_backend_tensor_get(pointer, data, ctypes.c_size_t(0), ctypes.c_size_t(size))
            self._chosen.append(list(data))
        return True

    def log_probability(self, logits: Any, token: int) -> float:
        """Of `token` being the next one, in float64."""
        wide = logits.astype(float)
        top = wide.max()
        return float(wide[token] - top - self._numpy.log(self._numpy.exp(wide - top).sum()))

    def close(self) -> None:
        """Free everything."""
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)


class Worker:
    """The state between requests."""

    def __init__(self) -> None:
        self._llama: Llama | None = None
        self._base_bytes = 0

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Load; peaks are above what the process takes with its imports done."""
        importlib.import_module("llama_cpp")
        reset_peak()
        self._base_bytes = memory().now_bytes
        read, start = storage_bytes_read(), time.perf_counter()
        self._llama = Llama(
            request["gguf"],
            request["threads"],
            request["load_mode"],
            request["repack"],
            request["context"],
            request.get("record", False),
        )
        return {
            "load_s": time.perf_counter() - start,
            "base_bytes": self._base_bytes,
            "load_peak_bytes": memory().peak_bytes - self._base_bytes,
            "load_storage_bytes": storage_bytes_read() - read,
            "threads": self._llama.threads,
            "cores": usable_cores(),
            "notes": [],
            "extra_files": [],
            "versions": {"llama-cpp-python": self._llama.version},
        }

    def feed(self, request: dict[str, Any]) -> dict[str, Any]:
        """Given tokens after a given prompt, measured."""
        if self._llama is None:
            raise RuntimeError("nothing is loaded")
        return feed(
            self._llama.passes(request["prompt"], request["forced"]),
            request["forced"],
            self._llama.log_probability,
            seconds=request["seconds"],
            base_bytes=self._base_bytes,
        ).as_dict()

    def routes(self, request: dict[str, Any]) -> dict[str, Any]:
        """The experts chosen for given tokens. The model must have been loaded with "record"."""
        if self._llama is None:
            raise RuntimeError("nothing is loaded")
        return {"routes": self._llama.routes(request["tokens"])}

    def stop(self, _: dict[str, Any]) -> dict[str, Any]:
        """Free everything."""
        if self._llama is not None:
            self._llama.close()
            self._llama = None
        return {}


if __name__ == "__main__":
    worker = Worker()
    serve({"load": worker.load, "feed": worker.feed, "routes": worker.routes, "stop": worker.stop})
