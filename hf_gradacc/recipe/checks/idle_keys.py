"""Keys of `model`, `tokenizer`, `data`, `peft` and `dpo` that change nothing as a recipe stands.

Whoever writes `peft: {r: 8}` wants LoRA, and gets a full fine-tune if nobody says that the method
is missing. So a key that nothing reads is an error. One that repeats its default is not: the recipe
that a run saves spells all of them out. Those of `train` are in `idle_arguments`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hf_gradacc.data.files import LOADERS, ending_of, local_files
from hf_gradacc.data.section import FORMAT_COLUMNS, OPTIONAL_COLUMNS, Format, SourceSection
from hf_gradacc.errors import DataError
from hf_gradacc.recipe.checks.readable import ReadableSections, differs
from hf_gradacc.recipe.file.problems import Key

__all__ = ["Finding", "find_idle_keys"]

Finding = tuple[Key, str, str]
"""A key, why it has no effect, and what to do. The texts name the keys it depends on in full."""

_DIALOGUES: set[Format] = {"chat", "instruction", "question_answer", "prompt_completion"}

_READ_BY: dict[str, set[Format]] = {
    "assistant_turns": _DIALOGUES,
    "max_target_length": {"seq2seq"},
    "roles_to_train": {*_DIALOGUES, "preference"},
    "source_prefix": {"seq2seq"},
    "system": {*_DIALOGUES, "preference"},
    "template_options": {*_DIALOGUES, "preference"},
}
"""Which formats read a key of `data`; all of them, if it is not here."""

_MORE_COLUMNS: dict[Format, set[str]] = {
    "prompt_completion": {"tools", "system", "chat_template_kwargs"},
    "instruction": {"chat_template_kwargs"},
    "question_answer": {"chat_template_kwargs"},
}
"""Columns that some rows of a format may have, beside those of `OPTIONAL_COLUMNS`."""

_OF_TOKENIZER = ("bos_token_id", "eos_token_id", "pad_token_id")
_OF_CLASSES = ("num_labels", "id2label", "label2id", "problem_type")
_OF_MODEL = {
    "dtype": "model.dtype",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attn_implementation",
    "_attn_implementation": "model.attn_implementation",
    "use_cache": "train.use_cache",
    "name_or_path": "model.name",
    "_name_or_path": "model.name",
}

_METHODS = {
    "r": ("lora", "dora", "qlora"),
    "alpha": ("lora", "dora", "qlora"),
    "dropout": ("lora", "dora", "qlora"),
    "target_modules": ("lora", "dora", "qlora", "ia3"),
    "modules_to_save": ("lora", "dora", "qlora", "ia3"),
    "num_virtual_tokens": ("prompt_tuning", "prefix_tuning"),
}
"""Which methods of peft read a key."""

_PEFT_OWN = {"lora_alpha": "alpha", "lora_dropout": "dropout"}
"""Fields of peft's config that the section has under another name."""

_NOT_OPTIONS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version"),
    *("revision", "task_type"),
}


def find_idle_keys(sections: ReadableSections) -> Iterator[Finding]:
    """Yield the keys that nothing reads.

    Args:
        sections: The recipe.
    """
    yield from _of_model(sections)
    yield from _of_tokenizer(sections)
    yield from _of_data(sections)
    yield from _of_sources(sections)
    yield from _of_peft(sections)
    yield from _of_dpo(sections)


def _of_model(sections: ReadableSections) -> Iterator[Finding]:
    model, tokenizer = sections.model, sections.tokenizer
    if model is None:
        return
    is_local = ("model", "name") in sections.paths
    if model.revision is not None and (is_local or model.config is not None):
        why = "names a version on the hub, and the model does not come from there"
        yield ("model", "revision"), why, "leave it out"
    names_tokenizer = tokenizer is None or tokenizer.name is not None
    if model.trust_remote_code and model.config is not None and not names_tokenizer:
        why = "model.config makes a model of transformers' own code"
        yield ("model", "trust_remote_code"), why, "leave it out"
    both = set(model.config or {}) & set(model.overrides)
    for part, values in (("config", model.config or {}), ("overrides", model.overrides)):
        for name in values:
            key = ("model", part, name)
            if name in _OF_TOKENIZER and (part == "config" or name == "pad_token_id"):
                yield key, "is taken from the tokenizer", "set tokenizer.eos_token or pad_token"
            elif name in _OF_CLASSES:
                yield key, "is decided by the labels of the data", "leave it out"
            elif name in _OF_MODEL:
                yield key, "is set elsewhere", f"set {_OF_MODEL[name]}"
            elif name == "model_type" and part == "overrides":
                yield key, "another type of model has other weights", "set model.name"
            elif name in both and part == "config":
                why = f"model.overrides.{name} is set, too"
                yield key, why, "keep one of them"


def _of_tokenizer(sections: ReadableSections) -> Iterator[Finding]:
    tokenizer = sections.tokenizer
    if tokenizer is None:
        return
    if tokenizer.name is not None and tokenizer.train is not None:
        why = "tokenizer.train makes a new one, so this one would not be read"
        yield ("tokenizer", "name"), why, "keep one of the two; set the other to null"
    twice = {token for token in tokenizer.add_tokens if tokenizer.add_tokens.count(token) > 1}
    if twice:
        why = f"names {', '.join(sorted(twice))} twice"
        yield ("tokenizer", "add_tokens"), why, "leave the second out"


