"""What would end a run later, and the recipe alone tells: found before anything is loaded.

The schedule and the optimizer are asked themselves: the one is built over a single weight, the
other looked up as the trainer will, with options that note which of them were read.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import re
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe.checks.idle_keys import Finding
from hf_gradacc.recipe.checks.metrics import eval_metric_names, find_metric_problem
from hf_gradacc.recipe.checks.readable import ReadableSections
from hf_gradacc.recipe.model.adapter_start import needs_data
from hf_gradacc.text import nearest

__all__ = ["find_foreseen", "packages_of_optimizer"]

_SIZES = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"),
    *("n_embd", "n_head", "n_layer", "n_positions", "d_model", "d_ff", "num_heads", "num_layers"),
}
"""Keys of model configs that are sizes in every config that has them."""


def find_foreseen(sections: ReadableSections) -> Iterator[Finding]:
    """Yield the keys that a run would fail on after it has loaded something.

    Args:
        sections: The recipe.
    """
    written = sections.source.values.get("tokenizer") or {}
    named = any(written.get(n) for n in ("name", "train")) if isinstance(written, dict) else True
    if sections.model is not None and sections.model.config is not None and not named:
        why = "makes a new model, which has no tokenizer"
        fix = "set tokenizer.train.vocab_size to train one on the data, or tokenizer.name"
        yield ("model", "config"), why, fix
    yield from _of_sizes(sections)
    yield from _of_sharding(sections)
    yield from _of_layout(sections)
    yield from _of_grouping(sections)
    yield from _of_evaluation(sections)
    yield from _of_stream(sections)
    yield from _of_words(sections)
    yield from _of_schedule(sections)
    yield from _of_optimizer(sections)
    start = None if sections.peft is None else sections.peft.options.get("init_lora_weights")
    if needs_data(start):
        why = "measures the model on rows before training, which a recipe does not do"
        fix = "use pissa or olora, or peft's own functions in a script"
        yield ("peft", "options", "init_lora_weights"), why, fix


def _of_sizes(sections: ReadableSections) -> Iterator[Finding]:
    """Sizes below 1; how they go together is asked of the model, in `sizes`."""
    for part in ("config", "overrides"):
        values = getattr(sections.model, part, None) or {}
        for name in _SIZES.intersection(values):
            value = values[name]
            if value is not None and (type(value) is not int or value < 1):
                yield ("model", part, name), "is no size", "use a whole number of at least 1"


def _of_sharding(sections: ReadableSections) -> Iterator[Finding]:
    get = sections.trains_with
    asked = [name for name in ("fsdp", "deepspeed") if get(name)]
    if asked and get("noise_scale_every") is not None:
        why = f"needs whole gradients, and train.{asked[0]} never has them"
        yield ("train", "noise_scale_every"), why, "leave it out, or run with DDP"
    if get("fsdp") and sections.peft is not None and sections.peft.merge_on_save:
        why = "merges on one rank, and under train.fsdp each holds a part of the weights"
        yield ("peft", "merge_on_save"), why, "leave it out, and merge the saved adapter with peft"


def _of_layout(sections: ReadableSections) -> Iterator[Finding]:
    """What refuses to share prefixes, whatever the model: see `why_not_shared`."""
    get = sections.trains_with
    if get("layout") != "shared_prefix":
        return
    key, fix = ("train", "layout"), "set it to padded"
    if sections.model is not None and sections.model.task == "seq2seq":
        yield (
            key,
            "needs a model in which each token sees the tokens before it alone",
            f"leave it out, or {fix}",
        )
    for name in ("neftune_noise_alpha", "torch_compile"):
        if get(name):
            yield key, f"does not go with train.{name}", f"leave out one of the two, or {fix}"


def _of_grouping(sections: ReadableSections) -> Iterator[Finding]:
    """Where rows cannot be drawn together, or would be for nothing."""
    if not sections.trains_with("group_by_prefix"):
        return
    key, fix = ("train", "group_by_prefix"), "leave it out"
    if sections.data is not None and sections.data.streaming:
        yield key, "draws rows together, and a stream gives them in its own order", fix
    if sections.model is not None and sections.model.task == "seq2seq":
        yield key, "lets rows meet that begin alike, and an encoder-decoder shares nothing", fix


def _of_evaluation(sections: ReadableSections) -> Iterator[Finding]:
    get = sections.trains_with
    if not sections.has_eval:
        asked = [("eval_strategy", get("eval_strategy") != "no")]
        asked += [(name, get(name)) for name in ("eval_on_start", "load_best_model_at_end")]
        asked += [("metric_for_best_model", get("metric_for_best_model") is not None)]
        for name, is_asked in asked:
            if is_asked and name in sections.train:
                why = "asks for an evaluation, and there are no held-out rows"
                yield ("train", name), why, "set data.eval or data.holdout, or leave it out"
        return
    metric = get("metric_for_best_model")
    is_decided = metric is not None or sections.stops_early
    if get("save_strategy") == "best" and not is_decided and "save_strategy" in sections.train:
        why = "does not say by which measure"
        yield ("train", "save_strategy"), why, "set train.metric_for_best_model: loss"
    metrics = sections.metrics
    if not isinstance(metric, str) or sections.model is None or metrics is None:
        return
    known = eval_metric_names(sections.model.task, metrics)
    if unknown := find_metric_problem(metric, known):
        yield ("train", "metric_for_best_model"), *unknown


def _of_stream(sections: ReadableSections) -> Iterator[Finding]:
    if sections.data is None or not sections.data.streaming:
        return
    if (sections.trains_with("max_steps") or -1) < 1 and not sections.is_unclear("max_steps"):
        why = "a stream does not tell how many rows it has, so nobody knows when to end"
        yield ("data", "streaming"), why, "set train.max_steps"


def _of_words(sections: ReadableSections) -> Iterator[Finding]:
    for name, known in _WORDS.items():
        value = sections.train.get(name)
        if not isinstance(value, str) or value in (words := known()):
            continue
        guess = nearest(value, words)
        fix = f"did you mean {guess}?" if guess else f"use one of {', '.join(words)}"
        yield ("train", name), "has a wrong value", fix
    attention = None if sections.model is None else sections.model.attn_implementation
    if attention is not None and "/" not in attention and attention not in _attentions():
        guess = nearest(attention, _attentions())
        fix = f"did you mean {guess}?" if guess else f"use one of {', '.join(_attentions())}"
        yield ("model", "attn_implementation"), "is no attention of transformers", fix
    options = sections.train.get("accelerator_config")
    if isinstance(options, dict):
        yield from _of_accelerator(options)


def _attentions() -> list[str]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]


def _log_levels() -> list[str]:
    from transformers.training_args import trainer_log_levels

    return list(trainer_log_levels)


def _of_accelerator(options: dict[str, Any]) -> Iterator[Finding]:
    import dataclasses

    from transformers.trainer_pt_utils import AcceleratorConfig

    known = [field.name for field in dataclasses.fields(AcceleratorConfig)]
    for name in options:
        if name not in known:
            guess = nearest(name, known)
            fix = f"did you mean {guess}?" if guess else f"known: {', '.join(known)}"
            yield ("train", "accelerator_config", name), "no such key", fix


def _compile_modes() -> list[str]:
    import torch

    return list(torch._inductor.list_mode_options())


def _compile_backends() -> list[str]:
    import torch
    from accelerate.utils import DynamoBackend

    named = [backend.value.lower() for backend in DynamoBackend]
    return sorted({*named, *torch._dynamo.list_backends(exclude_tags=())} - {"no"})


_WORDS: dict[str, Callable[[], list[str]]] = {
    "dataloader_multiprocessing_context": lambda: ["fork", "spawn", "forkserver"],
    "include_num_input_tokens_seen": lambda: ["all", "non_padding", "no"],
    "log_level": _log_levels,
    "log_level_replica": _log_levels,
    "torch_compile_backend": _compile_backends,
    "torch_compile_mode": _compile_modes,
    "train_sampling_strategy": lambda: ["random", "sequential", "group_by_length"],
}
"""Arguments that take any text by their type, and a few words by their code."""


def _of_schedule(sections: ReadableSections) -> Iterator[Finding]:
    """Build the schedule of a run of as many updates as the recipe says, or of very many."""
    from torch import nn
    from torch.optim import SGD
    from transformers import get_scheduler

    from hf_gradacc.trainer.optimizer.schedule import complete_schedule

    get = sections.trains_with
    name, options = str(get("lr_scheduler_type")), get("lr_scheduler_kwargs")
    asked = {"lr_scheduler_type", "lr_scheduler_kwargs"} & set(sections.train)
    unclear = sections.is_unclear("lr_scheduler_type") or sections.is_unclear("lr_scheduler_kwargs")
    if not asked or unclear or not isinstance(options, dict | None):
        return
    steps = int(get("max_steps") or -1)
    steps = steps if steps > 0 else 10**9
    warmup = get("warmup_steps") or 0
    warmup = int(warmup) if warmup >= 1 else math.ceil(warmup * steps)
    optimizer = SGD([nn.Parameter()], lr=1.0)
    key = "lr_scheduler_kwargs" if options else "lr_scheduler_type"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments = SimpleNamespace(lr_scheduler_type=name, lr_scheduler_kwargs=options)
            arguments.lr_decay_steps = get("lr_decay_steps")
            arguments.get_warmup_steps = lambda count: warmup
            options = complete_schedule(arguments, steps)
            schedule = get_scheduler(name, optimizer, warmup, steps, options)
            if name not in ("greedy", "reduce_lr_on_plateau"):  # they ask for a measure
                optimizer.step()
                schedule.step()
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        why = re.sub(r"^[\w.]*\(\) ", "", why)
        fix = "set train.lr_scheduler_kwargs to options of this schedule"
        yield ("train", key), f"does not make a {name} schedule ({why})", fix


_PACKAGES = {
    "torchdistx": ("adamw_anyprecision",),
    "torchao": ("adamw_torch_4bit", "adamw_torch_8bit"),
    "apollo_torch": ("apollo_",),
    "galore_torch": ("galore_",),
    "lomo_optim": ("lomo", "adalomo"),
    "grokadamw": ("grokadamw",),
    "schedulefree": ("schedule_free_",),
    "optimi": ("stable_adamw",),
    "torch_xla": ("adamw_torch_xla",),
    "torch_npu": ("adamw_torch_npu",),
    "bitsandbytes": (
        *("adamw_8bit", "adamw_bnb", "ademamix", "lion", "paged_", "rmsprop_"),
        *("adamw_apex",),
    ),
}
"""Packages that optimizers come from, and how the names of these begin."""


def packages_of_optimizer(name: str) -> str | None:
    """The package an optimizer needs beside torch and transformers; None for their own.

    >>> packages_of_optimizer("paged_adamw_8bit"), packages_of_optimizer("adamw_torch_fused")
    ('bitsandbytes', None)
    """
    for package, names in _PACKAGES.items():
        if name.startswith(names):
            return package
    return None


class _Noting(dict[str, str]):
    """Options of an optimizer that know which of them were read."""

    def __init__(self, values: dict[str, str]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.read.add(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.read.add(str(name))
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def pop(self, name: str, *default: Any) -> Any:
        self.read.add(name)
        return super().pop(name, *default)

    def keys(self) -> Any:  # whoever takes them all, reads them all
        self.read.update(self)
        return super().keys()


def _of_optimizer(sections: ReadableSections) -> Iterator[Finding]:
    from hf_gradacc.arguments import OUR_OPTIMIZERS
    from hf_gradacc.trainer.optimizer.muon import muon_options

    get = sections.trains_with
    name = str(get("optim"))
    if name.startswith(("apollo_", "galore_")) and get("optim_target_modules") is None:
        why = "projects the gradients of some layers, and nothing says of which"
        yield ("train", "optim"), why, "set train.optim_target_modules: all-linear"
    text = sections.train.get("optim_args")
    if text is None or sections.is_unclear("optim"):
        return
    pairs = [part.partition("=") for part in text.replace(" ", "").split(",") if part]
    if not all(key and equals and value for key, equals, value in pairs) or not pairs:
        yield ("train", "optim_args"), "is not a list of options", "write name=value,name=value"
        return
    if name in OUR_OPTIMIZERS:
        try:
            muon_options(text)
        except ConfigError as error:
            why = str(error).removeprefix("optim_args: ").rstrip(".")
            yield ("train", "optim_args"), why, f"correct the options of {name}"
        return
    options = _Noting({key: value for key, _, value in pairs})
    given = set(options)
    package = packages_of_optimizer(name)
    if package is not None and importlib.util.find_spec(package) is None:
        return  # it cannot be asked here
    refusal = _ask_optimizer(name, options, get)
    if refusal is not None:
        fix = f"correct the options of {name}"
        yield ("train", "optim_args"), f"does not make an optimizer ({refusal})", fix
        return
    unread = sorted(given - options.read)
    known = sorted(options.read)
    if unread:
        guess = nearest(unread[0], known)
        fix = f"did you mean {guess}?" if guess else f"it reads {', '.join(known) or 'none'}"
        why = f"optim {name} does not read {', '.join(unread)}"
        yield ("train", "optim_args"), why, fix


def _ask_optimizer(name: str, options: _Noting, get: Any) -> str | None:
    """Look an optimizer up as the trainer does; why that fails, or None."""
    from torch import nn
    from transformers import trainer_optimizer as stock
    from transformers.training_args import OptimizerNames

    handlers: Any = getattr(stock, "_OPTIMIZER_HANDLERS", None)
    if handlers is None:  # a release of another layout: the run itself will tell
        options.keys()
        return None
    read = "learning_rate adam_beta1 adam_beta2 adam_epsilon weight_decay warmup_steps"
    arguments = SimpleNamespace(**{option: get(option) for option in read.split()})
    arguments.optim_target_modules = get("optim_target_modules")
    arguments.gradient_accumulation_steps = 1
    arguments.optim = OptimizerNames(name)
    arguments.parallel_mode = None
    rates = {"lr": get("learning_rate")}
    betas = {"betas": (get("adam_beta1"), get("adam_beta2")), "eps": get("adam_epsilon")}
    context = stock.OptimizerContext(
        args=arguments, model=None, optimizer_kwargs=rates, adam_kwargs=betas, optim_args=options
    )
    try:
        kind, kwargs = handlers[arguments.optim](context)
        with contextlib.suppress(ImportError):
            if isinstance(kind, type) and "model" not in kwargs and "params" not in kwargs:
                kind([nn.Parameter()], **kwargs)
    except ImportError:
        options.keys()
    except Exception as error:
        if "model" in str(error):  # it wants to see the layers, which are not loaded
            options.keys()
            return None
        return " ".join(str(error).split()) or type(error).__name__
    return None
