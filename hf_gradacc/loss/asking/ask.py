"""Ask a prepared model how its loss counts, and leave it as it was.

`probe` asks with rows by themselves; where rows cannot be told apart in the collated tensors, or
the model takes one row at a time, it asks with labels alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_gradacc.errors import GradAccError
from hf_gradacc.loss.asking.answers import Loss
from hf_gradacc.loss.asking.evidence import CANNOT_TAKE, Evidence, rules_in_order
from hf_gradacc.loss.asking.probe import (
    complete,
    may_share_images,
    measure_padding,
    probe_in_place,
    probe_loss,
)
from hf_gradacc.loss.asking.questions import vary_padding, vary_targets
from hf_gradacc.loss.asking.rows import ProbeRows, choose_rows_to_ask, find_padding_targets
from hf_gradacc.loss.facts import LossFacts, Weighing
from hf_gradacc.updates.batch import can_slice_rows, count_rows, find_main_input, slice_rows
from hf_gradacc.updates.loader import ModelFacts
from hf_gradacc.updates.targets import TargetRule

__all__ = [
    "as_stated",
    "ask",
    "choose_mode",
    "dtype_computed_in",
    "find_mixing",
    "has_router_loss",
    "held_in_mode",
    "is_costly",
    "sample_of",
    "stated_facts",
    "unknown_facts",
    "with_warnings",
]


_COSTLY = 2e10
"""Operations of a forward beyond which rows are cut before they are asked with."""

_LONGEST_OF_LARGE = 32
"""Tokens that rows are cut to then: a weight is still used often for each time it is read."""


def sample_of(
    inputs: Mapping[str, Any], known: ProbeRows | None
) -> tuple[Mapping[str, Any], ProbeRows | None]:
    """Return what a model is asked with: a few rows, collated together.

    Args:
        inputs: Collated rows.
        known: The dataset rows they were made of, if those are known.

    Returns:
        The inputs, and the dataset rows if collated rows cannot simply be sliced out.
    """
    if known is not None and known.rows_per_sequence != 1:
        return inputs, known
    if can_slice_rows(inputs, count_rows(inputs)):
        inputs = slice_rows(inputs, choose_rows_to_ask(inputs))
    return inputs, None


def choose_mode(
    loss: Loss,
    inputs: Mapping[str, Any],
    known: ProbeRows | None,
    *,
    pad_token_id: int,
    is_large: bool = False,
) -> tuple[bool, Mapping[str, Any], ProbeRows | None]:
    """Choose the mode to ask in, and the inputs to ask with.

    Evaluation mode, in which nothing is dropped out and hooks of a user's own take no forward for
    one of training; training mode if only that gives a loss.

    Args:
        loss: To be asked.
        inputs: From `sample_of`.
        known: Likewise.
        pad_token_id: What rows are padded with.
        is_large: See `is_costly`.

    Returns:
        True for training mode; the inputs, with rows that show more (one cut very short, unequal
        numbers of targets), or as they are if the model does not take those, or one row if it takes
        no more; and the dataset rows that belong to them.

    Raises:
        Exception: What the model raised in evaluation mode, if it answers in neither.
    """
    candidates = [(dict(inputs), known)]
    num_rows = count_rows(inputs, ModelFacts.of(loss.model).main_input)
    if known is None:
        candidates.insert(0, (_telling(inputs, loss.model, pad_token_id, is_large=is_large), None))
    if num_rows > 1 and known is None and can_slice_rows(inputs, num_rows):
        candidates.append((slice_rows(inputs, [num_rows - 1]), None))
    first_error: Exception | None = None
    for part, rows in candidates:
        for training in (False, True):
            try:
                with held_in_mode(loss.model, training=training):
                    loss.ask_either_way(part, _any_count(part, loss.model))
            except GradAccError:
                raise
            except torch.OutOfMemoryError as error:
                first_error = error
                break  # training mode holds no less
            except Exception as error:
                first_error = first_error or error
            else:
                return training, part, rows
    assert first_error is not None
    raise first_error


def _telling(
    inputs: Mapping[str, Any], model: nn.Module, pad_token_id: int, *, is_large: bool
) -> dict[str, Any]:
    """Change rows so that they show more; and cut them short if forwards take long."""
    config: Any = getattr(model, "config", None)
    padded = vary_padding(
        inputs,
        pad_token_id=pad_token_id,
        max_width=getattr(config, "max_position_embeddings", None),
        longest=_LONGEST_OF_LARGE if is_large else None,
    )
    return vary_targets(padded)


def is_costly(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Return whether a forward of some rows takes long: a quarter of a second on a few cores.

    By count of operations, two for each parameter and token, rather than by the clock: all ranks
    have to ask alike, and a run that is resumed asks what it asked before.
    """
    main = find_main_input(inputs, ModelFacts.of(model).main_input)
    num_tokens = 0 if main is None else main.numel()
    num_parameters = sum(int(getattr(p, "ds_numel", p.numel())) for p in model.parameters())
    return 2 * num_parameters * num_tokens > _COSTLY


