"""A few thousand updates with failures of every kind thrown in, against a run nobody disturbed.

    python benchmarks/soak.py --updates 3000 --write

A tiny Llama in float64 trains under a token budget, saving every 50 updates, with a loader worker.
The disturbed run meets, at random moments: allocators that give up (in forward, in backward, in
evaluation; in the words of several backends), rows whose loss or gradient is NaN (the undisturbed
run has those too: they are in the data), files that cannot grow, a tracker that raises. In its
first half it is also ended again and again: SIGTERM and SIGINT in an update, in an evaluation, in a
save, SIGUSR1, SIGHUP, SIGKILL, a loader worker that is killed, a dataset that cannot be read. Its
own files are damaged then, and it is started anew with ``resume_from_checkpoint="auto"``. Its
second half is one process, whose memory is watched.

No dropout: another cut would draw other masks. Then a run's end is a matter of rounding alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from report import machine, table, write_result
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.failing import Failure
from support.reference import float64_everywhere
from support.tiny import make_trainer, ragged_rows, tiny_llama

from hf_gradacc import DataError, GradAccTrainer
from hf_gradacc.tracking.run_files import read_log

BAD_LOSS, BAD_GRADIENT = 1, 2  # tokens that no row holds by itself
WORDS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB.",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory",
)
ENDS = (
    "SIGTERM in an update",
    "SIGKILL",
    "a loader worker killed",
    "SIGINT in a save",
    "a row that cannot be read",
    "SIGTERM in an evaluation",
    "SIGUSR1 in an update",
    "SIGHUP in an evaluation",
)
CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGKILL": -9, "SIGHUP": 129, "SIGUSR1": 138}


def make_rows() -> list[dict[str, list[int]]]:
    rows = ragged_rows(4 * 97, seed=9, longest=6)
    chosen = random.Random(2).sample(range(len(rows)), 6)
    for index, token in zip(chosen, [BAD_LOSS, BAD_GRADIENT] * 3, strict=True):
        rows[index]["input_ids"][0] = token
    return rows


class Rows(list):  # type: ignore[type-arg]
    """Rows on a disk that may be gone."""

    gone = Path("never")

    def __getitem__(self, index: Any) -> Any:
        if self.gone.exists():
            raise OSError(5, "Input/output error")
        return super().__getitem__(index)


class Numbers(GradAccTrainer):
    """Gives a loss, or a gradient, that is NaN for rows with certain tokens."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training and bool((inputs["input_ids"] == BAD_LOSS).any()):
            return loss * math.nan
        if model.training and bool((inputs["input_ids"] == BAD_GRADIENT).any()):
            return loss + (model.model.norm.weight.sum() * 0.0).sqrt()  # 0, whose slope is 0 / 0
        return loss


class Allocator(Failure):
    """Gives up now and then, in other words and at another place each time.

    A row alone in its micro-batch is no exception: it then fits at the second try. In evaluation
    only whole batches do not fit, or the rows the model is asked with would not either.
    """

    def __init__(self, model: Any, *, draw: random.Random, often: tuple[int, int], **kwargs: Any):
        super().__init__(model, self._when, **kwargs)
        self.draw, self.often = draw, often
        self.following = draw.randint(*often)

    def _when(self, rows: int, width: int, seen: int) -> bool:
        if self.seen < self.following or (self.evaluation and rows < 8):
            return False
        self.seen, self.following = 0, self.draw.randint(*self.often)
        if not self.evaluation:
            self.where = self.draw.choice(["forward", "backward"])
        words = self.draw.choice(WORDS)
        kind = torch.OutOfMemoryError if words is WORDS[0] else RuntimeError
        self.error = kind(words)
        return True


