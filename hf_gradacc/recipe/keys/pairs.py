"""The `dpo` and `reward` sections of a recipe: what a loss of pairs takes beside the pairs.

Names, defaults and meanings are those of TRL's `DPOConfig` and `RewardConfig`. What TRL has for
loading models and reading rows is not here: a recipe's `model` and `data` sections do that.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from hf_gradacc.data.section import PAIR_TASKS, Section

if TYPE_CHECKING:
    from hf_gradacc.recipe.keys.sections import Recipe

__all__ = [
    "DpoSection",
    "PairLoss",
    "RewardSection",
    "contradictions_of_pairs",
    "is_trl_installed",
    "options_of_pairs",
]

PairLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]


def _several(value: Any) -> Any:
    """`loss_type: ipo` is short for a list of one."""
    return [value] if isinstance(value, str) else value


class DpoSection(Section):
    """The loss of `model.task: dpo`, Direct Preference Optimization."""

    beta: float = Field(default=0.1, gt=0)
    """How strongly the model is held to the reference; higher holds it closer."""
    loss_type: Annotated[list[PairLoss], BeforeValidator(_several)] = Field(
        default=["sigmoid"], min_length=1
    )
    """The loss of a pair, or several that are added up."""
    loss_weights: list[float] | None = None
    """One for each of `loss_type`; null means 1."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of pairs taken to be labelled the wrong way, for `robust`, `exo_pair` and `aot`."""
    ld_alpha: float | None = Field(default=None, ge=0, le=1)
    """Weight of the tokens by which the longer answer is longer (LD-DPO); null means 1."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        "reverse_kl"
    )
    """How the distance from the reference is measured."""
    f_alpha_divergence_coef: float = 0.5
    """Alpha of `alpha_divergence`."""
    use_weighting: bool = False
    """Weight pairs by how likely the model finds them (WPO)."""
    discopop_tau: float = Field(default=0.05, gt=0)
    """Temperature of `discopop`."""
    router_aux_loss_coef: float | None = Field(default=None, ge=0)
    """Weight of a mixture of experts' load-balancing loss; null means the model's."""
    disable_dropout: bool = True
    """Train without dropout, as TRL does."""
    precompute_ref_log_probs: bool = False
    """Ask the reference once before training, so that it need not stay in memory."""
    precompute_ref_batch_size: int | None = Field(default=None, ge=1)
    """Pairs that the reference is asked at a time then; null means those of a micro-batch."""
    sync_ref_model: bool = False
    """Let the reference follow the model (TR-DPO); whole models only."""
    ref_model_mixup_alpha: float = Field(default=0.6, gt=0, le=1)
    """Share of the model in the reference at each of these steps."""
    ref_model_sync_steps: int = Field(default=512, ge=1)
    """Updates between them."""

    @model_validator(mode="after")
    def _holds_together(self) -> DpoSection:
        losses, weights = self.loss_type, self.loss_weights
        if weights is not None and len(weights) != len(losses):
            raise ValueError(
                f"`loss_weights` has {len(weights)} numbers for the {len(losses)} of `loss_type`"
            )
        if "exo_pair" in losses and self.label_smoothing == 0:
            raise ValueError(
                "`loss_type: exo_pair` needs a `label_smoothing` above 0, such as 1e-3"
            )
        if "robust" in losses and self.label_smoothing >= 0.5:
            raise ValueError("`loss_type: robust` needs a `label_smoothing` below 0.5")
        if self.use_weighting and {"aot", "aot_unpaired"} & set(losses):
            raise ValueError("`use_weighting` has no meaning for `aot`, which sorts pairs")
        of_difference = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust"}
        other = [one for one in losses if one not in of_difference | {"discopop", "sft"}]
        if self.f_divergence_type != "reverse_kl" and other:
            raise ValueError(f"`f_divergence_type` has no meaning for {', '.join(other)}")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError("`sync_ref_model` changes the reference that was asked beforehand")
        return self


class RewardSection(Section):
    """The loss of `model.task: reward`, a model that scores answers."""

    center_rewards_coefficient: float | None = Field(default=None, gt=0)
    """Weight of what keeps the scores around zero; 0.01 is usual."""
    disable_dropout: bool = True
    """Train without dropout, as TRL does."""


_OTHER_REFERENCE = ("pissa", "olora", "loftq", "corda", "eva")
"""Starts of LoRA that change the base weights, which are the reference once the adapter is off."""


def contradictions_of_pairs(recipe: Recipe) -> Iterator[str]:
    """Name what of a recipe has no effect on its task, or cannot be trained from pairs."""
    task, options = recipe.model.task, recipe.peft.options
    for section in PAIR_TASKS:  # a section that repeats its defaults says nothing
        written = getattr(recipe, section)
        if section != task and written != type(written)():
            yield f"`{section}:` has no effect on model.task = {task}: set model.task to {section}"
    if task not in PAIR_TASKS:
        return
    for name, instead in _ELSEWHERE.items():
        if recipe.train.get(name):
            yield f"train.{name} has no effect on model.task = {task}{instead[task]}"
    if recipe.train.get("layout") == "packed":
        yield f"train.layout = packed lays rows end to end, and {task} compares two: leave it out"
    if task == "dpo" and recipe.dpo.sync_ref_model and recipe.peft.method != "none":
        yield "dpo.sync_ref_model needs a whole model as reference: leave out peft, or the key"
    start = str(options.get("init_lora_weights", "")).lower()
    if task == "dpo" and start.startswith(_OTHER_REFERENCE):
        yield (
            f"peft.options.init_lora_weights = {start} changes the base weights, and dpo takes "
            "them as its reference once the adapter is off: leave it out"
        )


_ELSEWHERE = {
    "label_smoothing_factor": {
        "dpo": ": set dpo.label_smoothing",
        "reward": ", whose loss has no labels to smooth",
    },
}
"""Training arguments that a loss of pairs does not read, and what to do about each."""


def options_of_pairs(recipe: Recipe) -> dict[str, Any]:
    """The fields of TRL's config that a recipe decides, beside those of `train`."""
    section = recipe.dpo if recipe.model.task == "dpo" else recipe.reward
    return {**section.model_dump(), "max_length": None}  # rows are cut when they are prepared


def is_trl_installed() -> bool:
    """Whether TRL, which trains from pairs, is installed here."""
    return importlib.util.find_spec("trl") is not None
