"""NEFTune's noise by the row: its size by the row's own length, its numbers by the row.

NEFTune adds uniform noise of size ``alpha / sqrt(length * width)`` to the embeddings of a sequence
(Jain et al., 2023, arXiv:2310.05914). The stock hook takes the width of the batch for the length,
so a short row beside a long one, or a row laid out end to end with others, gets too little: 0.078
instead of 0.221 for eight rows of 16 tokens in one. And what it draws depends on which rows share a
micro-batch. Here both are a function of the row alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.neftune import neftune_post_forward_hook

from hf_gradacc.updates.draws.randomness import seeds_of
from hf_gradacc.updates.update import MicroBatch

__all__ = ["RowNoise", "RowPlaces", "places_of_rows"]

_NOISE = 3


@dataclass(frozen=True)
class RowPlaces:
    """Where the rows of a micro-batch lie in what the embeddings return.

    Attributes:
        shape: ``(rows, seq)`` of the embedded tokens.
        tokens: For each row, which places of the flattened ``[rows * seq]`` are its own.
        names: For each row, integers that tell it from all other rows of the update; None if it is
            not known which rows of the dataset these are.
    """

    shape: tuple[int, int]
    tokens: list[Tensor]
    names: list[tuple[int, ...]] | None


class RowNoise:
    """Puts NEFTune's noise on embeddings, in place of the stock hook.

    Attributes:
        is_active: The stock hook was replaced.
    """

    def __init__(self) -> None:
        self.is_active = False
        self._places: RowPlaces | None = None
        self._entropy: tuple[int, ...] = ()
        self._handle: Any = None
        self._generator: torch.Generator | None = None

    def take_over(self, trainer: Any) -> None:
        """Replace the stock hook if there is one, before an update.

        In its own place, among whatever other hooks there are: stock's handle still removes it.

        Args:
            trainer: The trainer, whose ``neftune_hook_handle`` is stock's.
        """
        self._entropy = (_NOISE, trainer.args.seed, trainer.state.global_step)
        handle = getattr(trainer, "neftune_hook_handle", None)
        if handle is None or handle is self._handle:
            return
        for module in trainer.model.modules():
            if module._forward_hooks.get(handle.id) is neftune_post_forward_hook:
                module._forward_hooks[handle.id] = self._add
                self._handle, self.is_active = handle, True
                return

    @contextlib.contextmanager
    def running(
        self, inputs: Any, micro_batch: MicroBatch | None, *, packed: bool = False
    ) -> Iterator[None]:
        """Know the rows of the micro-batch that runs inside.

        Args:
            inputs: As collated, on the CPU.
            micro_batch: What they are the inputs of; None if that is not known.
            packed: They will be laid out as one row.
        """
        known = () if micro_batch is None or micro_batch.weightless else micro_batch.rows
        self._places = places_of_rows(inputs, known, packed=packed)
        try:
            yield
        finally:
            self._places = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _add(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Add noise to the embeddings ``[rows, seq, width]`` of real tokens."""
        places = self._places
        if not module.training:
            return output
        if places is None or output.ndim != 3 or tuple(output.shape[:2]) != places.shape:
            added: Tensor = neftune_post_forward_hook(module, args, output)
            return added
        alpha: Any = module.neftune_noise_alpha
        width = output.shape[2]
        noise = []
        for i, tokens in enumerate(places.tokens):
            size = alpha / (max(len(tokens), 1) * width) ** 0.5
            generator = None if places.names is None else self._seeded(places.names[i], output)
            row = torch.empty(len(tokens), width, dtype=output.dtype, device=output.device)
            noise.append(row.uniform_(-size, size, generator=generator))
        where = torch.cat(places.tokens).to(output.device, non_blocking=True)
        all_noise = torch.zeros_like(output).view(-1, width)
        return output + all_noise.index_copy(0, where, torch.cat(noise)).view_as(output)

    def _seeded(self, name: Sequence[int], like: Tensor) -> torch.Generator:
        if self._generator is None or self._generator.device != like.device:
            self._generator = torch.Generator(like.device)
        return self._generator.manual_seed(seeds_of(*self._entropy, *name)[0])


def places_of_rows(
    inputs: Any, rows: Sequence[int] = (), *, packed: bool = False
) -> RowPlaces | None:
    """Find the tokens of each row of a micro-batch.

    Args:
        inputs: ``input_ids`` ``[..., seq]``, with an ``attention_mask`` of that shape if there is
            padding; or one row whose ``position_ids`` begin again with each sequence.
        rows: Which dataset rows they are, if that is known.
        packed: The rows will be laid end to end without padding.

    Returns:
        None if that cannot be seen.

    >>> mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    >>> places = places_of_rows({"input_ids": mask, "attention_mask": mask}, [7, 4])
    >>> [row.tolist() for row in places.tokens], places.names
    ([[0, 1, 2], [3]], [(7, 0), (4, 0)])
    """
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim < 2 or ids.numel() == 0:
        return None
    seq = ids.shape[-1]
    real = torch.ones(ids.numel() // seq, seq, dtype=torch.bool)
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        real = mask.reshape(-1, seq).ne(0).cpu()
    lengths = real.sum(1).tolist()
    shape = (len(real), seq)
    if packed:
        shape = (1, sum(lengths))
        tokens = list(torch.split(torch.arange(shape[1]), lengths))
    elif mask is None and isinstance(positions, Tensor) and positions.shape == (1, seq):
        starts = [*positions[0].cpu().diff().ne(1).nonzero().squeeze(1).add(1).tolist(), seq]
        tokens = list(torch.arange(seq).tensor_split(starts[:-1]))
    else:
        tokens = [row.nonzero().squeeze(1) + i * seq for i, row in enumerate(real)]
    choices = ids.shape[1] if ids.ndim == 3 else 1
    names: list[tuple[int, ...]] | None = None
    if rows and len(tokens) % len(rows) == 0 and len(tokens) >= len(rows) * choices:
        n = len(rows)
        names = [
            (rows[i // choices], i % choices) if choices > 1 else (rows[i % n], i // n)
            for i in range(len(tokens))
        ]
    return RowPlaces(shape, tokens, names)
