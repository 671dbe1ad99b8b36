"""A plan's figures are those of the loaders that train, and can be worked out by hand.

Its memory counts what a real model has.
"""

import dataclasses
import io
import json
import random

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from support.kept_rows import keeping_always, rows_behind
from support.tiny import make_trainer, tiny_llama
from transformers import T5Config, T5ForConditionalGeneration

from hf_gradacc import GradAccArguments
from hf_gradacc.loss.trees.hooks import computing_these
from hf_gradacc.loss.trees.layout import lay_out_trees
from hf_gradacc.loss.trees.masks import takes_rows
from hf_gradacc.ranks.layout import RankLayout
from hf_gradacc.recipe.keys.sections import PeftSection, Recipe
from hf_gradacc.recipe.load import load_recipe
from hf_gradacc.recipe.model.load import apply_peft, load_model
from hf_gradacc.recipe.plan.activations import kept_for_backward
from hf_gradacc.recipe.plan.memory import MemoryEstimate, estimate_memory
from hf_gradacc.recipe.plan.screen import _print_ways, give_advice, show_plan
from hf_gradacc.recipe.plan.updates import plan_recipe
from hf_gradacc.recipe.plan.ways import Spread
from hf_gradacc.recipe.shipped import find_recipe
from hf_gradacc.updates.loader import ModelFacts
from hf_gradacc.updates.targets import TargetRule
from hf_gradacc.updates.trees.cost import TreeCost
from hf_gradacc.updates.trees.plan import trees_of

LENGTHS = [2, 3, 4, 5, 6, 7, 30]


def rows(*, first_label=True):
    return [
        {"input_ids": [1] * n, "labels": ([1] if first_label else [-100]) + [1] * (n - 1)}
        for n in LENGTHS
    ]


def arguments(**options):
    settings = {"output_dir": "out", "use_cpu": True, "report_to": "none", "num_train_epochs": 2}
    return GradAccArguments(**settings | {"effective_batch_size": 4} | options)


@pytest.mark.parametrize("first_label", [True, False])
def test_a_causal_model_has_no_target_at_its_first_token(first_label):
    plan = plan_recipe(rows(first_label=first_label), arguments=arguments(), task="causal_lm")
    assert plan.targets.tolist() == [n - 1 for n in LENGTHS]


def test_other_tasks_count_their_own_targets():
    seq2seq = plan_recipe(rows(), arguments=arguments(), task="seq2seq")
    assert seq2seq.targets.tolist() == LENGTHS
    classes = [{"input_ids": [1] * n, "labels": 0} for n in LENGTHS]
    assert plan_recipe(classes, arguments=arguments(), task="classification").targets.sum() == 7


@pytest.mark.parametrize(
    "options", [{}, {"max_tokens_per_micro_batch": 120}], ids=["rows", "tokens"]
)
def test_a_plan_of_an_encoder_decoder_counts_its_decoder_and_pads_it_apart(tmp_path, options):
    draw = random.Random(0)
    rows = [
        {"input_ids": [5] * draw.randrange(2, 30), "labels": [6] * draw.randrange(2, 15)}
        for _ in range(40)
    ]
    options = {"effective_batch_size": 8, "per_device_train_batch_size": 4} | options
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "vocab_size": 40}
    model = T5ForConditionalGeneration(T5Config(**sizes, **ids))

    def collate(batch):
        columns = {"input_ids": 0, "labels": -100}
        lists = {key: [torch.tensor(row[key]) for row in batch] for key in columns}
        padded = {
            key: torch.nn.utils.rnn.pad_sequence(lists[key], True, fill)
            for key, fill in columns.items()
        }
        return padded | {"attention_mask": padded["input_ids"].ne(0).long()}

    trainer = make_trainer(
        tmp_path, rows, model=model, data_collator=collate, logging_steps=5, **options
    )
    trainer.train()
    plan = plan_recipe(
        rows, arguments=arguments(**options), task="seq2seq", model=ModelFacts.of(model)
    )
    row = next(row for row in trainer.state.log_history if "computed_tokens_per_update" in row)
    assert row["input_tokens_per_update"] == plan.inputs_per_update.mean
    assert row["tokens_per_update"] == plan.targets_per_update.mean
    assert row["computed_tokens_per_update"] == plan.chosen.computed_per_update
    assert row["padding_fraction"] == pytest.approx(plan.chosen.padding_fraction)
    assert row["micro_batches_per_update"] == pytest.approx(plan.chosen.micro_batches.mean)


