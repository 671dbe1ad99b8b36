"""Gradient accumulation that gives exactly the gradient of the whole batch.

Read the code in the order data flows: `arguments`, `sampler`, `planner`, `collator`, `loader`,
`update`, `targets`, `probe`, `trainer_data`, `trainer_loss`, `trainer`.
"""

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
    "Update",
    "UpdateCollator",
    "UpdateSampler",
    "UpdateStats",
    "plan_micro_batches",
    "verify_parity",
]
