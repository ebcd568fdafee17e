"""The exception tree of the attention operator, which stands alone.

``AttentionError`` is the base, and a ValueError: a call, a tensor or a number is not what the
operator takes. Below it: ``ShapeError``, ``DtypeError`` (also a TypeError), ``DeviceError`` and
``BackendError``.
"""

from __future__ import annotations

__all__ = ["AttentionError", "BackendError", "DeviceError", "DtypeError", "ShapeError"]


class AttentionError(ValueError):
    """Base of every error the operator raises on purpose.

    Args:
        what: What is wrong, in one sentence.
        where: The argument concerned.
        expected: What would have been right.
        got: What was found instead.
        cure: What the caller can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: object = None,
        got: object = None,
        cure: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.expected = expected
        self.got = got
        self.cure = cure

    def __str__(self) -> str:
        """The message as a person reads it: the sentence, then one labelled line per known fact."""
        facts = (
            ("where", self.where),
            ("expected", self.expected),
            ("got", self.got),
            ("cure", self.cure),
        )
        lines = [f"  {label + ':':<10}{value}" for label, value in facts if value is not None]
        return "\n".join([self.what, *lines])


class ShapeError(AttentionError):
    """A tensor has the wrong number of dimensions or the wrong size."""


class DtypeError(AttentionError, TypeError):
    """A tensor or an argument has a type the operator does not take."""


class DeviceError(AttentionError):
    """The tensors lie on different devices, or on one the operator does not run on."""


class BackendError(AttentionError):
    """The backend asked for does not exist, or cannot serve these tensors."""
