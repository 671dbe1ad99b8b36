"""The training data of a run: the loader of updates, their number, and their size in rows."""

from __future__ import annotations

import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import RandomSampler
from transformers import Trainer
from transformers.trainer_utils import seed_worker
from transformers.utils import logging

from hf_gradacc.compat import start_method_of_loader
from hf_gradacc.errors import ConfigError, DataError
from hf_gradacc.loss.asking.rows import ProbeRows, choose_probe_rows, describe
from hf_gradacc.ranks.engine import Engine
from hf_gradacc.safety.waiting import TellOfWait
from hf_gradacc.trainer.as_requested import changed
from hf_gradacc.trainer.checkpoints.position import Ledger
from hf_gradacc.trainer.grouping import refuse_own_loader, tell_families, telling_of_search
from hf_gradacc.trainer.loss.asking import has_foreign_loss
from hf_gradacc.updates.batch import count_rows, find_main_input
from hf_gradacc.updates.batches import BatchLoader, GroupedBatches, updates_of
from hf_gradacc.updates.collator import (
    UpdateCollator,
    make_micro_batch,
    refuse_unknown_tokens,
)
from hf_gradacc.updates.fingerprint import count_rows_of, fingerprint
from hf_gradacc.updates.loader import ModelFacts, UpdateLoader, load_updates
from hf_gradacc.updates.loading import LoadingNow
from hf_gradacc.updates.sampler import UpdateSampler, count_updates
from hf_gradacc.updates.stream import UpdateStream, is_arrow_table, is_stream
from hf_gradacc.updates.targets import count_all_targets
from hf_gradacc.updates.trees.families import Families
from hf_gradacc.updates.update import Update

__all__ = ["TrainingData"]

logger = logging.get_logger(__name__)

_SIZES = ("gradient_accumulation_steps", "effective_batch_size", "tokens_per_update")
"""Options that say how large an update is."""

TELL_AFTER_SECONDS = 60.0
"""How long the loop waits for an update before a line says whose rows are late."""


