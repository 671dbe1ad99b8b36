"""The command line: what it prints, the files it leaves, its exit codes; never a traceback."""

import functools
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from support.patience import HUNG_AFTER_SECONDS
from support.ranks import free_port

import hf_gradacc
from hf_gradacc import cli
from hf_gradacc.recipe import shipped as cli_recipes
from hf_gradacc.recipe.load import load_recipe
from hf_gradacc.tracking.parity_file import read_parity
from hf_gradacc.tracking.run_files import read_run

ROOT = Path(__file__).parents[1]
SLICE = "data.train={path: rows.jsonl, split: 'train[:2]'}"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process; gives exit code, output and errors."""

    def run_command(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-gradacc", *map(str, arguments)])
        before = dict(os.environ)
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            os.environ.clear()
            os.environ.update(before)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run_command


@pytest.fixture
def recipe(tmp_path):
    """A recipe that trains in a second: twenty rows, one of them long."""
    lengths = [*range(1, 20), 90]
    rows = [{"question": f"{i}?", "answer": "7" * length} for i, length in enumerate(lengths)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    values = {
        "model": {"config": {"model_type": "llama", **sizes}},
        "tokenizer": {"train": {"vocab_size": 300}},
        "data": {"train": "rows.jsonl", "format": "question_answer", "holdout": 4},
        "train": {
            "max_steps": 2,
            "effective_batch_size": 6,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "steps",
            "save_steps": 1,
            "disable_tqdm": True,
        },
    }
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.mark.slow
def test_train_leaves_a_model_a_tokenizer_and_the_recipe(run, recipe, tmp_path):
    import transformers

    code, out, _ = run("train", recipe, "train.learning_rate=0.01")
    assert code == 0, out
    folder = tmp_path / "runs" / "mine"
    assert "saved: runs/mine" in out
    assert "runs/mine, saved at the end of the run" in out
    assert "in memory" not in out
    assert "hf-gradacc report runs/mine" in out
    assert 'load it: transformers.AutoModelForCausalLM.from_pretrained("runs/mine")' in out
    assert "held-out loss" in out
    transformers.AutoModelForCausalLM.from_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(folder)
    assert load_recipe(folder / "recipe.yaml").train["learning_rate"] == 0.01


@pytest.mark.slow
def test_a_saved_recipe_repeats_its_run(run, recipe, tmp_path):
    from safetensors.torch import load_file

    run("train", recipe)
    first = load_file(tmp_path / "runs/mine/model.safetensors")
    run("train", tmp_path / "runs/mine/recipe.yaml", "output.dir=again")
    second = load_file(tmp_path / "again/model.safetensors")
    assert all((first[name] == second[name]).all() for name in first)


@pytest.mark.slow
def test_a_run_resumes_where_its_last_checkpoint_is(run, recipe, tmp_path):
    def logged(step):
        file = tmp_path / f"runs/mine/checkpoint-{step}/trainer_state.json"
        return [row for row in json.loads(file.read_text())["log_history"] if "grad_norm" in row]

    run("train", recipe, "train.logging_steps=1")
    before = logged(2)
    code, _, err = run("train", recipe, "train.logging_steps=1", "train.max_steps=3", "--resume")
    assert code == 0, err
    assert [row["step"] for row in logged(3)] == [1, 2, 3]
    assert logged(3)[:2] == before, "with their times: updates 1 and 2 were not trained again"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_a_merged_model_answers_as_the_adapter_did(run, recipe, tmp_path, method):
    import torch
    import transformers
    from peft import AutoPeftModelForCausalLM

    run("train", recipe, "output.dir=base", "train.save_strategy=no")
    named = ["model.config=null", "model.name=base", "tokenizer.train=null"]
    settings = [*named, f"peft={method}", "train.learning_rate=0.05", "train.save_strategy=no"]
    run("train", recipe, *settings, "output.dir=adapter")
    code, out, err = run("train", recipe, *settings, "output.dir=merged", "peft.merge_on_save=true")
    assert code == 0, err
    assert 'transformers.AutoModelForCausalLM.from_pretrained("merged")' in out
    assert not (tmp_path / "merged/adapter_config.json").exists()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        base = transformers.AutoModelForCausalLM.from_pretrained("base")(ids).logits
        adapter = AutoPeftModelForCausalLM.from_pretrained("adapter")(ids).logits
        merged = transformers.AutoModelForCausalLM.from_pretrained("merged")(ids).logits
    torch.testing.assert_close(merged, adapter, rtol=1e-4, atol=1e-5)
    assert (adapter - base).abs().max() > 1e-3, "the adapter learned something"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dora", "ia3", "prompt_tuning", "prefix_tuning"])
def test_every_peft_method_trains(run, recipe, tmp_path, method):
    code, _, err = run("train", recipe, f"peft={method}", "train.save_strategy=no")
    assert code == 0, err
    assert (tmp_path / "runs/mine/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_an_adapter_to_weights_that_nobody_keeps_is_said_to_be_one(run, recipe):
    code, out, _ = run("train", recipe, "peft=lora", "train.save_strategy=no")
    assert code == 0
    assert out.count("set peft.merge_on_save: true for a model that can") == 2
    assert out.index("random weights (model.config)") < out.index("Trained 2 updates")
    assert "load it" not in out
    assert "from_pretrained" not in Path("runs/mine/README.md").read_text()
    code, out, _ = run("plan", recipe, "peft=prompt_tuning")
    assert "random weights (model.config)" in out
    assert "set peft.method: none" in out
    assert "random weights" not in run("plan", recipe)[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")  # so it should
def test_added_tokens_are_learned_under_lora(run, recipe, tmp_path):
    import transformers
    from peft import AutoPeftModelForCausalLM

    run("train", recipe, "output.dir=base", "train.save_strategy=no")
    rows = [{"question": f"{i}?", "answer": "<new>7<newer>"} for i in range(12)]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = ["model.config=null", "model.name=base", "tokenizer.train=null"]
    code, _, err = run(
        "train",
        recipe,
        *named,
        "peft=lora",
        "peft.modules_to_save=[embed_tokens,lm_head]",
        "tokenizer.add_tokens=[<new>,<newer>]",
        "data.train=new.jsonl",
        "output.dir=grown",
        "train.learning_rate=0.05",
        "train.save_strategy=no",
    )
    assert code == 0, err
    before = transformers.AutoModelForCausalLM.from_pretrained("base").get_input_embeddings()
    tokenizer = transformers.AutoTokenizer.from_pretrained("grown")
    base = transformers.AutoModelForCausalLM.from_pretrained("base")
    base.resize_token_embeddings(len(tokenizer))
    grown = AutoPeftModelForCausalLM.from_pretrained("grown").get_input_embeddings().weight
    assert grown.shape[0] == before.num_embeddings + 2
    mean = before.weight.mean(0)
    for token in ("<new>", "<newer>"):
        moved = (grown[tokenizer.convert_tokens_to_ids(token)] - mean).abs().max()
        assert moved > 0.01, "its row left the mean it began at"


@pytest.mark.slow
def test_added_tokens_grow_the_embeddings_of_a_named_model(run, recipe, tmp_path):
    import transformers

    run("train", recipe)
    small = transformers.AutoModelForCausalLM.from_pretrained("runs/mine")
    code, _, err = run(
        "train",
        recipe,
        "model.config=null",
        "model.name=runs/mine",
        "tokenizer.train=null",
        "tokenizer.add_tokens=[<new>,<newer>]",
        "output.dir=grown",
    )
    assert code == 0, err
    grown = transformers.AutoModelForCausalLM.from_pretrained("grown")
    before = small.get_input_embeddings().num_embeddings
    assert grown.get_input_embeddings().num_embeddings == before + 2


def test_plan_shows_updates_and_what_to_change_without_loading_weights(
    run, recipe, tmp_path, monkeypatch
):
    def refuse(*_args, **_kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("hf_gradacc.recipe.model.load.load_model", refuse)
    code, out, err = run("plan", recipe, "train.bf16=true", "--png", "plan.png")
    assert code == 0, err
    for word in ("updates", "effective_batch_size", "tokens_per_update", "padding", "together"):
        assert word in out
    assert "train.max_tokens_per_micro_batch" in out
    assert [line for line in out.split("\n") if line != line.rstrip()] == []
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run("plan", recipe, "--world-size", "2", "--gpu-memory", "0.1")
    assert "2 ranks" in out
    assert "of 100 MB on the GPU" in out


@pytest.mark.parametrize("png", ["plan.nope", "rows.jsonl/plan.png"])
def test_a_plan_that_cannot_be_drawn_is_told_before_the_rows_are_read(run, recipe, png):
    code, out, err = run("plan", recipe, "--png", png)
    assert (code, out) == (2, "")
    assert f"--png = '{png}'" in err


def test_a_plan_is_drawn_into_a_folder_that_is_made(run, recipe, tmp_path):
    assert run("plan", recipe, "--png", "new/plan")[0] == 0
    assert (tmp_path / "new" / "plan").read_bytes().startswith(b"\x89PNG")


def test_plan_of_a_stream_is_made_of_its_first_rows(run, recipe):
    streamed = ["data.streaming=true", "data.holdout=null", "--show-rows", "1"]
    code, out, err = run("plan", recipe, *streamed)
    assert code == 0, err
    assert "a sample of 20 rows of the stream" in out
    assert re.search(r"longest rows:\n  \d+ tokens: 19\?", out)


def test_plan_counts_by_hand(run, recipe):
    from rich.console import Console

    from hf_gradacc.recipe.plan.screen import show_plan

    plan = show_plan(load_recipe(recipe), console=Console(quiet=True))
    assert plan.num_sequences == 16
    assert (plan.updates_per_epoch, plan.num_updates, plan.last_update) == (3, 2, 4)
    assert plan.targets_per_update.mean * 3 == plan.targets.sum()
    stock, by_size, _, packed = plan.ways
    assert stock.padding_fraction >= by_size.padding_fraction >= packed.padding_fraction == 0
    assert by_size.chosen
    assert by_size.micro_batches.most == 1.0, "6 sequences fit the default of 8"


@pytest.mark.parametrize("budget", ["null", "100", "600"])
def test_training_cuts_its_updates_as_planned(run, recipe, budget):
    from rich.console import Console

    from hf_gradacc.recipe.plan.screen import show_plan

    changes = [f"train.max_tokens_per_micro_batch={budget}", "data.holdout=null"]
    changes += ["train.max_steps=4", "train.logging_steps=4", "train.save_strategy=no"]
    plan = show_plan(load_recipe(recipe, overrides=changes), console=Console(quiet=True))
    assert plan.updates_per_epoch == 4
    code, _, err = run("train", recipe, *changes)
    assert code == 0, err
    _, log = read_run(Path("runs/mine"))
    row = next(row for row in log if "tokens_per_update" in row)
    assert row["micro_batches_per_update"] == pytest.approx(plan.chosen.micro_batches.mean)
    assert row["padding_fraction"] == pytest.approx(plan.chosen.padding_fraction)
    assert row["tokens_per_update"] == pytest.approx(plan.targets_per_update.mean)
    assert row["input_tokens_per_update"] == pytest.approx(plan.inputs_per_update.mean)


@pytest.mark.slow
def test_verify_passes_on_a_sound_model(run, recipe, tmp_path):
    code, out, err = run("verify", recipe, "--rows", "6")
    assert code == 0, err
    assert read_parity(tmp_path / "runs" / "mine")["passed"] is True
    assert "PASS" in out
    assert "stock" in out
    assert "preflight" in out


@pytest.mark.slow
def test_verify_takes_rows_from_the_shortest_to_the_longest(run, recipe, monkeypatch):
    from hf_gradacc.recipe import verifying as cli_verify

    seen = {}

    def look(model, rows, *, preflight_rows, **parts):
        seen["chosen"] = [len(row["input_ids"]) for row in rows]
        seen["longest"] = [len(row["input_ids"]) for row in preflight_rows]
        return parity(model, rows, preflight_rows=preflight_rows, **parts)

    parity = cli_verify.verify_parity
    monkeypatch.setattr(cli_verify, "verify_parity", look)
    code, _, err = run("verify", recipe, "--rows", "9", "data.holdout=null")
    assert code == 0, err
    lengths = sorted(len(r["input_ids"]) for r in prepared(recipe))
    assert seen["chosen"][0] == lengths[0]
    assert seen["chosen"][-1] == lengths[-1]
    assert len(seen["chosen"]) == 9
    assert seen["longest"] == lengths[-8:], "as many as a micro-batch holds"


def prepared(recipe):
    from hf_gradacc.data import iter_texts, load_tokenizer, prepare_data

    loaded = load_recipe(recipe, overrides=["data.holdout=null"])
    texts = iter_texts(loaded.data)
    tokenizer = load_tokenizer(loaded.tokenizer, model=loaded.model, texts=texts)
    return prepare_data(loaded.data, tokenizer=tokenizer).train


@pytest.mark.slow
def test_verify_asks_one_process_about_a_model_that_will_be_sharded(run, recipe):
    sharded = ["train.fsdp=true", "train.fsdp_config={version: 2}"]
    code, out, err = run("verify", recipe, *sharded, "--rows", "6", "--no-preflight")
    assert code == 0, err
    assert "PASS" in out


@pytest.mark.slow
def test_verify_fails_with_exit_code_one(run, recipe, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    @functools.wraps(forward)  # the Trainer looks at its parameters
    def no_mean(self, *args, labels=None, **kwargs):
        output = forward(self, *args, labels=labels, **kwargs)
        if labels is not None:
            output["loss"] = output["loss"] * len(labels)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", no_mean)
    code, out, err = run("verify", recipe, "--rows", "6", "--no-preflight")
    assert code == 1, err
    assert "FAIL" in out
    code, out, err = run("train", recipe, "--verify")
    assert code == 1, err
    assert "Plan of" not in out, "nothing was trained"


@pytest.mark.slow
def test_training_that_was_verified_says_so_in_its_own_file(run, recipe, tmp_path):
    code, out, err = run("train", recipe, "--verify")
    assert code == 0, err
    settings, _ = read_run(tmp_path / "runs" / "mine")
    assert settings["parity"]["passed"] is True
    assert settings["parity"]["matches_run"] is True
    assert out.index("PASS") < out.index("Plan of")


def test_recipes_are_listed_shown_and_copied(run, tmp_path):
    code, out, _ = run("recipes", "list")
    assert code == 0
    assert len(cli_recipes.recipe_names()) == sum(
        "/" in line or "quick" in line for line in out.splitlines()
    )
    assert "`pip install 'hf_gradacc[trl]'`" in out, "square brackets are no markup"
    assert [line for line in out.split("\n") if line != line.rstrip()] == []
    code, out, _ = run("recipes", "show", "qwen3/4b_lora_chat")
    assert out == (ROOT / "recipes/qwen3/4b_lora_chat.yaml").read_text()
    code, out, _ = run("recipes", "copy", "qwen3/4b_lora_chat", "mine/lora.yaml")
    assert code == 0
    copied = load_recipe(tmp_path / "mine/lora.yaml")
    assert copied.model == load_recipe(ROOT / "recipes/qwen3/4b_lora_chat.yaml").model
    code, _, err = run("recipes", "copy", "qwen3/4b_lora_chat", "mine/lora.yaml")
    assert (code, "--force" in err) == (2, True)


def test_a_copied_recipe_still_finds_its_data(run, tmp_path):
    run("recipes", "copy", "quickstart", "deep/er/mine.yaml")
    assert Path(load_recipe(tmp_path / "deep/er/mine.yaml").data.train[0].path).is_file()


def test_the_schema_is_json(run, tmp_path):
    out = run("schema")[1]
    assert json.loads(out)["properties"]["train"]
    run("schema", "s.json")
    assert json.loads((tmp_path / "s.json").read_text()) == json.loads(out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nothing.yaml"], "neither a file nor a recipe"),
        (["train", "quickstrat"], "did you mean quickstart"),
        (["train", "mine.yaml", "train.max_stepz=3"], "train.max_steps"),
        (["train", "mine.yaml", "data.columns={question: q}"], "no column 'q'"),
        (["train", "mine.yaml", "model.config.model_type=lama"], "model.config"),
        (["train", "mine.yaml", "model.config.hiden_size=8"], "did you mean hidden_size"),
        (["train", "mine.yaml", "model.config=null", "model.name=no/model"], "model.name"),
        (["train", "mine.yaml", "tokenizer.train=null"], "tokenizer.train.vocab_size"),
        (["train", "mine.yaml", "peft=lora", "peft.target_modules=[nope]"], "peft.target_modules"),
        (["train", "mine.yaml", "peft=lora", "peft.options={bogus: 1}"], "peft.options"),
        (["train", "mine.yaml", "model.attn_implementation=bogus"], "attn_implementation"),
        (["train", "mine.yaml", "train.tokens_per_update=9"], "effective_batch_size"),
        (["train", "mine.yaml", "train.report_to=wandbb"], "did you mean wandb?"),
        (["train", "mine.yaml", "--resmue"], "no such option: did you mean --resume?"),
        (["train", "mine.yaml", "data.train=empty"], "holds no data files"),
        (["train", "mine.yaml", "data.train=empty", "output.dir=rows.jsonl"], "output.dir = 'rows"),
        (["train", "mine.yaml", "output.dir=rows.jsonl/x"], "output.dir = 'rows.jsonl/x'"),
        (["train", "mine.yaml", "peft=qlora"], "loads trained weights in 4 bits"),
        (["train", "mine.yaml", "train.fsdp=true"], "torchrun --nproc-per-node"),
        (["train", "mine.yaml", "data.template_options={tokenize: true}"], "how to render"),
        (["train", "mine.yaml", "data.streaming=true", "data.holdout=null", SLICE], "no slice"),
        (["plan", "mine.yaml", "peft=lora", "peft.target_modules=[nope]"], "peft.target_modules"),
        (["recipes", "show", "utf16.yaml"], "save it as UTF-8"),
        (["train", "mine.yaml", "train.max_steps=-5"], "train.max_steps = -5"),
        (["verify", "mine.yaml", "data.train=no.jsonl"], "data.train = 'no.jsonl': no such file"),
        (["plan", "mine.yaml", "train.optim=adm"], "train.optim"),
        (["train", "mine.yaml", "data.holdout=20"], "data.holdout"),
        (["train", "mine.yaml", "--resume", "output.dir=empty"], "output_dir = empty"),
        (["plan", "mine.yaml", "--png", "plan.nope"], "--png"),
        (["plan", "mine.yaml", "--png", "empty"], "--png = 'empty': is a folder"),
        (["report", "nowhere"], "nowhere"),
        (["report", "nowhere", "--png", "plot.nope"], "--png = 'plot.nope': .nope cannot be drawn"),
        (["report", "nowhere", "--html", "rows.jsonl/a/b.html"], "rows.jsonl is not a folder"),
        (["schema", "no/folder/s.json"], "no/folder"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_a_mistake_is_a_message_and_exit_code_two(run, recipe, tmp_path, arguments, message):
    (tmp_path / "utf16.yaml").write_text("model: {}", encoding="utf-16")
    (tmp_path / "empty").mkdir()
    code, _, err = run(*arguments)
    assert code == 2
    (said,) = re.findall(r"^error: .*(?:\n.*)*", err, re.MULTILINE)
    assert message in said
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_compiled_model_learns_the_same_weights(run, recipe, tmp_path):
    from safetensors.torch import load_file
    from torch.testing import assert_close

    run("train", recipe, "train.save_strategy=no")
    compiled = ["train.torch_compile=true", "train.torch_compile_backend=eager"]
    code, _, err = run("train", recipe, "train.save_strategy=no", "output.dir=fast", *compiled)
    assert code == 0, err
    assert_close(load_file("fast/model.safetensors"), load_file("runs/mine/model.safetensors"))


def test_liger_kernels_without_their_package_are_one_error(run, recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    find_spec = "hf_gradacc.recipe.checks.values.importlib.util.find_spec"
    monkeypatch.setattr(find_spec, lambda name: None)
    code, _, err = run("train", recipe, "train.use_liger_kernel=true")
    assert code == 2
    assert "train.use_liger_kernel = True: needs liger_kernel" in err
    assert "pip install liger-kernel" in err


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (OSError(28, "No space left on device"), 2, "free some space"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "free some space"),
        (PermissionError(13, "Permission denied", "out"), 2, "out: Permission denied"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_full_disk_a_closed_folder_or_ctrl_c_is_a_message(
    run, recipe, monkeypatch, failure, code, message
):
    def fail(*_args, **_kwargs):
        raise failure

    monkeypatch.setattr("hf_gradacc.recipe.run.prepare_data", fail)
    found, _, err = run("train", recipe)
    assert found == code
    assert message in err


def test_an_error_nobody_foresaw_is_one_line_and_its_traceback_a_file(
    run, recipe, monkeypatch, tmp_path
):
    def fail(*_args, **_kwargs):
        raise KeyError("what nobody foresaw")

    monkeypatch.setattr("hf_gradacc.recipe.run.prepare_data", fail)
    code, _, err = run("train", recipe, "wandb.notes=auth_token=hf_SECRET")
    assert code == 70, err
    assert "Traceback" not in err
    (line,) = re.findall(r"^error: .*", err, re.MULTILINE)
    assert "KeyError: 'what nobody foresaw'" in line
    (file,) = tmp_path.glob("gradacc_error_*.txt")
    assert str(file) in line
    told = file.read_text()
    assert "Traceback (most recent call last)" in told
    assert "in fail" in told
    assert "torch 2" in told
    assert "hf_SECRET" not in told
    monkeypatch.setenv("HF_GRADACC_DEBUG", "1")
    assert "in fail" in run("train", recipe)[2]


NAMED = ["model.config=null", "model.name=runs/mine", "tokenizer.train=null", "output.dir=other"]


def test_a_qlora_recipe_without_bitsandbytes_says_what_to_install(run, recipe, monkeypatch):
    run("train", recipe)
    find_spec = "hf_gradacc.recipe.checks.values.importlib.util.find_spec"
    monkeypatch.setattr(find_spec, lambda name: None)
    monkeypatch.setattr("hf_gradacc.recipe.run.load_tokenizer", None)  # nothing is loaded before
    code, _, err = run("train", recipe, "peft=qlora", *NAMED)
    assert code == 2
    assert "pip install bitsandbytes" in err


@pytest.mark.filterwarnings("ignore:bitsandbytes")  # about its kernels for a CPU
def test_weights_in_4_bits_train_and_pass_the_parity_check(run, recipe):
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes, which has a CPU backend")
    sizes = ["hidden_size=64", "intermediate_size=128", "num_key_value_heads=2"]
    whole = [f"model.config.{size}" for size in sizes]  # its CPU kernels want blocks of 64
    run("train", recipe, *whole, "tokenizer.train.vocab_size=320", "train.save_strategy=no")
    code, out, err = run("verify", recipe, "peft=qlora", *NAMED, "--rows", "6")
    assert code == 0, err
    assert "PASS" in out


def test_a_model_that_does_not_fit_is_told_before_the_data_are_read(run, recipe, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("rows were prepared")

    monkeypatch.setattr("hf_gradacc.recipe.run.prepare_data", refuse)
    monkeypatch.setattr("hf_gradacc.recipe.plan.screen.prepare_data", refuse)
    for command in ("train", "plan"):
        code, _, err = run(command, recipe, "peft=lora", "peft.target_modules=[nope]")
        assert code == 2
        assert "peft.target_modules" in err


@pytest.mark.slow
def test_a_bad_row_met_by_a_loader_worker_is_one_line(run, recipe, tmp_path):
    rows = [{"question": f"{i}?", "answer": "7" if i != 1100 else None} for i in range(1200)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    streamed = ["data.train=long.jsonl", "data.streaming=true", "data.holdout=null"]
    workers = ["train.dataloader_num_workers=1", "train.max_steps=250", "train.save_strategy=no"]
    code, _, err = run("train", recipe, *streamed, *workers)
    assert code == 2
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    place = f"{tmp_path}/long.jsonl:1101"
    assert said[0].endswith(
        f"{place}: column 'answer' is null: correct the row, leave it out, or set "
        "data.unusable to drop."
    )
    assert "Traceback" not in err


def test_a_secret_in_a_wrong_place_is_not_said_again(run, recipe):
    for place in ("model.config.hub_token", "peft.options.hub_token", "train.hub_token"):
        code, out, err = run("train", recipe, "peft=lora", f"{place}=hf_SECRET")
        assert code == 2
        assert "hf_SECRET" not in out + err


@pytest.mark.slow
def test_a_launcher_starts_a_recipe_on_two_ranks(run, recipe, tmp_path):
    """By torchrun; the launches that the documentation prints are started by their own test."""
    from safetensors.torch import load_file
    from torch.testing import assert_close

    run("train", recipe, "train.save_strategy=no", "output.dir=alone")
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command = [sys.executable, "-m", *launcher, "-m", "hf_gradacc", "train", str(recipe)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [*command, "train.save_strategy=no", "output.dir=together"],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=HUNG_AFTER_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert "over 2 ranks" in done.stdout
    assert done.stdout.count("saved: together") == 1, "only the first rank speaks"
    assert_close(load_file("together/model.safetensors"), load_file("alone/model.safetensors"))


def test_it_works_as_a_module_and_without_a_terminal(tmp_path):
    command = [sys.executable, "-m", "hf_gradacc", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    for name in ("train", "plan", "verify", "report", "schema", "recipes"):
        assert name in done.stdout


def test_the_help_has_one_line_for_each_command_on_the_narrowest_terminal(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run("--help")
    lines = out.partition(" Commands ")[2].splitlines()[1:]
    rows = [line.strip("│ ") for line in lines if line.startswith("│")]
    assert [row.split()[0] for row in rows if row] == [
        *("train", "plan", "verify", "sweep", "report", "chat", "merge", "push", "import"),
        *("schema", "recipes"),
    ]


@pytest.mark.parametrize("name", ["train", "plan", "verify", "report", "schema"])
def test_every_command_shows_an_example(run, name):
    code, out, _ = run(name, "--help")
    assert code == 0
    assert "hf-gradacc" in out.split("Usage")[1].partition("\n")[2]


def test_the_version_is_that_of_the_package_and_of_what_is_installed():
    done = subprocess.run(
        [sys.executable, "-m", "hf_gradacc", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"hf-gradacc {hf_gradacc.__version__}\n")
    assert metadata.version("hf_gradacc") == hf_gradacc.__version__
