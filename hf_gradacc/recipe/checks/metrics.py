"""The names that an evaluation of a recipe will have, and which of them are better when lower."""

from __future__ import annotations

from collections.abc import Iterable

from hf_gradacc.data.section import Task
from hf_gradacc.text import nearest

__all__ = ["eval_metric_names", "find_metric_problem", "is_lower_better"]

_OF_ANY = ("loss", "runtime", "samples_per_second", "steps_per_second")
_OF_DPO = (
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"),
    *("entropy", "mean_token_accuracy", "num_tokens", "aux_loss"),
)
_OF_REWARD = ("accuracy", "margin", "min_reward", "mean_reward", "max_reward", "num_tokens")
_LOWER = ("loss", "perplexity", "runtime", "entropy")


def eval_metric_names(task: Task, metrics: Iterable[str]) -> set[str]:
    """List the keys that a row of an evaluation may have, each beginning with `eval_`.

    Args:
        task: A recipe's `model.task`.
        metrics: Its `evaluation.metrics`.
    """
    names = set(_OF_ANY)
    if task in ("causal_lm", "seq2seq"):
        names.add("perplexity")
    elif task == "dpo":
        names.update(_OF_DPO)
    elif task == "reward":
        names.update(_OF_REWARD)
    for metric in metrics:
        names.update(["rouge1", "rouge2", "rougeL"] if metric == "rouge" else [metric])
    return {f"eval_{name}" for name in names}


def is_lower_better(name: str) -> bool:
    """Whether a metric is better when it is lower, as a loss is and an accuracy is not.

    >>> [is_lower_better(name) for name in ("eval_loss", "perplexity", "eval_accuracy")]
    [True, True, False]
    """
    return name.rpartition("/")[2].removeprefix("eval_").endswith(_LOWER)


def find_metric_problem(asked: str, known: Iterable[str]) -> tuple[str, str] | None:
    """Say why the metric that decides about the best model will not be measured, and the way out.

    Args:
        asked: Its name, with or without `eval_`.
        known: From `eval_metric_names`.

    Returns:
        What is wrong and what to do; None if nothing is.
    """
    known = set(known)
    name = asked if asked.startswith("eval_") else f"eval_{asked}"
    if name in known or name.startswith("eval_loss/"):  # parts of a loss, which the model names
        return None
    guess = nearest(name, known)
    hint = f"did you mean {guess}? " if guess else ""
    return "no evaluation measures it", f"{hint}known: {', '.join(sorted(known))}"
