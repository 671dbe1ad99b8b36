"""Exactness of every way to train a few parameters: LoRA, DoRA, IA3, prompt and prefix tuning.

Adapters start at random instead of at zero, where half of their gradients would vanish and hide
any mistake. The reference pads the whole update together and asks the same wrapped model.
"""

import peft
import pytest
import torch
from support import reference
from support.zoo import case_named
from support.zoo_runs import train_ours
from torch.nn.functional import cross_entropy

pytestmark = pytest.mark.slow

EXACT = 1e-10
# Where adapters go, by architecture.
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "t5": ["q", "v", "wo"],
    "gpt2": ["c_attn"],
    "bert": ["query", "value"],
    "mixtral": ["q_proj", "v_proj"],
}


def lora(case, task, **options):
    return peft.LoraConfig(
        task_type=task,
        r=4,
        lora_dropout=0.0,
        init_lora_weights=False,
        target_modules=TARGETS[case.model_type],
        fan_in_fan_out=case.model_type == "gpt2",  # its linears are transposed
        **options,
    )


METHODS = {
    "lora": lora,
    "dora": lambda case, task: lora(case, task, use_dora=True),
    "ia3": lambda case, task: peft.IA3Config(
        task_type=task,
        init_ia3_weights=False,
        target_modules=TARGETS[case.model_type],
        feedforward_modules=TARGETS[case.model_type][2:],
    ),
    "prompt": lambda case, task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3),
    "prefix": lambda case, task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
}


def wrapped(case, method, task="CAUSAL_LM"):
    model = case.build()
    torch.manual_seed(1)
    model = peft.get_peft_model(model, METHODS[method](case, task)).double()
    for name, parameter in model.named_parameters():
        if "prompt_encoder" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    assert sum(p.requires_grad for p in model.parameters()) > 0
    return model.train()


def compare(case, method, *, task="CAUSAL_LM", loss_of=reference.model_loss, **options):
    with reference.float64_everywhere():
        model = wrapped(case, method, task)
        run = train_ours(model, case.rows(), case.collator(model.get_base_model()), **options)
        again = wrapped(case, method, task)
        expected = reference.reference_gradient(
            again, case.rows(), case.collator(again.get_base_model()), loss_of=loss_of
        )
    assert len(run.micro_batches) == 4
    trainable = {name for name, p in again.named_parameters() if p.requires_grad}
    assert set(run.gradient) == set(expected) == trainable
    return reference.relative_error(run.gradient, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_causal_lm_is_exact_under(method):
    assert compare(case_named("llama-causal"), method) <= EXACT


@pytest.mark.parametrize("method", METHODS)
def test_an_encoder_decoder_is_exact_under(method):
    assert compare(case_named("t5-seq2seq"), method, task="SEQ_2_SEQ_LM") <= EXACT


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("gpt2-causal", "CAUSAL_LM"),
        ("bert-single", "SEQ_CLS"),
        ("bert-tok", "TOKEN_CLS"),
        ("bert-qa", "QUESTION_ANS"),
    ],
)
def test_other_heads_are_exact_under(method, name, task):
    assert compare(case_named(name), method, task=task) <= EXACT


@pytest.mark.parametrize("method", METHODS)
def test_label_smoothing_is_torchs_own_under(method):
    """Prompt tuning puts virtual tokens in front: the first label has a prediction then."""

    def smoothed(model, batch):
        logits, labels = model(**batch).logits, batch["labels"]
        ahead = logits.shape[1] - labels.shape[1]
        labels = torch.nn.functional.pad(labels, (ahead, 0), value=-100)
        return cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1
        )

    error = compare(
        case_named("llama-causal"), method, loss_of=smoothed, label_smoothing_factor=0.1
    )
    assert error <= EXACT


def test_prompt_tuning_makes_the_first_label_a_target():
    """What the count must follow: row 0 keeps its first label and the loss has one term more."""
    case = case_named("llama-causal")
    with reference.float64_everywhere():
        model = wrapped(case, "prompt")
        batch = dict(case.collator(model.get_base_model())(case.rows()[:1]))
        logits = model(**batch).logits[:, 2:-1]
        every_label = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        torch.testing.assert_close(model(**batch).loss, every_label, rtol=1e-12, atol=0)


def test_an_adapter_over_a_mixture_of_experts_has_the_router_loss_of_the_update():
    case = case_named("mixtral-causal-router")
    with reference.float64_everywhere():
        model = wrapped(case, "lora")
        collator = case.collator(model.get_base_model())
        run = train_ours(model, case.rows(), collator)
        whole = reference.reference_gradient(wrapped(case, "lora"), case.rows(), collator)
    assert reference.relative_error(run.gradient, whole) <= EXACT
