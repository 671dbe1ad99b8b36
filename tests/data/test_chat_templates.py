"""`tokenizer.chat_template` by name: what the shipped templates write, and what they mark."""

from importlib.resources import files

import pytest
from support.bytes_tokenizer import bytes_tokenizer, read_segments

from hf_gradacc.data import load_tokenizer
from hf_gradacc.data.chat_templates import set_chat_template, shipped_template, shipped_templates
from hf_gradacc.data.section import ModelSection, TokenizerSection
from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe import RecipeError, load_recipe

SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "Four.\n\nIt is even."},
    {"role": "user", "content": "And 3? "},
    {"role": "assistant", "content": " No.\n"},
]
TOKENS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "mistral": ["[INST]", "[/INST]"],
    "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "zephyr": [],
}


def tokenizer_with(name, tokens=None):
    tokenizer = bytes_tokenizer(None, ["<|begin|>", *(TOKENS[name] if tokens is None else tokens)])
    set_chat_template(tokenizer, name)
    return tokenizer


def trl_text(name):
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def render(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def test_six_templates_come_along():
    assert list(shipped_templates()) == sorted(TOKENS)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize(
    ("name", "family", "first"),
    [
        ("chatml", "qwen3_instruct_2507", [SYSTEM]),
        ("chatml", "qwen2_5", [SYSTEM]),
        ("llama3", "llama3", [SYSTEM]),
        ("gemma", "gemma", []),
        ("gemma", "gemma3", [SYSTEM]),
        ("phi3", "phi3", [SYSTEM]),
    ],
)
def test_a_template_writes_what_its_family_does(name, family, first, prompt):
    ours, theirs = tokenizer_with(name), tokenizer_with(name)
    theirs.chat_template = trl_text(family)
    for messages in (first + CHAT, CHAT, first + CHAT[:1], first + CHAT[:3]):
        if family == "qwen2_5" and messages[0] is not SYSTEM:
            continue  # it makes up a system turn
        options = {"add_generation_prompt": prompt}
        assert render(ours, messages, **options) == render(theirs, messages, **options)


def test_zephyr_and_mistral_write_what_their_cards_show():
    zephyr = render(tokenizer_with("zephyr"), [SYSTEM, *CHAT[:1]], add_generation_prompt=True)
    assert zephyr == (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nWhat is 2 + 2?<|end|>\n<|assistant|>\n"
    )
    assert render(tokenizer_with("mistral"), [SYSTEM, *CHAT]) == (
        "<|begin|>[INST]What is 2 + 2?[/INST]Four.\n\nIt is even.<|end|>"
        "[INST]Be brief.\n\nAnd 3? [/INST] No.\n<|end|>"
    )
    # What the model is asked with is how the row that answers it begins.
    asked = render(tokenizer_with("mistral"), [SYSTEM, *CHAT[:3]], add_generation_prompt=True)
    assert render(tokenizer_with("mistral"), [SYSTEM, *CHAT]).startswith(asked)


ENDS = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "mistral": "<|end|>",
    "phi3": "<|end|>",
    "zephyr": "<|end|>",
}


@pytest.mark.parametrize("name", sorted(TOKENS))
def test_the_answers_and_their_ends_are_targets_and_nothing_else(name):
    tokenizer = tokenizer_with(name)
    text = render(tokenizer, CHAT)
    segments, rest = [], text
    for turn in (CHAT[1], CHAT[3]):
        content = turn["content"].strip() if name in ("llama3", "gemma") else turn["content"]
        before, found, rest = rest.partition(content + ENDS[name])
        segments += [(before, False), (found, True)]
    expected = read_segments(tokenizer, [*segments, (rest, False)])
    encoded = tokenizer.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    masked = [
        token if kept else -100
        for token, kept in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    ]
    assert (encoded["input_ids"], masked) == expected


