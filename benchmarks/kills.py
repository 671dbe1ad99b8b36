"""Kill a training run at random moments and see whether it ends with the same bits.

    python benchmarks/kills.py --kills 20
    python benchmarks/kills.py --kills 50 --evaluate --workers 1
    python benchmarks/kills.py --kills 20 --trees

Trains a tiny Llama with dropout and AdamW, saving every other update, sends SIGKILL again and
again, resumes with ``resume_from_checkpoint="auto"``, and compares weights and log rows with a run
nobody killed. Prints when each kill struck. `--evaluate` evaluates as often as it saves;
`--workers` loads rows in processes that persist, for training and evaluation. `--trees` trains rows
that begin alike, drawn together, as trees behind beginnings that are kept.
"""

from __future__ import annotations

import argparse
import pickle
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.kept_rows import KEEPING, NUM_ROWS, rows_behind
from support.ranks import run_and_kill
from support.resume_jobs import train_and_report, train_until_killed
from support.tiny import ragged_rows

from hf_gradacc.safety.checkpoints import STAGING_NAME, find_whole_checkpoint, list_checkpoints
from hf_gradacc.updates import collator


def keep_short_beginnings(trainer: Any) -> None:
    """Let beginnings of a few tokens be kept, in this process from now on."""
    collator.OVERHEAD_ON_CPU = 0
    trainer.model.set_attn_implementation("sdpa")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=25, help="6 updates each, 50 ms long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--trees", action="store_true")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        job: dict[str, Any] = {"num_train_epochs": options.epochs, "save_total_limit": 2}
        if options.evaluate:
            job |= {
                "eval_strategy": "steps",
                "eval_steps": 2,
                "eval_dataset": ragged_rows(7, seed=9),
            }
        if options.workers:
            job |= {"dataloader_num_workers": options.workers}
            job |= {"dataloader_persistent_workers": True}
        if options.trees:
            rows = [row for seed in range(6) for row in rows_behind(seed=seed)]
            job |= KEEPING | {"rows": rows, "effective_batch_size": NUM_ROWS}
            job |= {"group_by_prefix": True, "prepare": keep_short_beginnings}
        straight = train_and_report(f"{folder}/straight", dropout=0.2, **job)
        out, result = Path(folder, "killed"), Path(folder, "result")
        kills = while_saving = 0
        while not result.exists():
            code = run_and_kill(
                train_until_killed,
                begun=Path(folder, "begun"),
                # By progress, since a busy machine may take seconds to start its loader workers.
                begins_after=draw.randrange(7),
                delay=draw.uniform(0.0, 0.3) if kills < options.kills else None,
                out=str(out),
                result=str(result),
                started=f"{folder}/begun",
                pause=0.05,  # or a fast machine is done before all kills have come
                **job,
            )
            if code == -9:
                kills += 1
                saving = any((out / STAGING_NAME).glob("checkpoint-*"))
                while_saving += saving
                newest, damaged = find_whole_checkpoint(out)
                moment = "while saving" if saving else "between saves"
                place = newest.name if newest else "the beginning"
                print(f"kill {kills:2}: {moment}; goes on from {place}, {len(damaged)} damaged")
        resumed = pickle.loads(result.read_bytes())
        same = all(torch.equal(w, resumed["weights"][n]) for n, w in straight["weights"].items())
        print(f"{kills} kills, {while_saving} of them while saving, {straight['step']} updates")
        same_logs = resumed["logs"] == straight["logs"]
        print(f"weights bit-identical: {same}; log rows identical: {same_logs}")
        print(f"checkpoints left: {[path.name for path in list_checkpoints(out)]}")
    sys.exit(0 if same and same_logs else 1)


if __name__ == "__main__":
    main()
