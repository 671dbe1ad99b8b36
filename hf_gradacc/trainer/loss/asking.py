"""Ask a trainer's own model how its loss counts: with its `compute_loss`, precision and padding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_gradacc.errors import ConfigError, DataError, GradAccError, LossError
from hf_gradacc.loss.asking.answers import Loss
from hf_gradacc.loss.asking.ask import (
    as_stated,
    ask,
    choose_mode,
    dtype_computed_in,
    has_router_loss,
    held_in_mode,
    is_costly,
    sample_of,
    stated_facts,
    unknown_facts,
    with_warnings,
)
from hf_gradacc.loss.asking.rows import ProbeRows
from hf_gradacc.loss.coupled.replay import Replay
from hf_gradacc.loss.facts import LossFacts
from hf_gradacc.loss.shortcuts.choose import Setting, Shortcuts, choose_shortcuts
from hf_gradacc.loss.shortcuts.remembered import RememberedLayers, find_layers
from hf_gradacc.loss.shortcuts.sharing import with_sharing
from hf_gradacc.ranks.collectives import largest_over_ranks
from hf_gradacc.ranks.engine import Engine
from hf_gradacc.safety.out_of_memory import is_out_of_memory
from hf_gradacc.safety.rollback import AttributeState, BufferState, RandomState, devices_of
from hf_gradacc.safety.waiting import telling_for
from hf_gradacc.trainer.loss.coupling import find_coupling, may_balance_experts
from hf_gradacc.trainer.loss.terms import ask_terms
from hf_gradacc.trainer.overrides import definers
from hf_gradacc.updates.batch import can_slice_rows, count_rows, slice_rows
from hf_gradacc.updates.collator import UpdateCollator
from hf_gradacc.updates.loader import ModelFacts
from hf_gradacc.updates.stream import is_stream
from hf_gradacc.updates.targets import TargetRule, can_have_target, count_all_targets

__all__ = [
    "Trace",
    "ask_trainer",
    "find_models",
    "has_foreign_loss",
    "padding_style",
    "prepared",
    "quietly",
    "refuse_data_without_targets",
    "tell_collator",
    "without_trace",
]

logger = logging.get_logger(__name__)


def ask_trainer(
    trainer: Any,
    model: nn.Module,
    inputs: Any,
    *,
    sample: ProbeRows | None,
    engine: Engine,
    insists: bool = True,
) -> tuple[LossFacts, Shortcuts | None]:
    """Ask the model how its loss counts and which shortcuts it allows; say what is not exact.

    While the loss is asked, ``trainer.facts`` is None, so that labels are not smoothed. It is set
    before shortcuts are tried, because they must reproduce the smoothed loss.

    Args:
        trainer: The trainer.
        model: The model, wrapped or bare.
        inputs: Collated rows to ask with.
        sample: The dataset rows they are made of; None if those are not known.
        engine: How the ranks work together.
        insists: A shortcut that was asked for by name and is not exact is an error.

    Returns:
        What the loss is a mean over, and the shortcuts taken; None for them if the trainer does not
        use our loader. A model that gives no answer trains by stock's rule.

    Raises:
        ConfigError: If a shortcut was asked for by name and would not give the same gradient, or
            tokens are stated that nobody can count.
    """
    args, collator = trainer.args, trainer.update_collator
    stated = args.loss_is_mean_over
    if not isinstance(inputs, Mapping) or count_rows(inputs) == 0:
        if stated in ("target_tokens", "tokens"):
            raise ConfigError(
                f"loss_is_mean_over = {stated!r}: the data collator returns no tensors by name, so "
                f"tokens cannot be counted. Return a flat dictionary, or set it to 'sequences', "
                f"'nothing' or 'micro_batch'."
            )
        facts = as_stated(stated, rule=TargetRule.SEQUENCE)
        if stated == "auto":
            facts = _facts_without_names()
        _tell(trainer.model, facts, is_news=False)
        return facts, None
    asked, known = sample_of(inputs, sample)
    bare = trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
    dtype = dtype_computed_in(bare, bf16=args.bf16, fp16=args.fp16)
    style = padding_style(trainer)

    def compute(part: Mapping[str, Any], count: int | None) -> Tensor:
        num_items = None if count is None else torch.tensor(count, device=args.device)
        with trainer.compute_loss_context_manager():
            loss: Tensor = trainer.compute_loss(
                bare, prepared(trainer, part), num_items_in_batch=num_items
            )
        return loss

    shortcuts = None
    is_large, is_foreign = is_costly(bare, asked), has_foreign_loss(type(trainer))
    progress = _Progress()
    with (
        without_trace(trainer, bare, args.device) as trace,
        telling_for(trainer, lambda: str(progress)),
    ):
        loss = Loss(
            bare,
            compute,
            restart=trace.restore,
            has_drawn=trace.has_drawn,
            can_differentiate=engine.can_differentiate_outside,
            note_forward=progress.note_forward,
        )
        remembers = not engine.lockstep and trainer.compute_loss_func is None and not is_foreign
        layers = RememberedLayers(
            find_layers(bare) if remembers else None,
            has_drawn=trace.has_drawn,
            # A router loss is asked by masks, whatever else is.
            keeps_graph=has_router_loss(bare),
        )
        try:
            progress.begin("asking the model how its loss counts", usual=1 + count_rows(asked))
            with layers.keeping():
                training, asked, known = choose_mode(
                    loss, asked, known, pad_token_id=style["pad_token_id"], is_large=is_large
                )
            with held_in_mode(bare, training=training):
                facts = _ask_in_mode(
                    trainer,
                    loss,
                    asked,
                    known,
                    layers=layers,
                    dtype=dtype,
                    engine=engine,
                    is_large=is_large,
                )
        except GradAccError:
            raise
        except Exception as error:
            if is_out_of_memory(error):  # not even one row fits
                raise
            training, facts = False, _facts_without_answer(bare, inputs, error, stated)
        facts = with_warnings(facts, bare, trainer.sample)
        if collator is not None:
            trainer.facts = facts
            setting = Setting(
                args,
                facts,
                has_loss_func=trainer.compute_loss_func is not None,
                # What is recorded in two passes is what the model returns as it stands.
                has_foreign_loss=is_foreign or isinstance(facts.coupling, Replay),
                smooths_labels=trainer.label_smoother is not None,
                lockstep=engine.lockstep,
                splits_rows=engine.layout.row_parts > 1,
                keeps_beginnings=engine.keeps_beginnings,
                insists=insists,
            )
            progress.begin("trying shortcuts to the same loss on the model", usual=6)
            with held_in_mode(bare, training=training), layers.returning():
                shortcuts = choose_shortcuts(
                    bare,
                    asked,
                    loss.value,
                    setting=setting,
                    dtype=dtype,
                    gradients_of=loss.gradients,
                )
            if args.layout == "shared_prefix" or (
                args.layout == "auto" and collator.foresees_sharing
            ):
                # The trial of trees changes windows and masks below the head: it needs the layers.
                with held_in_mode(bare, training=training):
                    shortcuts = with_sharing(
                        shortcuts,
                        find_models(trainer),
                        asked,
                        loss.value,
                        setting=setting,
                        dtype=dtype,
                        gradients_of=loss.gradients,
                    )
                shortcuts = _agree_on_trees(shortcuts, device=args.device)
            else:
                shortcuts = shortcuts.without_trees(_why_untried(args.layout))
    _tell(bare, facts, is_news=stated == "auto")
    return facts, shortcuts


def tell_collator(collator: UpdateCollator, facts: LossFacts, shortcuts: Shortcuts) -> None:
    """Tell the collator of a run what was found, since it plans by that."""
    collator.packed = shortcuts.packed
    collator.share_prefixes(
        shortcuts.bodies, by_rows=shortcuts.trees_by_rows, keeps=shortcuts.keeps_beginnings
    )
    collator.rule, collator.pad_to_one_width = facts.kept_by, facts.pad_to_one_width


def _agree_on_trees(shortcuts: Shortcuts, *, device: torch.device) -> Shortcuts:
    """Let all ranks compute trees alike, since they deal rows by what those cost.

    A rank that ran out of memory in a trial has found less than the others.
    """
    ways = (shortcuts.keeps_beginnings, shortcuts.trees_by_rows, bool(shortcuts.bodies), True)
    mine = ways.index(True)
    worst, best = (sign * largest_over_ranks(sign * mine, device=device) for sign in (1, -1))
    if best == worst:
        return shortcuts
    if worst == 1:
        return shortcuts.without_kept("another rank could not keep them")
    return shortcuts.without_trees("another rank could not compute trees in the same way")


def _why_untried(layout: str) -> str:
    """Say why trees were not even tried on the model."""
    if layout == "auto":
        return (
            "the rows looked at do not begin alike, so it was not tried; "
            "layout = 'shared_prefix' tries it whatever they are"
        )
    return f"layout = {layout!r} lays out rows as they are"


class _Progress:
    """What the model is asked at the moment, and how far that is."""

    def __init__(self) -> None:
        self._what, self._usual, self._forward = "", 0, 0

    def begin(self, what: str, *, usual: int) -> None:
        """Begin something that usually takes so many forwards."""
        self._what, self._usual, self._forward = what, usual, 0

    def note_forward(self) -> None:
        """Note that the next forward begins."""
        self._forward += 1

    def __str__(self) -> str:
        usual = f" of about {self._usual}" if self._forward <= self._usual else ""
        return f"{self._what}: forward {self._forward}{usual}"


def _ask_in_mode(
    trainer: Any,
    loss: Loss,
    asked: Mapping[str, Any],
    known: ProbeRows | None,
    *,
    layers: RememberedLayers,
    dtype: torch.dtype,
    engine: Engine,
    is_large: bool,
) -> LossFacts:
    """Ask what the loss, or each of its terms, is divided by, and what couples its rows."""
    stated, style = trainer.args.loss_is_mean_over, padding_style(trainer)
    parts = partial(_two_parts, asked, known)

    def ask_one(one: Loss, *, two_passes_follow: bool = False) -> LossFacts:
        if stated == "auto":
            return ask(
                one,
                asked,
                known,
                dtype=dtype,
                is_large=is_large,
                two_passes_follow=two_passes_follow,
                **style,
            )
        return stated_facts(one, asked, stated, dtype=dtype, is_large=is_large, **style)

    settler = trainer._loss_settler
    try:
        of_terms = ask_terms(trainer, loss, asked, parts, ask_one, dtype=dtype)
    except LossError:
        if settler.added is None:
            raise
        of_terms = None
    if of_terms is not None and not (settler.added and of_terms.misfit):
        return of_terms
    if settler.added is not None:  # another release of TRL, or a loss that adds still more
        settler.added, loss = None, loss.computed_by(loss.compute)

    def ask_with_passes(*, two_passes_follow: bool) -> LossFacts:
        with layers.repeating():
            facts = ask_one(loss, two_passes_follow=two_passes_follow)
        return find_coupling(
            trainer,
            loss,
            asked,
            parts(),
            facts,
            dtype=dtype,
            engine=engine,
            rows_per_sequence=1 if known is None else known.rows_per_sequence,
            left=style["left"],
        )

    if may_balance_experts(trainer, loss.model):
        # Two passes most often settle it, and how far rows are from it is of no interest then.
        facts = ask_with_passes(two_passes_follow=True)
        if facts.coupling is not None:
            return facts
    return ask_with_passes(two_passes_follow=False)


def _two_parts(inputs: Mapping[str, Any], known: ProbeRows | None) -> list[Mapping[str, Any]]:
    """Split collated rows in two parts of different size; one part if rows cannot be told apart."""
    num_rows = count_rows(inputs) if known is None else len(known.rows)
    if num_rows < 2 or (known is None and not can_slice_rows(inputs, num_rows)):
        return [inputs]
    take = partial(slice_rows, inputs) if known is None else known.take
    return [take([0]), take(list(range(1, num_rows)))]


def _tell(model: nn.Module, facts: LossFacts, *, is_news: bool) -> None:
    """Log what is not exact; and what may surprise, unless the user has said it."""
    for line in (*facts.warnings, *(facts.notes if is_news else ())):
        logger.warning_once(f"{type(model).__name__}: {line}")


def _facts_without_names() -> LossFacts:
    return LossFacts(
        TargetRule.SEQUENCE,
        other_warnings=(
            "the data collator returns no tensors by name, so what the loss is a mean over cannot "
            "be asked: each micro-batch is weighted by its rows. That is exact if the loss is a "
            "mean over rows.",
        ),
    )


def _facts_without_answer(
    model: nn.Module, inputs: Mapping[str, Any], error: Exception, stated: str
) -> LossFacts:
    """Go on with what is known if the model fails on the rows it is asked with.

    If it fails on all rows, training tells, with the traceback of its own first micro-batch.
    """
    first_line = (str(error).splitlines() or [""])[0][:200]
    reason = f"{type(error).__name__}: {first_line}"
    facts = unknown_facts(inputs, reason, model=ModelFacts.of(model))
    return facts if stated == "auto" else as_stated(stated, rule=facts.rule)


def find_models(trainer: Any) -> list[nn.Module]:
    """Find the models whose answers may enter a trainer's loss: its own, a reference, a teacher."""
    others = [v for v in vars(trainer).values() if isinstance(v, nn.Module)]
    model = trainer.model
    return [model, *(other for other in others if other is not model)]


