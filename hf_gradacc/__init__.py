"""Gradient accumulation that gives exactly the gradient of the whole batch.

Read the code in the order data flows: `arguments`, `sampler`, `planner`, `collator`, `loader`,
`update`, `targets`, `probe`, `trainer_data`, `trainer_loss`, `trainer`.

What is exported is imported when it is first asked for (PEP 562), since torch and transformers
take seconds to load and `hf-gradacc --help` needs neither.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from hf_gradacc.arguments import GradAccArguments, GradAccOptions
    from hf_gradacc.collator import UpdateCollator
    from hf_gradacc.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        GradAccError,
        LossError,
        MemoryBudgetError,
        NonFiniteError,
        RankFailedError,
    )
    from hf_gradacc.planner import plan_micro_batches
    from hf_gradacc.sampler import UpdateSampler
    from hf_gradacc.trainer import GradAccMixin, GradAccTrainer
    from hf_gradacc.update import MicroBatch, Update, UpdateStats
    from hf_gradacc.verify import ParityReport, verify_parity

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "GradAccArguments",
    "GradAccError",
    "GradAccMixin",
    "GradAccOptions",
    "GradAccTrainer",
    "LossError",
    "MemoryBudgetError",
    "MicroBatch",
    "NonFiniteError",
    "ParityReport",
    "RankFailedError",
    "Update",
    "UpdateCollator",
    "UpdateSampler",
    "UpdateStats",
    "plan_micro_batches",
    "verify_parity",
]

_MODULES = {
    "arguments": ("GradAccArguments", "GradAccOptions"),
    "collator": ("UpdateCollator",),
    "errors": (
        "CheckpointError",
        "ConfigError",
        "DataError",
        "GradAccError",
        "LossError",
        "MemoryBudgetError",
        "NonFiniteError",
        "RankFailedError",
    ),
    "planner": ("plan_micro_batches",),
    "sampler": ("UpdateSampler",),
    "trainer": ("GradAccMixin", "GradAccTrainer"),
    "update": ("MicroBatch", "Update", "UpdateStats"),
    "verify": ("ParityReport", "verify_parity"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

if not typing.TYPE_CHECKING:  # a type checker that saw this would take any name for exported

    def __getattr__(name: str) -> object:
        """Import an exported name from its module, and keep it."""
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """The exported names too, before anybody asked for one."""
    return sorted({*globals(), *__all__})
