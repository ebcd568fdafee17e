"""Upstream's device calls, answered by a CPU: what lets the real training loop run on gloo.

Upstream asks ``torch.cuda`` for streams, generators and a current device, names the device
``"cuda"`` when it makes a tensor, and recognises its parameters by the type name
``torch.cuda.FloatTensor``. Each of these is answered here with the CPU's equivalent, and nothing
else: ``torch.cuda.is_available()`` stays false, so that pinned memory, dynamo and the profiler
behave as on any machine without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from flagscale.patches.registry import Condition, Kind, Patch, PatchGroup
from flagscale.platforms import active_platform

__all__ = ["DEVICE_GROUP", "INITIALIZE_GROUP"]


def _on_cpu(device: Any) -> Any:
    """The CPU for whatever names a CUDA device; anything else unchanged."""
    if isinstance(device, str):
        return "cpu" if device.startswith("cuda") else device
    if getattr(device, "type", None) == "cuda":
        return "cpu"
    return device


def _redirect_factory(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return original(*args, **kwargs)

    return factory


def _redirect_to(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return original(self, *(_on_cpu(arg) for arg in args), **kwargs)

    return to


def _stay(_original: Callable[..., Any]) -> Callable[..., Any]:
    def cuda(self: Any, *_args: Any, **_kwargs: Any) -> Any:
        return self

    return cuda


def _cuda_type_name(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def type_(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        # Upstream groups and clips only what it recognises by this name.
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    return type_


def _do_nothing(_original: Callable[..., Any]) -> Callable[..., None]:
    def do_nothing(*_args: Any, **_kwargs: Any) -> None:
        return None

    return do_nothing


def _answer_cpu(_original: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    cpu = torch.device("cpu")
    return lambda: cpu


def _processes_on_this_node(_original: Callable[..., Any]) -> Callable[[], int]:
    # Upstream builds its model-parallel groups only where it counts devices.
    return lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _call_now(_original: Callable[..., Any]) -> Callable[..., None]:
    # Without a CUDA context torch queues these calls for ever: a random state that upstream
    # "restored" would silently not have been.
    def lazy_call(call: Callable[[], Any], **_kwargs: Any) -> None:
        call()

    return lazy_call


def _cpu_rng_state(_original: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    return lambda *_args, **_kwargs: torch.default_generator.get_state()


def _set_cpu_rng_state(_original: Callable[..., Any]) -> Callable[..., None]:
    import torch

    def set_rng_state(new_state: Any, *_args: Any, **_kwargs: Any) -> None:
        torch.default_generator.set_state(new_state)

    return set_rng_state


def _seed_cpu(_original: Callable[..., Any]) -> Callable[[int], None]:
    import torch

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    return manual_seed


class _SameForEveryIndex:
    def __init__(self, value: Any) -> None:
        self._value = value

    def __getitem__(self, _index: object) -> Any:
        return self._value


def _cpu_generator(_original: Any) -> _SameForEveryIndex:
    import torch

    return _SameForEveryIndex(torch.default_generator)


class _Stream:
    """A CPU executes in program order: every stream is the same one, and always done."""

    cuda_stream = 0

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, _stream: object) -> None: ...

    def wait_event(self, _event: object) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_exception: object) -> None: ...


class _Event:
    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self._seconds = time.perf_counter()

    def record(self, _stream: object = None) -> None:
        self._seconds = time.perf_counter()

    def synchronize(self) -> None: ...

    def wait(self, _stream: object = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds, as torch's."""
        return (end._seconds - self._seconds) * 1000.0


def _one_stream(_original: Callable[..., Any]) -> Callable[..., _Stream]:
    stream = _Stream()
    return lambda *_args, **_kwargs: stream


def _no_context(_original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: contextlib.nullcontext()


def _cpu_properties(_original: Callable[..., Any]) -> Callable[..., SimpleNamespace]:
    # Compute capability 0: no code path for a particular GPU generation is ever chosen.
    properties = SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=0
    )
    return lambda *_args, **_kwargs: properties


