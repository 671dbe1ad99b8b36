"""A recipe is read strictly, and everything wrong with it is said in one report."""

import copy
import json
import textwrap
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_gradacc.recipe.file.problems import RecipeError
from hf_gradacc.recipe.keys.schema import export_schema
from hf_gradacc.recipe.load import load_recipe, recipe_arguments
from hf_gradacc.recipe.run import resolved_recipe, save_recipe

GOOD = """\
model:
  config: {model_type: llama, hidden_size: 16}
tokenizer:
  train: {vocab_size: 400}
data:
  train: rows.jsonl
  format: question_answer
train:
  learning_rate: 1e-3
  max_steps: 2
"""


@pytest.fixture
def write(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "answer": "a"}\n')

    def write_recipe(text, name="mine.yaml"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(textwrap.dedent(text))
        return file

    return write_recipe


def problems(path, *overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides=overrides)
    return caught.value.problems


def test_a_good_recipe_loads_with_paths_relative_to_its_file(write, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    recipe = load_recipe(write(GOOD))
    assert recipe.data.train[0].path == str(tmp_path / "rows.jsonl")
    assert recipe.train == {"learning_rate": 0.001, "max_steps": 2, "report_to": "none"}
    assert recipe.output.dir == "runs/mine"
    assert recipe.wandb.name == "mine"
    assert recipe_arguments(recipe, use_cpu=True).max_steps == 2


def test_an_override_path_is_relative_to_the_current_folder(write, tmp_path, monkeypatch):
    file = write(GOOD, "deep/mine.yaml")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(file, overrides=["data.train=rows.jsonl"])
    assert recipe.data.train[0].path == str(tmp_path / "rows.jsonl")
    (found,) = problems(file)
    assert (found.key, found.why) == ("data.train", "no such file")


def test_all_problems_come_in_one_report_with_file_line_key_value_and_way_out(write):
    file = write("""\
        model:
          config: {model_type: llama}
          dtyp: float32
        tokenizer:
          train: {vocab_size: 40}
        data:
          train: rows.jsonl
          format: questions
        train:
          learning_rat: 0.001
          max_steps: many
          lr_scheduler_type: cosin
        wandbb: {}
        """)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    found = [(p.origin.line, p.key, p.value) for p in caught.value.problems]
    assert found == [
        (3, "model.dtyp", "float32"),
        (5, "tokenizer.train.vocab_size", 40),
        (8, "data.format", "questions"),
        (10, "train.learning_rat", 0.001),
        (11, "train.max_steps", "many"),
        (12, "train.lr_scheduler_type", "cosin"),
        (13, "wandbb", {}),
    ]
    report = str(caught.value)
    assert report.startswith("7 problems in this recipe:")
    assert f"{file}:10: train.learning_rat = 0.001: no such key" in report
    for way_out in (
        "model.dtype?",
        "train.learning_rate?",
        "question_answer?",
        "cosine?",
        "wandb?",
    ):
        assert f"did you mean {way_out}" in report


@pytest.mark.parametrize(
    ("change", "key", "fix"),
    [
        ("learning_rate: 0.1", "learning_rate", "train.learning_rate"),
        ("lora: {r: 4}", "lora", "known keys"),
        ("train: {output_dir: here}", "train.output_dir", "output.dir"),
        ("train: {hub_token: hf_abc}", "train.hub_token", "holds no secret"),
        ("wandb: {api_key: hf_abc}", "wandb.api_key", "known keys"),
    ],
)
def test_a_key_in_the_wrong_place_is_told_the_right_one(write, change, key, fix):
    text = GOOD if not change.startswith("train") else GOOD[: GOOD.index("train:\n  learning")]
    found = problems(write(text + change + "\n"))
    assert key in {problem.key for problem in found}
    assert any(fix in problem.fix for problem in found)
    assert "hf_abc" not in str(RecipeError(found))


@pytest.mark.parametrize("folder", ["a\\0b", " "])
def test_a_folder_that_can_be_none_is_a_wrong_value(write, folder):
    (found,) = problems(write(f'{GOOD}output: {{dir: "{folder}"}}\n'))
    assert (found.key, found.why) == ("output.dir", "has a wrong value")
    assert "names no folder" in found.fix


def test_a_misspelt_section_is_one_problem_not_two(write):
    (found,) = problems(write(GOOD.replace("data:", "daat:")))
    assert found.key == "daat"
    assert "data" in found.fix


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("model: [1, 2", "YAML"),
        ("- a\n- b\n", "not a mapping"),
        ("just text", "not a mapping"),
        ("", "missing"),
        ("model: &m {a: *m}", "itself"),
        ("model: {a: 1, a: 2}", "twice"),
        ("1: 2", "not a word"),
        ("? [a, b]\n: c", "not a word"),
        ("model: !!python/object/apply:os.system ['true']", "YAML"),
        ("model: {name: '${nothing.here}'}", "nothing"),
        ("model: {name: '${oc.env:HF_TOKEN}'}", "secret"),
        ("model: {name: '${oc.create:1}'}", "calls"),
        ("model: {name: '${unclosed'}", ""),
        ("base: [a]", "not a path"),
        ("base: nowhere.yaml", "not a recipe"),
        ("base: mine.yaml", "itself"),
        ("model:\n\t- tab", "YAML"),
        ("model: null\ndata: null", ""),
    ],
)
def test_a_file_that_is_no_recipe_is_one_report(write, text, why):
    report = str(RecipeError(problems(write(text))))
    assert why in report
    assert "mine.yaml" in report


