"""Every key of a recipe changes the run, or is refused; a table says by which value, and where.

The run is what reaches the model, the tokenizer, the rows, the adapter, the training arguments and
W&B. Nothing is trained.
"""

import dataclasses
import os
import re
from pathlib import Path

import pytest
import transformers
from support.every_key import ARGUMENTS, CASES, PLAIN, make, make_folder, other_value, resolve

import hf_gradacc
from hf_gradacc import GradAccError
from hf_gradacc.recipe.keys.sections import Recipe, WandbSection, train_section
from hf_gradacc.recipe.load import recipe_arguments


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    make_folder(folder)
    return folder


@pytest.fixture(autouse=True)
def _alone(here, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", here / "cache")
    monkeypatch.chdir(here)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def outcome(here, changes):
    """What reaches the run; or what it was refused for."""
    try:
        return resolve(make(here, PLAIN, changes))
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
    from hf_gradacc.recipe.checks.checks import _section_in

    section = _section_in(hint)
    return {} if section is None else section.model_fields


def test_the_table_has_every_key():
    keys = {key for key in keys_of_schema() if not key.startswith("data.eval[")}  # as of train
    assert keys == set(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("key", CASES)
def test_a_key_changes_the_run_or_is_refused(here, key):
    value, context = CASES[key]
    before = outcome(here, context)
    after = outcome(here, {**context, key: value})
    assert after != before
    if isinstance(after, str):
        assert re.split(r"[.\[]", key)[-1] in after, after


NEED_OTHERS = {key for key, (_, context) in CASES.items() if context} - {"data.unusable"}
"""What happens to a row that cannot be read shows where there is one."""


@pytest.mark.parametrize("key", sorted(NEED_OTHERS))
def test_a_key_that_needs_another_is_refused_without_it_or_changes_the_run(here, key):
    plain = {"data.train": ["rows.jsonl"]} if "[0]" in key else {}
    after = outcome(here, {**plain, key: CASES[key][0]})
    if not isinstance(after, str):
        assert after != outcome(here, plain)


# ---- train -------------------------------------------------------------------------------------
ELSEWHERE = {"tf32": "needs a newer GPU", "use_liger_kernel": "liger_kernel", "fp16": ""}
ELSEWHERE |= {"fsdp": "several processes", "push_to_hub": ""}


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
