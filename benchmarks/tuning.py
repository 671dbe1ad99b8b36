"""Does ``max_tokens_per_micro_batch="auto"`` settle near the best fixed budget, and how soon?

    python benchmarks/tuning.py --rows gsm8k --shape llama-9m

First a run tunes itself. Then all fixed budgets, the chosen one among them, train the same updates
in random order, several rounds; the figure is the chosen one's median over the best median.
"""

from __future__ import annotations

import argparse
import random
import statistics
from typing import Any

import torch
import transformers
from report import machine, table, write_result
from speed import BATCH, common, ours, quietly, run_once
from workloads import make_collator, make_model, make_rows, make_tokenizer

from hf_gradacc import GradAccArguments, GradAccTrainer

MOST_UPDATES = 24


def tune(model: Any, kind: str) -> tuple[int, int, str]:
    """Let a run tune itself: the budget, after how many updates, and what it says it tried."""
    rows = make_rows(kind, BATCH * MOST_UPDATES, vocab_size=model.config.vocab_size, seed=99)
    args = GradAccArguments(**common(effective_batch_size=BATCH, max_tokens_per_micro_batch="auto"))
    with quietly():
        trainer = GradAccTrainer(
            model, args, train_dataset=rows, data_collator=make_collator(make_tokenizer())
        )
        trainer.train()
    model.zero_grad(set_to_none=True)
    tuner: Any = trainer.token_budget.tuner
    return tuner.tokens, tuner.num_updates, tuner.describe()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=["gsm8k", "heavy-tail"])
    parser.add_argument("--shape", default="llama-9m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budgets", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    sections = []
    for kind in options.rows:
        model = make_model(options.shape).to("cuda" if torch.cuda.is_available() else "cpu")
        chosen, updates, words = tune(model, kind)
        budgets = sorted({*options.budgets, chosen})
        seconds: dict[int, list[float]] = {budget: [] for budget in budgets}
        for number in range(options.rounds):
            rows = make_rows(kind, BATCH, vocab_size=model.config.vocab_size, seed=number)
            for budget in random.Random(number).sample(budgets, len(budgets)):
                seconds[budget].append(run_once(ours(budget), model, rows)[0].seconds)
        medians = {budget: statistics.median(times) for budget, times in seconds.items()}
        best = min(medians.values())
        lines = [
            [
                f"**{budget:,}**" if budget == chosen else f"{budget:,}",
                f"{median:.2f}",
                f"{median / best:.3f}",
            ]
            for budget, median in medians.items()
        ]
        text = table(["budget", "s/update", "x the best"], lines)
        sections.append(f"### {kind}\n\nSettled after {updates} updates: {words}.\n\n{text}")
        print(sections[-1], flush=True)
    if options.out:
        head = (
            f"{options.shape}, effective batch {BATCH}, {options.rounds} rounds, "
            f"{options.threads} thread(s), {machine()}. Medians; bold: what it settled on."
        )
        write_result(options.out, head, sections)


if __name__ == "__main__":
    main()
