"""The Trainer's data side: a loader of updates, the true number of steps, exact resume."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import datasets
from torch.utils.data import RandomSampler
from transformers import Trainer
from transformers.trainer_utils import seed_worker

from hf_gradacc.errors import DataError
from hf_gradacc.loss.probe_rows import ProbeRows, choose_probe_rows, describe
from hf_gradacc.trainer.position import ExactResume
from hf_gradacc.updates.collator import UpdateCollator
from hf_gradacc.updates.fingerprint import count_rows_of, fingerprint
from hf_gradacc.updates.loader import GroupedBatches, ModelFacts, UpdateLoader, load_updates
from hf_gradacc.updates.sampler import UpdateSampler, count_updates
from hf_gradacc.updates.stream import is_stream

__all__ = ["UpdateLoading"]

# What the stock loop is to see while it runs. One item of the loader is one update, so it must
# not accumulate. Gradients and losses are averaged over ranks by the weight rule, so the stock
# factor for that must not come on top. Its filter replaces a NaN by the mean of earlier losses.
_STOCK_LOOP_SEES = {
    "gradient_accumulation_steps": 1,
    "average_tokens_across_devices": False,
    "logging_nan_inf_filter": False,
}


class UpdateLoading(ExactResume):
    """Overrides that make one item of the training loader one update."""

    _collator: UpdateCollator | None = None
    _probe_inputs: Any = None
    _probe_rows: ProbeRows | None = None
    _requested: dict[str, Any] | None = None

    # ---- the loader ----------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """Load updates instead of micro-batches."""
        if self.train_dataset is None:
            raise ValueError("Trainer: training requires a train_dataset.")
        args = self.args
        dataset, data_collator = self._drop_unused_columns(self.train_dataset)
        loader = load_updates(
            dataset,
            data_collator,
            args,
            model=ModelFacts.of(self.model),
            effective_batch_size=self._effective_batch_size,
            max_sequences=self._train_batch_size,
            rank=args.process_index,
            world_size=args.world_size,
            on_accelerator=args.device.type != "cpu",
            lockstep=self.is_fsdp_enabled,
            sampler=None if is_stream(dataset) else self._user_sampler(),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(
                seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
            ),
        )
        self._collator = loader.collator
        rows = choose_probe_rows(loader, self._collator, tokens_per_update=args.tokens_per_update)
        self._probe_inputs = self._collate_probe(rows)
        return loader

    def _drop_unused_columns(self, dataset: Any) -> tuple[Any, Any]:
        """Do what the stock loader does about columns that forward does not take."""
        if super().get_train_dataloader.__func__ is not Trainer.get_train_dataloader:
            return dataset, self.data_collator  # not a stock loader: its collator knows the columns
        if isinstance(dataset, datasets.Dataset):
            return self._remove_unused_columns(dataset, description="Training"), self.data_collator
        return dataset, self._get_collator_with_removed_columns(self.data_collator, "Training")

    def _user_sampler(self) -> Any:
        """Use the sampler of a subclass, if it makes one of its own."""
        if type(self)._get_train_sampler is Trainer._get_train_sampler:
            return None
        sampler = self._get_train_sampler()
        # The stock one says no more than "shuffle", which the seed does alike on all ranks.
        plain = (
            type(sampler) is RandomSampler
            and not sampler.replacement
            and sampler.generator is None
            and sampler.num_samples == len(sampler.data_source)
        )
        return None if plain else sampler

    def _collate_probe(self, rows: list[Any]) -> Any:
        """Collate the rows the model is asked with, so that unusable ones show before training."""
        if not rows:
            return None
        assert self._collator is not None
        try:
            inputs = self._collator.data_collator(rows)
        except Exception as error:
            raise DataError(
                f"the data collator ({type(self.data_collator).__name__}) failed on rows of the "
                f"training dataset: {type(error).__name__}: {error}\n"
                f"  the first row has {describe(rows[0])}"
            ) from error
        main = self._collator.main_input
        if (
            hasattr(self.model, "main_input_name")
            and isinstance(inputs, Mapping)
            and not {main, "inputs_embeds"} & set(inputs)
        ):
            raise DataError(
                f"the training rows give no `{main}`, the input of {type(self.model).__name__}: "
                f"after collating there is {sorted(inputs)}; the first row has "
                f"{describe(rows[0])}. Tokenize the dataset first, or give a data_collator that "
                f"does."
            )
        if isinstance(inputs, Mapping):
            self._probe_rows = ProbeRows.of(rows, inputs, self._collator.data_collator)
            self._collator.copies = self._probe_rows.copies
        return inputs

    # ---- how many updates, of how many sequences -----------------------------------------------

    @property
    def _effective_batch_size(self) -> int | None:
        with self._as_requested():
            return self.args.resolve_effective_batch_size(self.args.world_size)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Give the effective batch size; the stock formula knows only its own two options."""
        return self._effective_batch_size or self._train_batch_size * args.world_size

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Count updates and sequences as they will be, epoch by epoch."""
        if not isinstance(dataloader, UpdateLoader):  # a subclass made its own; see GroupedBatches
            with self._as_requested():
                values = list(super().set_initial_training_values(args, dataloader))
            values[5] = values[1]  # one step of the stock loop is one update
            return tuple(values)
        values = list(super().set_initial_training_values(args, dataloader))
        sampler = dataloader.batch_sampler
        if isinstance(sampler, UpdateSampler):
            epochs, per_epoch, max_steps = count_updates(
                sampler, num_train_epochs=args.num_train_epochs, max_steps=args.max_steps
            )
            values[0], values[1], values[5], values[6] = epochs, per_epoch, per_epoch, max_steps
            if args.max_steps > 0 and self._effective_batch_size is not None:
                values[3] = min(values[3], math.ceil(max_steps / per_epoch * sampler.num_sequences))
        return tuple(values)

    # ---- where the run stands ------------------------------------------------------------------

    def _membership(self) -> dict[str, Any]:
        """Say what decides which sequences share an update; a resume must not change it."""
        return {
            "effective_batch_size": self._effective_batch_size,
            "tokens_per_update": self.args.tokens_per_update,
            "seed": self.args.seed if self.args.data_seed is None else self.args.data_seed,
            "order": self._order,
            "num_sequences": count_rows_of(self.train_dataset),
            "incomplete_update": "keep" if self.args.keeps_incomplete_update else "drop",
            "fingerprint": fingerprint(self.train_dataset),
        }

    @property
    def _order(self) -> str:
        """Name what orders the rows: the stream itself, the dataset, the seed, a user's sampler."""
        if is_stream(self.train_dataset):
            return "stream"
        sampler = self._user_sampler()
        if sampler is not None:
            return type(sampler).__name__
        return "sequential" if self.args.train_sampling_strategy == "sequential" else "shuffled"

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Make updates of a loader that a subclass built its own way."""
        model, loader = super()._prepare_for_training(*args, **kwargs)
        if not isinstance(loader, UpdateLoader):
            assert self._requested is not None
            loader = GroupedBatches(
                loader,
                micro_batches_per_update=self._requested["gradient_accumulation_steps"],
                main_input=getattr(self.model, "main_input_name", "input_ids"),
            ).as_loader()
            self.callback_handler.train_dataloader = loader
        return model, loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: Any
    ) -> tuple[list[Any], None]:
        """Hand out the next update. Its items are counted in `training_step`, once."""
        try:
            updates = list(itertools.islice(epoch_iterator, 1))
        except (ConnectionError, EOFError) as error:
            if self.args.dataloader_num_workers == 0 or "Caught" in str(error):
                raise  # the dataset's own, which torch hands on in these words
            # A worker was killed while it handed over a tensor. The system tells of its death a
            # moment later, and torch's handler then raises from here, in words of its own.
            time.sleep(1.0)
            raise RuntimeError(f"DataLoader worker hung up ({error})") from error
        if not updates and self.ledger.epoch == self.ledger.update == 0:
            size = self._effective_batch_size
            what = f"{size} sequences" if size else f"{self.args.tokens_per_update} target tokens"
            raise DataError(
                f"the stream ended before it gave one update of {what}: it is empty, or shorter "
                f"than an update while incomplete_update = 'drop'. Use 'keep' or a smaller update."
            )
        self.ledger.update += len(updates)
        if updates:
            self.ledger.position = getattr(updates[0], "position", None)
        return updates, None

    # ---- what the stock loop sees --------------------------------------------------------------

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Let the stock loop see one batch per step, and everybody else what was asked for."""
        self._requested = {name: getattr(self.args, name) for name in _STOCK_LOOP_SEES}
        handler = self.callback_handler
        stock_call_event = handler.call_event

        def call_event(*args: Any, **kwargs: Any) -> Any:
            with self._as_requested():
                return stock_call_event(*args, **kwargs)

        handler.call_event = call_event
        try:
            with _set(self.args, _STOCK_LOOP_SEES):
                return super()._inner_training_loop(*args, **kwargs)
        finally:
            del handler.call_event
            self._requested = None

    def _as_requested(self) -> contextlib.AbstractContextManager[None]:
        """Show the arguments as the user wrote them, for as long as the context lasts."""
        return _set(self.args, self._requested or {})


@contextlib.contextmanager
def _set(target: Any, values: Mapping[str, Any]) -> Iterator[None]:
    before = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)
