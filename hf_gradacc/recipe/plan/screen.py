"""`hf-gradacc plan`: the updates of a recipe on one screen, and what to change.

What to change in a recipe, in lines that can be copied into it, with the reason beside each.

The picture of a plan: lengths, padding of each way, and targets of each update.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from hf_gradacc.data import iter_texts, load_tokenizer, prepare_data
from hf_gradacc.loss.asking.ask import has_router_loss
from hf_gradacc.loss.shortcuts.sharing import drops_out, why_not_by_options, why_not_kept_by_options
from hf_gradacc.loss.trees.kept import why_not_kept_by
from hf_gradacc.loss.trees.masks import takes_rows, why_no_masks
from hf_gradacc.recipe.hub import telling_of_hub
from hf_gradacc.recipe.keys.sections import Recipe
from hf_gradacc.recipe.load import recipe_arguments
from hf_gradacc.recipe.model.load import check_model
from hf_gradacc.recipe.model.positions import check_longest_row, check_max_length
from hf_gradacc.recipe.model.trained import check_trained, describe_rates
from hf_gradacc.recipe.plan.measure import (
    Measurement,
    describe_time,
    measure_updates,
    read_earlier_run,
)
from hf_gradacc.recipe.plan.memory import MemoryEstimate, anonymous_bytes, estimate_memory
from hf_gradacc.recipe.plan.show_rows import make_visible, show_rows
from hf_gradacc.recipe.plan.updates import RecipePlan, plan_recipe
from hf_gradacc.recipe.plan.ways import LEAST_GROUPED, Spread, WayToPlan
from hf_gradacc.recipe.tables import WithoutBlanks
from hf_gradacc.safety.output_files import check_drawing, picture_type
from hf_gradacc.safety.waiting import telling
from hf_gradacc.text import byte_size, printable
from hf_gradacc.updates.loader import ModelFacts

__all__ = ["draw_plan", "give_advice", "show_plan"]

# A plan is made on any machine; these options ask for hardware, or start distributed training.
_ON_ANY_MACHINE: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "fp16": False,
    "tf32": None,
    "ddp_backend": None,
    "fsdp": None,
    "fsdp_config": None,
    "deepspeed": None,
    "use_liger_kernel": False,
    "report_to": "none",
}


BAR = 40


@telling_of_hub
def show_plan(
    recipe: Recipe,
    *,
    world_size: int = 1,
    gpu_memory: float | None = None,
    png: Path | None = None,
    num_rows: int = 0,
    measures: bool = False,
    price_per_hour: float | None = None,
    console: Console,
) -> RecipePlan:
    """Tokenize the data, plan the updates, and print both.

    Args:
        recipe: A checked recipe.
        world_size: Ranks to plan for.
        gpu_memory: Bytes of the GPU it is for; by default those of the first one here.
        png: Also draw it into this file.
        num_rows: How many prepared rows to show, with their targets marked.
        measures: Train a few updates to tell how long the run will take.
        price_per_hour: What the machine costs, in any currency.
        console: Where to print.
    """
    if png is not None:
        check_drawing(png, option="--png")
    arguments = recipe_arguments(recipe, elsewhere=True, **_ON_ANY_MACHINE)
    with telling("preparing the data", beside_bars=True):
        texts = iter_texts(recipe.data)
        tokenizer = load_tokenizer(recipe.tokenizer, model=recipe.model, texts=texts)
        model = check_model(recipe.model, recipe.peft, tokenizer=tokenizer, here=False)
        check_trained(recipe, model, arguments)
        check_max_length(recipe, model)
        vocab_size = model.get_input_embeddings().num_embeddings
        task = recipe.model.task
        data = prepare_data(recipe.data, tokenizer=tokenizer, vocab_size=vocab_size, task=task)
    too_long = check_longest_row(recipe, model, data)
    remarks = filter(None, [too_long, recipe.adapter_to_nothing])
    for line in [*data.reports, *data.remarks, *remarks]:
        console.print(printable(str(line)), highlight=False, markup=False, soft_wrap=True)
    if num_rows:
        show_rows(
            data.train,
            num_rows=num_rows,
            tokenizer=tokenizer,
            task=task,
            label_names=data.label_names,
            console=console,
        )
    plan = plan_recipe(
        data.train,
        arguments=arguments,
        task=task,
        model=ModelFacts.of(model),
        world_size=world_size,
        on_accelerator=not recipe.train.get("use_cpu"),
        lockstep=bool(recipe.train.get("fsdp")),
        trees_by_rows=takes_rows(model.config),
        keeps_beginnings=_keeps_beginnings(recipe, model, arguments),
        why_not_shared=_why_not_shared(recipe, model, arguments),
    )
    gpu_memory = _memory_here() if gpu_memory is None else gpu_memory
    memory = estimate_memory(
        recipe,
        tokenizer=tokenizer,
        arguments=arguments,
        largest=plan.largest,
        largest_as_rows=plan.largest_as_rows,
        label_names=data.label_names,
        world_size=world_size,
        available=gpu_memory,
    )
    _print_updates(plan, console)
    _print_rates(model, arguments, console)
    _print_ways(plan, console)
    _print_lengths(plan, tokenizer, console)
    _print_memory(memory, plan, gpu_memory, console)
    measured = (
        measure_updates(recipe, data, tokenizer=tokenizer)
        if measures
        else read_earlier_run(
            recipe.output.dir or ".",
            num_parameters=memory.num_parameters,
            world_size=world_size,
        )
    )
    _print_time(measured, plan, price_per_hour, console)
    advice = list(give_advice(plan, memory=memory, gpu_memory=gpu_memory, peft=recipe.peft.method))
    if advice:
        console.print("\n[bold]What to change[/bold]")
    for line in advice:
        console.print(f"  {line}", highlight=False, soft_wrap=True)
    if png is not None:
        draw_plan(plan, png)
        console.print(f"written: {png}", highlight=False, markup=False)
    return plan


def _why_not_shared(recipe: Recipe, model: Any, arguments: Any) -> str:
    """Return what is known without weights to speak against sharing prefixes."""
    if arguments.layout not in ("auto", "shared_prefix"):
        return ""
    pairs: Any = {"dpo": recipe.dpo, "reward": recipe.reward}.get(recipe.model.task)
    keeps_dropout = pairs is None or not pairs.disable_dropout
    drops = arguments.layout != "shared_prefix" and keeps_dropout and drops_out(model)
    return why_not_by_options(arguments, drops=drops) or why_no_masks(
        model.config.get_text_config()
    )


def _keeps_beginnings(recipe: Recipe, model: Any, arguments: Any) -> bool:
    """Return whether what is known without weights lets micro-batches keep a beginning."""
    is_split = bool(recipe.train.get("fsdp") or recipe.train.get("deepspeed"))
    takes_two_passes = has_router_loss(model) and arguments.update_passes != 1
    return not (
        is_split
        or takes_two_passes
        or why_not_kept_by(model.config)
        or why_not_kept_by_options(arguments)
    )


def _print_updates(plan: RecipePlan, console: Console) -> None:
    console.print("\n[bold]Updates[/bold]")
    table = _table()
    sample = f" (a sample of {plan.num_sequences:,} rows of the stream)" if plan.is_sample else ""
    ranks = f", {plan.world_size} ranks" if plan.world_size > 1 else ""
    table.add_row("updates", f"{plan.num_updates:,}; {plan.updates_per_epoch:,} an epoch{sample}")
    table.add_row("effective_batch_size", f"{_spread(plan.sequences_per_update)}{ranks}")
    table.add_row("tokens_per_update", f"{_spread(plan.targets_per_update)} (targets)")
    table.add_row("input_tokens_per_update", _spread(plan.inputs_per_update))
    table.add_row("micro_batches_per_update", f"{_spread(plan.chosen.micro_batches)} on each rank")
    table.add_row("padding_fraction", f"{plan.chosen.padding_fraction:.1%}")
    console.print(WithoutBlanks(table))


def _print_rates(model: Any, arguments: Any, console: Console) -> None:
    groups = list(describe_rates(model, arguments))
    if len(groups) == 1 and not groups[0][0]:
        return
    console.print("\n[bold]Learning rates[/bold] at their peak")
    table = _table()
    for label, rate, size in groups:
        table.add_row(label or "learning_rate", f"{rate:g}", f"{size:,} weights")
    console.print(WithoutBlanks(table))


def _print_ways(plan: RecipePlan, console: Console) -> None:
    of = (
        f" of the first {plan.updates_cut} updates"
        if plan.updates_cut < plan.updates_per_epoch
        else ""
    )
    console.print(f"\n[bold]Ways to cut the same updates[/bold]{of}")
    sharing = plan.sharing
    computed = ["computed\ntokens"] if sharing else []
    table = _table(
        *("micro-batches of", *computed, "padding", "micro-\nbatches", "largest\ntokens", ""),
        gap=1,  # a plan of millions of tokens fits a terminal of 80 columns
    )
    for way in plan.ways:
        table.add_row(
            way.name,
            *([f"{way.computed_per_update:,.0f}"] if sharing else []),
            f"{way.padding_fraction:.1%}",
            f"{way.micro_batches.mean:.1f}",
            f"{way.largest:,}",
            _mark(way),
        )
    console.print(WithoutBlanks(table))
    if any("*" in way.name for way in plan.ways):
        console.print("* the budget of the first updates; then it is tuned", highlight=False)
    if sharing:
        console.print(
            f"rows begin alike: {sharing.shared_fraction:.0%} of the input tokens need not be "
            f"computed (layout: shared_prefix, {_who_takes(plan, sharing)})",
            highlight=False,
            soft_wrap=True,
        )
    if plan.grouping and plan.is_grouped:
        alone, grouped = plan.grouping
        console.print(
            f"rows that begin alike are drawn together (group_by_prefix): {grouped:,.0f} computed "
            f"tokens in an update instead of {alone:,.0f}",
            highlight=False,
            soft_wrap=True,
        )


def _mark(way: WayToPlan) -> str:
    """Mark the way that the recipe plans."""
    if way.stands_in:
        return "<- else"
    return "<- taken" if way.chosen else ""


def _who_takes(plan: RecipePlan, sharing: WayToPlan) -> str:
    """Say when common prefixes are computed once."""
    if plan.why_not_shared:
        return f"not taken: {plan.why_not_shared}"
    if not sharing.chosen:
        return "not taken by this recipe"
    return "taken by auto where the model allows it" if plan.depends_on_model else "asked for"


def _print_lengths(plan: RecipePlan, tokenizer: Any, console: Console) -> None:
    console.print("\n[bold]Tokens in a row[/bold]")
    counts, edges = np.histogram(plan.lengths, bins=min(10, len(set(plan.lengths.tolist()))))
    table = _table()
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = "█" * round(BAR * count / counts.max()) or ("▏" if count else "")
        table.add_row(f"{low:,.0f} - {high:,.0f}", f"{count:,}", bar)
    console.print(WithoutBlanks(table))
    console.print("longest rows:", highlight=False)
    for index, tokens in list(zip(plan.longest, plan.starts, strict=True))[:3]:
        start = tokenizer.decode(tokens, skip_special_tokens=True)
        text = make_visible(" ".join(start.split())[:60])
        console.print(f"  {plan.lengths[index]:,} tokens: {text}…", highlight=False, markup=False)


def _memory_here() -> float | None:
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _print_memory(
    memory: MemoryEstimate, plan: RecipePlan, gpu_memory: float | None, console: Console
) -> None:
    console.print("\n[bold]Memory of a rank[/bold] (estimated; `hf-gradacc verify` measures)")
    table = _table()
    share = memory.num_trainable / memory.num_parameters
    parameters = f"{memory.num_parameters:,} parameters, {share:.1%} of them trained"
    sharded = f", over {memory.shards} ranks" if memory.shards > 1 else ""
    table.add_row("weights", byte_size(memory.weights / memory.shards), parameters + sharded)
    sums = f"{byte_size(memory.float32_sums)} of it to sum in float32 (accumulate_grads_in_fp32)"
    in_float32 = sums if memory.float32_sums else ""
    if memory.reference:
        table.add_row("reference", byte_size(memory.reference / memory.shards), "frozen, of dpo")
    table.add_row("gradients", byte_size(memory.gradients / memory.shards), in_float32)
    table.add_row("optimizer", byte_size(memory.optimizer / memory.shards), "")
    if memory.masters:
        why = "float32 values of the weights (low_precision_updates)"
        table.add_row("masters", byte_size(memory.masters / memory.shards), why)
    largest = f"of the largest micro-batch, {plan.largest:,} tokens"
    table.add_row("activations", byte_size(memory.activations), largest)
    table.add_row("logits", byte_size(memory.logits), "")
    table.add_row("new gradient", byte_size(memory.new_gradient), "of the largest weight, unsummed")
    of = "" if gpu_memory is None else f"of {byte_size(gpu_memory)} on the GPU"
    table.add_row("together", byte_size(memory.total), of)
    if gpu_memory is None and (held := anonymous_bytes()):
        table.add_row("beside them", byte_size(held), "Python, libraries, tokenizer and rows, here")
    console.print(WithoutBlanks(table))


def _print_time(
    measured: Measurement | None, plan: RecipePlan, price_per_hour: float | None, console: Console
) -> None:
    if measured is None:
        if price_per_hour is not None:
            console.print("\n[bold]Time[/bold] and cost are not known: add --measure.")
        return
    console.print(f"\n[bold]Time[/bold] ({measured.source})", highlight=False)
    table = _table()
    for name, text in describe_time(measured, plan, price_per_hour=price_per_hour):
        table.add_row(name, text)
    console.print(WithoutBlanks(table))


def _table(*headers: str, gap: int = 2) -> Table:
    """Aligned columns without lines: the same in a terminal, a log file and a notebook."""
    table = Table(*headers, box=None, show_header=bool(headers), pad_edge=False, padding=(0, gap))
    for index in range(len(headers) or 3):
        if not headers:
            table.add_column()
        table.columns[index].no_wrap = True
    return table


def _spread(spread: Spread) -> str:
    if spread.least == spread.most:
        return f"{spread.mean:,.0f}"
    digits = 1 if spread.most < 100 else 0
    return f"{spread.mean:,.{digits}f} ({spread.least:,.0f} to {spread.most:,.0f})"


USABLE_MEMORY = 0.9
"""Share of a GPU's memory that an estimate may fill: allocator and kernels take some, too."""


