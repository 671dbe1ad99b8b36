"""The options this package adds to ``TrainingArguments``."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_args

from transformers import TrainingArguments

from hf_gradacc.errors import ConfigError

__all__ = [
    "OUR_OPTIMIZERS",
    "GradAccArguments",
    "GradAccOptions",
    "LowPrecisionMode",
    "MeanOver",
    "add_options",
    "check_options",
    "options_apart",
    "settle_drawn_size",
]


MeanOver = Literal["auto", "target_tokens", "tokens", "sequences", "micro_batch", "nothing"]
"""What a loss may be said to be a mean over; ``nothing`` is a sum."""

LowPrecisionMode = Literal["auto", "master", "stochastic", "plain"]
"""How an optimizer may be made to step on bfloat16 and float16 weights."""

OUR_OPTIMIZERS = ("muon",)
"""Values of ``optim`` beside those that transformers knows."""


@dataclass
class GradAccOptions:
    """Mixin that gives any ``TrainingArguments`` subclass the options of `GradAccMixin`.

    >>> from transformers import Seq2SeqTrainingArguments
    >>> @dataclass
    ... class MyArguments(GradAccOptions, Seq2SeqTrainingArguments): ...
    >>> MyArguments(output_dir="out", effective_batch_size=64).effective_batch_size
    64
    """

    effective_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Sequences in an update, over all ranks. Default: per_device_train_batch_size "
            "x gradient_accumulation_steps x world size, as in transformers."
        },
    )
    tokens_per_update: int | None = field(
        default=None,
        metadata={
            "help": "Target tokens an update must reach; sequences are drawn in seeded order until "
            "it does. Instead of effective_batch_size."
        },
    )
    max_tokens_per_micro_batch: int | str | None = field(
        default=None,
        metadata={
            "help": "Most tokens in a micro-batch, padding included; 'auto' tries some on the "
            "first 20 updates and keeps the fastest. Never changes the gradient. Default: "
            "per_device_train_batch_size sequences."
        },
    )
    remember_tuned_budget: bool = field(
        default=False,
        metadata={
            "help": "Write the budget that 'auto' settles on to token_budgets.json in the Hugging "
            "Face cache, and start with it in later runs of the same model, device and range of "
            "lengths instead of tuning anew."
        },
    )
    group_by_prefix: bool = field(
        default=False,
        metadata={
            "help": "Draw rows that begin alike together, so that an update computes their "
            "beginning once. At most a quarter of an update, and 16 rows, are drawn together; each "
            "row still comes once an epoch. Changes which rows meet: those of an update resemble "
            "each other."
        },
    )
    incomplete_update: Literal["keep", "drop"] | None = field(
        default=None,
        metadata={
            "help": "What to do with an epoch's last update if it is short: keep or drop. "
            "Default: drop if dataloader_drop_last, else keep."
        },
    )

    loss_is_mean_over: MeanOver = field(
        default="auto",
        metadata={
            "help": "What the loss of a micro-batch is a mean over, and so how much it weighs. "
            "'auto' asks the model with a few rows before the first update; 'target_tokens', "
            "'tokens' (all that are fed in) or 'sequences' says it by hand; 'nothing' is a sum; "
            "'micro_batch' weighs all micro-batches alike, as stock does."
        },
    )
    update_passes: Literal["auto", 1, 2] = field(
        default="auto",
        metadata={
            "help": "Passes over an update. 2 gather first what couples its rows (the load of "
            "experts, embeddings that are compared), so that a gradient in pieces is that of the "
            "whole; 1 leaves that inexact and saves the forward. Default: 2 where a check of the "
            "model at the start of training shows that it takes them, else 1."
        },
    )
    target_only_logits: bool | None = field(
        default=None,
        metadata={
            "help": "Compute logits only where a prediction enters the loss. Never changes the "
            "gradient. Default: where a check of the model at the start of training passes."
        },
    )
    chunked_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Take the loss from hidden states, some rows at a time, and never hold all "
            "logits of a micro-batch; needs target_only_logits. Never changes the gradient. "
            "Default: where a check of the model at the start of training passes."
        },
    )
    onednn_linear: bool | None = field(
        default=None,
        metadata={
            "help": "Let oneDNN multiply by the float32 weights of large linear layers on a CPU. "
            "Changes no more than rounding. Default: on CPUs with AVX-512 that are not Intel's, "
            "where torch's own BLAS (MKL) is slower."
        },
    )
    drop_attention_mask: bool | None = field(
        default=None,
        metadata={
            "help": "Give no mask for micro-batches padded on the right. Never changes the "
            "gradient. Default: where a check of the model at the start of training passes."
        },
    )
    layout: Literal["auto", "padded", "packed", "shared_prefix"] = field(
        default="auto",
        metadata={
            "help": "Rows side by side with padding; end to end as one row without; or as trees, "
            "in which a beginning that rows have in common is computed once. Never changes the "
            "gradient. Default: trees for updates in which they save 5 % or more, where a check "
            "of the model passes; else packed where the attention takes it for free (flash, "
            "flex), else padded."
        },
    )

    recover_from_out_of_memory: bool = field(
        default=True,
        metadata={
            "help": "Roll an update back that ran out of memory, cut it finer and run it again; "
            "evaluation likewise. Never changes the gradient."
        },
    )
    accumulate_grads_in_fp32: bool | None = field(
        default=None,
        metadata={
            "help": "Sum the gradients of bfloat16 and float16 weights in float32. Costs 2 bytes "
            "more per trainable weight. Default: wherever there is more than one micro-batch."
        },
    )
    low_precision_updates: LowPrecisionMode = field(
        default="auto",
        metadata={
            "help": "How an optimizer steps on bfloat16 and float16 weights. 'master': in float32, "
            "on values that are kept beside the rounded weights; 'stochastic': in float32, then "
            "rounded at random; 'plain': on the weights as they are, as stock does, where small "
            "steps round to nothing. 'auto': 'master' where float32 gradients, optimizer state and "
            "weights fill at most half of the free memory, else 'plain'."
        },
    )
    on_non_finite: Literal["raise", "skip"] = field(
        default="raise",
        metadata={
            "help": "What to do with an update whose loss or gradient is NaN or infinite: raise an "
            "error that names its rows, or skip it. Neither lets the optimizer see it."
        },
    )
    save_non_finite: bool = field(
        default=False,
        metadata={
            "help": "Save weights and optimizer state that are NaN or infinite. Default: end the "
            "run with an error instead; what was saved before stays."
        },
    )
    max_skipped_updates_in_a_row: int = field(
        default=5,
        metadata={"help": "Stop with an error after skipping so many updates one after another."},
    )

    learning_rates: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": "Learning rates of some parameters at their peak, by regular expressions that "
            "are searched for in parameter names: {'embed_tokens|lm_head': 1e-5}. The first that "
            "matches holds; parameters without one have learning_rate. One schedule scales all."
        },
    )
    loraplus_ratio: float | None = field(
        default=None,
        metadata={
            "help": "LoRA+: how many times learning_rate the B matrices of LoRA learn with, such "
            "as 16. Adapters of embeddings then learn with 1e-6. learning_rates comes first."
        },
    )

    lr_decay_steps: float | None = field(
        default=None,
        metadata={
            "help": "Updates over which warmup_stable_decay lets the learning rate fall at its "
            "end; below 1 a share of the run. Default: 0.2."
        },
    )

    noise_scale_every: int | None = field(
        default=None,
        metadata={
            "help": "Every so many updates, cut one at random and measure gradient noise: "
            "the batch size beyond which more rows per update help little. Default: never."
        },
    )

    wandb_per_rank: bool = field(
        default=False,
        metadata={
            "help": "Give every rank a W&B run of its own figures, in one group with rank 0's run. "
            "Default: rank 0 alone reports, for all ranks."
        },
    )

    wandb_report: bool = field(
        default=False,
        metadata={
            "help": "When training ends, write report.html into the output directory (and "
            "report.png), and upload both to W&B as an artifact."
        },
    )

    wandb_upload_text: bool = field(
        default=False,
        metadata={
            "help": "Upload text to W&B: eight rows of the training data with their targets "
            "marked. Default: no text of a row leaves the machine."
        },
    )

    allow_changed_data: bool = field(
        default=False,
        metadata={
            "help": "Resume even if the training dataset is not the one the checkpoint was trained "
            "on: go on at the same place of the new one."
        },
    )

    def __post_init__(self) -> None:
        """Check our options together with those of the class we are mixed into."""
        budget = self.max_tokens_per_micro_batch
        if isinstance(budget, str) and budget.isdecimal():
            self.max_tokens_per_micro_batch = int(budget)  # from the command line
        if isinstance(self.learning_rates, str):  # likewise
            self.learning_rates = _parsed(self.learning_rates)
        parent: Any = super()
        if hasattr(parent, "__post_init__"):
            with _named_like_stock(self):
                parent.__post_init__()
        check_options(self)

    @property
    def keeps_incomplete_update(self) -> bool:
        """Whether an epoch's short last update is trained."""
        if self.incomplete_update is None:
            return not getattr(self, "dataloader_drop_last", False)
        return self.incomplete_update == "keep"

    def resolve_effective_batch_size(self, world_size: int) -> int | None:
        """Return the sequences of an update over all ranks; None if tokens decide.

        Args:
            world_size: Ranks that each train their own share.
        """
        if self.tokens_per_update is not None:
            return None
        if self.effective_batch_size is not None:
            return self.effective_batch_size
        per_device: int = getattr(self, "per_device_train_batch_size", 1)
        steps: int = getattr(self, "gradient_accumulation_steps", 1)
        return per_device * steps * world_size


