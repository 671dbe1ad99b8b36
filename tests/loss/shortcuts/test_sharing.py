"""The trial lets models compute trees that do so exactly, and says why others do not."""

import peft
import pytest
import torch
from support.alike import rows_alike
from support.reference import float64_everywhere, model_loss
from support.tiny import VOCABULARY, pad, ragged_rows, tiny_llama
from support.zoo import case_named
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel

from hf_gradacc.errors import ConfigError
from hf_gradacc.loss.shortcuts.sharing import choose_sharing, drops_out
from hf_gradacc.loss.trees.kept import why_not_kept_by

SHORT = 3
"""Rows of a trial; they may be much shorter than those of the run."""


def try_out(model, inputs, *, dtype=torch.float64, others=(), **options):
    def loss_of(part):
        with torch.no_grad():
            return float(model_loss(model, dict(part)))

    if hasattr(model, "config"):
        model.config.use_cache = False  # as the Trainer does
    return choose_sharing([model, *others], inputs, loss_of, dtype=dtype, **options)


def try_case(name):
    case = case_named(name)
    with float64_everywhere():
        model = case.build()
        rows = case.with_sentence_ends(rows_alike(case.head)[:SHORT])
        return model, try_out(model, dict(case.collator(model)(rows)))


@pytest.mark.parametrize(
    "name",
    [
        *(f"{name}-causal" for name in ("llama", "qwen3", "gemma2", "gemma3_text", "mistral")),
        *(f"{name}-causal" for name in ("gpt2", "opt", "phi3", "llama4", "smollm3")),
        *("mixtral-causal-router", "llama-tok", "qwen3-single"),
    ],
)
def test_the_body_of_a_model_is_found_and_may_compute_trees(name):
    model, found = try_case(name)
    assert found.refused == ""
    (body,) = found.bodies
    assert body is not model
    assert any(body is module for module in model.modules())


REFUSED = {
    "mamba-causal": "carry a state",
    "qwen3_next-causal": "carry a state",
    "jamba-causal": "carry a state",
    "lfm2_moe-causal": "carry a state",
    "rwkv-causal": "no position_ids",
    "bloom-causal": "no position_ids",  # ALiBi
    "mpt-causal": "no position_ids",
    "bert-mlm": "does not go by the mask",
    "bert-tok": "does not go by the mask",
    "roberta-single": "does not go by the mask",
    "t5-seq2seq": "no position_ids",
    "bart-seq2seq": "no position_ids",
    "moshi-causal": "does not go by the mask",  # has no window where its configuration has one
    "gpt_neo-causal": "a table of 64",  # of a window that its configuration calls otherwise
    "big_bird-causal": "a table of 64",
    "bert-mc": "no two rows",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_in_words(name):
    _, found = try_case(name)
    assert found.bodies == ()
    assert REFUSED[name] in found.refused


@pytest.mark.parametrize("name", ["mamba-causal", "bloom-causal", "bert-mlm"])
def test_a_layout_that_was_asked_for_by_name_is_an_error(name):
    case = case_named(name)
    with float64_everywhere():
        model = case.build()
        inputs = dict(case.collator(model)(rows_alike(case.head)[:SHORT]))
        with pytest.raises(ConfigError) as caught:
            try_out(model, inputs, asked=True)
    first, *way_out = str(caught.value).splitlines()
    assert first.startswith("layout = 'shared_prefix' would not give the same gradient: ")
    assert REFUSED[name] in first
    assert way_out == ["  Set layout = 'auto' or 'padded'."]


def test_what_is_known_to_speak_against_it_is_not_tried():
    def loss_of(part):
        raise AssertionError("tried")

    found = choose_sharing([], {}, loss_of, dtype=torch.float64, why_not="there is a reason")
    assert found.refused == "there is a reason"


def test_a_model_that_fails_on_the_trial_trains_without_trees():
    found = choose_sharing(
        [tiny_llama()], pad(ragged_rows(3)), lambda part: 1 / 0, dtype=torch.float64
    )
    assert "ZeroDivisionError" in found.refused


# ---- bodies that let one row into another --------------------------------------------------------


class AddsUpPlaces(LlamaModel):
    """Adds a mean over all places before a token, whoever's they are: a state, in short."""

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)
        state = output.last_hidden_state
        places = torch.arange(1, state.shape[1] + 1)[None, :, None]
        output.last_hidden_state = state + 1e-3 * state.cumsum(1) / places
        return output


