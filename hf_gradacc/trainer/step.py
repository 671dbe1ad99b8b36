"""Run one micro-batch: lay it out the cheapest exact way, copy it to the device, call stock."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_gradacc.errors import ConfigError, LossError
from hf_gradacc.loss.layouts import kept_rows
from hf_gradacc.loss.shortcuts.choose import Shortcuts
from hf_gradacc.loss.shortcuts.chunked import without_logits
from hf_gradacc.loss.shortcuts.onednn import onednn_linears
from hf_gradacc.loss.smoothing import smoothing_correction
from hf_gradacc.loss.trees.hooks import computing_these
from hf_gradacc.loss.trees.kept import KeptBeginning
from hf_gradacc.loss.trees.layout import Trees, lay_out_trees
from hf_gradacc.loss.trees.targets import TreeTargets
from hf_gradacc.loss.trees.written import Weights
from hf_gradacc.trainer.overrides import OwnStep, warn_of_several_backwards
from hf_gradacc.trainer.row_noise import RowNoise
from hf_gradacc.updates.batch import tokens_of_batch
from hf_gradacc.updates.targets import TargetRule
from hf_gradacc.updates.update import MicroBatch, start_copies

__all__ = ["MicroBatchStep", "loss_of_rows", "smoothed_loss"]

logger = logging.get_logger(__name__)

_NO_TREES = (
    "rows that begin alike were planned as trees, but the model was given something else than the "
    "rows of a micro-batch, so they were computed as they are. The gradient is the same; "
    "computed_tokens_per_update and shared_fraction tell what was planned. "
    "layout = 'padded' plans no trees."
)
_NOT_KEPT = (
    "what rows of several micro-batches begin with is computed in each of them and not kept: {}. "
    "The gradient is the same."
)


class MicroBatchStep:
    """Runs the stock step on one micro-batch, and holds what its loss is divided by.

    Attributes:
        shortcuts: Which cheaper ways to the same loss are taken; None before the model was asked.
        divisor: The mean loss is divided by it: targets of the update over those of the
            micro-batch.
        num_reads: How often the divisor was read. Whoever reads it is trusted to divide by it.
        own: Weighs a ``training_step`` that runs a backward of its own; None if there is none.
        after: What to call once the stock step has run; None for nothing.
        noise: NEFTune's, by the row.
        micro_batch: The one that runs, or ran last.
        kept: What its rows begin with, if that is kept; None else.
        keeps: Beginnings may be kept.
        weights: What weights were when the update began, see `KeptBeginning`.
        lost: What ended the backward of a kept beginning; None as long as none failed.
    """

    def __init__(self) -> None:
        self.shortcuts: Shortcuts | None = None
        self.own: OwnStep | None = None
        self.noise = RowNoise()
        self.micro_batch: MicroBatch | None = None
        self.divisor = 1.0
        self.num_reads = 0
        self.after: Callable[[], None] | None = None
        self.kept: KeptBeginning | None = None
        self.keeps = True
        self.weights: Weights | None = None
        self.lost: Exception | None = None
        self.closing: Callable[[], contextlib.AbstractContextManager[Any]] | None = None
        self._runs = 0

    def watch_weights(self) -> None:
        """Note what weights are, as an update begins during which somebody may write to them."""
        if self.shortcuts is not None:
            self.weights = Weights(self.shortcuts.bodies)

    def begin(
        self,
        divisor: float,
        micro_batch: MicroBatch | None = None,
        *,
        after: Callable[[], None] | None = None,
        closing: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
    ) -> None:
        """Set the micro-batch that comes next, its weight, and what to do after it.

        Args:
            divisor: What its loss is divided by.
            micro_batch: It.
            after: What to call once its backward is over.
            closing: It is the last one behind a kept beginning, whose backward runs in what this
                returns.
        """
        self.divisor, self.num_reads, self.after = divisor, 0, after
        self.micro_batch, self.closing, self._runs = micro_batch, closing, 0

    def read_divisor(self) -> float:
        """Return what a loss must be divided by."""
        self.num_reads += 1
        return self.divisor if self.own is None else self.own.read_divisor()

    def check_weighed(self, trainer_class: type) -> None:
        """Check that the step has divided its loss, once.

        Raises:
            LossError: If it has not.
        """
        if self.num_reads == 0:
            raise LossError(
                f"{trainer_class.__name__}.training_step did not weigh this micro-batch, so its "
                f"gradient would be {self.divisor:.3g} times too large.\n  Call "
                f"super().training_step(model, inputs, num_items_in_batch) in it, or divide the "
                f"loss by self.current_gradient_accumulation_steps before its backward."
            )
        if self.num_reads > 1:
            warn_of_several_backwards(trainer_class)

    def run(
        self,
        stock_step: Callable[..., Tensor],
        model: nn.Module,
        inputs: Any,
        count: Tensor | int | None,
        *,
        device: torch.device,
    ) -> Tensor:
        """Lay out one micro-batch, start copying it, then run the stock step on it.

        Rows are laid out here and not in the loader. So code that cuts an update again, after
        running out of memory or from a foreign loader, works on plain padded rows.

        Args:
            stock_step: The ``training_step`` behind the mixin.
            model: The wrapped model.
            inputs: Collated inputs, on the CPU.
            count: What to pass as ``num_items_in_batch``.
            device: Where the model runs.

        Returns:
            The weighted loss, detached.
        """
        taken, positions = self.shortcuts, None
        if self.noise.is_active:
            packed = taken is not None and taken.packed
            stock_step = self._with_noise(stock_step, inputs, packed=packed)
        trees = targets = None
        if taken is not None and isinstance(inputs, Mapping):
            trees = self._trees_of(inputs)
            shaped, found = taken.shape(inputs, as_trees=trees is not None)
            inputs, positions = start_copies(shaped, found, device)
            if trees is not None and found is not None:
                labels, given = shaped["shift_labels"], inputs["shift_labels"]
                targets = TreeTargets(trees, found, labels, given=given, merge=taken.chunked_loss)
        computed: list[Trees] | None = None
        with contextlib.ExitStack() as layout:
            if taken is not None and trees is not None:
                ids, mask = inputs["input_ids"], inputs.get("attention_mask")
                computed = layout.enter_context(
                    computing_these(taken.bodies, trees, ids, mask, targets=targets)
                )
            if taken is not None and taken.linears:
                layout.enter_context(onednn_linears(taken.linears))
            if taken is not None and positions is not None:
                read = None if targets is None else targets.read
                layout.enter_context(kept_rows(taken.head, positions, read=read))
                if taken.chunked_loss:
                    chunked = without_logits(
                        taken.owner,
                        taken.head,
                        onednn=bool(taken.linears),
                        divisor=self.divisor if self.own is None else 1.0,
                        targets=targets,
                    )
                    layout.enter_context(chunked)
            loss = stock_step(model, inputs, count)
            if computed == []:
                logger.warning_once(_NO_TREES)
            if self.kept is not None:
                self._end_behind(self.kept)
        if self.after is not None:
            self.after()
        return loss

    def _trees_of(self, inputs: Mapping[str, Any]) -> Trees | None:
        """Lay out the rows as the trees they were planned as; None if they were not."""
        grown = None if self.micro_batch is None else self.micro_batch.trees
        if grown is None or self.shortcuts is None or not self.shortcuts.bodies:
            return None
        # A step of somebody's own may run other rows.
        tokens = tokens_of_batch(inputs)
        if tokens is None or len(tokens) != sum(map(len, grown.rows)):
            logger.warning_once(_NO_TREES)
            return None
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        behind = self._kept_for(tokens) if grown.kept else None
        return lay_out_trees(ids, mask, grown.rows, by_rows=grown.by_rows, behind=behind)

    def _kept_for(self, tokens: Sequence[Tensor]) -> KeptBeginning | None:
        """Return what is kept of the rows; None if they begin otherwise than was planned."""
        assert self.micro_batch is not None
        beginning = torch.tensor(self.micro_batch.beginning)
        n = len(beginning)
        if not self.keeps or not all(
            len(row) > n and torch.equal(row[:n].cpu().long(), beginning) for row in tokens
        ):
            return None
        self._runs += 1
        if self._runs > 1:  # who does that may change weights in between (adversarial training)
            self._keep_no_more("a step runs its rows several times")
            return None
        if self.kept is None or not torch.equal(self.kept.tokens, beginning):
            self.kept = KeptBeginning(beginning, self.weights)
        return self.kept

    def _end_behind(self, kept: KeptBeginning) -> None:
        """Send the gradient of a kept beginning back if no other micro-batch adds to it."""
        if kept.refused and self.keeps:
            self._keep_no_more(kept.refused)
        if self.closing is not None:
            self.kept = None
            try:
                with self.closing():
                    kept.close()
            except Exception as error:
                self.lost = error
                raise

    def _keep_no_more(self, why: str) -> None:
        self.keeps = False
        logger.warning_once(_NOT_KEPT.format(why))

    def end_group(self) -> None:
        """Send back what others have added up, if the last one behind their beginning has not.

        A step of somebody's own may skip rows, or catch the error that ended it early.

        Raises:
            Exception: What ended that backward, if the step has caught it.
        """
        if self.kept is not None:
            self._end_behind(self.kept)
        if self.lost is not None:  # a part of what other micro-batches have added up is missing
            raise self.lost

    def _with_noise(
        self, stock_step: Callable[..., Tensor], inputs: Any, *, packed: bool
    ) -> Callable[..., Tensor]:
        """Let NEFTune's hook know the rows while the stock step runs."""
        micro_batch = self.micro_batch
        is_whole = micro_batch is not None and micro_batch.inputs is inputs

        def step(*args: Any) -> Tensor:
            with self.noise.running(inputs, micro_batch if is_whole else None, packed=packed):
                return stock_step(*args)

        return step