def _parsed(text: str) -> Any:
    """Return what a text of JSON says; the text itself if it is none, for the check to refuse."""
    try:
        return json.loads(text)
    except ValueError:
        return text


@contextlib.contextmanager
def _named_like_stock(arguments: Any) -> Iterator[None]:
    """Let stock code see an optimizer it knows: it looks names up, and fails on ours."""
    name = getattr(arguments, "optim", None)
    if name not in OUR_OPTIMIZERS:
        yield
        return
    arguments.optim = "adamw_torch"
    try:
        yield
    finally:
        arguments.optim = name


_SIZES = (
    "effective_batch_size",
    "tokens_per_update",
    "max_tokens_per_micro_batch",
    "noise_scale_every",
)


_SWITCHES = (
    "group_by_prefix",
    "remember_tuned_budget",
    "wandb_per_rank",
    "wandb_report",
    "wandb_upload_text",
)


def _find_problems(args: Any) -> Any:
    """Yield every problem of the options, each naming the field, the value and the way out."""
    for name in _SIZES:
        value = getattr(args, name)
        if name == "max_tokens_per_micro_batch" and isinstance(value, str):
            if value != "auto":
                yield f"{name} = {value!r}: use a whole number, 'auto', or leave it out."
        elif value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            yield f"{name} = {value!r} is not a whole number."
        elif value is not None and value < 1:
            yield f"{name} = {value} is below 1: use at least 1, or leave it out."
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        value = getattr(args, name, 1)
        if not isinstance(value, int) or value < 1:
            yield f"{name} = {value!r} is not a whole number of at least 1."
    steps = getattr(args, "gradient_accumulation_steps", 1)
    if args.effective_batch_size is not None and args.tokens_per_update is not None:
        yield (
            f"effective_batch_size = {args.effective_batch_size} and tokens_per_update = "
            f"{args.tokens_per_update} both say how large an update is: keep one of them."
        )
    for name in ("effective_batch_size", "tokens_per_update"):
        if getattr(args, name) is not None and steps != 1:
            yield (
                f"{name} = {getattr(args, name)} and gradient_accumulation_steps = {steps} both "
                f"say how large an update is: leave gradient_accumulation_steps out; the number of "
                f"micro-batches follows from per_device_train_batch_size or "
                f"max_tokens_per_micro_batch."
            )
    if args.incomplete_update not in (None, "keep", "drop"):
        yield f"incomplete_update = {args.incomplete_update!r}: use 'keep' or 'drop'."
    if args.incomplete_update == "keep" and getattr(args, "dataloader_drop_last", False):
        yield (
            "incomplete_update = 'keep' contradicts dataloader_drop_last = True: "
            "leave one of them out."
        )
    for name in ("target_only_logits", "chunked_loss", "onednn_linear", "drop_attention_mask"):
        if getattr(args, name) not in (None, True, False):
            yield f"{name} = {getattr(args, name)!r}: use True, False, or leave it out."
    if args.chunked_loss and args.target_only_logits is False:
        yield (
            "chunked_loss = True needs target_only_logits: it is only given rows with a target. "
            "Leave target_only_logits out, or chunked_loss."
        )
    stated = get_args(MeanOver)
    if args.loss_is_mean_over not in stated:
        yield (
            f"loss_is_mean_over = {args.loss_is_mean_over!r}: use one of "
            f"{', '.join(map(repr, stated))}."
        )
    if args.update_passes not in ("auto", 1, 2) or args.update_passes is True:
        yield f"update_passes = {args.update_passes!r}: use 'auto', 1 or 2."
    if args.layout not in ("auto", "padded", "packed", "shared_prefix"):
        yield f"layout = {args.layout!r}: use 'auto', 'padded', 'packed' or 'shared_prefix'."
    for name in _SWITCHES:
        if not isinstance(getattr(args, name), bool):
            yield f"{name} = {getattr(args, name)!r}: use True or False."
    if args.group_by_prefix is True:
        yield from _find_grouping_problems(args)
    if args.remember_tuned_budget is True and args.max_tokens_per_micro_batch != "auto":
        yield (
            f"remember_tuned_budget = True, but max_tokens_per_micro_batch = "
            f"{args.max_tokens_per_micro_batch!r} tunes nothing: set it to 'auto'."
        )
    yield from _find_rate_problems(args)
    yield from _find_schedule_problems(args)
    yield from _find_transaction_problems(args)