def _any_count(inputs: Mapping[str, Any], model: nn.Module) -> int:
    return max(count_rows(inputs, ModelFacts.of(model).main_input), 1)


def ask(
    loss: Loss,
    inputs: Mapping[str, Any],
    known: ProbeRows | None,
    *,
    dtype: torch.dtype,
    pad_token_id: int,
    left: bool,
    is_large: bool = False,
    two_passes_follow: bool = False,
) -> LossFacts:
    """Find out what a loss is a mean over, and whether padding matters to it.

    Args:
        loss: Of a model held in the mode that `choose_mode` gave.
        inputs: From `choose_mode`.
        known: From `sample_of`.
        dtype: The coarsest dtype of a forward, see `dtype_computed_in`.
        pad_token_id: What rows are widened by.
        left: Padding goes in front.
        is_large: See `is_costly`.
        two_passes_follow: See `Evidence`.

    Raises:
        Exception: Whatever the model raises on the rows together.
    """
    config: Any = getattr(loss.model, "config", None)
    model = ModelFacts.of(loss.model)
    main_input = model.main_input
    num_rows = count_rows(inputs, main_input) if known is None else len(known.rows)
    options: dict[str, Any] = {
        "dtype": dtype,
        "encoder_decoder": model.encoder_decoder,
        "main_input": main_input,
        "has_router_loss": has_router_loss(loss.model),
        "two_passes_follow": two_passes_follow,
    }
    if num_rows > 1 and (known is not None or can_slice_rows(inputs, num_rows)):
        try:
            facts = probe_loss(
                inputs,
                loss.ask,
                is_large=is_large,
                pad_token_id=pad_token_id,
                left=left,
                max_width=getattr(config, "max_position_embeddings", None),
                num_rows=num_rows,
                take=None if known is None else known.take,
                **options,
            )
        except CANNOT_TAKE:
            # As many images as rows by chance, but some rows hold none and others several.
            if known is not None or not may_share_images(inputs):
                raise
            facts = probe_in_place(inputs, loss.ask, **options)
    else:
        facts = probe_in_place(inputs, loss.ask, **options)
    return facts


def stated_facts(
    loss: Loss,
    inputs: Mapping[str, Any],
    stated: str,
    *,
    dtype: torch.dtype,
    pad_token_id: int,
    left: bool,
    is_large: bool = False,
) -> LossFacts:
    """Take the user's word for what a loss is a mean over.

    Left to ask is what the word does not say: whether labels are shifted, whether the loss has to
    be told its count, and whether padding matters. What cannot be asked is taken to be as usual.
    """
    config: Any = getattr(loss.model, "config", None)
    model = ModelFacts.of(loss.model)
    evidence = Evidence(
        inputs,
        loss.ask,
        dtype=dtype,
        encoder_decoder=model.encoder_decoder,
        main_input=model.main_input,
    )
    facts = as_stated(stated, rule=evidence.order[0])
    try:
        facts = complete(facts, evidence)
        if can_slice_rows(inputs, evidence.num_rows) and not facts.draws:
            error = measure_padding(
                evidence,
                facts,
                pad_token_id=pad_token_id,
                left=left,
                max_width=getattr(config, "max_position_embeddings", None),
                rows_alone_add_up=False,
                is_large=is_large,
            )
            facts = dataclasses.replace(
                facts, padding_error=error, pad_to_one_width=not error <= evidence.loss_limit
            )
    except GradAccError:
        raise
    except Exception:
        return facts
    return facts


def as_stated(stated: str, *, rule: TargetRule) -> LossFacts:
    """Return the facts of a mean that was stated; `rule` says which tokens are targets."""
    rules = {"tokens": TargetRule.INPUT_TOKEN, "sequences": TargetRule.SEQUENCE}
    weighings: dict[str, Weighing] = {"micro_batch": "micro_batch", "nothing": "sum"}
    return LossFacts(rules.get(stated, rule), weighings.get(stated, "mean"))


