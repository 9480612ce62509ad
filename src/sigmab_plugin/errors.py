"""Errors that callers can catch. Every message names the offender and the next step."""

from __future__ import annotations


class SigmaBError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(SigmaBError, ValueError):
    """An option, or a combination of options, cannot be used."""


class ModelError(SigmaBError, ValueError):
    """The model cannot be cut, traced or sliced as asked."""


class CalibrationError(SigmaBError, ValueError):
    """The calibration data cannot be used: empty, one-shot, NaN, wrong shape or device."""


class FormatError(SigmaBError, ValueError):
    """A file is truncated, altered, or written by a newer version."""


class MissingDependencyError(SigmaBError, ImportError):
    """An optional library is needed; the message says which extra installs it."""


class TrainingError(SigmaBError, ValueError):
    """Training cannot start or go on: empty loader, targets that do not fit, a loss that is not finite."""