class TrainingData:
    """Loads updates instead of micro-batches.

    Attributes:
        collator: Makes updates of rows; None before there is a loader, or if a subclass built it.
        sample: A few dataset rows to ask the model with; None if the collator returns no mapping.
        sample_inputs: The same, collated; None for a stream that cannot be read ahead.
        families: Rows that are drawn together; None unless that is asked for.
        hands_out: An override of ``get_batch_samples`` runs now, and is given batches.
    """

    def __init__(self) -> None:
        self.collator: UpdateCollator | None = None
        self.sample: ProbeRows | None = None
        self.sample_inputs: Any = None
        self.families: Families | None = None
        self._stream: UpdateStream | None = None
        self.hands_out = False
        self._awaited = 0
        self._sized_by: dict[str, Any] = {}
        self._loading: LoadingNow | None = None
        self._slow_loader = TellOfWait(self._describe_wait, after=TELL_AFTER_SECONDS)

    def _describe_wait(self, seconds: float) -> str:
        who = "" if self._loading is None else f" ({self._loading.describe(self._awaited)})"
        return (
            f"update {self._awaited + 1} of this epoch has been waited for {seconds:.0f} s: its "
            f"rows are not there yet{who}. If this goes on, the dataset or the data collator hangs."
        )

    # ---- the loader ----------------------------------------------------------------------------

    def load(self, trainer: Any, *, is_stock_loader: bool, engine: Engine) -> BatchLoader:
        """Build the loader of updates, and collate the rows the model is asked with.

        Args:
            trainer: The trainer.
            is_stock_loader: No class between the mixin and the stock Trainer overrides
                ``get_train_dataloader``.
            engine: How the ranks work together.

        Raises:
            DataError: If no row has a target, or rows cannot be collated.
        """
        if trainer.train_dataset is None:
            raise ValueError("Trainer: training requires a train_dataset.")
        args, layout = trainer.args, engine.layout
        for name in ("split_batches", "dispatch_batches"):
            if getattr(args.accelerator_config, name, None):
                logger.warning_once(
                    f"accelerator_config.{name} = True has no effect: every rank loads its own "
                    f"share of each update."
                )
        dataset, data_collator = _drop_unused_columns(trainer, is_stock_loader=is_stock_loader)
        sampler = None if is_stream(dataset) else _users_sampler(trainer)
        options: dict[str, Any] = {
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory and args.device.type != "cpu",
            "persistent_workers": args.dataloader_persistent_workers,
            "multiprocessing_context": start_method_of_loader(args),
            "prefetch_factor": args.dataloader_prefetch_factor,
            "worker_init_fn": partial(
                seed_worker, num_workers=args.dataloader_num_workers, rank=layout.replica
            ),
        }
        with telling_of_search(trainer):
            loader = load_updates(
                dataset,
                data_collator,
                args,
                model=ModelFacts.of(trainer.model),
                effective_batch_size=self.effective_batch_size(trainer),
                max_sequences=trainer._train_batch_size,
                rank=layout.replica,
                world_size=layout.num_replicas,
                on_accelerator=args.device.type != "cpu",
                lockstep=engine.deals_in_lockstep,
                sampler=sampler,
                **options,
            )
        self.families = getattr(loader.batch_sampler, "families", None)
        tell_families(self.families)
        self.collator = loader.collator
        self.collator.pad_token_id = getattr(trainer.processing_class, "pad_token_id", None)
        self.collator.vocab_size = _vocab_size(trainer.model)
        before, self._stream = self._stream, None
        self._loading = getattr(loader.dataset, "loading", None)
        if isinstance(loader.dataset, UpdateStream):
            self._stream = loader.dataset
            if before is not None:  # the loader has been asked for before, say for its length
                self._stream.take_over(before)
        rows = choose_probe_rows(loader, self.collator, tokens_per_update=args.tokens_per_update)
        self.sample_inputs = self.collate_sample(trainer, rows)
        if args.include_num_input_tokens_seen == "non_padding":
            _tell_unknown_padding(self.sample_inputs, self.collator)
        steps = args.gradient_accumulation_steps
        return BatchLoader(
            loader,
            dataset,
            device=args.device,
            steps_per_update=steps,
            world_size=layout.num_replicas,
            total_batch_size=self.total_batch_size(trainer, args) // steps,
            batch_size=trainer._train_batch_size,
            drop_last=args.dataloader_drop_last and not is_stream(dataset),
            collate_fn=data_collator,
            sampler=sampler,
            shuffle=args.train_sampling_strategy != "sequential",
            **options,
        )

    def collate_sample(self, trainer: Any, rows: list[Any]) -> Any:
        """Collate the rows the model is asked with, so that unusable ones show before training.

        Raises:
            DataError: If the collator fails, or gives nothing that the model takes.
        """
        if not rows:
            return None
        assert self.collator is not None
        collate = self.collator.data_collator
        inputs, error = None, None
        try:
            inputs = collate(list(rows))
        except Exception as failure:
            error = failure
        if self.collator.max_sequences == 1:
            # Micro-batches of one item each: neither collator nor items need to take others beside.
            alone = _collate_alone(collate, rows)
            main = self.collator.main_input
            num_rows = [count_rows(item, main) for item in alone]
            if alone and (error or _leaves_items_out(inputs, alone, main)):
                inputs = alone[num_rows.index(max(num_rows))] if max(num_rows) > 1 else alone[-1]
                self.sample, self.collator.rows_per_sequence = None, 1
                self.collator.items_are_batches = max(num_rows) > 1
                _refuse_unused_inputs(trainer, inputs, rows[0])
                return inputs
        if error is not None:
            raise DataError(
                f"the data collator ({type(trainer.data_collator).__name__}) failed on "
                f"{_name_rows(rows, collate)} of the training dataset: {type(error).__name__}: "
                f"{error}\n  the first row has {describe(rows[0])}"
            ) from error
        _refuse_unused_inputs(trainer, inputs, rows[0])
        if isinstance(inputs, Mapping) and self.collator.vocab_size is not None:
            named = list(zip(getattr(rows, "indices", ()), rows, strict=False))
            refuse_unknown_tokens(inputs, named, vocab_size=self.collator.vocab_size)
        if isinstance(inputs, Mapping):
            self.sample = ProbeRows.of(rows, inputs, collate)
            self.collator.rows_per_sequence = self.sample.rows_per_sequence
        return inputs

    def as_updates(self, trainer: Any, loader: Any) -> Any:
        """Return our updates, or group the batches of a subclass's loader into updates."""
        self._sized_by = {name: getattr(trainer.args, name) for name in _SIZES}
        if isinstance(loader, BatchLoader):
            return loader.updates
        refuse_own_loader(trainer)
        if trainer.rank_layout.sp_size > 1:
            raise ConfigError(
                f"sp_size = {trainer.rank_layout.sp_size}: the ranks that compute a row together "
                f"have to load the same rows, and {type(trainer).__name__}.get_train_dataloader "
                f"gives each its own. Leave it to GradAccMixin, or train without sp_size."
            )
        return GroupedBatches(
            loader,
            micro_batches_per_update=_batches_per_update(trainer, loader),
            main_input=getattr(trainer.model, "main_input_name", "input_ids"),
        ).as_loader()

    def next_update(self, trainer: Any, ledger: Ledger, epoch_iterator: Iterator[Any]) -> list[Any]:
        """Take the next update, or nothing at the end of the epoch.

        Raises:
            DataError: If a stream gave no update at all.
            RuntimeError: If a loader worker died.
        """
        self._awaited = ledger.update
        self._tell_if_resized(trainer.args)
        try:
            with self._slow_loader:
                updates = list(itertools.islice(epoch_iterator, 1))
        except (ConnectionError, EOFError) as error:
            if trainer.args.dataloader_num_workers == 0 or "Caught" in str(error):
                raise  # the dataset's own error, which torch passes on with this word
            # A worker was killed while it handed over a tensor. The system reports its death a
            # moment later, and torch's handler then raises its own error from here.
            time.sleep(1.0)
            raise RuntimeError(f"DataLoader worker hung up ({error})") from error
        if not updates and ledger.epoch == ledger.update == 0:
            size = self.effective_batch_size(trainer)
            tokens = trainer.args.tokens_per_update
            what = f"{size:,} sequences" if size else f"{tokens:,} target tokens"
            raise DataError(
                f"the stream ended before it gave one update of {what}: it is empty, or shorter "
                f"than an update while incomplete_update = 'drop'. Use 'keep' and leave "
                f"dataloader_drop_last out, or a smaller update."
            )
        ledger.update += len(updates)
        if updates:
            ledger.position = getattr(updates[0], "position", None)
        return updates

    def _tell_if_resized(self, args: Any) -> None:
        """Say that a size which was changed in the run is not followed; stock follows the first."""
        for name, size in self._sized_by.items():
            if getattr(args, name) != size:
                logger.warning_once(
                    f"{name} is no longer {size}, as it was when training began. The size of "
                    f"updates is fixed then, so they stay as large as they were. Call train() once "
                    f"for each size to let them grow."
                )

    def handed_out(self, update: Update, samples: Callable[..., Any], device: Any) -> Update:
        """Let an override of ``get_batch_samples`` see, change or replace an update's batches.

        It may have changed them in place, so targets are counted anew.
        """
        batches = [micro_batch.inputs for micro_batch in update]
        self.hands_out = True
        try:
            kept, _ = samples(iter(batches), len(batches), device)
        finally:
            self.hands_out = False
        main = "input_ids" if self.collator is None else self.collator.main_input
        planned = list(update) if len(kept) == len(batches) else []
        micro_batches = []
        for i, inputs in enumerate(kept):
            made = make_micro_batch(inputs, main_input=main)
            if planned and count_rows(inputs, main) == count_rows(batches[i], main):
                counts = count_all_targets(
                    inputs if isinstance(inputs, Mapping) else {},
                    num_sequences=planned[i].num_sequences,
                    num_input_tokens=made.num_input_tokens,
                )
                made = replace(planned[i], inputs=inputs, targets=counts)
            micro_batches.append(made)
        return replace(update, micro_batches=micro_batches)

    # ---- how many updates, of how many sequences -----------------------------------------------

    def effective_batch_size(self, trainer: Any) -> int | None:
        """Resolve the sequences in an update over all ranks; None if it is drawn by tokens."""
        num_replicas = trainer.rank_layout.num_replicas
        size: int | None = trainer.args.resolve_effective_batch_size(num_replicas)
        return size

    def total_batch_size(self, trainer: Any, args: Any) -> int:
        """Return the effective batch size; the stock formula knows only its own two options."""
        size = self.effective_batch_size(trainer)
        return size or int(trainer._train_batch_size * trainer.rank_layout.num_replicas)

    def initial_values(
        self, trainer: Any, args: Any, loader: Any, stock_values: Callable[..., Any]
    ) -> tuple[Any, ...]:
        """Count updates and sequences as they will be, epoch by epoch.

        Args:
            trainer: The trainer.
            args: Its arguments.
            loader: Ours, or one that a subclass made.
            stock_values: The stock ``set_initial_training_values``.

        Returns:
            As the stock method: epochs, updates per epoch, examples, samples, batch size, steps in
            an epoch, most steps.
        """
        loader = updates_of(loader)
        if not isinstance(loader, UpdateLoader):  # a subclass made its own; see GroupedBatches
            with changed(args, gradient_accumulation_steps=_batches_per_update(trainer, loader)):
                values = list(stock_values(args, loader))
            values[5] = values[1]  # one step of the stock loop is one update
            return tuple(values)
        with changed(args, gradient_accumulation_steps=1):
            values = list(stock_values(args, loader))
        sampler = loader.batch_sampler
        if isinstance(sampler, UpdateSampler):
            epochs, per_epoch, max_steps = count_updates(
                sampler, num_train_epochs=args.num_train_epochs, max_steps=args.max_steps
            )
            values[0], values[1], values[5], values[6] = epochs, per_epoch, per_epoch, max_steps
            if args.max_steps > 0 and self.effective_batch_size(trainer) is not None:
                values[3] = min(values[3], math.ceil(max_steps / per_epoch * sampler.num_sequences))
        return tuple(values)

    def membership(self, trainer: Any) -> dict[str, Any]:
        """Return what decides which sequences share an update; a resume must not change it."""
        args = trainer.args
        first_rows = None if self._stream is None else self._stream.first_rows
        # Of none without families: such a run goes on from checkpoints of any release.
        families = {} if self.families is None else {"families": self.families.digest}
        return {
            **families,
            "effective_batch_size": self.effective_batch_size(trainer),
            "tokens_per_update": args.tokens_per_update,
            "seed": args.seed if args.data_seed is None else args.data_seed,
            "order": _order(trainer),
            "num_sequences": count_rows_of(trainer.train_dataset),
            "incomplete_update": "keep" if args.keeps_incomplete_update else "drop",
            "fingerprint": fingerprint(trainer.train_dataset, first_rows=first_rows),
        }