def smoothed_loss(
    trainer: Any, stock_loss: Callable[..., Any], inputs: Any, return_outputs: bool
) -> Any:
    """Add label smoothing to the model's own loss instead of replacing that loss.

    Args:
        trainer: The trainer. Nothing is smoothed until its ``facts`` are known.
        stock_loss: The stock ``compute_loss``, called with ``return_outputs`` alone.
        inputs: Collated inputs, with labels.
        return_outputs: Return the outputs too.

    Raises:
        ConfigError: If the labels are not classes.
    """
    smoother = trainer.label_smoother
    if inputs["labels"].is_floating_point():
        raise ConfigError(
            f"label_smoothing_factor = {smoother.epsilon}: there is nothing to smooth in "
            f"labels of {inputs['labels'].dtype}, which are not classes (regression, or several "
            f"labels at once). Leave it out."
        )
    trainer.label_smoother = None
    try:
        loss, outputs = stock_loss(return_outputs=True)
    finally:
        trainer.label_smoother = smoother
    if trainer.facts is not None:
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[1]
        correction = smoothing_correction(
            logits,
            inputs.get("shift_labels", inputs["labels"]),
            epsilon=smoother.epsilon,
            shifted=trainer.facts.rule is TargetRule.NEXT_TOKEN and "shift_labels" not in inputs,
        )
        loss = loss + correction.to(loss.device)
    return (loss, outputs) if return_outputs else loss


def loss_of_rows(trainer: Any, model: nn.Module, inputs: Any, return_outputs: bool = False) -> Any:
    """Compute a loss that a subclass takes of all rows by ``compute_update_loss``.

    Args:
        trainer: The trainer.
        model: The model, wrapped or bare.
        inputs: Collated inputs of these rows.
        return_outputs: Return what the model returned, too: in a dictionary, as stock wants it.
    """
    outputs = trainer.compute_row_outputs(model, inputs)
    loss = trainer.compute_update_loss(outputs, inputs)
    if not return_outputs:
        return loss
    return loss, outputs if isinstance(outputs, Mapping) else {"outputs": outputs}
