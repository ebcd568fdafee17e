"""NVIDIA GPUs: what upstream is written for. Nothing is changed but the upstream fixes."""

from __future__ import annotations

from pathlib import Path

from flagscale.platforms.platform import Platform

__all__ = ["CUDA"]

# Dense tensor-core peaks in TFLOP/s for bf16 and fp16, from NVIDIA's data sheets (SXM parts where
# they differ); fp32 is TF32's.
_PEAK_TFLOPS = {
    "A100": {"bf16": 312.0, "fp16": 312.0, "fp32": 156.0},
    "A800": {"bf16": 312.0, "fp16": 312.0, "fp32": 156.0},
    "H100": {"bf16": 989.0, "fp16": 989.0, "fp32": 494.0},
    "H200": {"bf16": 989.0, "fp16": 989.0, "fp32": 494.0},
    "H800": {"bf16": 989.0, "fp16": 989.0, "fp32": 494.0},
    "B200": {"bf16": 2250.0, "fp16": 2250.0, "fp32": 1125.0},
}


def _detect() -> bool:
    # The kernel driver's control device, or WSL's; torch must not be imported to find out.
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()


def _verify() -> str | None:
    import torch

    if torch.cuda.is_available():
        return None
    return "torch.cuda.is_available() is false"


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name()


def _peak_tflops(dtype: str) -> float | None:
    name = _device_name()
    for model, peaks in _PEAK_TFLOPS.items():
        if model in name:
            return peaks.get(dtype)
    return None


CUDA = Platform(
    name="cuda",
    description="NVIDIA GPUs through NCCL",
    detect=_detect,
    verify=_verify,
    device_name=_device_name,
    peak_tflops=_peak_tflops,
    priority=10,
    environment={"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
)