def _batches_per_update(trainer: Any, loader: Any) -> int:
    """Count the batches of a user's own loader that make an update.

    Where ``effective_batch_size`` says how large that is, the loader's batch size says how many.
    """
    args = trainer.args
    if args.effective_batch_size is None:
        steps: int = args.gradient_accumulation_steps
        return steps
    rows = getattr(loader, "total_batch_size", None)  # of a loader that accelerate prepared
    if rows is None:
        batch_size = getattr(loader, "batch_size", None)
        batch_size = batch_size or getattr(
            getattr(loader, "batch_sampler", None), "batch_size", None
        )
        rows = batch_size and batch_size * trainer.rank_layout.num_replicas
    return max(1, round(args.effective_batch_size / rows)) if rows else 1


def _vocab_size(model: Any) -> int | None:
    """Return the entries of a text model's vocabulary; None where ids may stand for something else.

    Models that see or hear take ids of their own for pictures and sounds, and some hash ids.
    """
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) != "input_ids" or config is None:
        return None
    if any(hasattr(config, name) for name in ("vision_config", "audio_config")):
        return None
    try:
        embeddings = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return embeddings.num_embeddings if type(embeddings) is torch.nn.Embedding else None


def _name_rows(rows: Any, collate: Callable[[list[Any]], Any]) -> str:
    """Name the rows that a collator fails on, by themselves if any does that."""
    if not hasattr(rows, "indices"):
        return "rows"
    named = dict(zip(rows.indices, rows, strict=True))
    failing = [i for i, row in named.items() if not _collate_alone(collate, [row])]
    numbers = failing or list(named)
    return f"row{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _collate_alone(collate: Callable[[list[Any]], Any], rows: list[Any]) -> list[Any]:
    """Collate each row by itself; none if the collator fails on any, or gives no mapping."""
    try:
        with torch.random.fork_rng(devices=[]):
            alone = [collate([row]) for row in rows]
    except Exception:  # whatever it is, the collator is asked with all rows first, and that is told
        return []
    return alone if all(isinstance(item, Mapping) for item in alone) else []


