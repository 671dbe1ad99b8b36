"""TRL's trainers of preferences with exact accumulation, on pairs that a recipe has prepared.

This module needs TRL: import it inside of a function.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from hf_gradacc.arguments import GradAccArguments, GradAccOptions
from hf_gradacc.errors import ConfigError, GradAccError
from hf_gradacc.recipe.keys.sections import Recipe
from hf_gradacc.trainer.mixin import GradAccMixin

__all__ = [
    "DPOArguments",
    "ExactDPOTrainer",
    "ExactRewardTrainer",
    "PreparedDPOTrainer",
    "PreparedRewardTrainer",
    "RewardArguments",
    "defaults_of_ours",
    "make_pair_trainer",
]

# TRL knows recomputing by its old names, in every forward; and `verify` asks for outputs.
for _start in ("`(is_)?gradient_checkpointing", "`return_outputs=True`"):
    warnings.filterwarnings("ignore", message=_start, category=FutureWarning)

_REFERENCE = "ref"
"""What TRL calls the copy of an adapter that it compares with."""


@dataclass
class DPOArguments(GradAccOptions, DPOConfig):
    """TRL's `DPOConfig` with the options of `GradAccOptions`."""


@dataclass
class RewardArguments(GradAccOptions, RewardConfig):
    """TRL's `RewardConfig` with the options of `GradAccOptions`."""


def defaults_of_ours(kind: type[Any]) -> dict[str, Any]:
    """Every default of `GradAccArguments` that TRL changes, but for the learning rate.

    A key of `train` that is left out should mean the same for every task: TRL turns on bf16 and
    recomputing of activations. Its learning rates belong to its losses, and stay.

    Args:
        kind: `DPOArguments` or `RewardArguments`.
    """
    theirs = {field.name: field for field in dataclasses.fields(kind)}
    return {
        field.name: field.default
        for field in dataclasses.fields(GradAccArguments)
        if field.name != "learning_rate"
        and field.init
        and field.default is not dataclasses.MISSING
        and field.default != theirs[field.name].default
    }


class PreparedDPOTrainer(DPOTrainer):
    """TRL's trainer on rows `{prompt_ids, chosen_ids, rejected_ids}`.

    Args:
        model: The model; of one with an adapter the reference is the model with the adapter off.
        ref_model: The reference of a model that is trained whole.
        args: A `DPOConfig`.
        train_dataset: A dataset of `datasets`, or a list of rows.
        **parts: As TRL's.
    """

    def __init__(
        self,
        model: Any = None,
        ref_model: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        **parts: Any,
    ) -> None:
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            train_dataset=_as_dataset(train_dataset),
            **parts,
        )
        # TRL copies an adapter that it finds, as one that may be trained already. A recipe's is
        # new, so the copy would be saved with every checkpoint and say nothing.
        if _REFERENCE in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter(_REFERENCE)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write TRL's card where it is pushed with the model, not beside every checkpoint."""
        if self.args.push_to_hub:
            super().create_model_card(*args, **kwargs)


class PreparedRewardTrainer(RewardTrainer):
    """TRL's trainer on rows `{chosen_ids, rejected_ids}`, and `margin` perhaps; lists as well."""

    def __init__(
        self, model: Any = None, args: Any = None, train_dataset: Any = None, **parts: Any
    ) -> None:
        train_dataset = _as_dataset(train_dataset)
        super().__init__(model=model, args=args, train_dataset=train_dataset, **parts)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write TRL's card where it is pushed with the model, not beside every checkpoint."""
        if self.args.push_to_hub:
            super().create_model_card(*args, **kwargs)


class ExactDPOTrainer(GradAccMixin, PreparedDPOTrainer):
    """DPO with the gradient of the whole update."""


class ExactRewardTrainer(GradAccMixin, PreparedRewardTrainer):
    """A reward model's training with the gradient of the whole update."""


def make_pair_trainer(recipe: Recipe, *, model: Any, args: Any, **parts: Any) -> Any:
    """Make the trainer of a recipe that learns from pairs.

    Args:
        recipe: A checked recipe.
        model: Its model, with its adapter; as it is now it is the reference.
        args: Its arguments.
        **parts: Further arguments of the trainer.

    Raises:
        ConfigError: If TRL or stock refuse what the recipe asks for.
    """
    is_dpo = recipe.model.task == "dpo"
    if is_dpo and recipe.peft.method == "none" and not recipe.dpo.precompute_ref_log_probs:
        # TRL would load it by its name: a new model has none, and the tokens added to this one
        # would be missing.
        parts["ref_model"] = copy.deepcopy(model)
    try:
        return (ExactDPOTrainer if is_dpo else ExactRewardTrainer)(model=model, args=args, **parts)
    except GradAccError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        why = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model.task = {recipe.model.task!r}: the trainer refuses this: {why.rstrip('.')}."
        ) from error


def _as_dataset(rows: Any) -> Any:
    return Dataset.from_list(rows) if isinstance(rows, list) else rows
