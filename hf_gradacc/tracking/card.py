"""A model card: what a model was trained on, how, and how well, for whoever finds it later.

Written as the `README.md` beside a model, with the metadata that the Hugging Face Hub reads. It
holds no row of the data, no path of the machine, and nothing that is a secret.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_gradacc.text import duration, printable, quantity
from hf_gradacc.tracking.run_files import kind_of

__all__ = [
    "CARD_NAME",
    "PLOT_NAME",
    "CardFacts",
    "as_merged",
    "find_license",
    "is_own_card",
    "write_card",
]

CARD_NAME, PLOT_NAME = "README.md", "training.png"

_MARK = "<!-- Written by hf_gradacc. Remove this line, and the file stays as it is. -->"
_MADE_BY_OTHERS = (
    "# Model Card for Model ID",
    "This model card has been generated automatically",
    "It has been trained using [TRL]",
)
"""What peft, the stock Trainer and TRL write, in the middle of a run too."""

_FEWEST_ROWS = 5
"""Log rows that make a plot worth drawing."""


@dataclass
class CardFacts:
    """What a card says, beside the figures of the log.

    Attributes:
        name: The model's name.
        base: The model it began as: a name on the hub, or the name of a folder; None from zero.
        base_is_public: `base` is a name on the hub.
        license: As the hub writes it; None if it is not known.
        task: "text-generation" or "text-classification"; None for others.
        library: "transformers" or "peft".
        language: Codes such as "en".
        tags: For the hub.
        datasets: Names on the hub.
        data: Lines about the data.
        method: What was trained: "all weights", "LoRA with r 16".
        training: Lines about how it was trained.
        load: Python that loads the model; `REPO` stands for its name.
        recipe: Name of the recipe file beside the card; None without.
    """

    name: str
    base: str | None = None
    base_is_public: bool = False
    license: str | None = None
    task: str | None = None
    library: str = "transformers"
    language: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    method: str = "all weights"
    training: list[str] = field(default_factory=list)
    load: str = ""
    recipe: str | None = None


def write_card(folder: Path, facts: CardFacts, history: Sequence[Mapping[str, Any]]) -> Path | None:
    """Write a card, and draw the loss where there are rows enough.

    Args:
        folder: Where the model lies.
        facts: What the card says.
        history: The run's log rows.

    Returns:
        The card; None if somebody's own `README.md` is there, which stays.
    """
    path = folder / CARD_NAME
    if path.exists() and not _is_ours(path):
        return None
    plotted = _draw(history, folder / PLOT_NAME)
    text = _render(facts, history, plotted=plotted)
    partial = path.with_name(f".{CARD_NAME}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path


def as_merged(card: str, load: str) -> str:
    """The card of a model whose adapter was merged into its base.

    Args:
        card: That of the adapter.
        load: Python that loads the merged model.
    """
    card = card.replace("library_name: peft", "library_name: transformers", 1)
    card = card.replace("base_model_relation: adapter", "base_model_relation: finetune", 1)
    code = f"## Use it\n\n```python\n{load}\n```"
    return re.sub(r"## Use it\n\n```python\n.*?```", lambda _: code, card, count=1, flags=re.S)


def is_own_card(text: str) -> bool:
    """Whether a card was written here, and is nobody's own since."""
    return _MARK in text


def find_license(base: str | None) -> str | None:
    """The license of a model: from the card in its folder, or from the hub; None if not known."""
    from huggingface_hub import ModelCard, model_info

    if base is None:
        return None
    with contextlib.suppress(Exception):  # no network, no card, no such field: it stays open
        if Path(base).is_dir():
            data = ModelCard.load(Path(base) / CARD_NAME).data
        else:
            data = model_info(base, timeout=5).card_data
        found = data.get("license") if data is not None else None
        return found if isinstance(found, str) else None
    return None


def _is_ours(path: Path) -> bool:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return is_own_card(text) or any(start in text for start in _MADE_BY_OTHERS)


