"""From dataset rows to an `Update`: leave out what has no target, plan, collate.

Runs in the DataLoader's workers, so that planning and padding cost the training loop nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_gradacc.errors import DataError
from hf_gradacc.updates.batch import count_rows, find_main_input, slice_rows
from hf_gradacc.updates.dealing import measures_noise
from hf_gradacc.updates.draws.rows import DrawsByRow
from hf_gradacc.updates.lengths import measure_length, sequences_of_rows
from hf_gradacc.updates.limits import Limits
from hf_gradacc.updates.planner import (
    OVERHEAD_ON_CPU,
    plan_micro_batches,
    plan_packed_micro_batches,
)
from hf_gradacc.updates.targets import (
    IGNORE_INDEX,
    TargetRule,
    can_have_target,
    count_all_targets,
    count_input_tokens,
)
from hf_gradacc.updates.trees.cost import TreeCost, padded_cost
from hf_gradacc.updates.trees.pairs import plan_shared_sequences
from hf_gradacc.updates.trees.plan import GrownTrees
from hf_gradacc.updates.update import MicroBatch, Update

__all__ = ["LEAST_SAVING", "UpdateCollator", "make_micro_batch", "refuse_unknown_tokens"]

LEAST_SAVING = 0.05
"""Trees are taken where they promise to save this part of an update; less than that is noise."""


class UpdateCollator:
    """Turn the rows of one rank's share of an update into an `Update`.

    Args:
        data_collator: Any Hugging Face data collator: a list of rows to a mapping of tensors.
        max_sequences: Most sequences in a micro-batch.
        max_tokens: Most tokens in a micro-batch, padding included.
        main_input: The feature that holds the sequence.
        encoder_decoder: Labels cost tokens of their own.
        seed: Seed of collators that draw random numbers (masked language modelling): what they
            draw for a row is a function of seed, epoch and row, see `DrawsByRow`.

    Attributes:
        rule: What counts as a target, once the model has been asked; None before that.
        pad_to_one_width: Pad all micro-batches of an update to one width, for models that let
            padding into their result. Collates the share once and cuts it by rows.
        packed: Micro-batches will be laid out as one row each, so only their real tokens cost.
        shares_prefixes: Rows that begin alike may be computed as trees, see
            `hf_gradacc.updates.trees.plan`.
        foresees_sharing: Rows of the dataset begin alike, so that sharing is worth a try.
        least_saving: The part of an update's cost that trees must save to be taken.
        tree_cost: What rows and trees cost.
        rows_per_sequence: Collated rows that each dataset row becomes; 2 for pairs, see
            `slice_rows`; None if they cannot be told apart.
        items_are_batches: Items of the dataset are batches that are ready made, of several rows
            each, so rows are counted in what the data collator returns.
        overhead_tokens: What one more micro-batch costs, in computed tokens; weighed against
            padding where there is a token budget, or many ranks.
        num_ranks: Ranks that share an update.
        pad_token_id: What padding is filled with, if no mask says where it is; None if that is not
            known.
        vocab_size: Token ids from here on do not exist; None if that is not known.
        rows_repeat: A sampler may name a row several times in a pass; what is drawn for it then
            depends on the update, too.
        noise_scale_every: Every so many updates of an epoch, cut in the order given instead of by
            length: a noise estimate needs micro-batches that are random samples of the update, and
            the rows of such an update are dealt in random order.
    """

    def __init__(
        self,
        data_collator: Callable[[list[Any]], Any],
        *,
        max_sequences: int | None = None,
        max_tokens: int | None = None,
        main_input: str = "input_ids",
        encoder_decoder: bool = False,
        seed: int = 0,
    ) -> None:
        self.data_collator = data_collator
        self.max_sequences = max_sequences
        self._budget: Tensor | int | None = max_tokens
        self._takes_trees: Tensor | bool = True
        self.main_input = main_input
        self.encoder_decoder = encoder_decoder
        self.seed = seed
        self.rule: TargetRule | None = None
        self.pad_to_one_width = False
        self.packed = False
        self.shares_prefixes = False
        self.foresees_sharing = False
        self.least_saving = LEAST_SAVING
        self.tree_cost = TreeCost()
        self.overhead_tokens = OVERHEAD_ON_CPU
        self.num_ranks = 1
        self.rows_per_sequence: int | None = 1
        self.items_are_batches = False
        self.pad_token_id: int | None = None
        self.vocab_size: int | None = None
        self.rows_repeat = False
        self.noise_scale_every: int | None = None
        self._draws: DrawsByRow | None = None

    @property
    def counting(self) -> dict[str, Any]:
        """What `make_micro_batch` has to know of the rows to count them."""
        return {
            "main_input": self.main_input,
            "encoder_decoder": self.encoder_decoder,
            "pad_token_id": self.pad_token_id,
        }

    @property
    def max_tokens(self) -> int | None:
        """Most tokens in a micro-batch, padding included; None for no limit."""
        return int(self._budget) if isinstance(self._budget, Tensor) else self._budget

    @max_tokens.setter
    def max_tokens(self, value: int | None) -> None:
        if isinstance(self._budget, Tensor) and value is not None:
            self._budget.fill_(value)
        else:
            self._budget = value

    @property
    def limits(self) -> Limits:
        """How micro-batches are limited now; those that tune themselves change."""
        return Limits(self.max_tokens, self.max_sequences, self.overhead_tokens)

    @property
    def tunes_budget(self) -> bool:
        """Whether the budget changes while training."""
        return isinstance(self._budget, Tensor)

    def share_budget(self) -> None:
        """Share what is tuned with the loader's workers, so that they see it change."""
        if isinstance(self._budget, int):
            self._budget = torch.tensor(self._budget)
            self._budget.share_memory_()  # type: ignore[no-untyped-call]
            self._takes_trees = torch.tensor(1)
            self._takes_trees.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def takes_trees(self) -> bool:
        """Whether an update may be planned as trees, where the model computes those.

        It changes while budgets are tuned, and decides how a share is cut, never how it is dealt.
        """
        return bool(self._takes_trees)

    @takes_trees.setter
    def takes_trees(self, value: bool) -> None:
        if isinstance(self._takes_trees, Tensor):
            self._takes_trees.fill_(int(value))
        else:
            self._takes_trees = value

    def __call__(self, share: Sequence[Any]) -> Update:
        """Plan and collate one share.

        Args:
            share: Rows, or ``(dataset index, row)`` pairs as `stream.Rows` holds them.
        """
        epoch, index = getattr(share, "epoch", 0), getattr(share, "update", 0)
        pairs: list[tuple[int, Any]] = (
            list(zip(share.indices, share, strict=True))
            if hasattr(share, "indices")
            else list(enumerate(share))
        )
        kept = [(i, row) for i, row in pairs if can_have_target(row, rule=self.rule)]
        num_left_out = len(pairs) - len(kept)
        rows = [row for _, row in kept]
        lengths = self.measure(rows)
        at_random = self.measures_noise(index)
        plan, trees = self.cut_rows(self.sequences(rows), lengths, at_random=at_random)
        inputs = self._collate(kept, plan, epoch=epoch, update=index)
        if self.vocab_size is not None:
            for piece, batch in inputs:
                named = [kept[i] for i in piece]
                refuse_unknown_tokens(batch, named, vocab_size=self.vocab_size)
        micro_batches = [
            make_micro_batch(
                batch,
                None if self.items_are_batches else [rows[i] for i in piece],
                indices=tuple(kept[i][0] for i in piece),
                lengths=() if self.items_are_batches else tuple(lengths[i] for i in piece),
                places=() if self.items_are_batches else tuple(piece),
                rows_per_sequence=self.rows_per_sequence,
                **self.counting,
            )
            for piece, batch in inputs
        ]
        for micro_batch, grown in zip(micro_batches, trees, strict=True):
            self.lay_out(micro_batch, grown)
        position = getattr(share, "position", None)
        # A cut at random says nothing about how fast a budget is.
        budget = None if at_random else self.max_tokens
        takes_trees = at_random or any(mb.trees for mb in micro_batches) or self.takes_trees
        return Update(
            micro_batches, epoch, index, num_left_out, position, budget, takes_trees=takes_trees
        )

    def plan(self, rows: Sequence[Any]) -> list[list[int]]:
        """Cut rows into micro-batches; see `plan_micro_batches`."""
        return self.cut(self.measure(rows))

    def measure(self, rows: Sequence[Any]) -> list[int]:
        """Measure what each row will cost; see `measure_length`."""
        return [
            measure_length(row, main_input=self.main_input, add_labels=self.encoder_decoder)
            for row in rows
        ]

    def measures_noise(self, index: int) -> bool:
        """Return whether this update of an epoch is one whose noise is measured."""
        return measures_noise(index, every=self.noise_scale_every)

    def cut(
        self, lengths: Sequence[int], *, max_tokens: int | None = None, at_random: bool = False
    ) -> list[list[int]]:
        """Cut sequences of given length.

        Args:
            lengths: Tokens of each sequence, in the order they were dealt.
            max_tokens: A token limit found by running out of memory, beside the collator's own.
            at_random: Keep that order, which then is random, and cut into at least four pieces.
        """
        lengths = list(lengths)
        max_tokens = self.limits.within(max_tokens).max_tokens
        if self.packed and any(lengths) and not at_random:
            return plan_packed_micro_batches(
                lengths, max_tokens=max_tokens, max_sequences=self.max_sequences
            )
        if self.pad_to_one_width and max_tokens is not None:
            lengths = [max(lengths, default=0)] * len(lengths)
        # On one rank whoever counts sequences is given the number of micro-batches they asked for.
        weighs = max_tokens is not None or (self.num_ranks > 1 and not self.pad_to_one_width)
        max_sequences = self.max_sequences
        if at_random:
            quarter = max(1, -(-len(lengths) // 4))
            max_sequences = min(max_sequences or quarter, quarter)
        return plan_micro_batches(
            lengths,
            max_tokens=max_tokens,
            max_sequences=max_sequences,
            keep_order=at_random or not any(lengths),
            overhead_tokens=self.overhead_tokens if weighs else None,
        )

    def sequences(self, rows: Sequence[Any]) -> list[list[Any]] | None:
        """Return the tokens of dataset rows as `cut_rows` takes them; None if nothing is shared."""
        if not self.shares_prefixes:
            return None
        return sequences_of_rows(
            rows, main_input=self.main_input, rows_per_sequence=self.rows_per_sequence
        )

    def cut_rows(
        self,
        sequences: Sequence[Sequence[Any]] | None,
        lengths: Sequence[int],
        *,
        max_tokens: int | None = None,
        at_random: bool = False,
    ) -> tuple[list[list[int]], list[GrownTrees | None]]:
        """Cut sequences, as trees where that costs less than `cut` does.

        Args:
            sequences: Token ids of the collated rows of each; None if they are not known.
            lengths: Tokens of each.
            max_tokens: As for `cut`.
            at_random: As for `cut`.

        Returns:
            The sequences of each micro-batch, and the trees of its collated rows; None for those
            computed as they are.
        """
        plan = self.cut(lengths, max_tokens=max_tokens, at_random=at_random)
        plain: list[GrownTrees | None] = [None] * len(plan)
        shares = self.shares_prefixes and self.takes_trees
        if not shares or at_random or self.pad_to_one_width or not sequences:
            return plan, plain
        limits = self.limits.within(max_tokens)
        shared = plan_shared_sequences(sequences, self.tree_cost, limits)
        costs = padded_cost(
            lengths,
            plan,
            self.tree_cost,
            overhead_tokens=self.overhead_tokens,
            packed=self.packed,
            rows_each=len(sequences[0]),
        )
        if not shared.pays(costs, least_saving=self.least_saving):
            return plan, plain
        return shared.pieces, list(shared.trees)

    def share_prefixes(self, bodies: Sequence[Any], *, by_rows: bool, keeps: bool = False) -> None:
        """Plan rows that begin alike as trees if any part of a model computes those.

        Args:
            bodies: The parts that do.
            by_rows: See `TreeCost`.
            keeps: Likewise.
        """
        self.shares_prefixes = bool(bodies)
        self.tree_cost = replace(self.tree_cost, by_rows=by_rows, keeps=keeps)

    def lay_out(self, micro_batch: MicroBatch, trees: GrownTrees | None = None) -> MicroBatch:
        """Say how a collated micro-batch will be laid out, and count its padding by that."""
        if self.packed:
            micro_batch.num_padding_tokens = 0
        if trees is not None:
            micro_batch.as_trees(trees)
        return micro_batch

    def _collate(
        self, kept: list[tuple[int, Any]], plan: list[list[int]], *, epoch: int, update: int
    ) -> list[Any]:
        draws = self._draws
        if draws is None or draws.collate is not self.data_collator:
            draws = self._draws = DrawsByRow(
                self.data_collator, seed=self.seed, main_input=self.main_input
            )
        salt = update + 1 if self.rows_repeat else 0

        def collate(piece: Sequence[int]) -> Any:
            return draws(
                [kept[i][1] for i in piece],
                [kept[i][0] for i in piece],
                epoch=epoch,
                salt=salt,
                rows_per_sequence=self.rows_per_sequence,
            )

        collated = []
        if self.pad_to_one_width and kept and self.rows_per_sequence == 1:
            whole = collate(range(len(kept)))
            if isinstance(whole, Mapping) and count_rows(whole, self.main_input) == len(kept):
                return [(piece, slice_rows(whole, piece)) for piece in plan]
        for piece in plan:
            try:
                collated.append((piece, collate(piece)))
            except Exception as error:
                names = ", ".join(str(kept[i][0]) for i in piece)
                what = f"the data collator failed on rows {names} of the training dataset"
                raise DataError(f"{what}: {type(error).__name__}: {error}") from error
        return collated


def refuse_unknown_tokens(inputs: Any, rows: Sequence[tuple[int, Any]], *, vocab_size: int) -> None:
    """Refuse token ids that no embedding stands for, before a device stops at them for good.

    Args:
        inputs: What a data collator returned, not yet on a device.
        rows: The rows it was made of, with their places in the dataset.
        vocab_size: Entries of the vocabulary.

    Raises:
        DataError: Naming the row and the id.
    """
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(ids, Tensor) or ids.is_floating_point() or not ids.numel():
        return
    if ids.device.type != "cpu":  # reading it would make the device wait
        return
    least, most = (int(value) for value in torch.aminmax(ids))
    if least >= 0 and most < vocab_size:
        return
    wrong = least if least < 0 else most
    holders = [
        index
        for index, row in rows
        if isinstance(row, Mapping) and wrong in torch.as_tensor(row.get("input_ids", ()))
    ]
    numbers = holders or [index for index, _ in rows]
    what = f"row{'s' * (len(numbers) != 1)} {', '.join(map(str, numbers))}"
    raise DataError(
        f"{what} of the training dataset: token id {wrong} is outside of the model's vocabulary "
        f"of {vocab_size:,}: tokenize with the model's own tokenizer, or grow the embeddings "
        f"(model.resize_token_embeddings)."
    )


def make_micro_batch(
    inputs: Any,
    rows: Sequence[Any] | None = None,
    *,
    indices: tuple[int, ...] = (),
    lengths: tuple[int, ...] = (),
    places: tuple[int, ...] = (),
    main_input: str = "input_ids",
    encoder_decoder: bool = False,
    pad_token_id: int | None = None,
    rows_per_sequence: int | None = 1,
) -> MicroBatch:
    """Count what a collated batch holds.

    Args:
        inputs: What a data collator returned.
        rows: The rows it was made of, if they are known.
        indices: Their places in the dataset.
        lengths: Cost of each row as the planner saw it.
        places: Their places in the rank's share of the update.
        main_input: The feature that holds the sequence.
        encoder_decoder: Labels are fed in too, and cost tokens of their own.
        pad_token_id: Input tokens that are padding where no mask says so, as stock counts them.
        rows_per_sequence: Collated rows of each sequence; None if they cannot be told apart.
    """
    mapping = inputs if isinstance(inputs, Mapping) else {}
    if rows is None:
        num_sequences = count_rows(mapping, main_input) // (rows_per_sequence or 1)
    else:
        num_sequences = len(rows)
    used, computed = _count_tokens(mapping, rows or (), main_input)
    decoded, decoder_padding = _count_decoder_tokens(mapping) if encoder_decoder else (0, 0)
    used, computed = used + decoded, computed + decoded + decoder_padding
    targets = count_all_targets(mapping, num_sequences=num_sequences, num_input_tokens=used)
    used -= _count_unmasked_padding(mapping, used - decoded, main_input, pad_token_id)
    return MicroBatch(
        inputs,
        targets,
        num_sequences,
        used,
        computed - used,
        indices,
        lengths,
        places,
        rows_per_sequence=rows_per_sequence,
        num_decoder_tokens=decoded,
        num_decoder_padding=decoder_padding,
    )


def _count_tokens(
    inputs: Mapping[str, Any], rows: Sequence[Any], main_input: str
) -> tuple[int, int]:
    """Count tokens fed in without padding, and tokens computed with it."""
    main = find_main_input(inputs, main_input)
    if main is None:
        return 0, 0
    mask = inputs.get("attention_mask")
    has_mask = isinstance(mask, Tensor) and mask.shape == main.shape
    computed = main.numel() if has_mask or not main.is_floating_point() else int(main.shape[0])
    used = count_input_tokens(inputs, main_input=main_input)
    if not has_mask:  # padding then shows only in the rows it was added to
        used = min(sum(measure_length(row, main_input=main_input) for row in rows) or used, used)
    return used, computed


def _count_decoder_tokens(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Count the labels that are fed to a decoder, and what pads them."""
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        return 0, 0
    used = int(labels.ne(IGNORE_INDEX).sum())
    return used, labels.numel() - used


def _count_unmasked_padding(
    inputs: Mapping[str, Any], used: int, main_input: str, pad_token_id: int | None
) -> int:
    """Count the padding among tokens that were taken for used, since no mask says otherwise."""
    main = find_main_input(inputs, main_input)
    if main is None or pad_token_id is None or main.is_floating_point():
        return 0
    if "attention_mask" in inputs:
        return 0
    return max(0, used - int(main.ne(pad_token_id).sum()))
