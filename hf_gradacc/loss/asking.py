"""Ask a prepared model how its loss counts, and leave it as it was.

`probe` asks with rows by themselves; where rows cannot be told apart in the collated tensors,
`questions` asks with labels alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_gradacc.loss.facts import LossFacts, rounding_of
from hf_gradacc.loss.probe import guess_rule, probe_loss
from hf_gradacc.loss.probe_rows import ProbeRows, choose_rows_to_ask, find_padding_targets
from hf_gradacc.loss.questions import probe_in_place, vary_targets
from hf_gradacc.updates.batch import can_slice_rows, count_rows, slice_rows

__all__ = [
    "Loss",
    "ask",
    "dtype_computed_in",
    "find_mixing",
    "held_in_eval_mode",
    "sample_of",
    "with_warnings",
]


@dataclasses.dataclass(frozen=True)
class Loss:
    """The loss of a model, to be asked.

    Attributes:
        model: The bare model.
        compute: Returns the loss of collated inputs as a tensor; the second argument is what to
            pass as the count.
    """

    model: nn.Module
    compute: Callable[[Mapping[str, Any], int | None], Tensor]

    def value(self, inputs: Mapping[str, Any], count: int | None) -> float:
        """Compute the loss, without gradients."""
        with torch.no_grad():
            return float(self._of_copy(inputs, count))

    def gradient(self, inputs: Mapping[str, Any], count: int | None) -> Tensor:
        """Compute the gradient ``[numbers]`` of the last few trainable parameters.

        The last few are most often a head's, and the backward stops there.
        """
        last = [p for p in self.model.parameters() if p.requires_grad][-4:]
        with torch.enable_grad():
            gradients = torch.autograd.grad(
                self._of_copy(inputs, count), last, allow_unused=True, materialize_grads=True
            )
        return torch.cat([gradient.reshape(-1) for gradient in gradients])

    def _of_copy(self, inputs: Mapping[str, Any], count: int | None) -> Tensor:
        # A copy, since FSMT writes padding over the -100 of the labels it is given.
        copied = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        return self.compute(copied, count)


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


def ask(
    loss: Loss,
    inputs: Mapping[str, Any],
    known: ProbeRows | None,
    *,
    dtype: torch.dtype,
    can_differentiate: bool,
    pad_token_id: int,
    left: bool,
) -> LossFacts:
    """Find out what a loss is a mean over, and whether padding matters to it.

    Args:
        loss: Of a model in evaluation mode.
        inputs: From `sample_of`.
        known: Likewise.
        dtype: The coarsest dtype of a forward, see `dtype_computed_in`.
        can_differentiate: Gradients can be computed outside of the wrapped model. Sharded weights
            are whole only inside of a forward.
        pad_token_id: What rows are widened by.
        left: Padding goes in front.

    Raises:
        LossError: If the loss is no mean, whichever way it is called.
    """
    model = loss.model
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    main_input = getattr(model, "main_input_name", "input_ids")
    routed = any(getattr(c, "output_router_logits", False) for c in (config, text))
    num_rows = count_rows(inputs, main_input) if known is None else len(known.rows)
    if known is not None or can_slice_rows(inputs, num_rows):
        try:
            return probe_loss(
                vary_targets(inputs) if known is None else inputs,
                loss.value,
                dtype=dtype,
                encoder_decoder=encoder_decoder,
                main_input=main_input,
                pad_token_id=pad_token_id,
                left=left,
                max_width=getattr(config, "max_position_embeddings", None),
                has_router_loss=routed,
                num_rows=num_rows,
                take=None if known is None else known.take,
                gradient_of=loss.gradient if can_differentiate else None,
            )
        except (RuntimeError, ValueError, IndexError):
            # As many images as rows by chance, but some rows hold none and others several.
            if known is not None or all(
                value.ndim <= 2 for value in inputs.values() if isinstance(value, Tensor)
            ):
                raise
    guess = guess_rule(
        inputs,
        loss.value,
        main_input=main_input,
        encoder_decoder=encoder_decoder,
        wants_own_count=False,
    )
    return probe_in_place(
        inputs,
        loss.value,
        first=guess,
        coarse=rounding_of(dtype),
        encoder_decoder=encoder_decoder,
        has_router_loss=routed,
    )


def with_warnings(facts: LossFacts, model: nn.Module, sample: ProbeRows | None) -> LossFacts:
    """Add what the probe cannot see: padding that is learned, rows mixed in training mode."""
    padding = find_padding_targets(sample)
    return dataclasses.replace(
        facts,
        pad_to_one_width=facts.pad_to_one_width or bool(padding),
        warnings=(*facts.warnings, *padding, *find_mixing(model)),
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
def held_in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Run a block with a model in eval mode.

    NLLB-MoE's routers write ``expert_capacity`` in every eval forward and train with it from then
    on: after a look at three short rows they would drop most tokens of a micro-batch. It is put
    back.
    """
    was_training = model.training
    routers: list[Any] = [m for m in model.modules() if hasattr(m, "expert_capacity")]
    capacities = [router.expert_capacity for router in routers]
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
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
    was_training = model.training
    model.train()  # a vision tower may pin its own to evaluation mode
    num_norms = sum(isinstance(m, _BatchNorm) and m.training for m in model.modules())
    model.train(was_training)
    if num_norms:
        warnings.append(
            f"{num_norms} BatchNorm layers normalize by the rows of a micro-batch, so rows "
            "influence each other: no cut gives exactly the whole update. Keep them in evaluation "
            "mode, or use a model that normalizes each row by itself (LayerNorm, GroupNorm)."
        )
    return warnings