def prepared(trainer: Any, inputs: Mapping[str, Any]) -> Any:
    """Prepare collated inputs as the trainer does before a forward: move and cast them."""
    return trainer._prepare_inputs(inputs)


class Trace:
    """What asking could leave behind: random states, buffers, plain attributes.

    Args:
        trainer: The trainer; a subclass may count its calls.
        model: The bare model.
        device: Where it runs.
    """

    def __init__(self, trainer: Any, model: nn.Module, device: torch.device) -> None:
        self._random = RandomState(*devices_of(model, device))
        self._buffers = BufferState(model)
        self._of_modules = AttributeState(
            model.modules(),
            # torch's own, and Transformers' note that it has put its hooks in place.
            leave_out={*vars(nn.Module()), "_output_capturing_hooks_installed"},
        )
        self._of_trainer = AttributeState(
            [trainer], leave_out=("train_dataset", "eval_dataset", "facts")
        )

    def restore(self) -> None:
        """Put everything back, but for the mode that modules are in."""
        self._buffers.restore()
        self._random.restore()

    def restore_all(self) -> None:
        """Put everything back."""
        self.restore()
        self._of_modules.restore()
        self._of_trainer.restore()

    def has_drawn(self) -> bool:
        """Return whether a random number was drawn since the last `restore`."""
        return self._random.has_moved()