def test_updates_are_those_of_two_epochs():
    plan = plan_recipe(rows(), arguments=arguments(), task="causal_lm")
    assert (plan.updates_per_epoch, plan.num_updates, plan.last_update) == (2, 4, 3)
    assert plan.longest[:2] == (6, 5)
    dropped = plan_recipe(rows(), arguments=arguments(incomplete_update="drop"), task="causal_lm")
    assert (dropped.updates_per_epoch, dropped.last_update) == (1, 4)


def test_an_update_of_all_rows_is_padded_as_counted_by_hand():
    options = {"effective_batch_size": 7, "per_device_train_batch_size": 7, "layout": "padded"}
    plan = plan_recipe(rows(), arguments=arguments(**options), task="causal_lm")
    stock, by_size, _, packed, *_ = plan.ways  # and trees: these rows begin alike
    assert stock.padding_fraction == by_size.padding_fraction == (7 * 30 - 57) / (7 * 30)
    assert stock.largest == 7 * 30
    options["max_tokens_per_micro_batch"] = 30
    plan = plan_recipe(rows(), arguments=arguments(**options), task="causal_lm")
    chosen = plan.chosen
    # 30 alone, then 7 6 5 and 4 3 2: 30 + 21 + 12 computed for 57; 7 6 5 4 and 3 2 is 1 more.
    assert chosen.micro_batches.mean == 3
    assert chosen.padding_fraction == (30 + 21 + 12 - 57) / 63
    assert packed.padding_fraction == 0


def test_two_ranks_have_half_of_each_update():
    plan = plan_recipe(rows(), arguments=arguments(), task="causal_lm", world_size=2)
    assert plan.sequences_per_update.most == 4
    assert plan.ways[0].micro_batches.most == 1


def rows_of_a_long_tail(count):
    """Chats: many short rows, few long ones."""
    draw = random.Random(1)
    lengths = [min(60, 3 + int(draw.lognormvariate(2, 0.8))) for _ in range(count)]
    return [{"input_ids": [5] * n, "attention_mask": [1] * n, "labels": [5] * n} for n in lengths]


def loaded(tmp_path, monkeypatch, rows, *, world_size, by_rows=True, keeps=False, **options):
    """What the trainer's own loaders yield in an epoch: an update's micro-batches, rank by rank."""
    trainer = make_trainer(tmp_path, rows, **options)
    found = []
    for rank in range(world_size):
        with monkeypatch.context() as patch:
            patch.setattr(type(trainer.args), "world_size", world_size)
            patch.setattr(type(trainer.args), "process_index", rank)
            patch.setattr(trainer._rank_engine, "layout", RankLayout(rank, world_size))
            loader = trainer.get_train_dataloader().updates
        loader.collator.rule = TargetRule.NEXT_TOKEN  # as the model says once it is asked
        loader.collator.packed = options.get("layout") == "packed"
        if options.get("layout") in ("auto", "shared_prefix"):
            loader.collator.share_prefixes([trainer.model], by_rows=by_rows, keeps=keeps)
        found += list(loader)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens_per_micro_batch": 120},
        {"per_device_train_batch_size": 4},
        {"max_tokens_per_micro_batch": 120, "layout": "packed"},
        {"max_tokens_per_micro_batch": "auto"},
        {"max_tokens_per_micro_batch": 120, "noise_scale_every": 2},
        {"max_tokens_per_micro_batch": 120, "effective_batch_size": None, "tokens_per_update": 700},
    ],
    ids=["tokens", "rows", "packed", "auto", "noise measured", "updates by tokens"],
)
def test_a_plan_is_what_the_loaders_of_all_ranks_yield(tmp_path, monkeypatch, world_size, options):
    rows = rows_of_a_long_tail(300)
    options = {"effective_batch_size": 64, "layout": "padded"} | options
    trained = loaded(tmp_path, monkeypatch, rows, world_size=world_size, **options)
    plan = plan_recipe(
        rows,
        arguments=arguments(**options),
        task="causal_lm",
        world_size=world_size,
        model=ModelFacts.of(tiny_llama()),
    )
    micro_batches = [micro_batch for update in trained for micro_batch in update]
    padding = sum(micro_batch.num_padding_tokens for micro_batch in micro_batches)
    used = sum(micro_batch.num_input_tokens for micro_batch in micro_batches)
    counts = [len(update) for update in trained]
    assert plan.chosen.micro_batches == Spread.of(counts)
    assert plan.chosen.padding_fraction == padding / (padding + used)
    assert plan.updates_per_epoch == len(trained) / world_size
    computed = [mb.num_padding_tokens + mb.num_input_tokens for mb in micro_batches]
    assert plan.chosen.largest == max(computed)


