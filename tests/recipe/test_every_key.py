"""Every key of a recipe changes the run, or is refused; a table says by which value, and where.

The run is what reaches the model, the tokenizer, the rows, the adapter, the training arguments and
W&B. Nothing is trained.
"""

import copy
import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
import transformers
import yaml

import hf_gradacc
from hf_gradacc import GradAccError
from hf_gradacc.data import iter_texts, load_tokenizer, prepare_data
from hf_gradacc.recipe.load import configure_wandb, load_recipe, recipe_arguments
from hf_gradacc.recipe.model import check_model
from hf_gradacc.recipe.sections import Recipe, WandbSection, train_section

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}
PLAIN = {
    "model": {"config": {"model_type": "llama", **SIZES}},
    "tokenizer": {"train": {"vocab_size": 300}},
    "data": {"train": "rows.jsonl", "format": "question_answer"},
    "train": {"use_cpu": True, "report_to": "none"},
}
NAMED = {"model.config": None, "model.name": "base", "tokenizer.train": None}
T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 8, "num_layers": 1}
LORA = {"peft.method": "lora"}
SEQ2SEQ = {
    **{"model.task": "seq2seq", "model.config": T5},
    **{"data.format": "seq2seq", "data.columns": {"source": "question", "target": "answer"}},
}
MIX = {"data.train": ["rows.jsonl", "more.jsonl"]}
HELD = {"data.eval": "more.jsonl"}

CASES = {
    "model.name": ("base", {"model.config": None, "tokenizer.train": None}),
    "model.config": ({"model_type": "llama", **SIZES, "num_hidden_layers": 2}, {}),
    "model.overrides": ({"rms_norm_eps": 1e-3}, NAMED),
    "model.task": (
        "seq2seq",
        {key: value for key, value in SEQ2SEQ.items() if key != "model.task"},
    ),
    "model.revision": ("v2", {}),
    "model.dtype": ("bfloat16", {}),
    "model.attn_implementation": ("eager", {}),
    "model.trust_remote_code": (True, {}),
    "tokenizer.name": ("base", {"tokenizer.train": None}),
    "tokenizer.train": ({"vocab_size": 310}, {}),
    "tokenizer.train.vocab_size": (310, {}),
    "tokenizer.chat_template": ("zephyr", {"tokenizer.eos_token": "<|end|>"}),
    "tokenizer.pad_token": ("<|user|>", {}),
    "tokenizer.eos_token": ("<|user|>", {}),
    "tokenizer.add_tokens": (["<new>"], {}),
    "data.train": ("more.jsonl", {}),
    "data.eval": ("more.jsonl", {}),
    "data.holdout": (2, {}),
    "data.format": ("text", {"data.columns": {"text": "question"}}),
    "data.columns": ({"question": "answer"}, {}),
    "data.document": ("line", {"data.train": "text.md", "data.format": "text"}),
    "data.system": ("Be brief.", {}),
    "data.template_options": (
        {"shout": True},
        {
            "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{{ eos_token }}"
            "{% if shout %}!{% endif %}{% endfor %}"
        },
    ),
    "data.assistant_turns": ("last", {"data.train": "chats.jsonl", "data.format": "chat"}),
    "data.roles_to_train": (["user", "assistant"], {}),
    "data.source_prefix": ("summarize: ", SEQ2SEQ),
    "data.max_length": (6, {}),
    "data.max_target_length": (2, SEQ2SEQ),
    "data.too_long": ("drop", {"data.max_length": 6}),
    "data.unusable": ("drop", {"data.train": "bad.jsonl"}),
    "data.mix": ("first_exhausted", MIX),
    "data.streaming": (True, {"train.max_steps": 2}),
    "data.num_proc": (2, {}),
    "data.seed": (3, MIX),
    "data.train[0].path": ("more.jsonl", MIX),
    "data.train[0].name": ("part", MIX),
    "data.train[0].split": ("train[:2]", MIX),
    "data.train[0].revision": ("v2", MIX),
    "data.train[0].weight": (9.0, MIX),
    "data.train[0].format": ("text", {**MIX, "data.columns": {"text": "question"}}),
    "data.train[0].columns": ({"question": "answer"}, MIX),
    "peft.method": ("lora", {}),
    "peft.r": (4, LORA),
    "peft.alpha": (4, LORA),
    "peft.dropout": (0.5, LORA),
    "peft.target_modules": (["q_proj"], LORA),
    "peft.modules_to_save": (["lm_head"], LORA),
    "peft.num_virtual_tokens": (4, {"peft.method": "prompt_tuning"}),
    "peft.merge_on_save": (True, LORA),
    "peft.options": ({"use_rslora": True}, LORA),
    "wandb.project": ("p", {}),
    "wandb.name": ("n", {}),
    "wandb.entity": ("e", {}),
    "wandb.group": ("g", {}),
    "wandb.tags": (["t"], {}),
    "wandb.notes": ("words", {}),
    "wandb.per_rank": (True, {}),
    "wandb.report": (True, {}),
    "wandb.mode": ("offline", {}),
    "output.dir": ("there", {}),
    "output.overwrite": (True, {}),
}
"""For each key a value that is not its default, and what else the recipe says."""

