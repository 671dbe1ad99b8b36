"""The `evaluation` section of a recipe: quality beside the loss, and when to stop."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from hf_gradacc.data.section import PAIR_TASKS, Section

if TYPE_CHECKING:
    from hf_gradacc.recipe.keys.sections import Recipe

__all__ = [
    "GENERATED",
    "EvaluationSection",
    "GenerateSection",
    "Metric",
    "contradictions_of_evaluation",
    "is_rouge_installed",
]

Metric = Literal["accuracy", "f1", "exact_match", "final_number", "rouge"]

GENERATED: tuple[Metric, ...] = ("exact_match", "final_number", "rouge")
"""Metrics that compare answers that the model generates with those of the rows."""


def _several(value: Any) -> Any:
    """`metrics: accuracy` is short for a list of one."""
    return [value] if isinstance(value, str) else value


class GenerateSection(Section):
    """How held-out prompts are answered: greedily, in batches, on all ranks."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Longest answer in tokens."""
    max_rows: int | None = Field(default=None, ge=1)
    """Rows that are answered, evenly over the held-out rows; null means all of them."""
    max_tokens_per_batch: int = Field(default=16384, ge=1)
    """Most tokens answered at a time, padding and room for the answers included."""


class EvaluationSection(Section):
    """What is measured on held-out rows beside the loss, at every evaluation."""

    metrics: Annotated[list[Metric], BeforeValidator(_several)] = Field(default=[])
    """`accuracy` and macro `f1` of a classification. Of generated answers `exact_match` (but for
    case and blanks), `final_number` (GSM8K's: behind `####`, or the last one), `rouge`."""
    generate: GenerateSection = GenerateSection()
    """How answers are generated, for the metrics that compare them."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations in a row without a better `train.metric_for_best_model` (the
    loss by default), and load the best model at the end."""
    early_stopping_threshold: float = Field(default=0.0, ge=0)
    """How much better is better."""

    @property
    def generated(self) -> list[Metric]:
        """The metrics that need generated answers."""
        return [name for name in self.metrics if name in GENERATED]


_ANSWERABLE = ("chat", "prompt_completion", "instruction", "question_answer", "seq2seq", "tokens")


def contradictions_of_evaluation(recipe: Recipe) -> Iterator[str]:
    """Name what of a recipe's `evaluation` has no effect or cannot be measured."""
    section, task = recipe.evaluation, recipe.model.task
    has_rows = bool(recipe.data.eval) or recipe.data.holdout is not None
    for name in section.metrics:
        if name in GENERATED and task not in ("causal_lm", "seq2seq"):
            yield f"evaluation.metrics: {name} compares texts, and {task} generates none"
        elif name not in GENERATED and task != "classification":
            why = "has its own in any case" if task in PAIR_TASKS else "has no classes"
            yield f"evaluation.metrics: {name} is of a classification, and {task} {why}"
    wants_rows = section.metrics or section.early_stopping_patience is not None
    if wants_rows and not has_rows:
        key = "metrics" if section.metrics else "early_stopping_patience"
        yield f"evaluation.{key} needs held-out rows: give data.eval or data.holdout"
    if section.early_stopping_patience is None and section.early_stopping_threshold:
        yield (
            "evaluation.early_stopping_threshold has no effect alone: set early_stopping_patience"
        )
    if section.early_stopping_patience is not None and not _evaluates(recipe.train):
        yield (
            "evaluation.early_stopping_patience counts evaluations, and train.eval_strategy is "
            "no: set it to steps or epoch, and save_strategy alike"
        )
    if not section.generated:
        if section.generate != GenerateSection():
            wanted = ", ".join(GENERATED)
            yield f"evaluation.generate has no effect: no metric of {wanted} is asked for"
        return
    for source in recipe.data.eval or recipe.data.train:
        format = source.format or recipe.data.format
        if format not in _ANSWERABLE:
            yield f"evaluation.metrics: rows of data.format = {format} have no prompt to answer"
            break
    if recipe.data.streaming and section.generate.max_rows is None:
        yield "evaluation.generate.max_rows is needed for a stream, whose rows are not counted"
    if recipe.train.get("fsdp") or recipe.train.get("deepspeed"):
        yield (
            f"evaluation.metrics: {', '.join(section.generated)} would generate with weights that "
            "are spread over ranks: leave them out, and score the saved model in a run of its own"
        )


def _evaluates(train: dict[str, Any]) -> bool:
    # `eval_steps` alone does not turn evaluation on; YAML reads an unquoted `no` as false.
    return train.get("eval_strategy", "no") not in (False, None, "no")


def is_rouge_installed() -> bool:
    """Whether the package that computes ROUGE is installed here."""
    return importlib.util.find_spec("rouge_score") is not None