def rows_of_few_prompts(count, *, prompts=11):
    """Answers to one of a few prompts each, behind instructions that all of them have."""
    draw = random.Random(2)
    head = [draw.randrange(3, 48) for _ in range(10)]
    starts = [[*head, *(draw.randrange(3, 48) for _ in range(20))] for _ in range(prompts)]
    rows = []
    for _ in range(count):
        ids = draw.choice(starts) + [draw.randrange(3, 48) for _ in range(draw.randint(2, 20))]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)})
    return rows


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens_per_micro_batch": 240},
        {"per_device_train_batch_size": 8},
        {"max_tokens_per_micro_batch": "auto", "layout": "auto"},
        {"max_tokens_per_micro_batch": 240, "noise_scale_every": 2},
    ],
    ids=["tokens", "rows", "auto", "noise measured"],
)
def test_a_plan_of_rows_that_begin_alike_is_what_the_loaders_of_all_ranks_yield(
    tmp_path, monkeypatch, world_size, by_rows, options
):
    rows = rows_of_few_prompts(200, prompts=5)
    options = {"effective_batch_size": 64, "layout": "shared_prefix"} | options
    trained = loaded(tmp_path, monkeypatch, rows, world_size=world_size, by_rows=by_rows, **options)
    plan = plan_recipe(
        rows,
        arguments=arguments(**options),
        task="causal_lm",
        world_size=world_size,
        model=ModelFacts.of(tiny_llama()),
        trees_by_rows=by_rows,
    )
    micro_batches = [micro_batch for update in trained for micro_batch in update]
    computed = [micro_batch.num_computed_tokens for micro_batch in micro_batches]
    used = sum(micro_batch.num_input_tokens for micro_batch in micro_batches)
    way = plan.sharing
    assert way is plan.chosen
    assert way.micro_batches == Spread.of([len(update) for update in trained])
    assert way.computed_per_update == sum(computed) * world_size / len(trained)
    assert way.padding_fraction == sum(mb.num_padding_tokens for mb in micro_batches) / sum(
        computed
    )
    assert way.shared_fraction == sum(mb.num_shared_tokens for mb in micro_batches) / used > 0.1
    assert way.largest == max(computed)
    instead = [other for other in plan.ways if other.stands_in]
    assert len(instead) == (options["layout"] == "auto")
    assert plan.largest == max(other.largest for other in [way, *instead])


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("grouped", [False, True], ids=["one by one", "families"])
def test_a_plan_of_kept_beginnings_is_what_the_loaders_of_all_ranks_yield(
    tmp_path, monkeypatch, world_size, grouped
):
    rows = [row for seed in (0, 0, 1, 1, 2, 2) for row in rows_behind(seed=seed)]
    options = {"effective_batch_size": 34, "layout": "shared_prefix"}
    options |= {"max_tokens_per_micro_batch": 34, "group_by_prefix": grouped}
    with keeping_always():
        trained = loaded(tmp_path, monkeypatch, rows, world_size=world_size, keeps=True, **options)
        plan = plan_recipe(
            rows,
            arguments=arguments(**options),
            task="causal_lm",
            world_size=world_size,
            model=ModelFacts.of(tiny_llama()),
            keeps_beginnings=True,
        )
    beginnings = [micro_batch.beginning for update in trained for micro_batch in update]
    assert len(set(beginnings)) > 2
    assert len(list(filter(None, beginnings))) > 2 * len(set(beginnings))
    stats = [update.stats(TargetRule.NEXT_TOKEN) for update in trained]
    total = sum(stats[1:], start=stats[0])
    per_update = total.num_computed_tokens * world_size / len(trained)
    assert plan.chosen.computed_per_update == per_update
    assert plan.chosen.shared_fraction == total.num_shared_tokens / total.num_input_tokens
    assert plan.chosen.micro_batches == Spread.of([len(update) for update in trained])
    held = [mb.num_computed_tokens + len(mb.beginning) for update in trained for mb in update]
    assert plan.chosen.largest == max(held)  # a beginning is there while each of them runs
    assert plan.grouping is None or plan.grouping[grouped] == per_update


