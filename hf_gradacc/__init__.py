"""Gradient accumulation that gives exactly the gradient of the whole batch.

Each folder is one part of the way from rows to a log row, and imports only from folders on a lower
line:

    cli
    recipe                                 a recipe becomes a run
    verify                                 a run is held against the whole batch
    trainer                                hooks of the stock Trainer, and the parts they call
    tracking                               numbers of a run: files, terminal, W&B, reports
    safety                                 what may go wrong in an update
    loss    ranks    data                  what a loss is a mean over | processes | rows of text
    updates                                rows -> shares -> micro-batches -> Update; no Trainer
    errors  compat  arguments  text        compat: all that differs between releases of others

Read in the order data flows: `updates.targets`, `updates.sampler`, `updates.dealing`,
`updates.planner`, `updates.collator`, `updates.update`, `updates.loader`, `loss.probe`,
`trainer.mixin` (hooks, top to bottom), `trainer.runner`, `trainer.step`, `ranks.engine`,
`trainer.gradients`, `trainer.log_row`, `tracking.install`.
"""

import typing

from hf_gradacc._exports import load_when_asked

__version__ = "0.1.0"

if typing.TYPE_CHECKING:
    from hf_gradacc.arguments import GradAccArguments, GradAccOptions
    from hf_gradacc.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        GradAccError,
        LossError,
        MemoryBudgetError,
        NonFiniteError,
        RankFailedError,
        VersionError,
    )
    from hf_gradacc.loss.terms import LossTerm, LossTerms
    from hf_gradacc.trainer.mixin import GradAccMixin, GradAccTrainer
    from hf_gradacc.updates.collator import UpdateCollator
    from hf_gradacc.updates.planner import plan_micro_batches
    from hf_gradacc.updates.sampler import UpdateSampler
    from hf_gradacc.updates.update import MicroBatch, Update, UpdateStats
    from hf_gradacc.verify.parity import verify_parity
    from hf_gradacc.verify.result import ParityReport

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
    "LossTerm",
    "LossTerms",
    "MemoryBudgetError",
    "MicroBatch",
    "NonFiniteError",
    "ParityReport",
    "RankFailedError",
    "Update",
    "UpdateCollator",
    "UpdateSampler",
    "UpdateStats",
    "VersionError",
    "plan_micro_batches",
    "verify_parity",
]

_MODULES = {
    "arguments": ("GradAccArguments", "GradAccOptions"),
    "errors": (
        "CheckpointError",
        "ConfigError",
        "DataError",
        "GradAccError",
        "LossError",
        "MemoryBudgetError",
        "NonFiniteError",
        "RankFailedError",
        "VersionError",
    ),
    "loss.terms": ("LossTerm", "LossTerms"),
    "trainer.mixin": ("GradAccMixin", "GradAccTrainer"),
    "updates.collator": ("UpdateCollator",),
    "updates.planner": ("plan_micro_batches",),
    "updates.sampler": ("UpdateSampler",),
    "updates.update": ("MicroBatch", "Update", "UpdateStats"),
    "verify.parity": ("verify_parity",),
    "verify.result": ("ParityReport",),
}

if not typing.TYPE_CHECKING:  # a type checker that saw this would take any name for exported
    __getattr__, __dir__ = load_when_asked(__name__, _MODULES)