class Trouble(TrainerCallback):
    """Full disks and a broken tracker on the way, one of `ENDS` after some updates."""

    def __init__(self, draw: random.Random, counts: Counter[str], end: str | None, gone: Path):
        self.draw, self.counts, self.end, self.gone = draw, counts, end, gone
        self.updates, self.ends_after = 0, draw.randint(60, 140)
        self.pages: list[int] = []

    @property
    def _is_due(self) -> bool:
        return self.end is not None and self.updates >= self.ends_after

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.updates += 1
        full = state.global_step % 50 == 49 and self.draw.random() < 0.3
        # A disk still full at the very end would keep the last rows from the log for good.
        full = full and state.global_step + 1 < state.max_steps
        self.counts["files that cannot grow"] += full
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000 if full else -1, -1))
        if state.global_step % 50 == 0:
            self.pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
        if not self._is_due:
            return
        if self.end == "SIGTERM in an update":
            self._die(signal.SIGTERM)
        elif self.end == "SIGUSR1 in an update":
            self._die(signal.SIGUSR1)
        elif self.end == "SIGKILL":
            self._die(signal.SIGKILL)
        elif self.end == "a loader worker killed":
            for worker in multiprocessing.active_children():
                os.kill(worker.pid or 0, signal.SIGKILL)
        elif self.end == "a row that cannot be read":
            self.gone.touch()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_due and self.end == "SIGINT in a save":
            self._die(signal.SIGINT)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_due and self.end == "SIGTERM in an evaluation":
            self._die(signal.SIGTERM)
        elif self._is_due and self.end == "SIGHUP in an evaluation":
            self._die(signal.SIGHUP)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        import wandb

        if state.global_step == 400 and wandb.run is not None:
            self.counts["a tracker that raises"] += 1

            def refuse(*args: Any, **kwargs: Any) -> None:
                raise wandb.errors.CommError("the server said no")

            wandb.log = refuse

    def _die(self, number: int) -> None:
        self.end = None
        os.kill(os.getpid(), number)