def _render(facts: CardFacts, history: Sequence[Mapping[str, Any]], *, plotted: bool) -> str:
    from huggingface_hub import ModelCardData

    relation = "adapter" if facts.library == "peft" else "finetune"
    extra: dict[str, Any] = {"base_model_relation": relation} if facts.base_is_public else {}
    metadata = ModelCardData(
        base_model=facts.base if facts.base_is_public else None,
        license=facts.license,
        language=facts.language or None,
        library_name=facts.library,
        pipeline_tag=facts.task,
        tags=list(dict.fromkeys(["hf_gradacc", *facts.tags])),
        datasets=facts.datasets or None,
        **extra,
    )
    began = "trained from random weights" if facts.base is None else "fine-tuned"
    subject = f"`{facts.name}`" if facts.base is None else f"`{facts.base}`,"
    lines = [
        f"# {facts.name}",
        "",
        _MARK,
        "",
        f"{subject} {began} with hf_gradacc: {facts.method}. "
        "The gradient of each update is that of the whole batch.",
    ]
    if facts.load:
        lines += ["", "## Use it", "", "```python", facts.load, "```"]
    lines += ["", "## Figures", "", *_table(_figures(history))]
    if plotted:
        lines += ["", f"![Loss over updates]({PLOT_NAME})"]
    if facts.data:
        lines += ["", "## Data", "", *(f"- {line}" for line in facts.data)]
    if facts.training:
        lines += ["", "## Training", "", *(f"- {line}" for line in facts.training)]
    if facts.recipe is not None:
        lines += ["", f"All of it is in [{facts.recipe}]({facts.recipe}): "
                  f"`hf-gradacc train {facts.recipe}` repeats it."]  # fmt: skip
    return f"---\n{metadata.to_yaml()}\n---\n\n{printable(chr(10).join(lines))}\n"


def _table(rows: Mapping[str, str]) -> list[str]:
    cells = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return ["| | |", "|---|---|", *cells]


def _figures(history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    train = [row for row in history if kind_of(row) == "train"]
    held_out = [row for row in history if kind_of(row) == "eval" and "eval_loss" in row]
    ends = [row for row in history if kind_of(row) == "end"]
    figures: dict[str, str] = {}
    if history:
        figures["updates"] = f"{max(int(row.get('step', 0)) for row in history):,}"
    if train:
        first, last = float(train[0]["loss"]), float(train[-1]["loss"])
        figures["training loss"] = f"{first:.4g} at first, {last:.4g} at last"
    if held_out:
        figures["held-out loss"] = f"{float(held_out[-1]['eval_loss']):.4f}"
        timing = ("runtime", "per_second", "_loss", "jit_compilation_time", "_num_tokens")
        for key, value in held_out[-1].items():
            is_metric = key.startswith("eval_") and isinstance(value, int | float)
            if is_metric and not key.endswith(timing):
                figures[f"held-out {key.removeprefix('eval_').replace('_', ' ')}"] = f"{value:.4g}"
    seen = next((row["target_tokens_seen"] for row in reversed(history)
                 if "target_tokens_seen" in row), None)  # fmt: skip
    if seen is not None:
        figures["learned tokens seen" if _counts_tokens(train) else "targets seen"] = quantity(seen)
    if ends:
        figures["time"] = duration(float(ends[-1]["train_runtime"]))
    return figures


def _counts_tokens(train: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a target is a token, and not a whole row, such as one with a class or a pair."""
    return any(row.get("tokens_per_update") != row.get("effective_batch_size") for row in train)


def _draw(history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw the loss over updates; False where there is too little to see."""
    train = [row for row in history if kind_of(row) == "train"]
    held_out = [row for row in history if kind_of(row) == "eval" and "eval_loss" in row]
    # The first of each update: one after training is of the model kept, maybe an earlier one.
    held_out = list({row.get("step"): row for row in reversed(held_out)}.values())[::-1]
    if len(train) < _FEWEST_ROWS:
        path.unlink(missing_ok=True)
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([row["step"] for row in train], [float(row["loss"]) for row in train], label="train")
    if held_out:
        places = [row["step"] for row in held_out]
        losses = [float(row["eval_loss"]) for row in held_out]
        axes.plot(places, losses, "o-", label="held out")
        axes.legend(frameon=False)
    axes.set_xlabel("updates")
    axes.set_ylabel("loss per target")
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure)  # without it, saving would look for a display
    figure.savefig(path)
    return True
