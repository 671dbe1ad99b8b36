"""Which text architectures compute rows that begin alike as trees, and how exactly.

    python benchmarks/tree_exactness.py --all        every text architecture of Transformers
    python benchmarks/tree_exactness.py --only bert  every head of one architecture

Tiny random models in float64, as in `exactness.py`. One update of thirteen rows that begin alike,
with prefixes within prefixes, against one forward and backward over the rows padded together.

    the trainer       with layout = "shared_prefix", rows longer than the model's windows of 5
    after short rows  the trial sees rows shorter than the model's windows of 20; if it lets them
                      pass, rows of up to 64 tokens must be exact, and trees wider than the model
                      has positions
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import datetime
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from exactness import EXACT  # noqa: E402
from support import alike, reference, zoo, zoo_configs, zoo_runs  # noqa: E402
from support.windows import windows_of  # noqa: E402
from sweeps import group_of, number, quiet, say, sweep  # noqa: E402

from hf_gradacc.errors import ConfigError  # noqa: E402
from hf_gradacc.loss.shortcuts.sharing import choose_sharing  # noqa: E402
from hf_gradacc.loss.trees.hooks import computing_trees  # noqa: E402
from hf_gradacc.loss.trees.layout import lay_out_trees  # noqa: E402
from hf_gradacc.updates.trees.cost import TreeCost  # noqa: E402
from hf_gradacc.updates.trees.plan import trees_of  # noqa: E402

ROWS_PER_MICRO_BATCH = 5
WINDOW, WIDE_WINDOW = 5, 20


@dataclasses.dataclass
class Result:
    """One case's figures.

    Attributes:
        verdict: ``exact``, ``refused``, ``WRONG``, ``no trees`` if it passed and computed none, or
            ``not run`` if the model itself fails.
        error: Of the trainer's gradient.
        after_short_rows: Of a gradient that only a trial on short rows stands behind; None if that
            trial refused.
        note: Why it was refused.
    """

    case: zoo.Case
    verdict: str
    error: float | None = None
    after_short_rows: float | None = None
    note: str = ""


def measure(case: zoo.Case) -> Result:
    """Run one case in both ways."""
    try:
        with _windows(case, WINDOW), reference.float64_everywhere():
            model = case.build()
            rows = case.with_sentence_ends(alike.rows_alike(case.head, unit=4))
            collator = case.collator(model)
            expected = reference.reference_gradient(model, rows, collator)
        finite = bool(expected) and all(g.isfinite().all() for g in expected.values())
    except Exception as error:
        return Result(case, "not run", note=say(error))
    if not finite:
        return Result(case, "not run", note="the whole batch's gradient is not finite")
    result = Result(case, "WRONG")
    try:
        with (
            _windows(case, WINDOW),
            reference.float64_everywhere(),
            alike.counting_trees() as computed,
        ):
            run = zoo_runs.train_ours(
                case.build(),
                rows,
                collator,
                layout="shared_prefix",
                per_device_train_batch_size=ROWS_PER_MICRO_BATCH,
            )
            result.error = reference.relative_error(run.gradient, expected)
        result.verdict = "exact" if result.error <= EXACT else "WRONG"
        if result.verdict == "exact" and not computed:
            result.verdict = "no trees"
    except ConfigError as error:
        result.verdict, result.note = "refused", _reason(error)
    except Exception as error:
        result.verdict, result.note = "WRONG", "fails in training: " + say(error)
    with _windows(case, WIDE_WINDOW), reference.float64_everywhere():
        result.after_short_rows, note = after_a_short_trial(case)
    if result.verdict != "WRONG" and not (result.after_short_rows or 0.0) <= EXACT:
        result.verdict, result.note = "WRONG", "after a trial on short rows " + note
    return result


def after_a_short_trial(case: zoo.Case) -> tuple[float | None, str]:
    """Return the error of long rows whose trial saw short ones; None if it refuses."""
    model = case.build()
    model.config.use_cache = False
    collator = case.collator(model)
    short = [row for row in alike.rows_alike(case.head, unit=3) if _length(row) in range(3, 10)][:3]
    inputs = dict(collator(short))

    def loss_of(part: Any) -> float:
        with torch.no_grad():
            return float(reference.model_loss(model, dict(part)))

    found = choose_sharing([model], inputs, loss_of, dtype=torch.float64)
    if found.refused:
        return None, found.refused
    long = alike.rows_alike(case.head, unit=8, seed=1)
    long = [row for row in long if _length(row) <= zoo_configs.MAX_LENGTH]
    grown = trees_of([row["input_ids"] for row in long], TreeCost())
    if grown is None:
        return float("inf"), "long rows grow no trees"
    batch = dict(collator(long))
    expected = reference.weighted_gradient(model, [batch], [1.0])

    def lay_out(ids: torch.Tensor, mask: torch.Tensor | None) -> Any:
        return (
            lay_out_trees(ids, mask, grown.rows) if ids.shape == batch["input_ids"].shape else None
        )

    try:
        with computing_trees(found.bodies, lay_out):
            actual = reference.weighted_gradient(model, [batch], [1.0])
    except Exception as error:
        return float("inf"), say(error)
    return reference.relative_error(actual, expected), "long rows differ"


def _length(row: Any) -> int:
    ids = row["input_ids"]
    return len(ids[0]) if isinstance(ids[0], list) else len(ids)


@contextlib.contextmanager
def _windows(case: zoo.Case, width: int) -> Iterator[None]:
    """Build the case's model with windows and chunks of this many tokens."""
    name = zoo_configs.TEXT_PART.get(case.model_type, case.model_type)
    before = zoo_configs.OVERRIDES.get(name)
    zoo_configs.OVERRIDES[name] = {**(before or {}), **windows_of(name, width)}
    try:
        yield
    finally:
        if before is None:
            del zoo_configs.OVERRIDES[name]
        else:
            zoo_configs.OVERRIDES[name] = before