def live(out: Path, *, updates: int, life: int, end: str | None, rough: bool) -> None:
    """One process of a run: from its last checkpoint to its end, or to what ends it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    draw, counts = random.Random(1000 + life), Counter[str]()
    model = tiny_llama(num_hidden_layers=1)
    rows = Rows(make_rows())
    rows.gone = out / "gone"
    rows.gone.unlink(missing_ok=True)
    trouble = Trouble(draw, counts, end, rows.gone)
    allocators = []
    if rough:
        allocators = [
            Allocator(model, draw=draw, often=(15, 60)),
            Allocator(model, draw=draw, often=(2, 5), evaluation=True),
        ]
    trainer = make_trainer(
        out,
        rows,
        model=model,
        trainer_class=Numbers,
        callbacks=[trouble] if rough else [],
        eval_dataset=ragged_rows(24, seed=3, longest=6),
        effective_batch_size=4,
        max_tokens_per_micro_batch=24,
        max_steps=updates,
        optim="adamw_torch",
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        on_non_finite="skip",
        save_strategy="steps",
        save_steps=50,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=100,
        logging_steps=10,
        dataloader_num_workers=1,
        report_to="wandb" if rough else "none",
    )
    try:
        with float64_everywhere():
            trainer.train(resume_from_checkpoint="auto")
    except DataError as error:
        if end is None:
            raise
        print(f"DataError: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        for name, allocator in zip(("training", "evaluation"), allocators, strict=False):
            counts[f"out of memory in {name}"] += allocator.raised
        with (out / "counts.jsonl").open("a") as file:
            file.write(json.dumps(counts) + "\n")
    result = {
        "weights": {name: p.detach() for name, p in model.named_parameters()},
        "log": [row for row in read_log(out / "gradacc_log.jsonl") if row["kind"] != "event"],
        "pages": trouble.pages,
        "step": trainer.state.global_step,
    }
    (out / "result.pickle").write_bytes(pickle.dumps(result))


def run_child(out: Path, updates: int, *, life: int, end: str | None, rough: bool) -> int:
    command = [sys.executable, __file__, "--child", str(out), "--updates", str(updates)]
    command += ["--life", str(life)] + (["--end", end] if end else [])
    command += ["--rough"] if rough else []
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(out)}
    environment |= {"WANDB_SILENT": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (out / "output.txt").open("ab") as output:
        return subprocess.run(command, env=environment, stdout=output, stderr=output).returncode


def compare(calm: dict[str, Any], rough: dict[str, Any]) -> tuple[float, float]:
    """Give the largest relative difference of weights, and of what rows of the log must share."""
    weights = max(
        float((rough["weights"][name] - w).abs().max() / w.abs().max())
        for name, w in calm["weights"].items()
    )
    shared = ("loss", "eval_loss", "grad_norm", "tokens_per_update", "target_tokens_seen")
    exact = ("step", "kind", "skipped_updates", "effective_batch_size", "learning_rate")
    rows = 0.0
    told = [Counter((row["kind"], row["step"]) for row in run["log"]) for run in (calm, rough)]
    assert told[0] == told[1], f"missing {told[0] - told[1]}, too many {told[1] - told[0]}"
    for left, right in zip(calm["log"], rough["log"], strict=True):
        assert all(left.get(key) == right.get(key) for key in exact), (left, right)
        for key in shared:
            if key in left and math.isfinite(left[key]):
                rows = max(rows, abs(left[key] - right[key]) / abs(left[key]))
    return weights, rows


def soak(folder: Path, updates: int) -> tuple[list[list[str]], bool]:
    """Run both, and give a table of what was thrown in and what came out."""
    calm, rough = folder / "calm", folder / "rough"
    for out in (calm, rough):
        out.mkdir(parents=True)
    assert run_child(calm, updates, life=0, end=None, rough=False) == 0, _tail(calm)
    codes: Counter[str] = Counter()
    life = 0
    while True:
        done = max((int(p.name[11:]) for p in rough.glob("checkpoint-*")), default=0)
        end = ENDS[life % len(ENDS)] if done < updates // 2 else None
        code = run_child(rough, updates, life=life, end=end, rough=True)
        life += 1
        if end is None:
            assert code == 0, _tail(rough)
            break
        expected = CODES.get(end.split()[0], 2)
        assert code == expected, f"{end}: exit code {code}\n{_tail(rough)}"
        codes[f"{end} (exit code {137 if code == -9 else code})"] += 1
        codes[_damage(rough, life)] += 1
    results = [pickle.loads((out / "result.pickle").read_bytes()) for out in (calm, rough)]
    weights, rows = compare(*results)
    counts: Counter[str] = Counter()
    for line in (rough / "counts.jsonl").read_text().splitlines():
        counts.update(json.loads(line))
    skipped = max(row.get("skipped_updates", 0) for row in results[1]["log"])
    pages = results[1]["pages"]
    settled = pages[len(pages) // 4 :]
    grown = (max(settled) - settled[0]) * resource.getpagesize() / 2**20
    lines = [
        ["updates", f"{results[1]['step']:,}"],
        *([name, f"{count}"] for name, count in sorted(counts.items()) if count),
        ["updates skipped as not finite, in both runs", f"{skipped:.0f}"],
        *([name, f"{count}"] for name, count in sorted(codes.items())),
        ["processes it took", f"{life}"],
        ["largest relative difference of a weight", f"{weights:.1e}"],
        ["largest relative difference of a loss, norm or evaluation", f"{rows:.1e}"],
        ["rows of the log, each once, in both", f"{len(results[1]['log'])}"],
        ["memory grown over the last process, after its first quarter", f"{grown:.1f} MiB"],
        ["updates of that process", f"{50 * len(pages):,}"],
    ]
    return lines, weights < 1e-7 and rows < 1e-7 and grown < 16


def _damage(out: Path, life: int) -> str:
    """Damage a file of ours between two processes, as a power cut may; say which."""
    log = out / "gradacc_log.jsonl"
    if life % 3 == 0:
        log.write_bytes(log.read_bytes()[:-200])
        return "the log's last rows lost"
    if life % 3 == 1:
        log.write_bytes(b"")
        return "the log empty"
    (out / "gradacc_run.json").write_bytes(b"\xff\xfe{")
    return "gradacc_run.json no text"


def _tail(out: Path) -> str:
    return (out / "output.txt").read_text(errors="replace")[-3000:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--updates", type=int, default=3000)
    parser.add_argument("--write", action="store_true", help="keep the result under results/")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--life", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--end", help=argparse.SUPPRESS)
    parser.add_argument("--rough", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        live(
            options.child,
            updates=options.updates,
            life=options.life,
            end=options.end,
            rough=options.rough,
        )
        return
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        lines, passed = soak(folder, options.updates)
    result = table(["what", "how many or how much"], lines)
    print(result)
    if options.write:
        write_result("soak", machine(), [result])
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
