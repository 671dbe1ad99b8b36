"""What the tests of many ranks run on each of them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import datasets
import peft
import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, ParallelismConfig
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from hf_gradacc import GradAccTrainer
from hf_gradacc.updates.collator import UpdateCollator

from .reduction_jobs import small_buckets
from .reference import float64_everywhere
from .tiny import Recorder, make_trainer, pad, ragged_rows, timeless_log_rows, tiny_llama

SEQUENTIAL = {"train_sampling_strategy": "sequential"}


def loss_by_count(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> Any:
    """A sum over the count it is given, as stock's own losses are; it must be given one."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


class OwnBackward(GradAccTrainer):
    """Runs its backward by itself, as in stock: it divides by the attribute that says by what."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss = loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


SCENARIOS: dict[str, dict[str, Any]] = {
    "a step with a backward of its own": {
        "num_rows": 9,
        "options": {
            "effective_batch_size": 5,
            "per_device_train_batch_size": 1,
            "trainer_class": OwnBackward,
        },
    },
    "an epoch that ends mid-update": {
        "num_rows": 11,
        "options": {
            "effective_batch_size": 4,
            "per_device_train_batch_size": 2,
            "num_train_epochs": 2,
        },
    },
    "a last update of one row": {
        "num_rows": 9,
        "form": "dataset",
        "options": {"effective_batch_size": 4, "per_device_train_batch_size": 1},
    },
    "updates smaller than the world from the first on": {
        "num_rows": 5,
        "options": {"effective_batch_size": 2},
    },
    "rows, shares and an update without a target": {
        "num_rows": 12,
        "without_target": (0, 1, 2, 4, 6, 7),
        "options": {"effective_batch_size": 2, **SEQUENTIAL},
    },
    "a token budget": {
        "num_rows": 11,
        "options": {"effective_batch_size": 8, "max_tokens_per_micro_batch": 20},
    },
    "updates drawn by tokens": {
        "num_rows": 11,
        "form": "dataset",
        "options": {"tokens_per_update": 25, "max_tokens_per_micro_batch": 24},
    },
    "a stream without a length": {
        "num_rows": 11,
        "form": "stream",
        "options": {"effective_batch_size": 4, "max_steps": 5},
    },
    "a stream of shards drawn by tokens": {
        "num_rows": 11,
        "form": "iterable",
        "options": {"tokens_per_update": 25, "max_steps": 5},
    },
    "a loss that divides by the count it is given": {
        "num_rows": 6,
        "options": {
            "effective_batch_size": 3,
            "trainer_options": {"compute_loss_func": loss_by_count},
        },
    },
    "label smoothing": {
        "num_rows": 6,
        "options": {"effective_batch_size": 6, "label_smoothing_factor": 0.1},
    },
    "rows that begin alike": {
        "num_rows": 32,
        "heads": 2,
        "options": {
            "effective_batch_size": 16,
            "layout": "shared_prefix",
            "max_tokens_per_micro_batch": 160,
            **SEQUENTIAL,
        },
    },
    "a stream of rows that begin alike": {
        "num_rows": 32,
        "heads": 2,
        "form": "stream",
        "options": {
            "effective_batch_size": 16,
            "layout": "shared_prefix",
            "max_tokens_per_micro_batch": 160,
            "max_steps": 2,
        },
    },
    "buckets that are views and a search for unused parameters": {
        "num_rows": 6,
        "options": {"effective_batch_size": 3, "ddp_find_unused_parameters": True},
    },
}
"""Settings every engine has to train alike."""

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)


class Stream(IterableDataset[Any]):
    """Rows in their order, and nothing else: no length, no index."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def scenario_rows(scenario: dict[str, Any]) -> Any:
    """The dataset of a scenario: how many rows, which of them without a target, in what form."""
    rows = ragged_rows(scenario["num_rows"], seed=3)
    for index in scenario.get("without_target", ()):
        rows[index]["labels"] = [-100] * len(rows[index]["labels"])
    heads = [
        [3 + (5 * head + 7 * place) % 45 for place in range(24)]
        for head in range(scenario.get("heads", 0))
    ]
    if heads:
        rows = [begun_with(heads[index // 2 % len(heads)], row) for index, row in enumerate(rows)]
    form = scenario.get("form", "list")
    if form == "dataset":
        return datasets.Dataset.from_list(rows)
    if form == "stream":
        return Stream(rows)
    if form == "iterable":
        return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2)
    return rows


def begun_with(head: list[int], row: dict[str, list[int]]) -> dict[str, list[int]]:
    """A row behind some tokens, the last of which are targets in this row and no other."""
    ids, own = [*head, *row["input_ids"]], row["labels"]
    labels = [*[-100] * (len(head) - len(own) // 4), *head[len(head) - len(own) // 4 :], *own]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


class Membership(UpdateCollator):
    """Notes which rows it was given."""

    seen: list[tuple[int, int, tuple[int, ...]]]

    def __call__(self, share: Any) -> Any:
        self.seen.append((share.epoch, share.update, tuple(share.indices)))
        return super().__call__(share)


class WholeGradients(Recorder):
    """Gathers sharded gradients; every rank calls it, so every rank takes part."""

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        super().on_pre_optimizer_step(*args, model=model, **kwargs)
        self.gradients[-1] = {name: whole(g) for name, g in self.gradients[-1].items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or all shards of it put together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


FSDP2 = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}


def allow_sharding_on_cpu() -> None:
    """Let accelerate shard on a CPU: it goes by the kind of machine, torch can do it anywhere."""
    make_state = AcceleratorState.__init__

    def make_state_of_gpus(self: Any, *args: Any, **kwargs: Any) -> None:
        if not AcceleratorState._shared_state:  # later ones take over what this one has settled
            PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        make_state(self, *args, **kwargs)

    AcceleratorState.__init__ = make_state_of_gpus


def _mesh(scenario: dict[str, Any]) -> dict[str, Any]:
    """Shard over pairs of ranks and replicate the pairs, if the scenario says so."""
    if not scenario.get("hybrid"):
        return {}
    return {"parallelism_config": ParallelismConfig(dp_shard_size=2, dp_replicate_size=2)}


def ask_for_model_parallelism() -> dict[str, str]:
    """Ask for each way to share a row between ranks; give what each is answered."""
    allow_sharding_on_cpu()
    asked: dict[str, dict[str, Any]] = {
        "tp": {"parallelism_config": ParallelismConfig(tp_size=2)},
        "sp": {"parallelism_config": ParallelismConfig(sp_size=2)},
        "cp": {"parallelism_config": ParallelismConfig(cp_size=2), **FSDP2},
    }
    answers = {}
    for name, options in asked.items():
        AcceleratorState._reset_state()
        with tempfile.TemporaryDirectory() as out:
            try:
                make_trainer(out, ragged_rows(4), effective_batch_size=2, **options)
                answers[name] = "accepted"
            except Exception as error:
                answers[name] = f"{type(error).__name__}: {error}"
    return answers


def train_scenarios(
    scenarios: dict[str, dict[str, Any]], *, sharded: bool = False
) -> dict[str, Any]:
    """Train every scenario in one process group; each starts from the same weights."""
    if sharded:
        allow_sharding_on_cpu()
        scenarios = {
            name: {**scenario, "options": {**scenario["options"], **FSDP2, **_mesh(scenario)}}
            for name, scenario in scenarios.items()
        }
    with small_buckets():  # or each tiny model would be one bucket, sent after the backward
        return {name: train_scenario(scenario) for name, scenario in scenarios.items()}


def train_scenario(scenario: dict[str, Any]) -> dict[str, Any]:
    """Train one scenario in float64 and give back everything the ranks must agree on."""
    recorder = WholeGradients()
    exactly = contextlib.nullcontext() if "dtype" in scenario else float64_everywhere()
    with tempfile.TemporaryDirectory() as out, exactly:
        model = make_model(scenario)
        trainer = make_trainer(
            out,
            scenario_rows(scenario),
            model=model,
            callbacks=[recorder],
            eval_dataset=scenario_rows({**scenario, "num_rows": 7, "without_target": ()}),
            **scenario["options"],
        )
        seen = _note_membership(trainer)
        trainer.train()
        evaluated = trainer.evaluate()
    return {
        "gradients": [gradient for gradient in recorder.gradients if gradient],
        "seen": seen,
        "weights": {
            name: whole(p.detach()).clone() for name, p in trainer.model.named_parameters()
        },
        "logs": timeless_log_rows(trainer),
        "train_loss": trainer.state.log_history[-2].get("train_loss"),
        "eval_loss": evaluated["eval_loss"],
        "steps": trainer.state.global_step,
        "sharded": any(hasattr(p, "full_tensor") for p in trainer.model.parameters()),
    }


def train_dealt_by_length(scenario: dict[str, Any]) -> dict[str, Any]:
    """Train a scenario whose rows are dealt as if none began alike, and computed as trees."""
    from hf_gradacc.updates import dealing_updates

    dealt = dealing_updates.deal_trees
    dealing_updates.deal_trees = lambda found, num_ranks, by_length, terms: by_length
    try:
        return train_scenario(scenario)
    finally:
        dealing_updates.deal_trees = dealt


def ask_for_what_needs_ddp_to_reduce() -> dict[str, str]:
    """Try what DDP's own reduction would have to do; give what each is answered."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    from torch.nn.parallel import DistributedDataParallel

    def hooked(trainer: Any) -> None:
        prepare = trainer.accelerator.prepare_model

        def prepare_and_hook(*args: Any, **kwargs: Any) -> Any:
            model = prepare(*args, **kwargs)
            assert isinstance(model, DistributedDataParallel)
            model.register_comm_hook(None, default_hooks.fp16_compress_hook)
            return model

        trainer.accelerator.prepare_model = prepare_and_hook

    answers = {}
    for name, options, change in (
        ("static graph", {"ddp_static_graph": True}, lambda trainer: None),
        ("hook", {}, hooked),
    ):
        with tempfile.TemporaryDirectory() as out:
            trainer = make_trainer(out, ragged_rows(4), effective_batch_size=2, **options)
            change(trainer)
            try:
                trainer.train()
                answers[name] = "trained"
            except Exception as error:
                answers[name] = f"{type(error).__name__}: {error}"
    return answers


def train_with_batch_normalization() -> dict[str, Any]:
    """Train a model whose running statistics each rank has its own of, then evaluate."""
    with tempfile.TemporaryDirectory() as out, float64_everywhere():
        model = tiny_llama()
        norm = torch.nn.BatchNorm1d(16).double()
        model.model.batch_norm = norm
        model.model.norm.register_forward_hook(
            lambda module, args, output: norm(output.transpose(1, 2)).transpose(1, 2)
        )
        options = {"effective_batch_size": 4, "per_device_train_batch_size": 1}
        rows = ragged_rows(7, seed=3)
        trainer = make_trainer(out, rows, model=model, eval_dataset=rows, **options)
        trainer.train()
        apart = norm.running_mean.clone()
        loss = trainer.evaluate()["eval_loss"]
        # Of all rows at once, by what this rank's model says with its statistics.
        alone = model.eval()(**pad(rows)).loss.item()
    return {"apart": apart, "together": norm.running_mean.clone(), "loss": loss, "alone": alone}


def count_collectives(num_rows: int) -> dict[str, int]:
    """Count what gloo carries in the second update of a run, by torch's profiler."""

    class Counted(TrainerCallback):
        def __init__(self) -> None:
            cpu = torch.profiler.ProfilerActivity.CPU
            self.profiler, self.counts = torch.profiler.profile(activities=[cpu]), {}

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                self.profiler.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                self.profiler.stop()
                events = self.profiler.key_averages()
                self.counts = {e.key: e.count for e in events if e.key.startswith("gloo:")}

    counted = Counted()
    with tempfile.TemporaryDirectory() as out:
        make_trainer(
            out,
            ragged_rows(num_rows, seed=3),
            callbacks=[counted],
            effective_batch_size=8,
            per_device_train_batch_size=1,
            logging_strategy="no",
        ).train()
    return counted.counts


def make_model(scenario: dict[str, Any]) -> Any:
    """The tiny Llama, in another dtype or with an adapter if the scenario says so."""
    model = tiny_llama(dtype=getattr(torch, scenario.get("dtype", "float64")))
    if not scenario.get("lora"):
        return model
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
        autocast_adapter_dtype=False,
    )
    return adapted.to(torch.float64)


def _note_membership(trainer: Any) -> list[tuple[int, int, tuple[int, ...]]]:
    """Let the collator of the trainer's loader note the rows of every share."""
    seen: list[tuple[int, int, tuple[int, ...]]] = []
    get_loader = trainer.get_train_dataloader

    def get_train_dataloader() -> Any:
        loader = get_loader()
        loader.updates.collate_fn.__class__ = Membership
        loader.updates.collate_fn.seen = seen
        return loader

    trainer.get_train_dataloader = get_train_dataloader
    return seen


__all__ = ["FSDP2", "pad", "scenario_rows", "train_scenario", "train_scenarios"]