def trained_and_planned(tmp_path, rows, attention, **options):
    """A trainer that has run, the plan of its recipe, and the one row that it logged."""
    options |= {"effective_batch_size": 16, "max_tokens_per_micro_batch": 160}
    model = tiny_llama(attn_implementation=attention)
    trainer = make_trainer(tmp_path, rows, model=model, **options)
    trainer.train()
    plan = plan_recipe(
        rows,
        arguments=arguments(**options),
        task="causal_lm",
        model=ModelFacts.of(model),
        trees_by_rows=takes_rows(model.config),
        keeps_beginnings=attention == "sdpa",
    )
    (row,) = (row for row in trainer.state.log_history if "computed_tokens_per_update" in row)
    return trainer, plan, row


@pytest.mark.parametrize(
    ("attention", "num_rows"), [("eager", 48), ("sdpa", 48)], ids=["under a mask", "row by row"]
)
def test_a_run_logs_the_computed_tokens_that_were_planned(tmp_path, attention, num_rows):
    rows = rows_of_few_prompts(num_rows, prompts=2)
    trainer, plan, row = trained_and_planned(tmp_path, rows, attention, logging_steps=3)
    assert trainer.args.layout == "auto"
    assert trainer.shortcuts.keeps_beginnings == (attention == "sdpa")
    chosen = plan.chosen
    assert chosen.shared_fraction > 0.2
    assert row["computed_tokens_per_update"] == pytest.approx(chosen.computed_per_update)
    assert row["shared_fraction"] == pytest.approx(chosen.shared_fraction)
    assert row["padding_fraction"] == pytest.approx(chosen.padding_fraction)
    assert row["micro_batches_per_update"] == pytest.approx(chosen.micro_batches.mean)


def test_rows_that_hardly_begin_alike_are_planned_without_a_word_of_it():
    """One token of 120 is common to all, as a template's first."""
    draw = random.Random(3)
    rows = [[1, *(draw.randrange(3, 10_000) for _ in range(119))] for _ in range(16)]
    rows = [{"input_ids": ids, "labels": ids} for ids in rows]
    plan = plan_recipe(rows, arguments=arguments(), task="causal_lm")
    assert plan.sharing is None
    assert len(plan.ways) == 4
    assert not any(way.stands_in for way in plan.ways)


def plan_of_few_prompts(**options):
    table = datasets.Dataset.from_list(rows_of_few_prompts(60, prompts=4))
    return plan_recipe(table, arguments=arguments(**options), task="causal_lm", world_size=2)


def printed_ways(plan, *, columns=200):
    console = Console(record=True, width=columns, file=io.StringIO())
    _print_ways(plan, console)
    return console.export_text()


@pytest.mark.parametrize(
    ("layout", "mark", "words"),
    [
        ("auto", "<- taken", "taken by auto where the model"),
        ("shared_prefix", "<- taken", "asked for"),
        ("padded", "", "not taken by this recipe"),
    ],
)
def test_the_screen_says_what_sharing_saves_and_who_takes_it(layout, mark, words):
    plan = plan_of_few_prompts(layout=layout)
    shown = printed_ways(plan).splitlines()
    assert "computed" in shown[2]
    line = next(line for line in shown if "shared prefixes" in line)
    assert line.rstrip().endswith(mark)
    assert f"{plan.sharing.computed_per_update:,.0f}" in line
    assert f"begin alike: {plan.sharing.shared_fraction:.0%} of the input tokens" in shown[-1]
    assert words in shown[-1]


@pytest.mark.parametrize("columns", [80, 120])
def test_the_ways_to_cut_updates_fit_a_terminal(columns):
    plan = plan_of_few_prompts(max_tokens_per_micro_batch="auto")
    large = [
        dataclasses.replace(
            way,
            name=way.name.replace("1,024", "131,072"),
            computed_per_update=1_048_576,
            largest=131_072,
        )
        for way in plan.ways
    ]
    plan = dataclasses.replace(plan, ways=tuple(large))
    shown = printed_ways(plan, columns=columns)
    assert "…" not in shown
    lines = shown.splitlines()
    table_lines = lines[2 : 4 + len(plan.ways)]
    assert max(len(line.rstrip()) for line in table_lines) <= 80
    assert table_lines[0].split() == ["computed", "micro-", "largest"]
    headings = ("micro-batches", "of", "tokens", "padding", "batches", "tokens")
    assert tuple(table_lines[1].split()) == headings
    assert table_lines[-1].split() == [
        *("131,072", "tokens*,", "shared", "prefixes", "1,048,576"),
        *(f"{large[-1].padding_fraction:.1%}", f"{large[-1].micro_batches.mean:.1f}"),
        *("131,072", "<-", "taken"),
    ]
    assert lines[-2 if "begin alike" in lines[-1] else -3].startswith("* the budget")