def _find_grouping_problems(args: Any) -> Any:
    """Yield what rows that are drawn together do not go with."""
    if getattr(args, "train_sampling_strategy", None) == "sequential":
        yield (
            "group_by_prefix = True draws families of rows at random, and train_sampling_strategy "
            "= 'sequential' keeps the dataset's order: leave out one of the two."
        )
    if args.layout in ("padded", "packed"):
        yield (
            f"group_by_prefix = True lets rows meet that begin alike, and layout = {args.layout!r} "
            f"computes each of them whole: set layout to 'auto' or 'shared_prefix', or leave "
            f"group_by_prefix out."
        )
    if args.noise_scale_every is not None:
        yield (
            f"noise_scale_every = {args.noise_scale_every} takes the rows of an update for drawn "
            f"one by one, and would measure too little noise under group_by_prefix = True: leave "
            f"out one of the two."
        )


def _find_rate_problems(args: Any) -> Any:
    """Yield the problems of the learning rates of groups."""
    rates = args.learning_rates
    if rates is not None and (not isinstance(rates, dict) or not rates):
        yield (
            f"learning_rates = {rates!r}: write patterns with their rates, such as "
            f"{{'embed_tokens|lm_head': 1e-5}}, or leave it out."
        )
        rates = None
    for pattern, rate in (rates or {}).items():
        if not _is_number(rate) or not rate >= 0:
            yield (
                f"learning_rates gives {pattern!r} the rate {rate!r}: use a number of at least 0."
            )
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            yield (
                f"learning_rates has {pattern!r}, no regular expression ({error}): write a part of "
                f"a parameter's name."
            )
    ratio = args.loraplus_ratio
    if ratio is not None and (not _is_number(ratio) or ratio < 1):
        yield f"loraplus_ratio = {ratio!r}: use a number of at least 1, such as 16."


