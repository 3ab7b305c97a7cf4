"""What goes wrong for a user: what was found, how to cure it, and the exit code the command line ends with."""

from __future__ import annotations


class FastadvError(ValueError):
    """A refusal. ``what`` names the field and the value, ``fix`` the command, flag or call that cures it."""

    exit_code = 2

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"{what}; {fix}")
        self.what, self.fix = what, fix


class SettingsError(FastadvError):
    """A setting or an argument that cannot be meant."""


class DataError(FastadvError):
    """Images or labels that cannot be used."""

    exit_code = 3


class CheckpointError(FastadvError):
    """A checkpoint or weights file that cannot be read, written or trusted."""

    exit_code = 4


class NumericalError(FastadvError):
    """Numbers that stopped being numbers."""

    exit_code = 5


class Elsewhere(FastadvError):
    """Another process of the run failed, with ``exit_code``, and says itself why: here nothing is printed."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process of this run failed", "its own message says how to cure it")
        self.exit_code = exit_code


class NonFiniteGradientError(NumericalError):
    """An attack met logits or gradients that are NaN or infinite: its result would say nothing about robustness."""