def unknown_facts(inputs: Mapping[str, Any], reason: str, *, model: ModelFacts) -> LossFacts:
    """Go by stock's own rule, every micro-batch alike, because the model gave no answer."""
    rule = rules_in_order(
        inputs, main_input=model.main_input, encoder_decoder=model.encoder_decoder
    )[0]
    return LossFacts(
        rule,
        "micro_batch",
        other_warnings=(
            f"what the loss is a mean over could not be asked ({reason}): each micro-batch weighs "
            f"alike, as in the stock Trainer. loss_is_mean_over = 'target_tokens', 'tokens', "
            f"'sequences' or 'nothing' (a sum) makes the gradient that of the whole update.",
        ),
    )


def has_router_loss(model: nn.Module) -> bool:
    """Return whether the configuration asks for the router loss of a mixture of experts."""
    return any(bool(getattr(c, "output_router_logits", False)) for c in _configs(model))


def _configs(model: nn.Module) -> list[Any]:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return [config, text]


def _chooses_tokens(model: nn.Module) -> bool:
    """Return whether attention looks at a choice of tokens that padding may change.

    Doge keeps the best ``keep_window_size`` tokens of a row, sparse attention as in DeepSeek-V3.2
    the best ``index_topk``. Rows short enough to be asked with are kept whole and show nothing.
    """
    names = ("index_topk", "keep_window_size")
    return any(getattr(config, name, None) for config in _configs(model) for name in names)


def with_warnings(facts: LossFacts, model: nn.Module, sample: ProbeRows | None) -> LossFacts:
    """Add what no answer shows: padding that is learned or chosen, rows mixed in training mode."""
    padding = find_padding_targets(sample)
    return dataclasses.replace(
        facts,
        pad_to_one_width=facts.pad_to_one_width or bool(padding) or _chooses_tokens(model),
        other_warnings=(*facts.other_warnings, *padding, *find_mixing(model)),
    )


def dtype_computed_in(model: nn.Module, *, bf16: bool, fp16: bool) -> torch.dtype:
    """Return the coarsest dtype of a forward: it says how much two evaluations may differ.

    Args:
        model: The bare model.
        bf16: It runs under autocast to bfloat16.
        fp16: It runs under autocast to float16.
    """
    if bf16 or fp16:
        return torch.bfloat16 if bf16 else torch.float16
    dtypes = {p.dtype for p in model.parameters()}
    if not all(dtype.is_floating_point for dtype in dtypes):
        return torch.bfloat16  # quantized: weights are unpacked to that, or to something finer
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


@contextlib.contextmanager
def held_in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Run a block with a model in training or evaluation mode.

    NLLB-MoE's routers write ``expert_capacity`` in every eval forward and train with it from then
    on: after a look at three short rows they would drop most tokens of a micro-batch. It is put
    back.
    """
    was_training = {module: module.training for module in model.modules()}
    routers: list[Any] = [m for m in model.modules() if hasattr(m, "expert_capacity")]
    capacities = [router.expert_capacity for router in routers]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in was_training.items():
            module.training = mode
        for router, capacity in zip(routers, capacities, strict=True):
            router.expert_capacity = capacity


def find_mixing(model: nn.Module) -> list[str]:
    """Warn of models whose rows influence each other in training but not in evaluation mode."""
    warnings = []
    config = getattr(model, "config", None)
    if getattr(config, "moe_eval_capacity_token_fraction", None) is not None:
        warnings.append(
            f"each expert takes {getattr(config, 'expert_capacity', None)} tokens of a micro-batch "
            "(expert_capacity) and drops the rest, so rows influence each other: no cut gives "
            "exactly the whole update."
        )
    with held_in_mode(model, training=True):  # a vision tower may pin its own to evaluation mode
        num_norms = sum(isinstance(m, _BatchNorm) and m.training for m in model.modules())
    if num_norms:
        warnings.append(
            f"{num_norms} BatchNorm layers normalize by the rows of a micro-batch, so rows "
            "influence each other: no cut gives exactly the whole update. Keep them in evaluation "
            "mode, or use a model that normalizes each row by itself (LayerNorm, GroupNorm)."
        )
    return warnings
