"""`hf-gradacc chat`: answers as the rows were trained, on a terminal and from a script."""

import io
import json
import os
import shutil
import signal

import pytest
import transformers
from support import templates
from support.bytes_tokenizer import bytes_tokenizer

from hf_gradacc.after.answering import classify, generate, generation_settings
from hf_gradacc.after.asking import choose_asking
from hf_gradacc.after.chat import Chat
from hf_gradacc.after.saved import find_saved, load_saved, load_tokenizer_of
from hf_gradacc.data.formats import RowReader, encode_row
from hf_gradacc.errors import ConfigError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["run", "run/checkpoint-60"])
def test_one_prompt_gives_its_answer_and_nothing_else(command, runs, name):
    code, out, err = command("chat", runs / name, "--prompt", "bb", "--temperature", "0")
    assert (code, out, err) == (0, "Nobody knows, not even the owl.\n", "")


def test_a_text_that_is_piped_in_is_one_prompt(command, runs):
    code, out, _ = command("chat", runs / "run", stdin=io.StringIO("c\n"))
    assert (code, out) == (0, "Seven.\n")


@pytest.mark.parametrize("name", ["adapter", "adapter/checkpoint-60"])
def test_an_adapter_answers_on_its_base_and_stops_where_its_rows_end(command, runs, name):
    code, out, err = command("chat", runs / name, "--prompt", "a")
    assert (code, out, err) == (0, "Seven.\n", "")


def test_a_conversation_on_a_terminal_remembers_until_told_to_forget(command, runs, terminal):
    typed = terminal("bb\n", "\n", "a\n", "/new\n", "c\n", "\x04")
    code, out, err = command("chat", runs / "run", stdin=typed)
    assert code == 0, err
    assert "a conversation through the run's chat template" in out
    answers = out.split("> ")
    assert answers[1] == "Nobody knows, not even the owl.\n"
    assert answers[5] == "Seven.\n", "asked for the first time, as in training"
    assert len(answers) == 7


def test_what_was_said_stands_before_the_next_prompt(runs):
    saved = find_saved(runs / "run")
    chat = Chat(saved, system="Be brief.", temperature=0)
    chat.say("bb")
    ids = chat.asking.encode("a", past=chat.past)
    assert chat.tokenizer.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nbb<|im_end|>\n"
        f"<|im_start|>assistant\n{chat.past[0][1]}<|im_end|>\n"
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_interrupt_stops_the_answer_and_keeps_what_was_said(runs):
    saved = find_saved(runs / "base")
    tokenizer = load_tokenizer_of(saved)
    model = load_saved(saved, tokenizer=tokenizer)
    shown = []

    def show(text):
        shown.append(text)
        if len(shown) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    settings = generation_settings(model, temperature=1.5)  # in words, so there are pieces
    kept = tokenizer.encode("a ", add_special_tokens=False)
    settings.suppress_tokens = [i for i in range(len(tokenizer)) if i not in kept]
    options = {"tokenizer": tokenizer, "settings": settings, "max_new_tokens": 200}
    ids = tokenizer("aa")["input_ids"]
    answer = generate(model, ids, show=show, **options)
    assert answer.interrupted
    assert answer.text == "".join(shown)
    assert 0 < len(answer.text) < 150
    assert generate(model, ids, show=shown.append, **options).cut_at == 200


def test_an_answer_that_is_cut_off_says_so(command, runs):
    code, out, err = command("chat", runs / "run", "--prompt", "bb", "--max-new-tokens", "6")
    assert (code, out) == (0, "Nobody\n")
    assert err == "(cut off after 6 tokens; see --max-new-tokens)\n"


def test_a_prompt_longer_than_the_model_is_refused(command, runs):
    code, _, err = command("chat", runs / "run", "--prompt", "x" * 300)
    assert code == 2
    assert "the model 256 positions" in err


def test_classes_come_with_probabilities_and_no_control_characters(command, runs):
    code, out, err = command("chat", runs / "classes", "--prompt", "b")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split()[1] == r"y\x1b[0m"
    assert float(lines[0].split()[0]) > 0.9
    assert sum(float(line.split()[0]) for line in lines) == pytest.approx(1, abs=1e-3)
    saved = find_saved(runs / "classes")
    tokenizer = load_tokenizer_of(saved)
    model = load_saved(saved, tokenizer=tokenizer)
    assert [classify(model, text, tokenizer=tokenizer)[0][0] for text in ("aa", "ccc")] == [
        "x",
        "z",
    ]