def _reason(error: ConfigError) -> str:
    first = str(error).splitlines()[0].removesuffix(".")
    return first.partition("same gradient: ")[2] or first


def sweep_all(cases: list[zoo.Case], log: Path | None) -> str:
    """Run every case that the log does not hold already; report all."""

    def line(result: Result) -> str:
        error, after = number(result.error), number(result.after_short_rows)
        told = f"{result.case}: {result.verdict} {error} {after} {result.note}"[:300]
        return "" if result.verdict in ("exact", "refused") else told

    return report(sweep(cases, log, measure=measure, result=Result, line=line))


def report(results: list[Result]) -> str:
    """Markdown of a sweep."""
    groups: dict[str, list[Result]] = collections.defaultdict(list)
    for result in results:
        groups[group_of(result.case)].append(result)
    lines = ["| head | ran | exact as trees | refused | wrong |", "|---|---|---|---|---|"]
    for name, group in [*groups.items(), ("all", results)]:
        count = collections.Counter(r.verdict for r in group if r.verdict != "not run")
        wrong = count["WRONG"] + count["no trees"]
        ran = sum(count.values())
        lines.append(f"| {name} | {ran} | {count['exact']} | {count['refused']} | {wrong} |")
    errors = [r.error for r in results if r.verdict == "exact" and r.error is not None]
    after = [r.after_short_rows for r in results if r.after_short_rows is not None]
    lines += [
        "",
        f"Largest error of those that are exact: {number(max(errors, default=None))}; of "
        f"{len(after)} whose trial saw short rows only: {number(max(after, default=None))}.",
        "",
        "Refused:",
        "",
        "| why | cases | architectures |",
        "|---|---|---|",
    ]
    why: dict[str, list[Result]] = collections.defaultdict(list)
    for result in results:
        if result.verdict == "refused":
            why[_without_figures(result.note)].append(result)
    for reason, some in sorted(why.items(), key=lambda item: -len(item[1])):
        names = sorted({r.case.model_type for r in some})
        shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
        lines.append(f"| {reason} | {len(some)} | {shown} |")
    for verdict in ("WRONG", "no trees", "not run"):
        some = [r for r in results if r.verdict == verdict]
        if some:
            lines += ["", f"{verdict} ({len(some)}):", ""]
            lines += [f"- {r.case}: {number(r.error)} {r.note}".rstrip()[:300] for r in some]
    return "\n".join(lines)


def _without_figures(note: str) -> str:
    """Return the part of a reason that is the same for many models."""
    if note.startswith("its loss as a tree is"):
        return "its loss as a tree is another than that of rows: " + note.partition(": ")[2]
    if note.startswith("it fails with"):
        return note.partition(":")[0] + " on the mask of a tree, or on one row for many"
    return note


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every text architecture")
    parser.add_argument("--only", nargs="*", help="every head of some architectures")
    parser.add_argument("--head", help="one head")
    parser.add_argument("--log", type=Path, help="go on where this file of results ends")
    parser.add_argument("--no-file", action="store_true", help="print, write no result file")
    chosen = parser.parse_args()
    if not (chosen.all or chosen.only):
        parser.error("--all or --only")
    quiet()
    cases = [
        case
        for case in zoo.all_cases()
        if (not chosen.only or case.model_type in chosen.only) and chosen.head in (None, case.head)
    ]
    text = (
        f"transformers {transformers.__version__}, torch {torch.__version__}, float64, one update "
        f"of {alike.NUM_ROWS} rows that begin alike, at most {ROWS_PER_MICRO_BATCH} a micro-batch, "
        f"layout = 'shared_prefix', windows and chunks of {WINDOW} tokens, rows of up to 32.\n\n"
        f"A second trial sees rows shorter than windows of {WIDE_WINDOW}; what it lets pass "
        f"computes rows of up to {zoo_configs.MAX_LENGTH} tokens.\n\n"
        f"{sweep_all(cases, chosen.log)}\n"
    )
    print(text)
    if not (chosen.no_file or chosen.only or chosen.head):
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        path = ROOT / "benchmarks" / "results" / f"exactness_trees_cpu_{today}.md"
        command = "`python benchmarks/tree_exactness.py --all`"
        path.write_text(f"# Exactness of trees, CPU, {today}\n\n{command}\n\n{text}")


if __name__ == "__main__":
    main()