@contextlib.contextmanager
def without_trace(trainer: Any, model: nn.Module, device: torch.device) -> Iterator[Trace]:
    """Run a block that leaves buffers, random states and plain attributes as they were."""
    trace = Trace(trainer, model, device)
    try:
        yield trace
    finally:
        trace.restore_all()


@contextlib.contextmanager
def quietly(trainer: Any) -> Iterator[None]:
    """Run forwards that only look: nothing is logged, and metrics they collect are dropped."""
    was_asking, trainer._is_asking = trainer._is_asking, True
    try:
        with trainer._foreign_metrics.taking():
            yield
    finally:
        trainer._is_asking = was_asking


def refuse_data_without_targets(dataset: Any, sample: ProbeRows | None, rule: TargetRule) -> None:
    """Refuse a dataset in which no row has a target under the loss's rule.

    Raises:
        DataError: If no row has a target.
    """
    if sample is None or is_stream(dataset) or not hasattr(dataset, "__getitem__"):
        return
    counts = count_all_targets(sample.inputs, num_sequences=len(sample.rows), num_input_tokens=2)
    if counts.under(rule):
        return
    if any(can_have_target(dataset[i], rule=rule) for i in range(len(dataset))):
        return
    raise DataError(
        f"none of the {len(dataset)} training rows has a target: all labels but each row's first "
        f"are -100, and this model predicts every label from the one before. Check how the "
        f"prompt is masked and how rows are cut."
    )


def padding_style(trainer: Any) -> dict[str, Any]:
    """Return how the trainer's data collator pads: with which token, and on which side."""
    tokenizer, config = trainer.processing_class, getattr(trainer.model, "config", None)
    pad = getattr(tokenizer, "pad_token_id", None)
    pad = getattr(config, "pad_token_id", None) if pad is None else pad
    left = getattr(tokenizer, "padding_side", "right") == "left"
    return {"pad_token_id": pad or 0, "left": left}


def has_foreign_loss(trainer_class: type) -> bool:
    """Return whether a class other than the stock Trainer and ours computes the loss."""
    takes_all_rows = hasattr(trainer_class, "compute_update_loss")
    return takes_all_rows or any(definers(trainer_class.__mro__, "compute_loss"))