def test_an_answers_control_characters_are_shown_as_codes(runs, capsys):
    chat = Chat(find_saved(runs / "base"), max_new_tokens=20)
    escape = chat.tokenizer.encode("\x1b", add_special_tokens=False)[0]
    chat._settings.suppress_tokens = [i for i in range(len(chat.tokenizer)) if i != escape]
    chat.say("aa")
    assert capsys.readouterr().out == "\\x1b" * 20 + "\n"


# ---- what is no run ----------------------------------------------------------------------------
def test_a_folder_that_is_no_run_says_what_to_name_instead(runs, tmp_path):
    def complaint(folder):
        with pytest.raises(ConfigError) as caught:
            find_saved(folder)
        return str(caught.value)

    assert "did you mean" in complaint(runs / "rum")
    assert "holds no model, and no run of ours" in complaint(tmp_path)
    shutil.copy(runs / "run" / "recipe.yaml", tmp_path)
    assert "the run has saved none" in complaint(tmp_path)
    (tmp_path / "checkpoint-7").mkdir()
    assert "its newest checkpoint is" in complaint(tmp_path)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "pytorch_model.bin").touch()
    assert "is a pickle" in complaint(tmp_path / "inner")


def test_a_model_that_lacks_weights_is_not_filled_up_at_random(runs, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "run"
    shutil.copytree(runs / "run", folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 weights, model\.norm\.weight"):
        load_saved(find_saved(folder), tokenizer=load_tokenizer_of(find_saved(folder)))


def test_code_of_a_model_needs_the_command_line_too(runs, tmp_path):
    for path in (runs / "adapter").glob("*.*"):
        shutil.copy(path, tmp_path)
    recipe = (tmp_path / "recipe.yaml").read_text()
    changed = recipe.replace("trust_remote_code: false", "trust_remote_code: true")
    assert changed != recipe
    (tmp_path / "recipe.yaml").write_text(changed)
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        find_saved(tmp_path)
    assert find_saved(tmp_path, trust_remote_code=True).trusted


# ---- prompts -----------------------------------------------------------------------------------
ROWS = {
    "question_answer": {"question": "a?", "answer": "b", "history": [["c?", "d"]]},
    "instruction": {"instruction": "a?", "output": "b", "history": [["c?", "d"]]},
    "text": {"text": "a?b"},
    "prompt_completion": {"prompt": "a?", "completion": "b"},
    "chat": {
        "messages": [
            {"role": "user", "content": "c?"},
            {"role": "assistant", "content": "d"},
            {"role": "user", "content": "a?"},
            {"role": "assistant", "content": "b"},
        ]
    },
}


CASES = [(name, template) for name in ROWS for template in (None, templates.CHATML)]
CASES.remove(("chat", None))


@pytest.mark.parametrize(("format", "template"), CASES)
def test_a_prompt_is_what_the_rows_of_its_format_begin_with(runs, format, template):
    tokenizer = bytes_tokenizer(template, templates.CHATML_TOKENS)
    saved = find_saved(runs / "run")
    saved.recipe.data.format = format
    system = None if format == "prompt_completion" else "Be kind."  # a text has no place for one
    saved.recipe.data.system = system
    asking = choose_asking(saved, tokenizer=tokenizer)
    past = [("c?", "d")] if asking.remembers else []
    ids = asking.encode("a?", past=past)
    row = encode_row(RowReader(tokenizer, system=system), ROWS[format], format=format)
    assert row["input_ids"][: len(ids)] == ids
    assert "b" in tokenizer.decode(row["input_ids"][len(ids) :])
    assert "a?" not in tokenizer.decode(row["input_ids"][len(ids) :])


def test_a_prompt_that_is_a_list_of_turns_is_asked_in_turns(runs, tmp_path):
    turns = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(turns))
    saved = find_saved(runs / "run")
    saved.recipe.data.format = "prompt_completion"
    tokenizer = bytes_tokenizer(templates.CHATML, templates.CHATML_TOKENS)
    assert choose_asking(saved, tokenizer=tokenizer).kind == "text"
    saved.recipe.data.train[0].path = str(tmp_path / "rows.jsonl")
    assert choose_asking(saved, tokenizer=tokenizer).kind == "turns"


def test_an_encoder_decoder_is_given_its_source_with_its_prefix(tmp_path, capsys):
    tokenizer = bytes_tokenizer()
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    chat = Chat(find_saved(tmp_path), max_new_tokens=5)
    assert chat.asking.kind == "source"
    assert tokenizer.decode(chat.asking.encode("a")) == "a<|end|>"
    chat.say("a")
    chat.say("b")
    assert chat.past == []
    with pytest.raises(ConfigError, match="--system"):
        Chat(find_saved(tmp_path), system="Be brief.")