def test_a_file_that_is_not_there_or_not_text_is_one_report(tmp_path):
    assert "No such file" in str(RecipeError(problems(tmp_path / "none.yaml")))
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe\x00model")
    assert "UTF-8" in str(RecipeError(problems(tmp_path / "bin.yaml")))
    assert "directory" in str(RecipeError(problems(tmp_path)))


@pytest.mark.parametrize("override", ["nonsense", "=1", "a b=1", "train.max_steps=[1", "model=3"])
def test_an_override_that_cannot_be_is_one_report(write, override):
    assert all(p.origin.file == "command line" for p in problems(write(GOOD), override))


def test_an_override_that_cannot_be_applied_hides_no_other_problem(write):
    file = write(GOOD.replace("format:", "formt:"))
    overrides = ["train.max_steps=", "train.learning_rate=-1", "model.hidden=[1", "peft.r=${nope}"]
    found = problems(file, *overrides, "data.holdout=1.5")
    wrong = {text.partition("=")[0] for text in overrides} | {"data.formt", "data.holdout"}
    assert {p.key for p in found} == wrong


@pytest.mark.parametrize(
    ("text", "override", "key"),
    [
        (GOOD.replace("  train: rows.jsonl\n", ""), "data.train=", "data.train"),
        (GOOD, "data.train=${nothing}", "data.train"),
        (GOOD.replace("1e-3", "-1"), "train.learning_rate=", "train.learning_rate"),
        (GOOD + "  eval_strategy: steps\n  eval_steps: 1\n", "data.holdout=", "data.holdout"),
        (GOOD.replace("config: {", "confg: {"), "model.name=[1", "model.name"),
    ],
)
def test_what_an_override_that_failed_would_have_mended_is_not_reported(write, text, override, key):
    found = {p.key for p in problems(write(text), override)}
    assert found - {"model.confg"} == {key}


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.holdout=1.5"], "share below 1.0"),
        (["data.holdout=3", "data.eval=rows.jsonl"], "either `eval` or `holdout`"),
        (["data.holdout=3", "data.streaming=true"], "cannot hold rows out"),
        (["model.name=gpt2"], "either `name` or `config`"),
        (["peft.merge_on_save=true"], "nothing to merge"),
        (["model.task=seq2seq"], "cannot learn from data.format = question_answer"),
    ],
)
@pytest.mark.parametrize("fault", ["data.max_length=0", "peft.dropot=1", "train.max_steps=many"])
def test_a_contradiction_is_told_beside_a_wrong_value(
    write, tmp_path, monkeypatch, overrides, told, fault
):
    monkeypatch.chdir(tmp_path)
    found = problems(write(GOOD), *overrides, fault)
    assert any(told in f"{p.why} {p.fix}" for p in found)
    assert fault.partition("=")[0] in {p.key for p in found}