def _leaves_items_out(together: Any, alone: list[Any], main: str) -> bool:
    """Return whether a collator gives less of several items than of each by itself.

    One that takes the first (``lambda items: items[0]``) does. One that lays rows end to end gives
    fewer rows, but all of their tokens.
    """
    whole = find_main_input(together, main)
    parts = [find_main_input(item, main) for item in alone]
    size = 0 if whole is None else whole.numel()
    return size < sum(part.numel() for part in parts if part is not None)


def _refuse_unused_inputs(trainer: Any, inputs: Any, row: Any) -> None:
    """Refuse rows that hold nothing a Transformers model takes, such as text not yet tokenized.

    A model of one's own may take what it likes under any name: only one whose ``forward`` names
    its main input, and is given none of its inputs, is refused. Whoever calls the model in a
    ``compute_loss`` of their own may hand it the batch under other names, or piece by piece.

    Raises:
        DataError: If it is.
    """
    model = trainer.model
    main = getattr(model, "main_input_name", None)
    if main is None or not isinstance(inputs, Mapping) or has_foreign_loss(type(trainer)):
        return
    named = set(inspect.signature(model.forward).parameters) | {"inputs_embeds"}
    held = {key for key, value in inputs.items() if isinstance(value, Tensor)} - {"labels"}
    if main not in named or named & held:
        return
    raise DataError(
        f"the training rows give no `{main}`, the input of {type(model).__name__}: "
        f"the data collator returns {sorted(inputs)}; the first row has "
        f"{describe(row)}. Tokenize the dataset first, or give a data_collator that does."
    )


