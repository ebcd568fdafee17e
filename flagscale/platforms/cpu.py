"""A CPU through gloo: for a laptop, for tests, and for trying a recipe before a cluster does."""

from __future__ import annotations

import platform as host
import time

from flagscale.platforms.platform import Platform

__all__ = ["CPU"]


def _peak_tflops(dtype: str) -> float:
    """Measured, since no data sheet knows the machine: the best of a few matrix products.

    Takes about 0.1 s, also where a CPU without units for the dtype is a hundred times slower at it.
    The product is of the dtype trained in, by the threads this process has.
    """
    import torch

    size, best_seconds = 256, float("inf")
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    left = torch.ones(size, size, dtype=torch_dtype)
    end = time.perf_counter() + 0.1
    while (start := time.perf_counter()) < end:
        left @ left
        best_seconds = min(best_seconds, time.perf_counter() - start)
    return 2 * size**3 / best_seconds / 1e12


CPU = Platform(
    name="cpu",
    description="CPU through gloo (upstream's device calls answered by a shim)",
    detect=lambda: True,
    verify=lambda: None,
    device_name=lambda: host.processor() or host.machine(),
    peak_tflops=_peak_tflops,
    priority=-10,
    megatron_arguments=(
        *("--distributed-backend", "gloo"),
        *("--transformer-impl", "local"),
        "--no-persist-layer-norm",
        "--no-gradient-accumulation-fusion",
        "--no-masked-softmax-fusion",
        "--no-rope-fusion",
    ),
    environment={
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        # Upstream compiles small functions with dynamo; on a CPU the first iteration would pay
        # about ten seconds for it.
        "TORCHDYNAMO_DISABLE": "1",
    },
)