@pytest.mark.parametrize(
    "faults",
    [
        ["model.task=classificaton", "data.format=classification"],
        ["data.eval=3", "data.holdout=3"],
        ["peft.method=loar", "peft.merge_on_save=true"],
    ],
)
def test_no_contradiction_is_told_of_a_value_that_is_wrong_by_itself(
    write, tmp_path, monkeypatch, faults
):
    monkeypatch.chdir(tmp_path)
    (found,) = problems(write(GOOD), *faults)
    assert found.key == faults[0].partition("=")[0]


def test_overrides_win_over_the_file_and_null_takes_a_value_back(write):
    recipe = load_recipe(
        write(GOOD),
        overrides=["train.max_steps=null", "peft=lora", "peft.r=4", "train.eval_strategy=no"],
    )
    assert recipe_arguments(recipe, use_cpu=True).max_steps == -1
    assert (recipe.peft.method, recipe.peft.r) == ("lora", 4)
    assert recipe.train["eval_strategy"] == "no"


def test_an_override_of_the_method_keeps_the_other_keys_of_the_file(write):
    file = write(GOOD + "peft: {method: lora, r: 4}\n")
    for asked in ("peft=dora", "peft.method=dora"):
        recipe = load_recipe(file, overrides=[asked])
        assert (recipe.peft.method, recipe.peft.r) == ("dora", 4)


def test_peft_none_turns_off_all_that_a_file_says_of_it(write):
    file = write(GOOD + "peft: {method: lora, r: 4}\n", "base.yaml")
    assert load_recipe(file, overrides=["peft=none"]).peft.r == 16
    assert load_recipe(write("base: base.yaml\npeft: none\n")).peft.r == 16
    assert load_recipe(write("base: base.yaml\npeft: null\n")).peft.method == "none"


def test_an_override_from_an_unset_variable_of_the_shell_is_an_error(write):
    (found,) = problems(write(GOOD), "train.max_steps=")
    assert (found.key, found.origin.file) == ("train.max_steps", "command line")
    assert "shell" in found.why
    assert "train.max_steps=null" in found.fix


def test_a_recipe_inherits_and_its_lines_are_those_of_the_file_that_said_it(write):
    write(GOOD + "  warmup_stepz: 3\n", "base.yaml")
    file = write("base: base.yaml\ntrain:\n  max_steps: 9\n  bogus_key: 1\n")
    found = {p.key: p.origin for p in problems(file)}
    assert Path(found["train.warmup_stepz"].file).name == "base.yaml"
    assert found["train.warmup_stepz"].line == 11
    assert (Path(found["train.bogus_key"].file).name, found["train.bogus_key"].line) == (
        "mine.yaml",
        4,
    )


def test_an_interpolation_reads_another_key(write):
    recipe = load_recipe(write(GOOD + "output: {dir: 'runs/lr-${train.learning_rate}'}\n"))
    assert recipe.output.dir == "runs/lr-0.001"


def test_a_pattern_of_files_needs_no_quotes_on_a_command_line(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(write(GOOD), overrides=["data.train=*.jsonl"])
    assert [Path(source.path).name for source in recipe.data.train] == ["*.jsonl"]


@pytest.mark.parametrize(
    "text", ["output: {dir: ${x.y}}", "output: {dir: a}\nwandb: {tags: [${x}]}"]
)
def test_an_interpolation_that_yaml_takes_for_its_own_brace_is_to_be_quoted(write, text):
    (found,) = problems(write(GOOD + text + "\n"))
    assert "write ${...} in quotes" in found.fix


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["model.name=gpt2"], "either `name` or `config`"),
        (["data.eval=rows.jsonl", "data.holdout=3"], "either `eval` or `holdout`"),
        (["data.holdout=1.5"], "share below 1.0"),
        (["peft.merge_on_save=true"], "nothing to merge"),
        (["model.task=seq2seq"], "cannot learn from data.format = question_answer"),
        (["data.format=classification"], "set model.task to classification"),
        (["peft=lora", "tokenizer.add_tokens=[<new>]"], "peft.modules_to_save"),
        (["data.columns={quesion: q}"], "did you mean question?"),
        (["peft=qlora", "peft.merge_on_save=true"], "round the update away"),
    ],
)
def test_keys_that_contradict_each_other_are_reported(write, tmp_path, monkeypatch, overrides, why):
    monkeypatch.chdir(tmp_path)
    assert why in str(RecipeError(problems(write(GOOD), *overrides)))