TURNS = [{"role": r, "content": f"{r} {i}"} for i in (1, 2) for r in ("user", "assistant")]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    words = [
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "all",
        "of",
        "them",
    ]
    rows = [{"question": f"{i} + {i}?", "answer": " ".join(words[i:])} for i in range(6)]
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "more.jsonl", [{"question": f"{i}?", "answer": "no"} for i in range(4)])
    write_rows(folder / "bad.jsonl", [*rows, {"question": None, "answer": "x"}])
    write_rows(folder / "chats.jsonl", [{"messages": TURNS}])
    (folder / "text.md").write_text("one line\nand another\n\na paragraph\n")
    recipe = make(folder, PLAIN, {})
    tokenizer = load_tokenizer(recipe.tokenizer, model=recipe.model, texts=iter_texts(recipe.data))
    tokenizer.save_pretrained(folder / "base")
    config = transformers.LlamaConfig(**SIZES, vocab_size=320)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    return folder


@pytest.fixture(autouse=True)
def _alone(here, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", here / "cache")
    monkeypatch.chdir(here)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(folder, values, changes):
    """Load a recipe with changes, by their dotted keys."""
    values, changes = copy.deepcopy((values, changes))
    for key, value in changes.items():
        at = values
        *path, last = re.findall(r"\w+", key)
        for step in path:
            if isinstance(at, list):
                at[int(step)] = at = (
                    {"path": at[int(step)]} if isinstance(at[int(step)], str) else at[int(step)]
                )
            else:
                at = at.setdefault(step, {})
        at[last] = value
    (folder / "mine.yaml").write_text(yaml.safe_dump(values))
    return load_recipe(folder / "mine.yaml", trust_remote_code=True)


def resolve(recipe, monkeypatch):
    """All that reaches a run."""
    with monkeypatch.context() as patch:
        for name in ("PROJECT", "ENTITY", "RUN_GROUP", "TAGS", "NOTES", "MODE"):
            patch.setenv(f"WANDB_{name}", "x")  # to be undone, whatever is set
            patch.delenv(f"WANDB_{name}")
        configure_wandb(recipe)
        environment = {name: v for name, v in os.environ.items() if name.startswith("WANDB_")}
    tokenizer = load_tokenizer(recipe.tokenizer, model=recipe.model, texts=iter_texts(recipe.data))
    model = check_model(recipe.model, recipe.peft, tokenizer=tokenizer)
    data = prepare_data(recipe.data, tokenizer=tokenizer)
    adapter = getattr(model, "peft_config", {}).get("default")
    return {
        "model": (type(model).__name__, model.config.to_dict(), str(model.dtype)),
        "attention": model.config._attn_implementation,
        "tokenizer": (tokenizer.get_vocab(), tokenizer.special_tokens_map, tokenizer.chat_template),
        "rows": (type(data.train).__name__, [dict(row) for row in data.train]),
        "held out": None if data.eval is None else [dict(row) for row in data.eval],
        "adapter": None if adapter is None else dataclasses.asdict(adapter),
        "arguments": recipe_arguments(recipe).to_dict(),
        "W&B": environment,
        "saving": (recipe.peft.merge_on_save, recipe.output.overwrite, recipe.data.num_proc),
    }


def outcome(here, changes, monkeypatch):
    """What reaches the run; or what it was refused for."""
    try:
        return resolve(make(here, PLAIN, changes), monkeypatch)
    except GradAccError as error:
        return str(error)


def keys_of_schema():
    """All keys but those of `train`, dotted."""
    for section, field in Recipe.model_fields.items():
        kind = field.annotation
        for name in {} if section == "train" else _fields(kind):
            yield f"{section}.{name}"
            inner = Recipe.model_fields[section].annotation
            inner = getattr(inner, "model_fields", {}).get(name)
            for deeper in _fields(None if inner is None else inner.annotation):
                of_source = "[0]" if section == "data" else ""
                yield f"{section}.{name}{of_source}.{deeper}"


def _fields(hint):
    from hf_gradacc.recipe.checks import _section_in

    section = _section_in(hint)
    return {} if section is None else section.model_fields


def test_the_table_has_every_key():
    keys = {key for key in keys_of_schema() if not key.startswith("data.eval[")}  # as of train
    assert keys == set(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("key", CASES)
def test_a_key_changes_the_run_or_is_refused(here, monkeypatch, key):
    value, context = CASES[key]
    before = outcome(here, context, monkeypatch)
    after = outcome(here, {**context, key: value}, monkeypatch)
    assert after != before
    if isinstance(after, str):
        assert re.split(r"[.\[]", key)[-1] in after, after


NEED_OTHERS = {key for key, (_, context) in CASES.items() if context} - {"data.unusable"}
"""What happens to a row that cannot be read shows where there is one."""


@pytest.mark.parametrize("key", sorted(NEED_OTHERS))
def test_a_key_that_needs_another_is_refused_without_it_or_changes_the_run(here, monkeypatch, key):
    plain = {"data.train": ["rows.jsonl"]} if "[0]" in key else {}
    after = outcome(here, {**plain, key: CASES[key][0]}, monkeypatch)
    if not isinstance(after, str):
        assert after != outcome(here, plain, monkeypatch)


# ---- train -------------------------------------------------------------------------------------
EVALUATES = {"data.eval": "more.jsonl", "train.eval_strategy": "steps"}
WORKERS = {"train.dataloader_num_workers": 1}
PUSHES = {"train.push_to_hub": True}
ARGUMENTS = {
    "activation_checkpointing_kwargs": (
        {"use_reentrant": False},
        {"train.activation_checkpointing": True},
    ),
    "gradient_checkpointing_kwargs": (
        {"use_reentrant": False},
        {"train.activation_checkpointing": True},
    ),
    "accelerator_config": ({"even_batches": False}, {}),
    "adam_beta1": (0.5, {}),
    "adam_beta2": (0.5, {}),
    "bf16": (True, {}),
    "chunked_loss": (True, {}),
    "dataloader_pin_memory": (False, {"train.use_cpu": False}),
    "dataloader_multiprocessing_context": ("spawn", WORKERS),
    "dataloader_persistent_workers": (True, WORKERS),
    "dataloader_prefetch_factor": (3, WORKERS),
    "debug": ("underflow_overflow", {}),
    "ddp_backend": ("gloo", {}),
    "disable_tqdm": (False, {}),
    "loss_is_mean_over": ("tokens", {}),
    "low_precision_updates": ("plain", {}),
    "deepspeed": ("none.json", {}),
    "eval_delay": (3, EVALUATES),
    "eval_on_start": (True, EVALUATES),
    "eval_steps": (3, EVALUATES),
    "eval_strategy": ("epoch", HELD),
    "fsdp": (True, {}),
    "fsdp_config": ({"version": 2}, {}),
    "greater_is_better": (True, {**EVALUATES, "train.metric_for_best_model": "loss"}),
    "hub_model_id": ("me/model", PUSHES),
    "hub_revision": ("main", PUSHES),
    "include_for_metrics": (["loss"], {}),
    "include_num_input_tokens_seen": ("all", {}),
    "label_names": (["labels"], {}),
    "label_smoothing_factor": (0.1, {}),
    "liger_kernel_config": ({"rope": True}, {}),
    "load_best_model_at_end": (True, {**EVALUATES, "train.eval_steps": 500}),
    "log_level": ("info", {}),
    "log_level_replica": ("info", {}),
    "lr_scheduler_kwargs": ({"num_cycles": 2}, {"train.lr_scheduler_type": "cosine"}),
    "max_skipped_updates_in_a_row": (3, {"train.on_non_finite": "skip"}),
    "max_tokens_per_micro_batch": (64, {}),
    "metric_for_best_model": ("loss", EVALUATES),
    "optim": ("sgd", {}),
    "optim_args": ("momentum=0.9", {"train.optim": "sgd"}),
    "optim_target_modules": ("all-linear", {}),
    "per_device_eval_batch_size": (3, EVALUATES),
    "remember_tuned_budget": (True, {"train.max_tokens_per_micro_batch": "auto"}),
    "report_to": ("tensorboard", {}),
    "resume_from_checkpoint": ("base", {}),
    "save_strategy": ("epoch", {}),
    "seed": (3, {}),
    "data_seed": (3, {}),
    "tokens_per_update": (64, {}),
    "torch_compile_backend": ("eager", {}),
    "torch_compile_mode": ("default", {}),
    "trackio_bucket_id": ("b", {}),
    "trackio_space_id": ("s", {}),
    "trackio_static_space_id": ("s", {}),
    "train_sampling_strategy": ("sequential", {}),
}
"""Values of arguments that cannot be told by their type alone."""

ELSEWHERE = {"tf32": "needs a newer GPU", "use_liger_kernel": "liger_kernel", "fp16": ""}
ELSEWHERE |= {"fsdp": "several processes", "push_to_hub": ""}


def other_value(field):
    """A value of a field's type that is not its default."""
    default = field.default if field.default is not dataclasses.MISSING else None
    hint = str(field.type)
    if "Literal" in hint or "Strategy" in hint or "SchedulerType" in hint:
        known = {"lr_scheduler_type": "cosine", "logging_strategy": "epoch", "hub_strategy": "end"}
        known |= {"incomplete_update": "drop", "update_passes": 1}
        known |= {"layout": "packed", "on_non_finite": "skip"}
        return known[field.name]
    if "bool" in hint:
        return not default
    if "int" in hint:
        return (default or 1) + 1
    if isinstance(default, str):
        return "other"
    return (default or 0.0) + 0.5


def arguments_with(here, changes):
    try:
        return recipe_arguments(make(here, PLAIN, changes), elsewhere=True).to_dict()
    except GradAccError as error:
        return str(error)


FIELDS = {field.name: field for field in dataclasses.fields(hf_gradacc.GradAccArguments)}
NAMES = sorted(set(train_section().model_fields) & set(FIELDS))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")
@pytest.mark.parametrize("name", NAMES)
def test_an_argument_changes_the_arguments_or_is_refused(here, name):
    value, context = ARGUMENTS.get(name) or (other_value(FIELDS[name]), {})
    if name == "use_cpu":
        value = False
    before = arguments_with(here, context)
    assert not isinstance(before, str) or "push_to_hub" in str(context), before
    after = arguments_with(here, {**context, f"train.{name}": value})
    assert after != before
    if isinstance(after, str) and name not in ELSEWHERE:
        assert f"train.{name}" in after, after


READ_IN = (
    "trainer*.py",
    "training_args.py",
    "integrations/*.py",
    "modelcard.py",
    "generation/*.py",
)


def test_an_argument_that_is_accepted_is_read_by_someone(here):
    package = Path(transformers.__file__).parent
    files = [file for pattern in READ_IN for file in package.glob(pattern)]
    files += Path(hf_gradacc.__file__).parent.glob("[!r]*/**/*.py")
    files.append(Path(hf_gradacc.__file__).parent / "arguments.py")
    text = "\n".join(file.read_text() for file in files)
    read = set(re.findall(r"(?:args|arguments)\.(\w+)", text))
    read |= set(re.findall(r"self\.(?!args\b)(\w+)\b(?! = )", text))
    read |= set(re.findall(r"getattr\(\w+, \"(\w+)\"", text))
    read |= {"drop_attention_mask"}  # asked for in a loop over such names, in `loss/shortcuts`
    unread = []
    for name in NAMES:
        value, context = ARGUMENTS.get(name) or (other_value(FIELDS[name]), {})
        if name not in read and not isinstance(
            arguments_with(here, {**context, f"train.{name}": value}), str
        ):
            unread.append(name)
    assert not unread, unread


def test_keys_of_wandb_are_all_in_the_table():
    assert {f"wandb.{name}" for name in WandbSection.model_fields} <= set(CASES)