def _split_sizes_as_lists(original: Callable[..., Any]) -> Callable[..., Any]:
    # On a GPU upstream copies the token counts of MoE's all-to-all to the host, as lists; on a CPU
    # the copy is skipped, and they arrive as the tensors they were.
    def as_list(sizes: Any) -> Any:
        return sizes.tolist() if hasattr(sizes, "tolist") else sizes

    @functools.wraps(original)
    def all_to_all_single(
        output: Any,
        input: Any,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return original(
            output, input, as_list(output_split_sizes), as_list(input_split_sizes), *args, **kwargs
        )

    return all_to_all_single


def _allow_no_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "allow_no_cuda": True})

    return initialize_megatron


def _keep_device_rng(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def build_train_valid_test_data_iterators(*args: Any, **kwargs: Any) -> Any:
        import torch

        # A data loader draws a seed from the host's generator. On a CPU that is the device's too,
        # and a restart, which builds its loaders after it has restored the generator, would drop
        # out other activations than the run it continues.
        state = torch.default_generator.get_state()
        try:
            return original(*args, **kwargs)
        finally:
            torch.default_generator.set_state(state)

    return build_train_valid_test_data_iterators


def _builtin(replacement: Callable[[Any], Any], module: str, *names: str) -> tuple[Patch, ...]:
    return tuple(Patch(f"{module}:{name}", Kind.BUILTIN, replacement) for name in names)


_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like"),
    *("linspace", "ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like"),
    *("randperm", "tensor", "zeros", "zeros_like"),
)

_ON_CPU = Condition(
    lambda: active_platform().name == "cpu",
    when_true="the platform is cpu",
    when_false="the platform is not cpu",
)

DEVICE_GROUP = PatchGroup(
    name="cpu-device",
    patches=(
        *_builtin(_redirect_factory, "torch", *_FACTORIES),
        *_builtin(_redirect_to, "torch", "Tensor.to"),
        *_builtin(_stay, "torch", "Tensor.cuda"),
        *_builtin(_cuda_type_name, "torch", "Tensor.type"),
        *_builtin(_call_now, "torch.cuda", "_lazy_call"),
        *_builtin(_processes_on_this_node, "torch.cuda", "device_count"),
        *_builtin(_answer_cpu, "torch.cuda", "current_device"),
        *_builtin(_do_nothing, "torch.cuda", "set_device", "synchronize", "set_stream"),
        *_builtin(_do_nothing, "torch.cuda.nvtx", "range_push", "range_pop"),
        *_builtin(_one_stream, "torch.cuda", "current_stream", "default_stream"),
        *_builtin(_no_context, "torch.cuda", "stream"),
        *_builtin(lambda _original: _Stream, "torch.cuda", "Stream"),
        *_builtin(lambda _original: _Event, "torch.cuda", "Event"),
        *_builtin(_cpu_rng_state, "torch.cuda", "get_rng_state"),
        *_builtin(_cpu_rng_state, "torch.cuda.random", "get_rng_state"),
        *_builtin(_set_cpu_rng_state, "torch.cuda", "set_rng_state"),
        *_builtin(_seed_cpu, "torch.cuda", "manual_seed"),
        *_builtin(_cpu_generator, "torch.cuda", "default_generators"),
        *_builtin(_cpu_properties, "torch.cuda", "get_device_properties"),
        *_builtin(_split_sizes_as_lists, "torch.distributed", "all_to_all_single"),
    ),
    reason="upstream's training loop names CUDA wherever it touches a device",
    upstream="megatron-core 0.16.1-0.19.2; torch 2.11-2.14",
    enabled_if=_ON_CPU,
)

INITIALIZE_GROUP = PatchGroup(
    name="cpu-initialize",
    patches=(
        Patch(
            target="megatron.training.initialize:initialize_megatron",
            kind=Kind.FUNCTION,
            replacement=_allow_no_cuda,
            fingerprint="fafb0496b6576a82",
        ),
        Patch(
            target="megatron.training.training:build_train_valid_test_data_iterators",
            kind=Kind.FUNCTION,
            replacement=_keep_device_rng,
            fingerprint="ef1b589969ef64d8",
        ),
    ),
    reason="upstream asserts that CUDA is there, and counts on its generator not being the host's",
    upstream="megatron-core 0.19.2, training/initialize.py:62, training/training.py:4601",
    enabled_if=_ON_CPU,
)