def test_training_options_that_contradict_each_other_are_reported(write):
    found = problems(write(GOOD), "train.effective_batch_size=8", "train.tokens_per_update=9")
    (problem,) = found
    assert (problem.key, problem.value) == ("train.effective_batch_size", 8)
    assert "tokens_per_update = 9 both say how large an update is" in problem.why


def test_missing_files_and_refused_values_stand_in_the_report_of_the_schema(write):
    file = write("""\
        model:
          name: ./nowhere
          dtyp: float32
        data:
          train:
            - rows.jsonl
            - path: gone.jsonl
            - parts/*.csv
          format: question_answer
        train:
          max_steps: -5
          learning_rate: -1.0
          lr_scheduler_type: cosin
          optim: adamw_torchh
          logging_steps: 0
          warmup_steps: -3
          layout: dense
          noise_scale_every: 0
          bf16: true
          deepspeed: zero9.json
        """)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    found = [(p.origin.line, p.key, p.value) for p in caught.value.problems]
    assert found == [
        (2, "model.name", "./nowhere"),
        (3, "model.dtyp", "float32"),
        (7, "data.train[1].path", "gone.jsonl"),
        (8, "data.train[2]", "parts/*.csv"),
        (11, "train.max_steps", -5),
        (12, "train.learning_rate", -1.0),
        (13, "train.lr_scheduler_type", "cosin"),
        (14, "train.optim", "adamw_torchh"),
        (15, "train.logging_steps", 0),
        (16, "train.warmup_steps", -3),
        (17, "train.layout", "dense"),
        (18, "train.noise_scale_every", 0),
        (20, "train.deepspeed", "zero9.json"),
    ]
    assert all(problem.fix for problem in caught.value.problems)


def test_checking_a_recipe_starts_no_device(write, monkeypatch):
    from transformers import TrainingArguments

    def refuse(_self):
        raise AssertionError("a device was asked for")

    monkeypatch.setattr(TrainingArguments, "device", property(refuse))
    load_recipe(write(GOOD))


def test_a_saved_recipe_loads_to_the_same_recipe(write, tmp_path):
    recipe = load_recipe(write(GOOD), overrides=["peft=dora"])
    recipe.data.system = "it costs ${5}"
    recipe.peft.options = {"hub_token": "hf_secret"}
    saved = save_recipe(recipe, tmp_path / "out")
    assert "hf_secret" not in saved.read_text()
    again = load_recipe(saved)
    recipe.peft.options = {}
    assert again == recipe
    assert resolved_recipe(again) == resolved_recipe(recipe)


