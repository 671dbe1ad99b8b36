"""The errors a user can meet, and nothing else.

    GradAccError
    ├── ConfigError (ValueError)     an option, a recipe key or a combination of them
    ├── DataError (ValueError)       a dataset, a row, a stream
    ├── LossError (RuntimeError)     a loss that cannot be accumulated exactly
    ├── CheckpointError (RuntimeError, ValueError)    a checkpoint that is damaged or not there
    ├── MemoryBudgetError (RuntimeError)  out of memory, and no finer cut helps
    ├── NonFiniteError (RuntimeError)     a loss or a gradient that is NaN or infinite
    ├── RankFailedError (RuntimeError)    another rank failed, so this one stops, too
    └── VersionError (ImportError)        torch or transformers is too old to train exactly

Every message names the field, the value, and the way out.
"""

from __future__ import annotations

from hf_gradacc.text import printable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "GradAccError",
    "LossError",
    "MemoryBudgetError",
    "NonFiniteError",
    "RankFailedError",
    "VersionError",
]


class GradAccError(Exception):
    """Base of every error this package raises on purpose.

    Messages quote rows, file names and recipes, so what a terminal would act upon is written as its
    code.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigError(GradAccError, ValueError):
    """An option has a wrong value, or two options contradict each other."""


class DataError(GradAccError, ValueError):
    """The training or evaluation data cannot be used as it is."""


class LossError(GradAccError, RuntimeError):
    """The loss is not a mean that micro-batches can be weighted by."""


class CheckpointError(GradAccError, RuntimeError, ValueError):
    """A checkpoint to resume from is damaged, or there is none.

    The stock Trainer raises ``ValueError`` where there is none, and programs catch that.
    """


class MemoryBudgetError(GradAccError, RuntimeError):
    """Memory ran out where no finer cut helps: a single sequence, the optimizer, a collective."""


class NonFiniteError(GradAccError, RuntimeError):
    """An update produced a loss or a gradient that is NaN or infinite."""


class RankFailedError(GradAccError, RuntimeError):
    """Another rank failed, and its log says why. This rank stops, too."""


class VersionError(GradAccError, ImportError):
    """A library is too old: with it, gradients would be wrong and nothing would say so."""