@pytest.mark.parametrize(
    ("overrides", "is_taken", "words"),
    [
        ((), True, "taken by auto where the model"),
        (("peft=lora", "peft.dropout=0.05"), False, "not taken: dropout would drop the same"),
        (("model.config.attention_dropout=0.1",), False, "not taken: dropout"),
        (("model.config.attention_dropout=0.1", "train.layout=shared_prefix"), True, "asked for"),
        (("peft=lora", "peft.dropout=0.05", "train.layout=padded"), False, "by this recipe"),
        (("train.neftune_noise_alpha=5",), False, "not taken: neftune_noise_alpha"),
        (("train.torch_compile=true",), False, "not taken: torch.compile"),
    ],
)
def test_a_plan_promises_no_sharing_that_training_would_refuse(
    tmp_path, overrides, is_taken, words
):
    head = "Answer as a careful teacher of arithmetic would, step by step and in few words. "
    data = tmp_path / "rows.jsonl"
    lines = [json.dumps({"question": f"{head}{n} + 1?", "answer": f"{n + 1}"}) for n in range(64)]
    data.write_text("\n".join(lines))
    own = (f"data.train={data}", "data.holdout=4", *overrides)
    recipe = load_recipe(find_recipe("quickstart"), overrides=own)
    console = Console(record=True, width=200, file=io.StringIO())
    plan = show_plan(recipe, console=console)
    assert plan.sharing.chosen is is_taken
    assert words in console.export_text()


def test_a_stream_is_planned_by_a_sample():
    plan = plan_recipe(iter(rows()), arguments=arguments(), task="causal_lm")
    assert plan.is_sample
    assert plan.num_sequences == 7


def test_advice_names_a_budget_where_padding_is_high_and_none_where_it_is_low():
    padded = plan_recipe(rows(), arguments=arguments(), task="causal_lm")
    assert any("max_tokens_per_micro_batch: " in line for line in give_advice(padded))
    equal = [{"input_ids": [1] * 8, "labels": [1] * 8}] * 8
    assert not list(give_advice(plan_recipe(equal, arguments=arguments(), task="causal_lm")))
    too_long = arguments(max_tokens_per_micro_batch=8)
    advice = list(give_advice(plan_recipe(rows(), arguments=too_long, task="causal_lm")))
    assert any("30" in line and "planned alone" in line for line in advice)


@pytest.mark.parametrize(
    ("usable", "recomputed", "peft", "advice"),
    [
        (400_000, False, "none", None),
        (300_000, False, "none", "train.max_tokens_per_micro_batch: 30 "),
        (270_000, False, "none", "train.activation_checkpointing: true"),
        (270_000, True, "none", "data.max_length: 23 "),
        (190_000, True, "none", "peft.method: lora"),
        (190_000, True, "lora", "peft.method: qlora, model.name: a smaller one"),
        (190_000, True, "qlora", "model.name: a smaller one"),
    ],
)
def test_advice_makes_a_run_fit_a_gpu(usable, recomputed, peft, advice):
    options = {"max_tokens_per_micro_batch": 60, "effective_batch_size": 7}
    plan = plan_recipe(rows(), arguments=arguments(**options), task="causal_lm")
    assert (plan.chosen.largest, plan.lengths.max()) == (42, 30)
    # 200 000 bytes of state, and 3 000 for each of the 42 tokens of the largest micro-batch.
    state = {"weights": 100_000, "gradients": 60_000, "optimizer": 40_000}
    rest = {"activations": 84_000, "logits": 42_000, "recomputed": recomputed}
    memory = MemoryEstimate(1, 1, **state, **rest)
    # Nine tenths of a GPU are usable, and a byte more against rounding.
    found = list(give_advice(plan, memory=memory, gpu_memory=usable / 0.9 + 1, peft=peft))
    about_memory = [line for line in found if " GB" in line]
    assert len(about_memory) == (advice is not None)
    assert advice is None or found[0].startswith(advice)


