"""What a recipe may read of its surroundings: its own keys, and variables by name from a list."""

import time

import pytest

from hf_gradacc import ConfigError
from hf_gradacc.recipe.file.interpolation import READABLE_VARIABLES, escape
from hf_gradacc.recipe.file.problems import RecipeError
from hf_gradacc.recipe.load import load_recipe
from hf_gradacc.recipe.run import resolved_recipe, save_recipe

GOOD = """\
model:
  config: {model_type: llama, hidden_size: 16}
data:
  train: rows.jsonl
  format: question_answer
"""
SECRET = "hf_PLANTED"


@pytest.fixture
def load(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    for name in ("HF_TOKEN", "DATABASE_URL", "AWS_ACCESS_KEY_ID", "MY_VAR", "PATH_TO_KEYS"):
        monkeypatch.setenv(name, SECRET)

    def load(text, *overrides, **options):
        file = tmp_path / "mine.yaml"
        tokenizer = "" if "tokenizer" in text else "tokenizer: {name: gpt2}\n"
        file.write_text(GOOD + tokenizer + text)
        return load_recipe(file, overrides=overrides, **options)

    return load


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:HF_TOKEN}",
        "${oc.env:${x}}",
        "${oc.env:NOTHING,${y}}",
        "${oc.env:NOTHING,${oc.env:HF_TOKEN}}",
        "${oc.${z}:HF_TOKEN}",
        "${${z}.env:HF_TOKEN}",
        '${oc.env:"${x}"}',
        "${oc.env:'HF_TOKEN'}",
        "${oc.env: HF_TOKEN }",
        "${ oc.env : HF_TOKEN, none}",
        "${oc.env:DATABASE_URL}",
        "${oc.env:AWS_ACCESS_KEY_ID}",
        "${oc.env:MY_VAR}",
        "${oc.decode:${oc.env:HF_TOKEN}}",
        "\\\\${oc.env:HF_TOKEN}",
        "${.y}",
    ],
)
def test_no_spelling_reads_what_is_not_on_the_list(load, value):
    text = "x: HF_TOKEN\nz: oc\ny: '${oc.env:HF_TOKEN}'\n" if "y" in value else ""
    with pytest.raises(RecipeError) as caught:
        load(f"{text}wandb:\n  notes: '{value.replace(chr(39), chr(39) * 2)}'\n")
    report = str(caught.value)
    assert "wandb.notes" in report
    assert SECRET not in report