def test_the_schema_accepts_what_loads_and_refuses_a_misspelt_key():
    jsonschema = pytest.importorskip("jsonschema")
    schema = export_schema()
    json.dumps(schema)
    validator = jsonschema.Draft202012Validator(schema)
    root = Path(__file__).parents[2] / "recipes"
    for path in sorted(p for p in root.rglob("*.yaml") if p.parent.name != "sweeps"):
        values = yaml.safe_load(path.read_text())
        # YAML 1.1 as PyYAML reads it takes 1e-3 for text; OmegaConf and editors do not.
        values = json.loads(json.dumps(values), object_hook=_numbers)
        assert not list(validator.iter_errors(values)), path
    for accepted in (
        {"data": {"columns": None, "max_length": "${train.max_steps}"}, "wandb": None},
        {"peft": "dora", "data": {"train": ["a.jsonl", {"path": "b", "weight": 2}]}},
        {"train": {"eval_steps": "${train.save_steps}", "lr_scheduler_type": "cosine"}},
    ):
        assert not list(validator.iter_errors(accepted)), accepted
    for refused in (
        {"train": {"learning_rat": 1}},
        {"train": {"max_steps": "many"}},
        {"train": {"lr_scheduler_type": "cosin"}},
        {"modle": {}},
        {"model": {"dtype": "float23"}},
        {"peft": "lora2"},
        {"data": {"train": 5}},
        {"data": {"max_length": 1}},
    ):
        assert list(validator.iter_errors(refused)), refused


def test_every_key_of_the_schema_says_what_it_means():
    schema = export_schema()
    sections = [schema["properties"]["train"]["anyOf"][0], *schema["$defs"].values()]
    keys = {
        key: field for section in sections for key, field in section.get("properties", {}).items()
    }
    assert len(keys) > 150
    assert [key for key, field in keys.items() if not field.get("description")] == []


def test_null_takes_what_a_base_says_back_to_the_default(write):
    rest = "  columns: {question: q}\n  too_long: drop\n  seed: 7\n"
    text = GOOD.replace("train:\n  learning", f"{rest}train:\n  learning")
    extra = "peft: {method: lora, r: 4}\nwandb: {tags: [a], project: p}\noutput: {dir: there}\n"
    write(text + extra, "base.yaml")
    child = "base: base.yaml\ndata: {columns: null, too_long: null, seed: null}\n"
    child += "peft: {r: null}\nwandb: null\noutput: null\ntokenizer: {add_tokens: null}\n"
    recipe = load_recipe(write(child))
    assert (recipe.data.columns, recipe.data.too_long, recipe.data.seed) == ({}, "truncate", 0)
    assert (recipe.peft.method, recipe.peft.r) == ("lora", 16)
    assert (recipe.wandb.tags, recipe.wandb.project) == ([], "hf-gradacc")
    assert recipe.output.dir == "runs/mine"


def _numbers(values):
    def number(value):
        try:
            return float(value) if isinstance(value, str) else value
        except ValueError:
            return value

    fixed = {key: number(value) for key, value in values.items()}
    for key in ("eval_strategy", "save_strategy"):
        if fixed.get(key) is False:
            fixed[key] = "no"
    return fixed


FULL = {
    "model": {
        "config": {"model_type": "llama", "hidden_size": 16},
        "dtype": "float32",
        "overrides": {"attention_dropout": 0.1},
    },
    "tokenizer": {"train": {"vocab_size": 400}, "add_tokens": ["<a>"], "chat_template": "{{ 1 }}"},
    "data": {
        "train": [{"path": "rows.jsonl", "weight": 2.0}, "rows.jsonl"],
        "holdout": 0.5,
        "format": "question_answer",
        "columns": {"question": "q"},
        "max_length": 64,
        "template_options": {"enable_thinking": False},
        "document": "line",
    },
    "peft": {"method": "lora", "r": 4, "modules_to_save": ["lm_head"], "options": {"bias": "none"}},
    "train": {
        "learning_rate": 0.001,
        "max_steps": 2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "effective_batch_size": 4,
        "logging_steps": 1,
    },
    "wandb": {"tags": ["a"]},
    "output": {"dir": "out"},
}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=5,
)