def _find_schedule_problems(args: Any) -> Any:
    """Yield the problems of the decay that ends a schedule."""
    steps = args.lr_decay_steps
    if steps is None:
        return
    if not _is_number(steps) or steps <= 0 or (steps >= 1 and steps != int(steps)):
        yield (
            f"lr_decay_steps = {steps!r}: use a whole number of updates, or a share of the run "
            f"below 1."
        )
        return
    kind = getattr(args, "lr_scheduler_type", None)
    kind = getattr(kind, "value", kind)
    if kind != "warmup_stable_decay":
        yield (
            f"lr_decay_steps = {steps} has no effect with lr_scheduler_type = {kind!r}: set that "
            f"to 'warmup_stable_decay', or leave lr_decay_steps out."
        )
    options = getattr(args, "lr_scheduler_kwargs", None)
    if isinstance(options, dict) and "num_decay_steps" in options:
        yield (
            f"lr_decay_steps = {steps} and num_decay_steps = {options['num_decay_steps']} in "
            f"lr_scheduler_kwargs both say how long the decay is: leave one of them out."
        )
    warmup = getattr(args, "warmup_steps", 0)
    if steps < 1 and warmup < 1 and steps + warmup > 1:
        yield (
            f"lr_decay_steps = {steps} and warmup_steps = {warmup} are shares of one run, and more "
            f"than all of it: take less of one."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _find_transaction_problems(args: Any) -> Any:
    """Yield the problems of the options about memory, precision and bad numbers."""
    for name in ("recover_from_out_of_memory", "save_non_finite"):
        if not isinstance(getattr(args, name), bool):
            yield f"{name} = {getattr(args, name)!r}: use True or False."
    if args.accumulate_grads_in_fp32 not in (None, True, False):
        yield (
            f"accumulate_grads_in_fp32 = {args.accumulate_grads_in_fp32!r}: use True, False, or "
            f"leave it out."
        )
    steps = get_args(LowPrecisionMode)
    if args.low_precision_updates not in steps:
        yield (
            f"low_precision_updates = {args.low_precision_updates!r}: use one of "
            f"{', '.join(map(repr, steps))}."
        )
    if args.on_non_finite not in ("raise", "skip"):
        yield f"on_non_finite = {args.on_non_finite!r}: use 'raise' or 'skip'."
    most = args.max_skipped_updates_in_a_row
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        yield f"max_skipped_updates_in_a_row = {most!r} is not a whole number of at least 1."


@dataclass
class GradAccArguments(GradAccOptions, TrainingArguments):
    """``TrainingArguments`` with the options of `GradAccOptions`.

    >>> GradAccArguments(output_dir="out", tokens_per_update=50_000).tokens_per_update
    50000
    """


def check_options(arguments: Any) -> None:
    """Check our options, in whatever order a class was put together.

    Raises:
        ConfigError: Naming every field that is at fault, its value and the way out.
    """
    problems = list(_find_problems(arguments))
    if problems:
        raise ConfigError("\n".join(problems))


@contextlib.contextmanager
def options_apart(values: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Let a trainer see plain arguments in place of ours, and yield our options.

    TRL makes an ``SFTConfig`` of the ``TrainingArguments`` it is given, field by field, and fails
    on fields it does not know.

    Args:
        values: What the trainer is made with; `GradAccArguments` among it become plain.
    """
    ours: list[Any] = [value for value in values if type(value) is GradAccArguments]
    names = [option.name for option in fields(GradAccOptions)]
    apart = [{name: vars(arguments).pop(name) for name in names} for arguments in ours]
    for arguments, options in zip(ours, apart, strict=True):
        if arguments.optim in OUR_OPTIMIZERS:
            options["optim"] = arguments.optim
            arguments.optim = "adamw_torch"
        arguments.__class__ = TrainingArguments
    try:
        yield apart[0] if apart else {}
    finally:
        for arguments, options in zip(ours, apart, strict=True):
            vars(arguments).update(options)
            arguments.__class__ = GradAccArguments


def settle_drawn_size(arguments: Any, *, before: tuple[Any, Any]) -> None:
    """Let the size of an update that a trial has drawn be the only one that is said.

    A search sets single fields. Without this a drawn ``effective_batch_size`` would stand beside
    the option that said the size before it.

    Args:
        arguments: After the trial has set its values.
        before: ``effective_batch_size`` and ``tokens_per_update`` before that.

    Raises:
        ConfigError: If a value cannot be used.
    """
    sizes = ("effective_batch_size", "tokens_per_update")
    for name, other, was in zip(sizes, reversed(sizes), before, strict=True):
        drawn = getattr(arguments, name)
        if drawn in (None, was):
            continue
        if not isinstance(drawn, str) and drawn == int(drawn):  # 16.0, or a number of numpy's
            setattr(arguments, name, int(drawn))
        setattr(arguments, other, None)
        arguments.gradient_accumulation_steps = 1
        break
    check_options(arguments)


def add_options(arguments: TrainingArguments, options: Mapping[str, Any] | None = None) -> None:
    """Add our options, at their defaults, to arguments that were made without them.

    The object stays the same one, so whoever holds it goes on setting what the trainer reads. Its
    class becomes a subclass of its own: `GradAccArguments`, or one made for the purpose.

    Args:
        arguments: Of any subclass of ``TrainingArguments``; those that have the options are only
            checked.
        options: Those that are not at their defaults.

    Raises:
        ConfigError: If an option is at fault.

    >>> plain = TrainingArguments(output_dir="out", gradient_accumulation_steps=4)
    >>> add_options(plain)
    >>> type(plain).__name__, plain.layout, plain.gradient_accumulation_steps
    ('GradAccArguments', 'auto', 4)
    """
    if not isinstance(arguments, GradAccOptions):
        kind: Any = type(arguments)
        wider = GradAccArguments if kind is TrainingArguments else _with_options(kind)
        for option in fields(GradAccOptions):
            assert option.default is not MISSING
            value = (options or {}).get(option.name, option.default)
            vars(arguments).setdefault(option.name, value)
        arguments.optim = (options or {}).get("optim", arguments.optim)
        arguments.__class__ = wider
    check_options(arguments)


class _MadeFor:
    """Arguments of a class that `add_options` made: pickled by the class they were made for."""

    made_for: type

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self.made_for, dict(vars(self)))


def _unpickle(made_for: type, values: dict[str, Any]) -> Any:
    arguments: Any = object.__new__(_with_options(made_for))
    vars(arguments).update(values)
    return arguments


@functools.cache
def _with_options(kind: Any) -> Any:
    """Make a class of arguments that has our options too."""
    made = type(
        f"GradAcc{kind.__name__}",
        (_MadeFor, GradAccOptions, kind),
        {"__module__": __name__, "__doc__": kind.__doc__, "made_for": kind},
    )
    return dataclass(made)
