"""Rows that several ranks compute together: which part of a row each rank is given.

A part's loss is the sum over its own targets, divided by the targets of the whole micro-batch. So
the parts add up to the micro-batch's mean loss, however unequal they are, and a part without a
target adds nothing. A mean over each part's own targets would not: a rank that holds a prompt, or
padding, would weigh as much as one that holds the answer, or be NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from hf_gradacc.errors import DataError
from hf_gradacc.ranks.layout import RankLayout
from hf_gradacc.updates.targets import IGNORE_INDEX

__all__ = [
    "any_batch_size",
    "begin_anew",
    "can_attend_in_ring",
    "part_of_rows",
    "rows_for_ring",
    "with_shifted_labels",
]

_plain_attentions: dict[str, Any] = {}
"""The attentions of transformers by name, as they were before DeepSpeed replaced one."""


def with_shifted_labels(inputs: Mapping[str, Any], *, multiple_of: int) -> dict[str, Any]:
    """Prepare rows to be split: shift their labels, number their tokens, pad them to one length.

    Labels are shifted first: the last token of a part predicts the first one of the next, which is
    on another rank.

    Args:
        inputs: Collated rows, padded on the right, or without padding.
        multiple_of: Pad to a multiple of that many tokens, with targets nowhere.

    Returns:
        The rows as ``input_ids``, ``position_ids``, ``shift_labels`` and what else they hold, but
        without ``labels``, and without a mask: no part of a causal row sees padding behind it.

    Raises:
        DataError: If rows are padded on the left, or hold what is not one value for each token.

    >>> rows = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, 6, 7]])}
    >>> with_shifted_labels(rows, multiple_of=2)["shift_labels"].tolist()
    [[6, 7, -100, -100]]
    """
    ids = inputs["input_ids"]
    length = ids.shape[1]
    rows = {k: v for k, v in inputs.items() if k not in ("labels", "attention_mask")}
    mask = inputs.get("attention_mask")
    if mask is not None and (mask.dim() != 2 or bool((mask[:, 1:] > mask[:, :-1]).any())):
        raise DataError(
            "rows that several ranks compute together must be padded on the right, with a mask of "
            "one value for each token: nothing else is masked in their parts. Set "
            "processing_class.padding_side = 'right'."
        )
    if "shift_labels" not in rows:
        rows["shift_labels"] = functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    if "position_ids" not in rows:
        rows["position_ids"] = torch.arange(length, device=ids.device).expand(len(ids), -1)
    more = math.ceil(length / multiple_of) * multiple_of - length
    for key, value in rows.items():
        if not isinstance(value, Tensor):
            continue
        if value.shape != ids.shape:
            raise DataError(
                f"`{key}` has the shape {tuple(value.shape)} and input_ids {tuple(ids.shape)}: "
                f"rows that several ranks compute together are split token by token, so every "
                f"tensor must hold one value for each. Leave it out, or train without cp_size and "
                f"sp_size."
            )
        rows[key] = _padded(key, value, more)
    return rows


def _padded(key: str, value: Tensor, more: int) -> Tensor:
    if key == "position_ids":  # not 0, which begins another row, nor past the last one known
        return torch.cat([value, value[:, -1:].expand(-1, more)], dim=1)
    return functional.pad(value, (0, more), value=IGNORE_INDEX if key == "shift_labels" else 0)


def part_of_rows(inputs: Mapping[str, Any], layout: RankLayout) -> dict[str, Any]:
    """Return this rank's part of rows, for Ulysses: neighbouring tokens, as many on every rank.

    Args:
        inputs: Collated rows.
        layout: Which part is this rank's.

    >>> rows = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
    >>> part = part_of_rows(rows, RankLayout(rank=1, world_size=2, sp_size=2))
    >>> part["input_ids"].tolist(), part["shift_labels"].tolist(), part["position_ids"].tolist()
    ([[7, 0]], [[-100, -100]], [[2, 2]])
    """
    whole = with_shifted_labels(inputs, multiple_of=layout.row_parts)
    size = whole["input_ids"].shape[1] // layout.row_parts
    first = layout.row_part * size
    return {
        key: value[:, first : first + size].contiguous() if isinstance(value, Tensor) else value
        for key, value in whole.items()
    }


def rows_for_ring(
    inputs: Mapping[str, Any], layout: RankLayout, *, device: torch.device
) -> dict[str, Any]:
    """Return whole rows as torch's ``context_parallel`` takes them: it cuts them up in place.

    It gives each rank one piece from the front and one from the back, so that all have as much to
    attend to. So rows are padded to a multiple of twice as many tokens as there are ranks.

    Args:
        inputs: Collated rows. They are left as they are.
        layout: How many ranks share them.
        device: Where the model runs.
    """
    whole = with_shifted_labels(inputs, multiple_of=2 * layout.row_parts)
    rows = {k: v.to(device).clone() if isinstance(v, Tensor) else v for k, v in whole.items()}
    # A causal model takes a loss only if it is given labels, and then prefers the shifted ones.
    return {**rows, "labels": rows["shift_labels"].clone()}


def can_attend_in_ring(device: torch.device) -> bool:
    """Return whether torch can attend to a row that is split: its ring has no kernel for CPUs."""
    return device.type != "cpu"


def any_batch_size() -> None:
    """Let DeepSpeed's attention take any number of rows.

    It wants ``train_micro_batch_size_per_gpu`` of them in every forward. Micro-batches of a token
    budget, and the last ones of an update, have others. accelerate takes the class from its module
    when it prepares the model.
    """
    from deepspeed.runtime.sequence_parallel import ulysses_sp

    if getattr(ulysses_sp.UlyssesSPAttentionHF, "takes_any_batch_size", False):
        return

    class AnyBatchSize(ulysses_sp.UlyssesSPAttentionHF):
        takes_any_batch_size = True

        def forward(self, module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            rows = self.batch_size = query.shape[0]
            for name in ("query", "key_value", "context"):
                shape = f"required_{name}_shape"
                first, _, *others = getattr(self, shape)
                setattr(self, shape, torch.Size([first, rows, *others]))
            return super().forward(module, query, *args, **kwargs)

    ulysses_sp.UlyssesSPAttentionHF = AnyBatchSize


def begin_anew() -> None:
    """Let DeepSpeed split rows in this process, whatever was split in it before.

    It does not find a process group that was made without it. It makes its groups once and fails on
    a second trainer. And it puts its attention in the place of transformers' own, for all models: a
    second time it would put it around the first.
    """
    import deepspeed.comm as comm
    from deepspeed.runtime.sequence_parallel import parallel_state_sp as groups
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if not comm.is_initialized():
        comm.init_distributed(dist_backend=dist.get_backend())
    groups._SEQUENCE_PARALLEL_GROUP = groups._SEQUENCE_DATA_PARALLEL_GROUP = None
    for name in ALL_ATTENTION_FUNCTIONS.valid_keys():
        attention: Any = ALL_ATTENTION_FUNCTIONS[name]
        if not attention.__module__.startswith("deepspeed."):
            _plain_attentions[name] = attention
        elif name in _plain_attentions:
            ALL_ATTENTION_FUNCTIONS[name] = _plain_attentions[name]