def places(value, path=()):
    """Every place in a nested value, from the outside in."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from places(value[index], (*path, index))


def try_to_load(file, *overrides):
    try:
        load_recipe(file, overrides=overrides)
    except RecipeError as error:
        return str(error)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_spoilt_recipe_loads_or_is_one_report_never_anything_else(write, data):
    spoilt = copy.deepcopy(FULL)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(places(spoilt))))
        parent = spoilt
        for step in path[:-1]:
            parent = parent[step]
        action = data.draw(st.sampled_from(["drop", "misspell", "mistype", "nest"]))
        value = parent[path[-1]]
        if action == "mistype":
            parent[path[-1]] = data.draw(ANYTHING)
        elif action == "nest":
            parent[path[-1]] = data.draw(st.sampled_from([[value], {"nested": value}]))
        elif isinstance(parent, dict):
            del parent[path[-1]]
            if action == "misspell":
                parent[data.draw(st.text(min_size=1, max_size=8)) + str(path[-1])[1:]] = value
        if not list(places(spoilt)):
            break
    file = write(yaml.safe_dump(spoilt, allow_unicode=True))
    report = try_to_load(file)
    assert report is None or report.splitlines()[0].endswith("in this recipe:")


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(max_size=60), overrides=st.lists(st.text(max_size=20), max_size=2))
def test_any_text_at_all_is_one_report(write, text, overrides):
    file = write("")
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError):
        load_recipe(file, overrides=overrides)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    key=st.sampled_from([".".join(map(str, path)) for path in places(FULL)] + ["train.nothing"]),
    value=st.text(max_size=12),
)
def test_any_override_is_applied_or_is_one_report(write, key, value):
    file = write(yaml.safe_dump(FULL))
    report = try_to_load(file, f"{key}={value}")
    assert report is None or report.splitlines()[0].endswith("in this recipe:")


def test_a_key_that_a_stronger_place_turned_off_is_no_error_and_not_saved(write, tmp_path):
    rest = "  save_steps: 1\n  num_train_epochs: 2\n"
    text = GOOD.replace("  max_steps: 2\n", rest) + "peft: {method: lora, r: 4}\n"
    base = write(text.replace("_answer", "_answer\n  columns: {question: q}"), "base.yaml")
    turned = ["train.save_strategy=no", "train.max_steps=2", "peft=ia3", "data.format=chat"]
    recipe = load_recipe(base, overrides=turned)
    kept = {"learning_rate": 0.001, "save_strategy": "no", "max_steps": 2}
    assert recipe.train == {**kept, "report_to": "none"}
    assert (recipe.peft.r, recipe.data.columns) == (16, {})
    assert load_recipe(save_recipe(recipe, tmp_path / "out")) == recipe
    child = "base: base.yaml\ntrain: {save_strategy: no, max_steps: 2}\npeft: ia3\n"
    assert load_recipe(write(child)).train == recipe.train
    write(child.replace("no,", "no, warmup_steps: 1,"), "middle.yaml")
    again = load_recipe(write("base: middle.yaml\ntrain: {lr_scheduler_type: constant}\n"))
    assert "warmup_steps" not in again.train
    (found,) = problems(write(child + "wandb: {}\n").parent / "mine.yaml", "train.save_steps=3")
    assert found.key == "train.save_steps"
    assert "save_strategy" in found.why


def test_what_is_wrong_by_itself_makes_no_other_key_wrong(write):
    text = GOOD + "  eval_strategy: stepz\n  eval_steps: 2\n  lr_scheduler_type: constnt\n"
    found = problems(write(text + "  warmup_steps: 3\n"), "data.holdout=many")
    wrong = {"data.holdout", "train.eval_strategy", "train.lr_scheduler_type"}
    assert {p.key for p in found} == wrong


FORESEEN = [
    (["train.eval_strategy=steps"], "train.eval_strategy", "data.holdout"),
    (["data.streaming=true", "train.max_steps=null"], "data.streaming", "train.max_steps"),
    (
        ["train.lr_scheduler_type=warmup_stable_decay", "train.lr_decay_steps=9"],
        "train.lr_scheduler_type",
        "lr_decay_steps = 9.0 do not fit",
    ),
    (["train.optim=muon", "train.optim_args='momentun=0.9'"], "train.optim_args", "momentum"),
    (["train.lr_decay_steps=0.3"], "train.lr_decay_steps", "warmup_stable_decay"),
    (
        [
            "train.learning_rates={embed: 1e-5}",
            "train.deepspeed={optimizer: {type: AdamW}}",
        ],
        "train.learning_rates",
        "DeepSpeed makes the optimizer",
    ),
    (
        ["model.task=dpo", "data.format=preference", "dpo.discopop_tau=0.1"],
        "dpo.discopop_tau",
        "loss_type: discopop",
    ),
    (
        ["train.lr_scheduler_type=cosine", "train.lr_scheduler_kwargs={num_cycle: 2}"],
        "train.lr_scheduler_kwargs",
        "num_cycle",
    ),
    (["train.optim=sgd", "train.optim_args='momentun=0.9'"], "train.optim_args", "momentum"),
    (["train.optim=sgd", "train.optim_args='momentum=much'"], "train.optim_args", "much"),
    (["train.optim=galore_adamw"], "train.optim", "optim_target_modules"),
    (["train.seed=-1"], "train.seed", "at least 0"),
    (["train.seed=99999999999"], "train.seed", "at most 4294967295"),
    (["data.seed=-1", "data.holdout=2"], "data.seed", "greater than or equal to 0"),
    (["train.log_level=debgu"], "train.log_level", "debug"),
    (["train.torch_compile_backend=inducto"], "train.torch_compile_backend", "inductor"),
    (["model.config.hidden_size=0"], "model.config.hidden_size", "at least 1"),
    (["train.learning_rate=.inf"], "train.learning_rate", "finite"),
    (["train.warmup_steps=1.5"], "train.warmup_steps", "whole number"),
    (["train.num_train_epochs=0", "train.max_steps=null"], "train.num_train_epochs", "more than 0"),
    (
        ["train.accelerator_config={even_batchez: true}"],
        "train.accelerator_config.even_batchez",
        "even_batches",
    ),
    (
        ["data.holdout=2", "train.eval_strategy=steps", "train.metric_for_best_model=accuracy"],
        "train.metric_for_best_model",
        "loss",
    ),
    (
        ["peft=lora", "peft.options={init_lora_weights: eva}"],
        "peft.options.init_lora_weights",
        "pissa",
    ),
    (["tokenizer.train=null"], "model.config", "tokenizer.name"),
    (["model.attn_implementation=sdap"], "model.attn_implementation", "sdpa"),
    (["train.layout=shared_prefix", "train.neftune_noise_alpha=5"], "train.layout", "neftune"),
    (["train.layout=shared_prefix", "train.torch_compile=true"], "train.layout", "torch_compile"),
    (["train.layout=shared_prefix", "train.torch_compile=true"], "train.layout", "two, or set it"),
    (
        ["data.streaming=true", "train.max_steps=3", "train.group_by_prefix=true"],
        "train.group_by_prefix",
        "a stream gives them in its own order",
    ),
    (["train.layout=padded", "train.group_by_prefix=true"], "train.group_by_prefix", "'auto'"),
    (["train.fsdp=true", "train.noise_scale_every=5"], "train.noise_scale_every", "DDP"),
    (["train.fsdp=true", "peft=lora", "peft.merge_on_save=true"], "peft.merge_on_save", "fsdp"),
]


@pytest.mark.parametrize(("overrides", "key", "told"), FORESEEN, ids=lambda v: str(v)[:50])
def test_what_would_end_a_run_later_is_in_the_report(write, overrides, key, told):
    (found,) = problems(write(GOOD), *overrides)
    assert found.key == key
    assert told in f"{found.why} {found.fix}"


def test_files_of_options_start_at_the_file_that_names_them(write, tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/options.json").write_text('{"even_batches": false}')
    (tmp_path / "deep/rows.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    monkeypatch.chdir("/")
    text = GOOD + "  accelerator_config: options.json\n"
    recipe = load_recipe(write(text, "deep/mine.yaml"))
    assert recipe.train["accelerator_config"] == str(tmp_path / "deep/options.json")
    assert recipe_arguments(recipe, use_cpu=True).accelerator_config.even_batches is False
    (found,) = problems(write(text.replace("options", "option"), "deep/mine.yaml"))
    assert (found.key, found.why) == ("train.accelerator_config", "no such file")
