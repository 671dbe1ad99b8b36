"""What a recipe measures and watches beside the loss, put into its trainer."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback

from hf_gradacc.data.prepare import PreparedData
from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe.keys.sections import Recipe
from hf_gradacc.recipe.quality.generating import AnswerMetrics
from hf_gradacc.recipe.quality.scoring import class_accuracy, macro_f1

__all__ = ["EarlyStopping", "add_metrics"]


class EarlyStopping(EarlyStoppingCallback):
    """The stock callback, which goes on counting in a resumed run.

    Stock begins to count anew there unless `restore_callback_states_from_checkpoint` is set, which
    would also take back a patience that was changed since.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the count from the checkpoint."""
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        if state.global_step and isinstance(saved, dict):
            counted = saved.get("attributes", {}).get("early_stopping_patience_counter", 0)
            self.early_stopping_patience_counter = counted
        if args.load_best_model_at_end:  # else stock warns that it does what the recipe says
            super().on_train_begin(args, state, control, **kwargs)


def add_metrics(trainer: Any, recipe: Recipe, data: PreparedData) -> None:
    """Let a trainer measure what its recipe's `evaluation` asks for, and stop as it says.

    Args:
        trainer: The trainer, before training.
        recipe: A checked recipe.
        data: Its rows.

    Raises:
        ConfigError, DataError: If answers cannot be generated or scored, or there are no classes.
    """
    section, tokenizer = recipe.evaluation, trainer.processing_class
    if section.early_stopping_patience is not None:
        patience, threshold = section.early_stopping_patience, section.early_stopping_threshold
        trainer.add_callback(EarlyStopping(patience, threshold))
    if section.generated and data.eval is not None:
        answers = AnswerMetrics(section, data.eval, task=recipe.model.task, tokenizer=tokenizer)
        answers.check(trainer)
        trainer.eval_metrics.append(answers)
    elif section.metrics and not data.label_names:
        raise ConfigError(
            f"evaluation.metrics = {section.metrics}: the labels are decimal numbers, so the model "
            "learns a regression and there are no classes to count: leave it out, or write classes "
            "as whole numbers or words."
        )
    elif section.metrics:
        trainer.compute_metrics = _ClassMetrics(section.metrics)
        trainer.preprocess_logits_for_metrics = _largest


class _ClassMetrics:
    """Accuracy and F1 of all held-out rows, which stock gathers from all ranks."""

    def __init__(self, metrics: list[Any]) -> None:
        self._metrics = metrics

    def __call__(self, prediction: Any) -> dict[str, float]:
        known = {"accuracy": class_accuracy, "f1": macro_f1}
        predicted, labels = prediction.predictions, prediction.label_ids
        return {name: known[name](predicted, labels) for name in self._metrics}


def _largest(logits: Any, labels: Any) -> Any:
    """The class of each row, so that no logits are kept and gathered."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)