def give_advice(
    plan: RecipePlan,
    *,
    memory: MemoryEstimate | None = None,
    gpu_memory: float | None = None,
    peft: str = "none",
) -> Iterator[str]:
    """What would make these updates fit or cheaper, or is likely not meant.

    Args:
        plan: The updates.
        memory: What a rank will need.
        gpu_memory: Bytes a rank has, where that is known.
        peft: The recipe's `peft.method`.
    """
    if memory is not None and gpu_memory is not None and memory.total > USABLE_MEMORY * gpu_memory:
        yield _make_it_fit(plan, memory, USABLE_MEMORY * gpu_memory, peft)
    by_size, by_tokens = plan.ways[1], plan.ways[2]
    if by_size.chosen and by_size.padding_fraction > 0.1:
        budget = int(max(plan.lengths.max(), 2 ** round(np.log2(by_size.largest / 2))))
        yield (
            f"train.max_tokens_per_micro_batch: {budget}   # padding is "
            f"{by_size.padding_fraction:.0%}; a token budget cuts it, the gradient stays the same"
        )
    if plan.max_tokens is not None and plan.lengths.max() > plan.max_tokens:
        yield (
            f"train.max_tokens_per_micro_batch: {plan.lengths.max()}   # the longest row does not "
            f"fit {plan.max_tokens} and is planned alone; or cut rows with data.max_length"
        )
    if plan.max_tokens is not None and by_tokens.padding_fraction > 0.25:
        smaller = max(int(plan.lengths.max()), plan.max_tokens // 2)
        yield (
            f"train.max_tokens_per_micro_batch: {smaller}   # smaller micro-batches hold rows of "
            f"more equal length (padding is {by_tokens.padding_fraction:.0%} now)"
        )
    alone, grouped = plan.grouping or (0.0, 0.0)
    if not plan.is_grouped and grouped < (1 - LEAST_GROUPED) * alone:
        yield (
            f"train.group_by_prefix: true   # would compute {grouped:,.0f} tokens in an update "
            f"instead of {alone:,.0f}; rows that begin alike would share updates"
        )
    if 4 * plan.last_update < plan.sequences_per_update.most and plan.updates_per_epoch > 1:
        yield (
            f"train.incomplete_update: drop   # an epoch's last update holds {plan.last_update} "
            f"of {plan.sequences_per_update.most:.0f} sequences, at the full learning rate"
        )
    if plan.sequences_per_update.least < plan.world_size:
        yield "train.effective_batch_size: larger   # some ranks have no sequence in some updates"


def _make_it_fit(plan: RecipePlan, memory: MemoryEstimate, usable: float, peft: str) -> str:
    """The first of these that is enough: smaller micro-batches, recomputing, fewer weights."""
    longest = int(plan.lengths.max())
    state = memory.state + memory.new_gradient
    per_token = (memory.activations + memory.logits) / plan.largest
    reason = f"estimated {memory.total / 1e9:.1f} GB exceed {usable / 1e9:.1f} GB"
    fits = int((usable - state) / per_token) if per_token else 0
    if fits >= longest:
        fits = max(longest, fits - fits % 256)
        return f"train.max_tokens_per_micro_batch: {fits}   # {reason}; the gradient stays the same"
    if usable > state and not memory.recomputed:
        return f"train.activation_checkpointing: true   # {reason}, even for the longest row alone"
    if usable > state:
        return f"data.max_length: {max(1, fits)}   # {reason}, even for the longest row alone"
    reason = f"weights, gradients and optimizer alone take {state / 1e9:.1f} GB per rank"
    if peft == "none":
        return f"peft.method: lora   # {reason}; or train.fsdp over several GPUs"
    smaller = "" if peft == "qlora" else "peft.method: qlora, "
    return f"{smaller}model.name: a smaller one   # {reason}; or more GPUs with train.fsdp"


def draw_plan(plan: RecipePlan, path: Path) -> None:
    """Draw the plan into a file whose ending decides its type; its folder is made."""
    from matplotlib.figure import Figure  # only here: a plan on the screen does without

    figure = Figure(figsize=(11, 4), layout="constrained")
    lengths, ways = figure.subplots(1, 2)
    lengths.hist(plan.lengths, bins=40, color="#4477aa")
    lengths.set(title="Tokens in a row", xlabel="input tokens", ylabel="rows")
    if plan.max_tokens is not None:
        lengths.axvline(plan.max_tokens, color="#ee6677", label="token budget")
        lengths.legend()
    names = [way.name for way in plan.ways]
    shares = [100 * way.padding_fraction for way in plan.ways]
    colors = ["#228833" if way.chosen else "#bbbbbb" for way in plan.ways]
    bars = ways.barh(names, shares, color=colors)
    ways.bar_label(bars, fmt="%.1f%%", padding=3)
    ways.invert_yaxis()
    ways.margins(x=0.15)
    ways.set(title="Padding (green: this recipe)", xlabel="% of computed tokens")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format=picture_type(path), dpi=120)
