"""A line ``y = a x + b`` to be fitted, for claims about the Trainer that need no language model."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from hf_gradacc import GradAccTrainer

QUIET: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
KINDS: dict[str, Any] = {"stock": Trainer, "ours": GradAccTrainer}


class LineRows(Dataset[Any]):
    """Noisy points of ``2 x + 3``; each name in `labels` gets noise of its own."""

    def __init__(self, length: int = 64, *, labels: tuple[str, ...] = ("labels",)) -> None:
        draw = np.random.RandomState(7)
        self.x = draw.normal(size=length).astype(np.float32)
        self.labels = {
            name: (2 * self.x + 3 + draw.normal(scale=0.1, size=length)).astype(np.float32)
            for name in labels
        }

    @property
    def y(self) -> Any:
        return next(iter(self.labels.values()))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {name: values[index] for name, values in self.labels.items()}
        return {"input_x": self.x[index], **row}


class LineStream(IterableDataset[Any]):
    """The same points as a stream; a one-shot stream gives each of them only once."""

    def __init__(
        self, length: int = 64, *, labels: tuple[str, ...] = ("labels",), one_shot: bool = False
    ) -> None:
        self.rows = LineRows(length, labels=labels)
        self.one_shot, self.next_row = one_shot, 0

    def __iter__(self) -> Any:
        if not self.one_shot:
            yield from (self.rows[i] for i in range(len(self.rows)))
            return
        while self.next_row < len(self.rows):
            yield self.rows[self.next_row]
            self.next_row += 1


class WideRows(Dataset[Any]):
    """Rows whose width changes from one batch to the next."""

    def __init__(self, *, batch_size: int, num_batches: int = 4) -> None:
        draw = np.random.RandomState(3)
        widths = [w for w in draw.randint(1, 20, num_batches) for _ in range(batch_size)]
        self.xs = [draw.normal(size=w).astype(np.float32) for w in widths]
        self.ys = [draw.normal(size=w).astype(np.float32) for w in widths]

    def __len__(self) -> int:
        return len(self.xs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_x": self.xs[index], "labels": self.ys[index]}


class LineConfig(PretrainedConfig):
    model_type = "line"

    def __init__(self, a: float = 0.0, b: float = 0.0, *, twice: bool = False, **kw: Any) -> None:
        super().__init__(**kw)
        self.a, self.b, self.twice = a, b, twice
        self.hidden_size = 1


def _outputs(model: Any, x: Tensor, labels: Tensor | None) -> tuple[Tensor, ...]:
    y = x * model.a + model.b
    outputs = (y, y) if model.twice else (y,)
    return outputs if labels is None else (nn.functional.mse_loss(y, labels), *outputs)


class LineModel(PreTrainedModel):
    """A Transformers model; `twice` returns its prediction two times."""

    config_class = LineConfig
    base_model_prefix = "line"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.a = nn.Parameter(torch.as_tensor(config.a).float())
        self.b = nn.Parameter(torch.as_tensor(config.b).float())
        self.twice = config.twice
        self.post_init()

    def forward(self, input_x: Tensor, labels: Any = None, **kwargs: Any) -> Any:
        return _outputs(self, input_x, labels)


class PlainLine(nn.Module):
    """A module that is no Transformers model and has no config."""

    def __init__(self, a: float = 0.0, b: float = 0.0, *, twice: bool = False) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a).float())
        self.b = nn.Parameter(torch.tensor(b).float())
        self.twice = twice
        self.config = None

    def forward(self, input_x: Tensor, labels: Any = None, **kwargs: Any) -> Any:
        return _outputs(self, input_x, labels)


class DictLine(PlainLine):
    """Returns a dict."""

    def forward(self, input_x: Tensor, labels: Any = None, **kwargs: Any) -> Any:
        y = input_x * self.a + self.b
        loss = {} if labels is None else {"loss": nn.functional.mse_loss(y, labels)}
        return {**loss, "output": y}


class NoisyLine(LineModel):
    """Draws from all three random generators in each forward."""

    def forward(self, input_x: Tensor, labels: Any = None, **kwargs: Any) -> Any:
        y = input_x * self.a + self.b
        noise = float(torch.randn(1)) + float(np.random.rand()) + random.random()
        y = y + 0.05 * noise
        return (y,) if labels is None else (nn.functional.mse_loss(y, labels), y)


class CheckpointedLine(PreTrainedModel):
    """Two layers that honour activation checkpointing."""

    config_class = LineConfig
    base_model_prefix = "line"
    supports_activation_checkpointing = True
    supports_gradient_checkpointing = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(1, 4), nn.Linear(4, 1)])
        self.gradient_checkpointing = False
        self.num_checkpointed = 0
        self.post_init()

    def forward(self, input_x: Tensor, labels: Any = None, **kwargs: Any) -> Any:
        y = input_x.unsqueeze(-1)
        for layer in self.layers:
            if self.training and self.gradient_checkpointing:
                self.num_checkpointed += 1
                y = self._gradient_checkpointing_func(layer.__call__, y)
            else:
                y = layer(y)
        y = y.squeeze(-1)
        return (y,) if labels is None else (nn.functional.mse_loss(y, labels), y)


def near(prediction: Any, *, width: float = 0.25) -> dict[str, float]:
    """The share of predictions that are nearly right, as `compute_metrics`."""
    predictions, labels = prediction
    return {"accuracy": float(np.mean(np.abs(predictions - labels) <= width))}


class NearInBatches:
    """The same, batch by batch."""

    def __init__(self) -> None:
        self.hits: list[float] = []

    def __call__(self, prediction: Any, compute_result: bool) -> dict[str, float]:
        predictions, labels = (part[0] if isinstance(part, tuple) else part for part in prediction)
        self.hits += ((predictions - labels).abs() <= 0.25).float().tolist()
        if not compute_result:
            return {}
        result, self.hits = {"accuracy": float(np.mean(self.hits))}, []
        return result


_OF_TRAINER = (
    "callbacks",
    "compute_metrics",
    "compute_loss_func",
    "data_collator",
    "model_init",
    "optimizer_cls_and_kwargs",
    "optimizers",
    "preprocess_logits_for_metrics",
    "processing_class",
)


def fit_line(
    kind: Any,
    out: Any,
    *,
    a: float = 0.0,
    b: float = 0.0,
    twice: bool = False,
    model: Any = "transformers",
    train: Any = 64,
    evaluate: Any = 64,
    arguments_class: Any = TrainingArguments,
    **options: Any,
) -> Any:
    """Make a trainer of a kind with plain ``TrainingArguments``.

    Args:
        kind: The trainer's class.
        out: Its output directory.
        a: Slope that the model begins with.
        b: Intercept that the model begins with.
        twice: Two predictions, and two columns of labels.
        model: "transformers", "plain", or a model.
        train: Training rows, or how many.
        evaluate: Evaluation rows, or how many.
        arguments_class: The class of the arguments.
        **options: Of the trainer or of its arguments.
    """
    if isinstance(model, str):
        plain = model == "plain"
        model = (
            PlainLine(a, b, twice=twice) if plain else LineModel(LineConfig(a=a, b=b, twice=twice))
        )
    labels = tuple(options.get("label_names") or ("labels",))
    train, evaluate = (
        LineRows(rows, labels=labels) if isinstance(rows, int) else rows
        for rows in (train, evaluate)
    )
    own = {key: options.pop(key) for key in _OF_TRAINER if key in options}
    arguments = arguments_class(output_dir=str(out), **{**QUIET, **options})
    model = None if "model_init" in own else model
    return kind(model, arguments, train_dataset=train, eval_dataset=evaluate, **own)


def fitted(trainer: Any) -> tuple[float, float]:
    """Slope and intercept."""
    return trainer.model.a.item(), trainer.model.b.item()


def logged(trainer: Any, key: str) -> list[float]:
    """The values of a key in the log, in order."""
    return [row[key] for row in trainer.state.log_history if key in row]