class SeesOddTokens(LlamaModel):
    """Changes everything as soon as any token of the call is odd."""

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)
        # Each row sees its own tokens, in rows as in a tree: those of the trial are even.
        output.last_hidden_state = output.last_hidden_state + 1e-1 * (input_ids % 2 == 1).any()
        return output


class IgnoresPositions(LlamaModel):
    """Counts positions by itself, over the places it is given."""

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, position_ids=None, **kwargs)


class SeesAllThatCameBefore(LlamaModel):
    """Attends to every place before a token, whatever its mask says."""

    def forward(self, input_ids=None, position_ids=None, attention_mask=None, **kwargs):
        return super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)


def llama_with(body_class):
    model = tiny_llama()
    model.model.__class__ = body_class
    return model


def even_rows():
    rows = ragged_rows(SHORT, seed=1)
    for row in rows:
        row["input_ids"] = [2 * (token // 2) for token in row["input_ids"]]
    return rows


class CountsFromItsFirst(LlamaModel):
    """Takes the first position that it is given for that of the row."""

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        first = 0 if position_ids is None else position_ids.min()
        ids = None if position_ids is None else position_ids - first // 2
        return super().forward(input_ids=input_ids, position_ids=ids, **kwargs)


LEAKS = {
    AddsUpPlaces: "its loss as a tree",
    SeesOddTokens: "one row changes the hidden states of the others",
    IgnoresPositions: "its hidden states differ",
    SeesAllThatCameBefore: "its loss as a tree",
}


@pytest.mark.parametrize("body", LEAKS, ids=lambda body: body.__name__)
def test_a_body_that_lets_rows_into_each_other_is_refused(body):
    with float64_everywhere():
        found = try_out(llama_with(body), pad(even_rows()))
    assert LEAKS[body] in found.refused
    assert found.bodies == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("body", LEAKS, ids=lambda body: body.__name__)
def test_rounding_hides_no_leak(body, dtype):
    model = llama_with(body).to(dtype)
    if body in (AddsUpPlaces, IgnoresPositions) and dtype == torch.bfloat16:
        pytest.skip("a part in a thousand of an untrained model is less than bf16 resolves")
    assert try_out(model, pad(even_rows()), dtype=dtype).bodies == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_refuses_nobody(dtype):
    assert try_out(tiny_llama(dtype=dtype), pad(ragged_rows(3)), dtype=dtype).refused == ""


def test_a_leak_in_the_loss_alone_is_seen():
    class LooksAtTheBatch(LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            output = super().forward(input_ids=input_ids, **kwargs)
            body = self.model(input_ids=input_ids, position_ids=torch.zeros_like(input_ids))
            output.loss = output.loss + body.last_hidden_state.mean()
            return output

    model = tiny_llama()
    model.__class__ = LooksAtTheBatch
    with float64_everywhere():
        found = try_out(model, pad(ragged_rows(3)))
    assert "not given rows of tokens alone" in found.refused


# ---- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3_text", "llama4"])
def test_the_trial_narrows_windows_and_puts_them_back(name):
    case = case_named(f"{name}-causal")
    model = case.build()
    seen = []

    def look(module, args, kwargs):
        config = module.config
        seen.append(
            (getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None))
        )

    before = model.config.get_text_config().to_dict()
    model.model.register_forward_pre_hook(look, with_kwargs=True)
    with float64_everywhere():
        inputs = dict(case.collator(model)(rows_alike("causal")[:SHORT]))
        assert try_out(model, inputs).refused == ""
    longest = inputs["input_ids"].shape[1]
    assert all(min(width for width in widths if width) <= longest // 2 for widths in seen)
    assert model.config.get_text_config().to_dict() == {**before, "use_cache": False}


def test_windows_are_put_back_after_an_error():
    model = case_named("mistral-causal").build()
    before = model.config.sliding_window

    def loss_of(part):
        assert model.config.sliding_window < before
        raise KeyError("a layer")

    found = choose_sharing([model], pad(ragged_rows(3)), loss_of, dtype=torch.float64)
    assert "KeyError" in found.refused
    assert model.config.sliding_window == before


class CountsPlaces(LlamaModel):
    """Has a window of its own, counted over the places it is given."""

    def forward(self, input_ids=None, position_ids=None, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.ndim == 4:
            width = attention_mask.shape[-1]
            places = torch.arange(width)
            near = places[:, None] - places[None] < self.config.sliding_window
            attention_mask = attention_mask & near
        return super().forward(
            input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, **kwargs
        )


def test_a_window_that_is_wider_than_the_trials_rows_is_no_way_through():
    model = tiny_llama(attn_implementation="sdpa")
    model.model.__class__ = CountsPlaces
    model.config.sliding_window = 4096
    with float64_everywhere():
        assert try_out(model, pad(ragged_rows(3))).bodies == ()


# ---- several models, and parts of models ---------------------------------------------------------


def test_a_reference_model_computes_trees_too():
    model, reference = tiny_llama(), tiny_llama(seed=1)

    def loss_of(part):
        with torch.no_grad():
            return float(model(**part).loss - reference(**part).loss)

    with float64_everywhere():
        found = choose_sharing(
            [model, reference], pad(ragged_rows(3)), loss_of, dtype=torch.float64
        )
    assert [id(body) for body in found.bodies] == [id(model.model), id(reference.model)]


def test_one_of_two_models_that_leaks_is_enough_to_refuse():
    model, reference = tiny_llama(), llama_with(SeesAllThatCameBefore)

    def loss_of(part):
        with torch.no_grad():
            return float(model(**part).loss - reference(**part).loss)

    with float64_everywhere():
        found = choose_sharing(
            [model, reference], pad(ragged_rows(3)), loss_of, dtype=torch.float64
        )
    assert found.bodies == ()


def adapted(config):
    return peft.get_peft_model(tiny_llama(), config)


def test_lora_computes_trees_and_a_prompt_in_front_does_not():
    with float64_everywhere():
        lora = adapted(peft.LoraConfig(task_type="CAUSAL_LM", r=4)).double()
        assert try_out(lora, pad(ragged_rows(3))).refused == ""
        prompt = adapted(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        refused = try_out(prompt.double(), pad(ragged_rows(3))).refused
    assert "not given rows of tokens alone" in refused


def test_a_model_that_is_not_of_transformers_is_refused():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(VOCABULARY, 4)

        def forward(self, input_ids, labels, attention_mask):
            return {"loss": self.table(input_ids).square().mean()}

    refused = try_out(Bag(), pad(ragged_rows(3))).refused
    assert "no part of the model was seen" in refused


def test_dropout_is_seen_in_modules_and_in_numbers():
    assert not drops_out(tiny_llama())
    assert drops_out(tiny_llama(attention_dropout=0.1))
    assert drops_out(nn.Sequential(nn.Dropout(0.1)))
    assert drops_out(nn.Sequential(nn.Dropout1d(0.1)))
    assert not drops_out(nn.Sequential(nn.Dropout(0.0)))


BY_NUMBER = {
    "falcon": ("hidden_dropout",),  # read off the configuration in forward
    "opt": ("dropout", "layerdrop"),
    "xglm": ("dropout", "activation_dropout", "layerdrop"),
    "mixtral": ("router_jitter_noise",),
    "phimoe": ("router_jitter_noise", "input_jitter_noise"),
}


@pytest.mark.parametrize("name", BY_NUMBER)
def test_random_numbers_are_seen_whatever_a_model_calls_their_rate(name):
    fields = BY_NUMBER[name]
    none = dict.fromkeys((*fields, "attention_dropout"), 0.0)
    sizes = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 1, "num_local_experts": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    for on in ("", *fields):
        config = CONFIG_MAPPING[name](**sizes, **none | ({on: 0.1} if on else {}))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert drops_out(model) == bool(on), on


# ---- beginnings that are kept --------------------------------------------------------------------


def with_sdpa(body_class=LlamaModel):
    model = tiny_llama(attn_implementation="sdpa")
    model.model.__class__ = body_class
    return model


def test_a_beginning_may_be_kept_where_attention_goes_row_by_row():
    with float64_everywhere():
        assert try_out(with_sdpa(), pad(even_rows())).not_kept == ""


def test_nothing_is_kept_under_a_mask():
    with float64_everywhere():
        found = try_out(tiny_llama(attn_implementation="eager"), pad(even_rows()))
    assert found.bodies
    assert "row by row" in found.not_kept
    assert "sdpa" in why_not_kept_by(tiny_llama(attn_implementation="flex_attention").config)


def test_a_model_that_cannot_stand_behind_a_beginning_computes_trees_all_the_same():
    with float64_everywhere():
        found = try_out(with_sdpa(CountsFromItsFirst), pad(even_rows()))
    assert found.refused == ""
    assert found.by_rows
    assert "differ" in found.not_kept or "its loss as a tree" in found.not_kept


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_positions_that_depend_on_the_longest_row_are_refused(kind):
    config = with_sdpa().config
    config.rope_parameters = {"full_attention": {"rope_type": kind}}
    assert "rotary" in why_not_kept_by(config)
    config.rope_parameters = {"rope_type": "linear"}
    assert why_not_kept_by(config) == ""
