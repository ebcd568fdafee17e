"""Rotary embeddings in fp32 against complex numbers in float64."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flagscale.patches.apply import apply
from flagscale.patches.rotary_fp32 import GROUP

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.models.common.embeddings import rope_utils

_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    assert not GROUP.enabled_if.test()
    monkeypatch.setattr(sys, "argv", ["train", "--rotary-in-fp32"])
    applied = apply([GROUP])
    assert applied.groups == (GROUP.name,)
    yield rope_utils
    applied.undo()


def angles_of(seq_length: int, head_dim: int) -> torch.Tensor:
    """[s, d / 2]"""
    return torch.outer(
        torch.arange(seq_length), 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    )


def upstream_freqs(angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """[s, 1, 1, d]"""
    freqs = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    return freqs[:, None, None]


def rotate(tensor: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """[s, b, h, d] float64."""
    wide = tensor.detach().double()
    real, imaginary = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, -1)
    phases = torch.polar(torch.ones_like(angles, dtype=torch.float64), angles.double())
    turned = torch.complex(real, imaginary) * phases[:, None, None]
    parts = (turned.real, turned.imag)
    return torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)


def excess(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error, as a multiple of what one rounding at the end explains."""
    # Products of fp32 cancel: their own error is relative to the operands, which are below 8.
    allowed = _ROUNDOFF[found.dtype] * expected.abs() + 8 * 2.0**-20
    return float(((found.detach().double() - expected).abs() / allowed).max())


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from(list(_ROUNDOFF)),
    head_dim=st.sampled_from([2, 8, 128]),
    seq_length=st.integers(1, 64),
    interleaved=st.booleans(),
)
def test_one_rounding_at_the_end(
    patched: ModuleType,
    seed: int,
    dtype: torch.dtype,
    head_dim: int,
    seq_length: int,
    interleaved: bool,
) -> None:
    angles = angles_of(seq_length, head_dim)
    freqs = upstream_freqs(angles, interleaved)
    generator = torch.Generator().manual_seed(seed)
    query, cotangent = (
        torch.randn(seq_length, 2, 3, head_dim, generator=generator).to(dtype) for _ in range(2)
    )
    query.requires_grad_()
    rotated = patched._apply_rotary_pos_emb_bshd(query, freqs, rotary_interleaved=interleaved)
    assert excess(rotated, rotate(query, angles, interleaved)) < 1.01
    assert rotated.dtype == dtype
    # The gradient is turned back.
    (grad,) = torch.autograd.grad(rotated, query, cotangent)
    assert excess(grad, rotate(cotangent, -angles, interleaved)) < 1.01


@pytest.mark.parametrize("interleaved", [False, True])
def test_upstream_alone_rounds_more_than_once(interleaved: bool) -> None:
    angles = angles_of(64, 128)
    query = torch.randn(64, 2, 3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    rotated = rope_utils._apply_rotary_pos_emb_bshd(
        query, upstream_freqs(angles, interleaved), rotary_interleaved=interleaved
    )
    assert excess(rotated, rotate(query, angles, interleaved)) > 4


def test_packed_sequences_too(patched: ModuleType) -> None:
    angles = angles_of(16, 8)
    packed = torch.randn(24, 3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    rotated = patched._apply_rotary_pos_emb_thd(
        packed,
        torch.tensor([0, 8, 24]),
        upstream_freqs(angles, False),
        cp_group=SimpleNamespace(size=lambda: 1, rank=lambda: 0),
    )
    for piece in (slice(0, 8), slice(8, 24)):
        expected = rotate(packed[piece][:, None], angles[: piece.stop - piece.start], False)
        assert excess(rotated[piece], expected[:, 0]) < 1.01
