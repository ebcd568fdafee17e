"""One exception tree for the whole layer.

    FlagScaleError                      exit code 1
    ├── VerificationError               exit code 1   a result is not what it was made from
    ├── ConfigError                     exit code 2   an argument, recipe, layout or path is wrong
    ├── PlatformError                   exit code 2   the device platform cannot be used as asked
    ├── PatchError                      exit code 2   upstream is not what a patch was written for
    │   ├── PatchTargetMissingError
    │   ├── PatchSourceChangedError
    │   └── PatchConflictError
    ├── PluginError                     exit code 2   a plugin cannot be loaded, or failed to start
    ├── DataError                       exit code 2   input data is missing or malformed
    ├── CheckpointError                 exit code 3   a checkpoint is missing, broken or unfit
    └── SupersededError                 exit code 76  another attempt owns the run

Programs print ``str(error)`` and exit with ``error.exit_code``; the library itself never exits.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FlagScaleError",
    "PatchConflictError",
    "PatchError",
    "PatchSourceChangedError",
    "PatchTargetMissingError",
    "PlatformError",
    "PluginError",
    "SupersededError",
    "VerificationError",
]


class FlagScaleError(Exception):
    """Base of every error this project raises on purpose.

    Args:
        what: What went wrong, in one sentence.
        where: The file, argument, parameter or target concerned.
        expected: What would have been right.
        got: What was found instead.
        cure: What the reader can do about it.
    """

    exit_code = 1

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
        text = "\n".join([self.what, *lines])
        # What was found may hold characters that no terminal and no file takes.
        return text.encode("utf-8", "backslashreplace").decode()


class VerificationError(FlagScaleError):
    """A result was made, and a check of it finds that it is wrong."""


class ConfigError(FlagScaleError):
    """An argument, recipe, layout or path is wrong; nothing has been started."""

    exit_code = 2


class PlatformError(FlagScaleError):
    """The device platform cannot be used as asked."""

    exit_code = 2


class PatchError(FlagScaleError):
    """Upstream is not what a patch was written for; nothing has been changed."""

    exit_code = 2


class PatchTargetMissingError(PatchError):
    """The module, class or name a patch aims at does not exist."""


class PatchSourceChangedError(PatchError):
    """The source a patch was written against has changed."""


class PatchConflictError(PatchError):
    """Two parties claim the same target."""


class PluginError(FlagScaleError):
    """A plugin cannot be loaded, or failed to start; nothing has been started."""

    exit_code = 2


class DataError(FlagScaleError):
    """Input data is missing or malformed."""

    exit_code = 2


class CheckpointError(FlagScaleError):
    """A checkpoint is missing, broken, or does not fit the job that wants it."""

    exit_code = 3


class SupersededError(FlagScaleError):
    """A later attempt owns the run: this process must stop, and publish nothing."""

    exit_code = 76