class Tokenizer:
    """As much of a tokenizer as a config asks for."""

    bos_token_id = None
    eos_token_id = pad_token_id = 0

    def __len__(self):
        return 100


@pytest.mark.parametrize("method", ["none", "lora"])
def test_memory_counts_the_weights_that_a_real_model_has(method):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    recipe = Recipe.model_validate(
        {
            "model": {"config": {"model_type": "llama", **sizes}},
            "data": {"train": "rows.jsonl"},
            "peft": method,
        }
    )
    model = load_model(recipe.model, tokenizer=Tokenizer())
    model = apply_peft(model, recipe.peft)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = estimate_memory(recipe, tokenizer=Tokenizer(), arguments=arguments(), largest=64)
    assert (memory.num_parameters, memory.num_trainable) == (total, trained)
    assert memory.gradients == 4 * trained
    assert memory.optimizer == 8 * trained
    assert memory.logits == 64 * 100 * 12
    sharded = recipe.model_copy(update={"train": {"fsdp": True}})
    spread = estimate_memory(
        sharded, tokenizer=Tokenizer(), arguments=arguments(), largest=64, world_size=4
    )
    assert spread.total < memory.total


@pytest.mark.parametrize("key_value_heads", [4, 1])
def test_memory_of_shared_prefixes_is_what_their_trees_keep(key_value_heads):
    """A head of 150 tokens before 24 rows of 6: most tokens are seen by rows and computed once."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": key_value_heads}
    model = {"config": {"model_type": "llama", **sizes}, "dtype": "float32"}
    recipe = Recipe.model_validate({"model": model, "data": {"train": "rows.jsonl"}})
    ids = torch.cat([torch.arange(150).expand(24, -1) % 97, torch.arange(144).view(24, 6) % 89], 1)
    grown = trees_of(ids.tolist(), TreeCost(by_rows=True))
    trees = lay_out_trees(ids, None, grown.rows, by_rows=True)
    body = load_model(recipe.model, tokenizer=Tokenizer()).train().model

    def as_trees():
        with computing_these([body], trees, ids, None):
            return body(input_ids=ids).last_hidden_state

    real = bytes_kept(body, as_trees)
    whole, undercounted = (
        estimate_memory(
            recipe,
            tokenizer=Tokenizer(),
            arguments=arguments(chunked_loss=False),
            largest=grown.num_computed,
            largest_as_rows=as_rows,
        )
        for as_rows in (ids.numel(), 0)
    )
    assert whole.logits == ids.numel() * 100 * 12 > 8 * undercounted.logits
    assert 0.95 * real < whole.activations < 1.6 * real
    assert undercounted.activations < 0.92 * real


def bytes_kept(model, forward):
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    ("options", "changes", "bytes_each"),
    [
        ({"low_precision_updates": "plain"}, {}, 4),  # each cast as it goes to the optimizer
        ({"low_precision_updates": "plain", "accumulate_grads_in_fp32": False}, {}, 2),
        ({}, {"train": {"fsdp": True}}, 2),  # the engine reduces in a type of its own
        ({}, {"peft": PeftSection(method="lora")}, 4),  # peft keeps adapters in float32
    ],
    ids=["summed in float32", "asked not to", "sharded", "adapters"],
)
def test_memory_counts_float32_sums_of_bfloat16_weights(options, changes, bytes_each):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "dtype": "bfloat16"}
    model = {"config": {"model_type": "llama", **sizes}, "dtype": "bfloat16"}
    recipe = Recipe.model_validate({"model": model, "data": {"train": "rows.jsonl"}})
    recipe = recipe.model_copy(update=changes)
    memory = estimate_memory(
        recipe, tokenizer=Tokenizer(), arguments=arguments(**options), largest=64
    )
    assert memory.gradients == bytes_each * memory.num_trainable
    beyond = 2 if bytes_each == 4 and not changes else 0
    assert memory.float32_sums == beyond * memory.num_trainable


@pytest.mark.parametrize(
    ("mode", "available", "optimizer", "masters", "step"),
    [
        ("plain", None, 4, 0, 0),
        ("stochastic", None, 8, 0, 4),
        ("master", None, 8, 4, 0),
        ("auto", None, 8, 4, 0),  # the larger, where nobody knows
        ("auto", 10**9, 8, 4, 0),
        ("auto", 10**5, 4, 0, 0),
    ],
)
def test_memory_counts_what_a_step_on_bfloat16_weights_keeps(
    mode, available, optimizer, masters, step
):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "dtype": "bfloat16"}
    model = {"config": {"model_type": "llama", **sizes}, "dtype": "bfloat16"}
    memory = estimate_memory(
        Recipe.model_validate({"model": model, "data": {"train": "rows.jsonl"}}),
        tokenizer=Tokenizer(),
        arguments=arguments(low_precision_updates=mode),
        largest=64,
        available=available,
    )
    count = memory.num_trainable
    assert (memory.weights, memory.gradients) == (2 * count, 4 * count)
    assert (memory.optimizer, memory.masters) == (optimizer * count, masters * count)
    assert memory.step == step * count
    assert memory.total == (6 + optimizer + masters) * count + max(
        memory.activations + memory.logits + memory.new_gradient, memory.step
    )


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_forward_without_values_keeps_what_a_real_one_does(lora):
    sizes = {"num_hidden_layers": 3, "attn_implementation": "sdpa"}
    options = {"r": 2, "target_modules": ["q_proj", "up_proj"]}

    def make(device):
        with torch.device(device):
            model = tiny_llama(dtype=torch.bfloat16, **sizes)
            return get_peft_model(model, LoraConfig(**options)) if lora else model

    model, seen = make("cpu"), {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return tensor

    base = model.get_base_model() if lora else model
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        base.model(input_ids=torch.zeros(1, 40, dtype=torch.long))
    found, of_layer = kept_for_backward(make("meta"), tokens=40)
    assert found == sum(storage.nbytes() for storage in seen.values())
    assert 0 < of_layer < found / 2


@pytest.mark.parametrize("grouped", [False, True])
def test_a_run_computes_what_was_planned_for_rows_drawn_one_by_one_and_in_families(
    tmp_path, grouped
):
    rows = rows_of_few_prompts(96, prompts=30)
    options = {"logging_steps": 6, "group_by_prefix": grouped}
    _, plan, row = trained_and_planned(tmp_path, rows, "eager", **options)
    assert plan.grouping[1] < 0.7 * plan.grouping[0]
    assert row["computed_tokens_per_update"] == pytest.approx(plan.grouping[grouped])
    fewer, more = f"{plan.grouping[1]:,.0f}", f"{plan.grouping[0]:,.0f}"
    proposed = [line for line in give_advice(plan) if "group_by_prefix" in line]
    assert len(proposed) == (not grouped)
    for line in proposed:
        assert f"train.group_by_prefix: true   # would compute {fewer} tokens" in line
        assert f"instead of {more}" in line
    told = f"(group_by_prefix): {fewer} computed tokens in an update instead of {more}"
    assert (told in printed_ways(plan)) is grouped


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "padded"},
        {"train_sampling_strategy": "sequential"},
        {"noise_scale_every": 2},
        {"effective_batch_size": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_nothing_is_proposed_that_the_rest_of_a_recipe_refuses(options):
    rows = rows_of_few_prompts(96, prompts=30)
    plan = plan_recipe(rows, arguments=arguments(**options), task="causal_lm")
    assert plan.grouping is None
    assert not any("group_by_prefix" in line for line in give_advice(plan))


@pytest.mark.parametrize("hold", [np.array, torch.tensor, tuple], ids=["numpy", "torch", "tuple"])
@pytest.mark.parametrize("pairs", [False, True], ids=["rows", "pairs"])
def test_a_plan_is_the_same_whatever_holds_the_tokens_of_its_rows(hold, pairs):
    plain = rows_of_few_prompts(24, prompts=3)
    if pairs:
        plain = [
            {"prompt_ids": row["input_ids"][:-1], "chosen_ids": [7, 8], "rejected_ids": [9] * n}
            for n, row in enumerate(plain)
        ]
    held = [{name: hold(ids) for name, ids in row.items()} for row in plain]
    in_arrow = datasets.Dataset.from_list(plain).with_format("numpy")
    options = {"effective_batch_size": 8, "max_tokens_per_micro_batch": 160}
    task = "dpo" if pairs else "causal_lm"
    expected, *found = (
        plan_recipe(rows, arguments=arguments(**options), task=task)
        for rows in (plain, held, in_arrow)
    )
    assert expected.sharing is not None
    for plan in found:
        assert plan.figures() == expected.figures()
        assert plan.starts == expected.starts
        assert all(type(token) is int for start in plan.starts for token in start)
