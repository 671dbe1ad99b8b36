"""The Trainer asks its model how it counts, before the first update and before an evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_gradacc.errors import DataError
from hf_gradacc.loss.asking import find_mixing, held_in_eval_mode
from hf_gradacc.loss.facts import LossFacts, LossOf, rounding_of
from hf_gradacc.loss.probe import guess_rule, probe_loss
from hf_gradacc.loss.probe_rows import ProbeRows, choose_rows_to_ask, find_padding_targets
from hf_gradacc.loss.questions import probe_in_place, vary_targets
from hf_gradacc.trainer.speed import FastSteps
from hf_gradacc.updates.batch import can_slice_rows, count_rows, slice_rows
from hf_gradacc.updates.collator import UpdateCollator
from hf_gradacc.updates.stream import is_stream
from hf_gradacc.updates.targets import TargetRule, count_all_targets, may_have_target

__all__ = ["AskedModel"]

logger = logging.get_logger(__name__)


class AskedModel(FastSteps):
    """Overrides that find out what a loss is a mean over, and whether padding matters to it."""

    _collator: UpdateCollator | None = None
    _probe_inputs: Any = None
    _probe_rows: ProbeRows | None = None
    _facts: LossFacts | None = None

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Ask the prepared model how its loss counts, before the first update."""
        model, loader = super()._prepare_for_training(*args, **kwargs)
        self._facts = None  # the model may be another one than in the last call of train()
        if self._probe_inputs is not None:
            self._facts = self._ask(model, self._probe_inputs)
            self._refuse_data_without_targets(self._facts.rule)
        return model, loader

    def _refuse_data_without_targets(self, rule: TargetRule) -> None:
        """Refuse a dataset whose every row has labels, and none that this loss would predict."""
        rows = self.train_dataset
        asked = self._probe_rows
        if asked is None or is_stream(rows) or not hasattr(rows, "__getitem__"):
            return
        counts = count_all_targets(asked.inputs, num_sequences=len(asked.rows), num_input_tokens=2)
        if counts.under(rule) or any(may_have_target(rows[i], rule=rule) for i in range(len(rows))):
            return
        raise DataError(
            f"none of the {len(rows)} training rows has a target: all labels but each row's first "
            f"are -100, and this model predicts every label from the one before. Check how the "
            f"prompt is masked and how rows are cut."
        )

    def _ask(self, model: nn.Module, inputs: Any) -> LossFacts:
        """Ask the model how its loss counts, see `probe_loss`, and say what is not exact."""
        if not isinstance(inputs, Mapping) or count_rows(inputs) == 0:
            return LossFacts(TargetRule.SEQUENCE)
        known = self._probe_rows if inputs is self._probe_inputs else None
        if known is None or known.copies == 1:
            known = None
            if can_slice_rows(inputs, count_rows(inputs)):
                inputs = slice_rows(inputs, choose_rows_to_ask(inputs))
        bare = self.accelerator.unwrap_model(model, keep_torch_compile=False)

        def compute(part: Mapping[str, Any], count: int | None) -> Tensor:
            own = None if count is None else torch.tensor(count, device=self.args.device)
            # A copy, since FSMT writes padding over the -100 of the labels it is given.
            part = {k: v.clone() if isinstance(v, Tensor) else v for k, v in part.items()}
            with self.compute_loss_context_manager():
                return self.compute_loss(bare, self._prepare_inputs(part), num_items_in_batch=own)

        def loss_of(part: Mapping[str, Any], count: int | None) -> float:
            with torch.no_grad():
                return float(compute(part, count))

        def gradient_of(part: Mapping[str, Any], count: int | None) -> Tensor:
            # The last few: most often a head's, and the backward stops there.
            last = [p for p in bare.parameters() if p.requires_grad][-4:]
            with torch.enable_grad():
                gradients = torch.autograd.grad(
                    compute(part, count), last, allow_unused=True, materialize_grads=True
                )
            return torch.cat([gradient.reshape(-1) for gradient in gradients])

        with torch.random.fork_rng(), held_in_eval_mode(bare):
            facts = self._probe(bare, inputs, loss_of, known, gradient_of)
            if self._collator is not None:
                self._facts = facts  # label smoothing goes by them
                self._choose_shortcuts(bare, inputs, loss_of, facts=facts)
                self._choose_products(bare)
        padding = find_padding_targets(self._probe_rows)
        facts = dataclasses.replace(
            facts,
            pads_alike=facts.pads_alike or bool(padding),
            warnings=(*facts.warnings, *padding, *find_mixing(bare)),
        )
        for warning in facts.warnings:
            logger.warning_once(f"{type(bare).__name__}: {warning}")
        if self._collator is not None:
            self._collator.rule, self._collator.pad_alike = facts.rule, facts.pads_alike
        return facts

    def _probe(
        self,
        bare: nn.Module,
        inputs: Mapping[str, Any],
        loss_of: LossOf,
        known: ProbeRows | None,
        gradient_of: Callable[[Mapping[str, Any], int | None], Tensor],
    ) -> LossFacts:
        """Ask with rows by themselves, or with labels alone where rows cannot be told apart."""
        config: Any = getattr(bare, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        main_input = getattr(bare, "main_input_name", "input_ids")
        dtype = self._dtype_computed_in(bare)
        routed = any(getattr(c, "output_router_logits", False) for c in (config, text))
        num_rows = count_rows(inputs, main_input) if known is None else len(known.rows)
        rows_apart = known is not None or can_slice_rows(inputs, num_rows)
        if rows_apart:
            try:
                return probe_loss(
                    vary_targets(inputs) if known is None else inputs,
                    loss_of,
                    dtype=dtype,
                    encoder_decoder=encoder_decoder,
                    main_input=main_input,
                    max_width=getattr(config, "max_position_embeddings", None),
                    has_router_loss=routed,
                    num_rows=num_rows,
                    take=None if known is None else known.take,
                    # Sharded weights are whole only inside of a forward.
                    gradient_of=None if self.is_fsdp_enabled else gradient_of,
                    **self._padding_style,
                )
            except (RuntimeError, ValueError, IndexError):
                # As many images as rows by chance, but some rows hold none and others several.
                if known is not None or all(
                    value.ndim <= 2 for value in inputs.values() if isinstance(value, Tensor)
                ):
                    raise
        guess = guess_rule(
            inputs,
            loss_of,
            main_input=main_input,
            encoder_decoder=encoder_decoder,
            wants_own_count=False,
        )
        return probe_in_place(
            inputs,
            loss_of,
            first=guess,
            coarse=rounding_of(dtype),
            encoder_decoder=encoder_decoder,
            has_router_loss=routed,
        )

    @property
    def _padding_style(self) -> dict[str, Any]:
        tokenizer = self.processing_class
        config = getattr(self.model, "config", None)
        pad = getattr(tokenizer, "pad_token_id", None)
        pad = getattr(config, "pad_token_id", None) if pad is None else pad
        left = getattr(tokenizer, "padding_side", "right") == "left"
        return {"pad_token_id": pad or 0, "left": left}
