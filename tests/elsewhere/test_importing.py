"""`hf-gradacc import`: what other tools' files say is what the recipe says, or a note tells."""

import sys

import pytest
import yaml
from support import other_tools as shapes

from hf_gradacc.elsewhere.axolotl import AXOLOTL as AXOLOTL_KEYS
from hf_gradacc.elsewhere.draft import is_recipe_key, show_value
from hf_gradacc.elsewhere.importing import import_file
from hf_gradacc.elsewhere.llamafactory import LLAMAFACTORY as LLAMAFACTORY_KEYS
from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe.file.reading import read_yaml
from hf_gradacc.recipe.load import load_recipe

CASES = {f"Axolotl: {name}": shape for name, shape in shapes.AXOLOTL.items()}
CASES |= {f"LLaMA-Factory: {name}": shape for name, shape in shapes.LLAMAFACTORY.items()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    (tmp_path / "mine.jsonl").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(shapes.INFO)
    (tmp_path / "data" / "mine.jsonl").touch()
    return tmp_path


def look_up(values, key):
    for part in key.split("."):
        values = values[part]
    return values


@pytest.mark.parametrize("name", CASES)
def test_a_file_becomes_a_recipe_that_means_the_same(folder, name):
    shape = CASES[name]
    (folder / "theirs.yml").write_text(shape.text)
    out = folder / "mine.yaml"
    imported = import_file(folder / "theirs.yml", out, world_size=shape.world_size)
    assert imported.tool == name.partition(":")[0]
    values, _ = read_yaml(out)
    assert {key: look_up(values, key) for key in shape.expected} == shape.expected
    assert {note.key for note in imported.notes if note.changes} == shape.changing
    noted = {note.key for note in imported.notes if not note.changes}
    assert shape.unchanged <= noted
    assert [problem.key for problem in imported.problems] == list(shape.refused)
    for note in imported.notes:
        assert f"{note.key}: {note.value}\n" in imported.text
    left = sum(not note.carried for note in imported.notes)
    assert f"# {left} key" in imported.text


@pytest.mark.parametrize(
    ("text", "task", "beta"),
    [
        (shapes.SMALL + "rl: dpo\nrl_beta: 0.2\ndatasets: [{path: a/b}]\n", "dpo", 0.2),
        (shapes.START.replace("sft", "dpo") + "dataset: pairs\npref_beta: 0.3\n", "dpo", 0.3),
        (shapes.START.replace("sft", "rm") + "dataset: pairs\n", "reward", None),
    ],
)
def test_pairs_are_trained(folder, text, task, beta):
    (folder / "theirs.yml").write_text(text)
    assert import_file(folder / "theirs.yml", folder / "mine.yaml").problems == []
    values, _ = read_yaml(folder / "mine.yaml")
    assert (values["model"]["task"], values["data"]["format"]) == (task, "preference")
    assert values.get("dpo", {}).get("beta") == beta


def test_there_are_twenty_three_shapes():
    assert len(CASES) == 23


@pytest.mark.parametrize("name", CASES)
def test_no_key_of_a_file_is_lost_in_silence(folder, name):
    """Each key is in the table with a target, or a note tells of it."""
    shape = CASES[name]
    (folder / "theirs.yml").write_text(shape.text)
    imported = import_file(folder / "theirs.yml", folder / "mine.yaml")
    table = AXOLOTL_KEYS if imported.tool == "Axolotl" else LLAMAFACTORY_KEYS
    noted = {note.key for note in imported.notes}
    for key, value in yaml.safe_load(shape.text).items():
        known = key in table and (table[key].target or table[key].read)
        stock = imported.tool == "LLaMA-Factory" and is_recipe_key(f"train.{key}")
        assert known or stock or key in noted or value is False, key


@pytest.mark.parametrize("table", [AXOLOTL_KEYS, LLAMAFACTORY_KEYS], ids=["axolotl", "factory"])
def test_every_target_of_the_tables_is_a_key_of_recipes(table):
    for name, key in table.items():
        assert key.target or key.read or key.why, name
        for part in key.target.split(", "):
            target = part.partition(":")[0].partition("; ")[0]
            if "." in target:
                assert is_recipe_key(target), f"{name} -> {target}"


def test_secrets_are_copied_nowhere(folder, capsys):
    secrets = ["hf_abcdefghijklmnop1234", "0" * 40, "do-not-tell", "sk-abcdefghijklmnop"]
    (folder / "theirs.yml").write_text(
        shapes.SMALL + "datasets: [{path: a/b, type: chat_template, token: do-not-tell}]\n"
        f"hf_token: {secrets[0]}\nwandb_api_key: '{secrets[1]}'\nsome_password: do-not-tell\n"
        f"unknown: {{inner: {secrets[3]}}}\n"
    )
    imported = import_file(folder / "theirs.yml", folder / "mine.yaml")
    said = imported.describe(folder / "mine.yaml") + (folder / "mine.yaml").read_text()
    assert not [secret for secret in secrets if secret in said]
    assert said.count("(not copied)") >= 5


def test_what_looks_like_a_reference_is_only_text(folder, monkeypatch):
    monkeypatch.setenv("HOME", "/of/somebody")
    (folder / "theirs.yml").write_text(
        shapes.SMALL + "datasets: [{path: a/b, type: chat_template}]\n"
        "default_system_message: Dear ${oc.env:HOME}\n"
    )
    import_file(folder / "theirs.yml", folder / "mine.yaml")
    assert load_recipe(folder / "mine.yaml").data.system == "Dear ${oc.env:HOME}"


def test_a_value_of_many_lines_stays_in_its_comment(folder):
    (folder / "theirs.yml").write_text(
        shapes.SMALL + 'datasets: [{path: a/b, type: chat_template}]\nunknown: "a\\nmodel: evil"\n'
    )
    imported = import_file(folder / "theirs.yml", folder / "mine.yaml")
    assert read_yaml(folder / "mine.yaml")[0]["model"]["name"] != "evil"
    assert '#   unknown: "a\\nmodel: evil"' in imported.text
    assert len(show_value("long", "x" * 500)) < 100


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("base_model: [a\nb: c: d\n", ":2", "is not YAML"),
        ("just words\n", ":1", "is not a mapping"),
        ("a: 1\na: 2\n", ":2", "a: stands here twice"),
        ("x: " + "[" * 50 + "]" * 50, ":1", "nests deeper"),
        ("\udcff", "", "is not text"),
    ],
)
def test_a_file_that_cannot_be_read_is_not_spoken_of_as_a_recipe(tmp_path, text, place, words):
    file = tmp_path / "theirs.yml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        import_file(file, tmp_path / "mine.yaml")
    told = str(caught.value)
    assert told.startswith(f"{file}{place}: ")
    assert words in told
    assert "recipe" not in told
    assert not (tmp_path / "mine.yaml").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {name: gpt2}\ndata: {train: a}\n", "neither a file of Axolotl"),
        ("base_model: a/b\nadapter: lora\n", "datasets is missing"),
        ("base_model: a/b\nrl: grpo\nsequence_len: 3\n", "rl = 'grpo'"),
        ("model_name_or_path: a/b\nstage: ppo\ndataset: c\n", "stage = 'ppo'"),
        ("model_name_or_path: a/b\nstage: sft\n", "dataset is missing"),
        ("base_model: a/b\nrl: dpoo\nsequence_len: 3\n", "rl = 'dpoo' is not known"),
        (shapes.START + "dataset: c\npref_loss: orpo\n", "pref_loss = 'orpo'"),
        (shapes.SMALL + "datasets: [{path: a}]\nsequence_len: 5\nmicro_batch_size: two\n"
         "sample_packing: true\n", "micro_batch_size = 'two' is not a number"),
        (shapes.SMALL + "datasets: [3]\nsequence_len: 5\n", "not of the kind that Axolotl"),
        (shapes.SMALL + "warmup_ratio: 7\ndatasets: [{path: a}]\n", "warmup_ratio = 7"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_become_a_recipe_is_refused(folder, text, words):
    (folder / "theirs.yml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        import_file(folder / "theirs.yml", folder / "mine.yaml")
    assert not (folder / "mine.yaml").exists()


def test_the_command_says_what_changes_and_overwrites_nothing(folder, monkeypatch, capsys):
    from hf_gradacc import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-gradacc", "import", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        return code or 0, printed.out, printed.err

    shape = shapes.AXOLOTL["lora with packing and W&B"]
    (folder / "theirs.yml").write_text(shape.text)
    code, out, _ = run("theirs.yml")
    assert code == 0
    assert "written: theirs.recipe.yaml, from a file of Axolotl" in out
    assert "3 keys without a counterpart" in out
    assert all(f"  {key}: " in out for key in shape.changing)
    code, _, err = run("theirs.yml")
    assert code == 2
    assert "is there already" in err
    (folder / "theirs.yml").write_text(shapes.SMALL + "datasets: [{path: no.jsonl}]\nrl: null\n"
                                       "sequence_len: 9\n")  # fmt: skip
    code, out, _ = run("theirs.yml", "-o", "other.yaml")
    assert code == 1
    assert "1 problem before it can be trained" in out
    assert "no such file" in out