def test_a_variable_of_the_list_is_read_and_typed_and_may_have_a_default(load, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("USER", "me")
    monkeypatch.delenv("SCRATCH", raising=False)
    recipe = load(
        "train: {save_steps: '${oc.env:WORLD_SIZE}', max_steps: '${oc.env:SCRATCH,3}'}\n"
        "output: {dir: '${oc.env:SCRATCH, runs}/${oc.env:USER}-${train.save_steps}'}\n"
        "wandb: {notes: 'costs \\${oc.env:USER}'}\n"
    )
    assert recipe.train == {"save_steps": 8, "max_steps": 3, "report_to": "wandb"}
    assert recipe.output.dir == "runs/me-8"
    assert recipe.wandb.notes == "costs ${oc.env:USER}"


def test_the_caller_may_allow_more_but_no_secret(load):
    notes = "wandb: {notes: '${oc.env:MY_VAR}'}\n"
    assert load(notes, allow_env=["MY_VAR"]).wandb.notes == SECRET
    with pytest.raises(RecipeError, match="--allow-env MY_VAR"):
        load(notes)
    with pytest.raises(ConfigError, match="looks like a secret"):
        load(notes, allow_env=["HF_TOKEN"])
    assert not {name for name in READABLE_VARIABLES if "TOKEN" in name or "KEY" in name}


def test_what_came_from_the_environment_is_written_by_name(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_DIR", "plans")
    monkeypatch.setenv("MODEL_DIR", "7")
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans/rows.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    recipe = load(
        "output: {dir: 'out/${oc.env:DATA_DIR}'}\n"
        "train: {save_steps: '${oc.env:MODEL_DIR}', logging_steps: '${train.save_steps}'}\n"
        "wandb: {notes: 'it is \\${x} in ${oc.env:DATA_DIR}', tags: ['${wandb.notes}']}\n",
        "data.train=${oc.env:DATA_DIR}/rows.jsonl",
    )
    values = resolved_recipe(recipe)
    assert values["data"]["train"][0]["path"] == f"{tmp_path}/${{oc.env:DATA_DIR}}/rows.jsonl"
    assert values["output"]["dir"] == "out/${oc.env:DATA_DIR}"
    steps = "${oc.env:MODEL_DIR}"
    assert values["train"] == {"save_steps": steps, "logging_steps": steps, "report_to": "wandb"}
    assert values["wandb"]["tags"] == ["it is ${x} in ${oc.env:DATA_DIR}"]
    again = load_recipe(save_recipe(recipe, tmp_path / "saved"))
    assert again.model_dump() == recipe.model_dump()


def test_errors_say_the_variable_and_not_what_it_held(load, monkeypatch):
    monkeypatch.setenv("MODEL_DIR", "/PLANTED/place")
    monkeypatch.setenv("WORLD_SIZE", "-12345")
    with pytest.raises(RecipeError) as caught:
        load(
            "train: {max_steps: '${oc.env:WORLD_SIZE}', save_steps: '${train.max_steps}'}\n"
            "tokenizer: {name: '${oc.env:MODEL_DIR}'}\n"
            "peft: {method: '${oc.env:MODEL_DIR}', r: ['${oc.env:MODEL_DIR}']}\n"
        )
    report = str(caught.value)
    for key in (
        "train.max_steps = '${oc.env:WORLD_SIZE}'",
        "tokenizer.name = '${oc.env:MODEL_DIR}'",
    ):
        assert key in report
    assert "peft.method = '${oc.env:MODEL_DIR}'" in report
    assert "peft.r: has a wrong value" in report
    assert "PLANTED" not in report
    assert "12345" not in report


@pytest.mark.parametrize("text", ["${x}", r"\${x}", r"a\\${x}${y}$", "$ { } \\ ${", "plain"])
def test_an_escaped_text_reads_as_it_was(load, text):
    written = escape(text).replace("'", "''")
    assert load(f"wandb: {{notes: '{written}'}}\n").wandb.notes == text


def _doubled(line, count=25):
    return "".join(line.format(i=i, before=i - 1) for i in range(1, count))


BOMBS = {
    "aliases": "a0: &a0 [x, x, x, x]\n" + _doubled("a{i}: &a{i} [*a{before}, *a{before}]\n"),
    "merges": "a0: &a0 {x: 1}\n" + _doubled("a{i}: &a{i} {{<<: [*a{before}, *a{before}]}}\n"),
    "long aliases": f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 100)}]\n",
    "references": "a0: xxxx\n" + _doubled("a{i}: '${{a{before}}}${{a{before}}}'\n"),
    "sections": "a0: [x]\n" + _doubled("a{i}: ['${{a{before}}}', '${{a{before}}}']\n"),
    "levels": "a: " + "[" * 100_000,
    "values": "a: [" + "1," * 190_000 + "]\n",
    "characters": "a: '" + "word " * 100_000 + "'\n",
    "backslashes": "a: '" + "\\" * 300_000 + "'\n",
    "openings": "a: '" + "${" * 150_000 + "'\n",
    "digits": "a: " + "9" * 300_000 + "\n",
    "minutes": "a: 1" + ":59" * 100_000 + "\n",
    "a key": "a" * 100_000 + "x: 1\n",
    "a name": "a: '${" + "b" * 300_000 + "}'\n",
    "a chain": "".join(f"k{i}: '${{k{i + 1}}}'\n" for i in range(3000)),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_recipe_that_blows_up_is_one_error_within_two_seconds(load, bomb):
    started = time.process_time()
    with pytest.raises(RecipeError) as caught:
        load(BOMBS[bomb])
    assert time.process_time() - started < 2
    assert len(str(caught.value)) < 20_000


def test_code_of_a_repository_runs_only_if_the_command_line_says_so_too(load, monkeypatch):
    text = "model.trust_remote_code=true"
    assert load("", text).model.trust_remote_code  # typed by whoever starts the run
    file = GOOD.replace("16}", "16}\n  trust_remote_code: true\n  attn_implementation: me/kernel")
    monkeypatch.setitem(globals(), "GOOD", file)
    with pytest.raises(RecipeError) as caught:
        load("")
    assert [problem.key for problem in caught.value.problems] == [
        "model.trust_remote_code",
        "model.attn_implementation",
    ]
    assert "--trust-remote-code" in str(caught.value)
    assert load("", trust_remote_code=True).model.trust_remote_code
    with pytest.raises(RecipeError, match="trust_remote_code = True: runs code"):
        load("x: true\n", "model.trust_remote_code=${x}")  # typed, but decided by the file
