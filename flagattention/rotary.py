"""Rotary position embedding: what a model rotates by, forward and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flagattention.errors import AttentionError, DeviceError, DtypeError, ShapeError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Rotary", "angles", "check_rotary", "rotate", "turn"]


@dataclass(frozen=True, eq=False)
class Rotary:
    """How a model rotates queries and keys.

    A head's first ``2 * len(inv_freq)`` dims are taken in pairs, and pair i turned by the angle
    position * inv_freq[i]; the other dims stay as they are.

    Attributes:
        inv_freq: [R / 2] float32, after any scaling (linear, YaRN, ...).
        interleaved: Dims 2i and 2i + 1 make a pair; else dims i and i + R / 2.
        attention_scaling: What the rotated dims are multiplied by too (YaRN's factor on cos, sin).
    """

    inv_freq: Tensor
    interleaved: bool = False
    attention_scaling: float = 1.0


def check_rotary(rotary: Rotary, x: Tensor) -> None:
    """Checks that a rotation fits queries or keys.

    Raises:
        AttentionError: inv_freq is no vector of floats on the device of x, or longer than half a
            head of x, or the scaling is not positive.
    """
    inv_freq = rotary.inv_freq
    if not isinstance(inv_freq, torch.Tensor) or not inv_freq.is_floating_point():
        raise DtypeError(
            "the inverse frequencies are no tensor of floats",
            where="rotary.inv_freq",
            expected="float32 [R / 2]",
            got=getattr(inv_freq, "dtype", type(inv_freq).__name__),
        )
    if inv_freq.dim() != 1 or 2 * len(inv_freq) > x.shape[-1]:
        raise ShapeError(
            "the rotation does not fit the head size",
            where="rotary.inv_freq",
            expected=f"[R / 2], R at most {x.shape[-1]}",
            got=list(inv_freq.shape),
        )
    if inv_freq.device != x.device:
        raise DeviceError(
            "the inverse frequencies lie on another device",
            where="rotary.inv_freq",
            expected=x.device,
            got=inv_freq.device,
        )
    if not rotary.attention_scaling > 0:
        raise AttentionError(
            "the scaling of the rotation is not positive",
            where="rotary.attention_scaling",
            expected="a number above 0; 1 for none",
            got=rotary.attention_scaling,
        )


def rotate(x: Tensor, positions: Tensor, rotary: Rotary) -> Tensor:
    """Rotates queries or keys, computed in float32 and rounded once.

    Args:
        x: [B, H, T, D], packed [T, H, D].
        positions: [T] or [B, T], whole numbers or not; one number [1] serves all tokens.
        rotary: The rotation.

    Returns:
        A contiguous tensor shaped like x.
    """
    return turn(x, angles(positions, rotary, x.dtype), rotary, rotary.attention_scaling)


def angles(positions: Tensor, rotary: Rotary, dtype: torch.dtype) -> Tensor:
    """The angles at some positions, as a model computes them.

    Models multiply position and frequency in float32, which far out in a long text is off by
    thousandths. Who rotates back must be off by the same; so the product is rounded as theirs, and
    returned in float64, that differences of two angles lose nothing more.

    Args:
        positions: [T] or [B, T].
        rotary: The rotation.
        dtype: Of the queries or keys; for float64 the product is taken in float64.

    Returns:
        [T, R / 2] or [B, T, R / 2], float64.
    """
    work = torch.promote_types(dtype, torch.float32)
    inv_freq = rotary.inv_freq.detach().to(work)
    return (positions.to(work).unsqueeze(-1) * inv_freq).double()


def turn(
    x: Tensor,
    angle: Tensor,
    rotary: Rotary,
    scaling: float = 1.0,
    row_scale: Tensor | None = None,
) -> Tensor:
    """Turns each pair of dims by an angle, computed in float32 and rounded once.

    Args:
        x: [B, H, T, D], packed [T, H, D].
        angle: [T, R / 2] or [B, T, R / 2], T may be 1.
        rotary: Which dims make a pair.
        scaling: What the rotated dims are multiplied by.
        row_scale: What all dims of a token are multiplied by, [T] or [B, T].

    Returns:
        A contiguous tensor shaped like x.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(work)
    if row_scale is not None:
        wide = wide * _every_head(row_scale.to(work).unsqueeze(-1), x)
    cos = _every_head((angle.cos() * scaling).to(work), x)
    sin = _every_head((angle.sin() * scaling).to(work), x)
    half = angle.shape[-1]
    rotated, rest = wide[..., : 2 * half], wide[..., 2 * half :]
    if rotary.interleaved:
        a, b = rotated[..., ::2], rotated[..., 1::2]
        rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = rotated[..., :half], rotated[..., half:]
        rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((rotated, rest), -1).to(x.dtype).contiguous()


def _every_head(table: Tensor, x: Tensor) -> Tensor:
    """A table [T, R] or [B, T, R], shaped to meet all heads of x."""
    return table.unsqueeze(-2 if x.dim() == 3 else -3)
