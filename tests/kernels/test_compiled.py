"""The kernels over slots, compiled for real GPUs without one: shared memory fits, and no address overflows."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

TARGETS = (80, 90, 120)
SHARED_BYTES = 99 << 10
"""Of one program at most on compute capability 8.6, 8.9 and 12.0, the least of all from 8.0 on."""


def compiled(target: int, name: str, dtype: str, **constants: Any) -> Any:
    """A kernel for weights whose rows are contiguous, with its arguments' alignment as it is in a bank."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from emoe.kernels import triton_products

    kernel = getattr(triton_products, name)
    constants |= {"w_in": 1, "BIASED": True}
    pointers = dict.fromkeys(("x", "w", "bias", "y"), f"*{dtype}") | dict.fromkeys(("slots", "tiles"), "*i32")
    signature = {each: "constexpr" if each in constants else pointers.get(each, "i32") for each in kernel.arg_names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, each in enumerate(signature) if signature[each] != "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", target, 32))


def main() -> None:
    """Compile; print what was found, for the test below: here Triton's interpreter is not in the way."""
    from emoe.kernels.triton_products import FEW_IN, FEW_OUT, MANY_IN, MANY_OUT, block_rows

    found = []
    for target in TARGETS:
        for dtype in ("bf16", "fp32"):
            kernels = {"_few": {"OUT": FEW_OUT, "IN": FEW_IN}}
            kernels["_many"] = {"OUT": MANY_OUT, "IN": MANY_IN, "ROWS": block_rows(1e9)}
            for name, constants in kernels.items():
                kernel = compiled(target, name, dtype, **constants)
                # One slot's number is loaded as i32; what it is multiplied by is a slot's stride, of any bank.
                wide = re.findall(r"arith\.muli %slot\w*, %\w+ : (\w+)", kernel.asm["ttir"])
                found.append([target, dtype, name, kernel.metadata.shared, wide, len(kernel.asm["cubin"])])
    print(json.dumps(found))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_they_compile_for_every_architecture_and_fit() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__],
        check=False,
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(TARGETS) * 4
    for target, dtype, name, shared, wide, size in found:
        assert shared <= SHARED_BYTES and size, (target, dtype, name, shared)
        assert wide and set(wide) == {"i64"}, (target, dtype, name, wide)


if __name__ == "__main__":
    main()