@pytest.mark.parametrize("name", sorted(TOKENS))
def test_a_call_of_a_tool_is_refused_rather_than_left_out(name):
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    messages = [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(Exception, match=f"the template {name} has no tool calls"):
        render(tokenizer_with(name), messages)


@pytest.mark.parametrize("name", ["chatml", "gemma", "llama3", "mistral"])
def test_a_vocabulary_without_the_marks_is_told_which_to_add(name):
    missing = TOKENS[name][-1]
    others = [token for token in TOKENS[name] if token != missing]
    with pytest.raises(ConfigError, match=r"tokenizer\.chat_template.*tokenizer\.add_tokens") as e:
        tokenizer_with(name, others)
    assert f"add_tokens: ['{missing}']" in str(e.value)
    assert all(token not in str(e.value) for token in others)


def test_a_template_that_ends_with_eos_needs_one():
    tokenizer = bytes_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"set tokenizer\.eos_token"):
        set_chat_template(tokenizer, "zephyr")


def test_the_marks_can_be_added_in_the_same_recipe(tmp_path):
    bytes_tokenizer().save_pretrained(tmp_path)
    section = TokenizerSection(chat_template="chatml", add_tokens=TOKENS["chatml"])
    tokenizer = load_tokenizer(section, model=ModelSection(name=str(tmp_path)))
    assert tokenizer.chat_template == shipped_template("chatml")


def test_a_name_among_the_tokenizers_own_templates_goes_first(tmp_path):
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = {"default": "{{ 1 }}", "rag": "{{ 2 }}", "chatml": "{{ 3 }}"}
    tokenizer.save_pretrained(tmp_path)

    def load(name):
        section = TokenizerSection(chat_template=name)
        return load_tokenizer(section, model=ModelSection(name=str(tmp_path))).chat_template

    assert [load("rag"), load("chatml")] == ["{{ 2 }}", "{{ 3 }}"]
    with pytest.raises(ConfigError, match="did you mean rag"):
        load("rga")
    with pytest.raises(ConfigError, match="chatml, default, rag, gemma, llama3, mistral, phi3"):
        load("nothing_like_it")


RECIPE = """
model: {config: {model_type: llama}}
tokenizer: {train: {vocab_size: 300}, chat_template: TEMPLATE}
data: {train: rows.jsonl}
"""


@pytest.fixture
def write_recipe(tmp_path, monkeypatch):
    """Write a recipe, and its rows, into a folder that is not the current one."""

    def write(template, folder="recipes"):
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        (place / "rows.jsonl").write_text("{}\n")
        (place / "r.yaml").write_text(RECIPE.replace("TEMPLATE", template))
        return place / "r.yaml"

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return write


@pytest.mark.parametrize("written", ["mine.jinja", "./mine.jinja", "../recipes/mine.jinja", "bare"])
def test_a_path_starts_at_the_folder_of_the_recipe(write_recipe, written):
    path = write_recipe(written)
    file = path.parent / written.rpartition("/")[2]
    file.write_text("{{ 'mine' }}")
    assert load_recipe(path).tokenizer.chat_template == str(file)
    (path.parent.parent / "child").mkdir()
    child = path.parent.parent / "child" / "c.yaml"
    child.write_text("base: ../recipes/r.yaml\n")
    recipe = load_recipe(child)
    assert recipe.tokenizer.chat_template == str(file)
    tokenizer = bytes_tokenizer()
    set_chat_template(tokenizer, str(recipe.tokenizer.chat_template))
    assert tokenizer.chat_template == "{{ 'mine' }}"


def test_a_path_on_the_command_line_starts_at_the_current_folder(write_recipe, tmp_path):
    here = tmp_path / "elsewhere" / "mine.jinja"
    here.write_text("{{ 1 }}")
    recipe = load_recipe(write_recipe("chatml"), overrides=["tokenizer.chat_template=mine.jinja"])
    assert recipe.tokenizer.chat_template == str(here)


def test_names_and_jinja_stay_as_they_are(write_recipe):
    assert load_recipe(write_recipe("chatml")).tokenizer.chat_template == "chatml"
    assert load_recipe(write_recipe("rag")).tokenizer.chat_template == "rag"
    assert load_recipe(write_recipe("'{{ 1 }}'")).tokenizer.chat_template == "{{ 1 }}"


def test_a_file_that_is_not_there_is_told_with_the_line_that_names_it(write_recipe):
    with pytest.raises(RecipeError, match=r"r\.yaml:3: tokenizer\.chat_template = 'mine\.jinja'"):
        load_recipe(write_recipe("mine.jinja"))
