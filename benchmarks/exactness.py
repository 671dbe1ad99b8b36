"""How far the accumulated gradient is from the gradient of the whole batch: theirs and ours.

    python benchmarks/exactness.py              ten well-known models, as in the README
    python benchmarks/exactness.py --all        every text architecture of Transformers
    python benchmarks/exactness.py --only bert  every head of one architecture
    python benchmarks/exactness.py --router     every architecture that has a router loss
    python benchmarks/exactness.py --all --rows 1   the same with rows of other lengths (0, 1, 2)

Tiny random models in float64 without dropout, built from their configurations (no hub). One update
of eleven rows of very unequal length, cut into four micro-batches of 3, 3, 3 and 2 by both
trainers, against one forward and backward over the eleven rows padded together.

    error   |g - g_whole| / |g_whole| over all parameters
    scale   the multiple of g_whole that lies in g; 1 is right, 4 is the number of micro-batches
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import datetime
import functools
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import router_share  # noqa: E402
from support import reference, zoo, zoo_runs  # noqa: E402
from support.zoo_rows import MORE_LENGTHS  # noqa: E402
from sweeps import group_of, number, quiet, say, sweep  # noqa: E402

EXACT = 1e-10

WELL_KNOWN = (
    ("Llama", zoo.Case("llama", "causal")),
    ("GPT-2", zoo.Case("gpt2", "causal")),
    ("Mixtral, router loss on", zoo.Case("mixtral", "causal", router_loss=True)),
    ("Qwen3-MoE, router loss on", zoo.Case("qwen3_moe", "causal", router_loss=True)),
    ("T5", zoo.Case("t5", "seq2seq")),
    ("BART", zoo.Case("bart", "seq2seq")),
    ("BERT, masked LM", zoo.Case("bert", "mlm")),
    ("RoBERTa, sequence classification", zoo.Case("roberta", "single")),
    ("ModernBERT, token classification", zoo.Case("modernbert", "tok")),
    ("DeBERTa-v2, question answering", zoo.Case("deberta-v2", "qa")),
)


@dataclasses.dataclass
class Result:
    """One case's figures; an error is None where that trainer did not finish.

    Attributes:
        verdict: ``exact``, ``warned``, ``refused``, ``WRONG``, or ``not run`` if the model itself
            fails.
    """

    case: zoo.Case
    verdict: str
    ours: float | None = None
    stock: float | None = None
    stock_scale: float | None = None
    note: str = ""


def measure(case: zoo.Case, seed: int = 0) -> Result:
    """Run one case through both trainers and the reference."""
    try:
        with reference.float64_everywhere():
            model, rows = case.build(), case.rows(seed=seed)
            collator = case.collator(model)
            expected = reference.reference_gradient(model, rows, collator)
        finite = bool(expected) and all(g.isfinite().all() for g in expected.values())
    except Exception as error:
        return Result(case, "not run", note=say(error))
    if not finite:
        return Result(case, "not run", note="the whole batch's gradient is not finite")
    result = Result(case, "WRONG")
    result.stock, result.stock_scale, result.note = _measure_stock(case, rows, expected)
    try:
        with reference.float64_everywhere():
            run = zoo_runs.train_ours(case.build(), rows, collator)
            result.ours = reference.relative_error(run.gradient, expected)
    except Exception as error:
        result.verdict, result.note = "refused", say(error)
        return result
    if result.ours <= EXACT:
        result.verdict = "exact"
    elif run.warnings:
        result.verdict, result.note = "warned", " ".join(run.warnings)
    return result


def _measure_stock(
    case: zoo.Case, rows: list[Any], expected: reference.Gradient
) -> tuple[float | None, float | None, str]:
    try:
        with reference.float64_everywhere():
            model = case.build()
            run = zoo_runs.train_stock(model, rows, case.collator(model))
    except Exception as error:
        return None, None, "stock: " + say(error)
    error = reference.relative_error(run.gradient, expected)
    return error, reference.scale(run.gradient, expected), ""


def ten_models() -> str:
    """The table of the README."""
    lines = [
        "| model | stock `Trainer`: error | scale | `GradAccTrainer`: error |",
        "|---|---|---|---|",
    ]
    for name, case in WELL_KNOWN:
        result = measure(case)
        lines.append(
            f"| {name} | {number(result.stock)} | {number(result.stock_scale, '.2f')} | "
            f"{number(result.ours)} |"
        )
    return "\n".join(lines)


def sweep_all(cases: list[zoo.Case], log: Path | None, seed: int = 0) -> str:
    """Run every case; counts by head, then each case that is not simply exact.

    Args:
        cases: What to run.
        log: See `sweeps.sweep`.
        seed: Of the rows; it decides their lengths, too.
    """

    def line(result: Result) -> str:
        told = f"{result.case}: {result.verdict} {number(result.ours)} {result.note}"[:400]
        return "" if result.verdict == "exact" else told

    measure_case = functools.partial(measure, seed=seed)
    return report(sweep(cases, log, measure=measure_case, result=Result, line=line))


def report(results: list[Result]) -> str:
    """Markdown of a sweep."""
    groups: dict[str, list[Result]] = collections.defaultdict(list)
    for result in results:
        groups[group_of(result.case)].append(result)
    lines = [
        "| head | ran | stock exact | ours exact | warned or refused | neither |",
        "|---|---|---|---|---|---|",
    ]
    for name, group in [*groups.items(), ("all", results)]:
        ran = [r for r in group if r.verdict != "not run"]
        count = collections.Counter(r.verdict for r in ran)
        stock = sum(r.stock is not None and r.stock <= EXACT for r in ran)
        lines.append(
            f"| {name} | {len(ran)} | {stock} | {count['exact']} | "
            f"{count['warned'] + count['refused']} | {count['WRONG']} |"
        )
    for verdict, title in (
        ("WRONG", "Neither exact nor warned"),
        ("warned", "Warned"),
        ("refused", "Refused"),
        ("not run", "Not run: the tiny model itself fails"),
    ):
        some = [r for r in results if r.verdict == verdict]
        if some:
            lines += ["", f"{title} ({len(some)}):", ""]
            lines += [f"- {r.case}: {number(r.ours)} {r.note}".rstrip()[:300] for r in some]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every text architecture")
    parser.add_argument("--only", help="every head of one architecture")
    parser.add_argument("--router", action="store_true", help="with a router loss alone")
    parser.add_argument("--rows", type=int, default=0, help="which rows: 0, 1 or 2")
    parser.add_argument("--log", type=Path, help="go on where this file of results ends")
    parser.add_argument("--no-file", action="store_true", help="print, write no result file")
    chosen = parser.parse_args()
    quiet()
    if chosen.all or chosen.only or chosen.router:
        name = "exactness-all" + (f"-rows-{chosen.rows}" if chosen.rows else "")
        body = sweep_all(
            [
                case
                for case in zoo.all_cases()
                if chosen.only in (None, case.model_type)
                and (case.router_loss or not chosen.router)
            ],
            chosen.log,
            chosen.rows,
        )
    else:
        name = "exactness"
        with contextlib.redirect_stdout(sys.stderr):
            body = f"{ten_models()}\n\n{router_share.NOTE}\n\n{router_share.study()}"
    num_rows = len(MORE_LENGTHS[chosen.rows])
    text = (
        f"transformers {transformers.__version__}, torch {torch.__version__}, float64, one update "
        f"of {num_rows} ragged rows in {-(-num_rows // zoo_runs.ROWS_PER_MICRO_BATCH)} "
        f"micro-batches.\n\n{body}\n"
    )
    print(text)
    if not (chosen.no_file or chosen.only or chosen.router):
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        path = ROOT / "benchmarks" / "results" / f"{name.replace('-', '_')}_cpu_{today}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# Exactness, CPU, {today}\n\n{text}")


if __name__ == "__main__":
    main()