def _of_data(sections: ReadableSections) -> Iterator[Finding]:
    data = sections.data
    if data is None:
        return
    formats = {source.format or data.format for _, source, _ in sections.sources}
    named = " and ".join(sorted(formats))
    for name, readers in _READ_BY.items():
        if differs(data, name) and not formats & readers:
            fix = f"leave it out, or use data.format {' or '.join(sorted(readers))}"
            yield ("data", name), f"is not read by data.format {named}", fix
    own = [source for _, source, _ in sections.sources]
    for name in ("format", "columns"):
        if differs(data, name) and all(getattr(source, name) is not None for source in own):
            why = f"every source has {name} of its own"
            yield ("data", name), why, "leave it out"
    has_limit = data.max_length is not None or data.max_target_length is not None
    if differs(data, "too_long") and (not has_limit or formats == {"text"}):
        why = "text is cut into blocks, which are never too long"
        why = "nothing is too long without data.max_length" if not has_limit else why
        yield ("data", "too_long"), why, "set data.max_length" if not has_limit else "leave it out"
    is_mix = len(data.train) > 1
    if differs(data, "mix") and not is_mix:
        yield ("data", "mix"), "data.train is one source, which is no mix", "leave it out"
    if differs(data, "seed") and not is_mix and data.holdout is None:
        why = "decides about data.holdout and the order of a mix, and there is neither"
        yield ("data", "seed"), why, "set train.seed for the order of rows"
    if data.num_proc is not None and data.streaming:
        why = "a stream is read while training, by the loader"
        yield ("data", "num_proc"), why, "set train.dataloader_num_workers"
    if differs(data, "document") and not any(map(_has_text, sections.sources)):
        why = "says what a document is in txt and md files, and no source has any"
        yield ("data", "document"), why, "leave it out"


def _has_text(source: tuple[Key, SourceSection, str | None]) -> bool:
    _, section, place = source
    if place is None:
        return False
    try:
        files = local_files(section.model_copy(update={"path": place}))
    except (DataError, OSError, ValueError, KeyError):  # reading it will tell
        files = [Path(place)]
    return any(LOADERS.get(ending_of(file)) == "text" for file in files)


def _of_sources(sections: ReadableSections) -> Iterator[Finding]:
    data = sections.data
    if data is None:
        return
    for key, source, place in sections.sources:
        for name in ("name", "revision") if place is not None else ():
            if getattr(source, name) is not None:
                why = "belongs to a set of the hub, and this one lies on this machine"
                yield (*key, name), why, "leave it out"
        if differs(source, "weight") and (key[1] == "eval" or len(data.train) == 1):
            is_held = key[1] == "eval"
            why = "held-out rows are all read" if is_held else "data.train is one source"
            why = f"is a share of a mix: {why}"
            yield (*key, "weight"), why, "leave it out"
        if source.columns is not None:
            yield from _of_columns(
                (*key, "columns"), source.columns, {source.format or data.format}
            )
    shared = {s.format or data.format for _, s, _ in sections.sources if s.columns is None}
    if shared:
        yield from _of_columns(("data", "columns"), data.columns, shared)


def _of_columns(key: Key, columns: dict[str, str], formats: set[Format]) -> Iterator[Finding]:
    read = {
        name
        for format in formats
        for names in (FORMAT_COLUMNS[format], OPTIONAL_COLUMNS.get(format, ()))
        for name in (*names, *_MORE_COLUMNS.get(format, ()))
    }
    for name, column in columns.items():
        if name not in read and name != column:
            why = f"is no column of data.format {' and '.join(sorted(formats))}"
            yield (*key, name), why, f"it reads {', '.join(sorted(read))}"


def _of_peft(sections: ReadableSections) -> Iterator[Finding]:
    peft, written = sections.peft, sections.source.values.get("peft")
    if peft is None or not isinstance(written, dict):
        return
    given = [name for name, value in written.items() if value is not None and name != "method"]
    if written.get("method") is None and given:
        why = "no method is set, so the whole model would be trained"
        for name in given:
            yield ("peft", name), why, "add peft.method: lora, or leave it out"
        return
    for name, methods in _METHODS.items():
        if differs(peft, name) and peft.method not in methods:
            fix = f"leave it out; it belongs to {', '.join(methods)}"
            yield ("peft", name), f"is not read by peft.method {peft.method}", fix
    if peft.options and peft.method == "none":
        yield ("peft", "options"), "is not read by peft.method none", "leave it out"
    for name in peft.options:
        own = _PEFT_OWN.get(name, name)
        if own in _METHODS and peft.method in _METHODS[own]:
            why = f"peft.{own} says it already"
            yield ("peft", "options", name), why, f"set peft.{own}"
        elif name in _NOT_OPTIONS:
            why = "is peft's own note about an adapter, not an option"
            yield ("peft", "options", name), why, "leave it out"


def _of_dpo(sections: ReadableSections) -> Iterator[Finding]:
    dpo = sections.dpo
    if dpo is None:
        return
    smoothed = {"robust", "exo_pair", "aot", "aot_unpaired"}
    conditions = [
        (
            "label_smoothing",
            smoothed & {*dpo.loss_type},
            f"loss_type: {' or '.join(sorted(smoothed))}",
        ),
        ("discopop_tau", "discopop" in dpo.loss_type, "loss_type: discopop"),
        (
            "f_alpha_divergence_coef",
            dpo.f_divergence_type == "alpha_divergence",
            "f_divergence_type: alpha_divergence",
        ),
        (
            "precompute_ref_batch_size",
            dpo.precompute_ref_log_probs,
            "precompute_ref_log_probs: true",
        ),
        ("ref_model_mixup_alpha", dpo.sync_ref_model, "sync_ref_model: true"),
        ("ref_model_sync_steps", dpo.sync_ref_model, "sync_ref_model: true"),
    ]
    for name, is_read, needs in conditions:
        if differs(dpo, name) and not is_read:
            yield ("dpo", name), f"is read with dpo.{needs} alone", "set that, or leave it out"