def _tell_unknown_padding(inputs: Any, collator: UpdateCollator) -> None:
    """Warn if nothing says which of the tokens to be counted are padding."""
    if (
        isinstance(inputs, Mapping)
        and "attention_mask" not in inputs
        and collator.pad_token_id is None
    ):
        logger.warning(
            "include_num_input_tokens_seen = 'non_padding': batches have no attention_mask, and no "
            "processing_class says what padding is. Rows count with the length they have in the "
            "dataset."
        )


def _drop_unused_columns(trainer: Any, *, is_stock_loader: bool) -> tuple[Any, Any]:
    """Drop the columns that forward does not take, as the stock loader does."""
    dataset, collator = trainer.train_dataset, trainer.data_collator
    if not is_stock_loader:
        return dataset, collator  # its collator knows the columns
    if is_arrow_table(dataset):
        return trainer._remove_unused_columns(dataset, description="Training"), collator
    return dataset, trainer._get_collator_with_removed_columns(collator, "Training")


def _users_sampler(trainer: Any) -> Any:
    """Return the sampler of a subclass, None if it has none of its own."""
    if type(trainer)._get_train_sampler is Trainer._get_train_sampler:
        return None
    make: Any = trainer._get_train_sampler
    # As stock calls it; overrides written for older releases take no dataset.
    takes_dataset = bool(inspect.signature(make).parameters)
    sampler = make(trainer.train_dataset) if takes_dataset else make()
    # The stock one says no more than "shuffle", which the seed does alike on all ranks.
    plain = (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.generator is None
        and sampler.num_samples == len(sampler.data_source)
    )
    return None if plain else sampler


def _order(trainer: Any) -> str:
    """Name what orders the rows: the stream itself, the dataset, the seed, a user's sampler."""
    if is_stream(trainer.train_dataset):
        return "stream"
    sampler = _users_sampler(trainer)
    if sampler is not None:
        return type(sampler).__name__
    if trainer.args.group_by_prefix:
        return "shuffled with group_by_prefix"
    return "sequential" if trainer.args.train_sampling_strategy == "sequential" else "shuffled"
