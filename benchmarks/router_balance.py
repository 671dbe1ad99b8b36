"""Experts balanced per micro-batch and per update: loss and load side by side, as a picture.

    python benchmarks/router_balance.py            trains, writes the picture and a result file
    python benchmarks/router_balance.py --quick    a few updates, nothing written

A small Mixtral with random weights learns eight made-up languages, each a chain over the same
letters with odds of its own. A row is of one language, and a micro-batch holds two rows of one
language, as rows of one source and length often meet. Balanced by micro-batch, each language has to
be spread over all experts; balanced by update, only their mixture has to. Both runs see the same
rows in the same order and the same number of tokens, from the same weights; they differ in
`update_passes` alone. Held-out rows tell the loss, without the router's, and which experts the
tokens choose.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from report import machine, table, write_result
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, TrainerCallback

from hf_gradacc import GradAccArguments, GradAccTrainer

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "router_balance.png"
LANGUAGES, LETTERS, LENGTH = 8, 48, 24
EXPERTS, UPDATE, MICRO_BATCH = 8, 32, 2
COEFFICIENT = 0.05
NAMES = {1: "per micro-batch", 2: "per update"}
Row = dict[str, list[int]]


@dataclasses.dataclass
class Look:
    """What held-out rows show after an update.

    Attributes:
        loss: Cross entropy per token.
        loads: Share of the choices that fall on each expert ``[layers, experts]``; even is 1 / 8.
        apart: How far the loads of one language are from those of all, as the share of its choices
            that would have to move; the mean over languages and layers.
    """

    loss: float
    loads: Tensor
    apart: float


def make_rows(num_rows: int, *, seed: int) -> list[Row]:
    """Return rows in turn of each language, each language of a length of its own."""
    odds = torch.randn(LANGUAGES, LETTERS, LETTERS, generator=torch.Generator().manual_seed(7))
    chains = (odds * 2.5).softmax(-1)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(num_rows):
        language = i % LANGUAGES
        letters = [int(torch.randint(LETTERS, (), generator=generator))]
        while len(letters) < LENGTH + language:
            following = chains[language, letters[-1]]
            letters.append(int(torch.multinomial(following, 1, generator=generator)))
        rows.append({"input_ids": letters, "labels": letters})
    return rows


def collate(rows: list[Row]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def pad(key: str, filler: int) -> Tensor:
        return torch.tensor([row[key] + [filler] * (width - len(row[key])) for row in rows])

    ids, labels = pad("input_ids", 0), pad("labels", -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": labels.ne(-100).long()}


def make_model() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=LETTERS,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=COEFFICIENT,
        max_position_embeddings=64,
    )
    return MixtralForCausalLM(config)


@torch.no_grad()
def look(model: Any, languages: list[list[Row]]) -> Look:
    """Run held-out rows, language by language."""
    was_training = model.training
    model.eval()
    losses, loads = [], []
    for rows in languages:
        outputs = model(**collate(rows))
        losses.append(float(outputs.loss - COEFFICIENT * outputs.aux_loss))
        chosen = [logits.topk(2).indices.reshape(-1) for logits in outputs.router_logits]
        counts = torch.stack([torch.bincount(c, minlength=EXPERTS) for c in chosen])
        loads.append(counts / counts.sum(-1, keepdim=True))
    model.train(was_training)
    every = torch.stack(loads)  # [languages, layers, experts]
    apart = (every - every.mean(0)).abs().sum(-1).mean() / 2
    return Look(sum(losses) / len(losses), every.mean(0), float(apart))


class Looking(TrainerCallback):
    """Looks at held-out rows before training and every so many updates."""

    def __init__(self, languages: list[list[Row]], every: int) -> None:
        self.languages, self.every = languages, every
        self.seen: dict[int, Look] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen[0] = look(kwargs["model"], self.languages)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.seen[state.global_step] = look(kwargs["model"], self.languages)


def train(passes: int, updates: int) -> dict[int, Look]:
    """Train one run; return what held-out rows showed, by update."""
    held_out = make_rows(LANGUAGES * 16, seed=1)
    looking = Looking([held_out[i::LANGUAGES] for i in range(LANGUAGES)], max(updates // 40, 1))
    with tempfile.TemporaryDirectory() as folder:
        trainer = GradAccTrainer(
            make_model(),
            GradAccArguments(
                output_dir=folder,
                update_passes=passes,
                effective_batch_size=UPDATE,
                per_device_train_batch_size=MICRO_BATCH,
                max_steps=updates,
                learning_rate=4e-3,
                warmup_steps=10,
                lr_scheduler_type="cosine",
                log_level="error",
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=make_rows(UPDATE * updates, seed=2),
            data_collator=collate,
            callbacks=[looking],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return looking.seen


def draw(runs: dict[int, dict[int, Look]], path: Path) -> None:
    """Draw held-out loss on the left, loads and how far languages are apart on the right."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9.6, 3.3), dpi=130)
        for passes, color in ((1, "#e4572e"), (2, "#0b3c49")):
            steps, looks = list(runs[passes]), list(runs[passes].values())
            left.plot(steps, [one.loss for one in looks], color=color, label=NAMES[passes])
            middle.plot(steps, [float(one.loads.max()) for one in looks], color=color)
            middle.plot(steps, [float(one.loads.min()) for one in looks], color=color, ls=":")
            right.plot(steps, [one.apart for one in looks], color=color)
        middle.axhline(1 / EXPERTS, color="#999999", lw=0.8)
        left.set_title("held-out loss", loc="left")
        left.legend(title="experts balanced", frameon=False)
        middle.set_title("load of the busiest, idlest (dotted) expert", loc="left", fontsize=9)
        right.set_title("experts a language has for itself", loc="left", fontsize=9)
        for axes in (middle, right):
            axes.set_ylim(0, None)
        for axes in (left, middle, right):
            axes.set_xlabel("update")
            axes.grid(axis="y", color="#dddddd", lw=0.6)
        figure.tight_layout()
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    updates = 3 if options.quick else options.updates
    runs = {passes: train(passes, updates) for passes in NAMES}
    body = [
        [
            NAMES[passes],
            f"{last.loss:.4f}",
            f"{float(last.loads.max()):.3f}",
            f"{float(last.loads.min()):.3f}",
            f"{last.apart:.3f}",
        ]
        for passes, last in ((passes, list(seen.values())[-1]) for passes, seen in runs.items())
    ]
    header = ["experts balanced", "held-out loss", "busiest", "idlest", "languages apart"]
    results = table(header, body)
    print(results)
    if not options.quick:
        draw(runs, PICTURE)
        tokens = UPDATE * updates * (LENGTH + (LANGUAGES - 1) / 2)
        head = f"Small Mixtral in float32, {updates} updates, {tokens:,.0f} tokens, {machine()}."
        write_result("router-balance", head, [results])


if __name__ == "__main__":
    main()
