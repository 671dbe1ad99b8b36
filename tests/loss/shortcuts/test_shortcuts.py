"""Shortcuts give the gradient of the whole batch, and a model that breaks one refuses it."""

import copy
from types import SimpleNamespace

import peft
import pytest
import torch
from support.gated import shifting_llama
from support.reference import float64_everywhere, reference_gradient, relative_error
from support.tiny import Recorder, make_trainer, pad, ragged_rows, tiny_llama
from support.zoo import Case
from torch import nn
from transformers import LlamaForCausalLM

from hf_gradacc import GradAccArguments, GradAccTrainer
from hf_gradacc.errors import ConfigError
from hf_gradacc.loss.facts import LossFacts
from hf_gradacc.loss.layouts import (
    find_head,
    is_right_padded,
    keep_targets,
    kept_rows,
    pack_rows,
    without_mask,
)
from hf_gradacc.loss.shortcuts.choose import Setting, Shortcuts
from hf_gradacc.loss.shortcuts.trials import Trial, can_try_shortcuts
from hf_gradacc.trainer.loss.asking import has_foreign_loss
from hf_gradacc.updates.targets import TargetRule

WAYS = {
    "target-only logits": Shortcuts(target_only_logits=True),
    "no mask": Shortcuts(drop_mask=True),
    "packed": Shortcuts(packed=True),
    "packed, target-only logits": Shortcuts(packed=True, target_only_logits=True),
    "no mask, target-only logits": Shortcuts(drop_mask=True, target_only_logits=True),
}
CUT = ((0, 3), (3, 4), (4, None))
ARCHITECTURES = ["llama", "qwen3", "gemma2", "gemma3_text", "gpt2"]
ARCHITECTURES += ["gpt_neox", "phi3", "mixtral", "qwen2_moe"]


def build(name):
    """A tiny model in float64 with its rows and collator; Gemma attends within windows of 4."""
    case = Case(name, "causal")
    model = case.build()
    return model, case.rows(), case.collator(model)


def shortcut_gradient(model, rows, collator, shortcuts, cut=CUT):
    batches = [dict(collator(rows[a:b])) for a, b in cut]
    counts = [int(batch["labels"][:, 1:].ne(-100).sum()) for batch in batches]
    model.zero_grad(set_to_none=True)
    for batch, count in zip(batches, counts, strict=True):
        inputs, positions = shortcuts.shape(batch)
        with kept_rows(find_head(model), positions):
            (model(**inputs).loss * (count / sum(counts))).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def make_trial(model, rows=None, *, collator=pad, dtype=torch.float64):
    model.config.use_cache = False  # as the Trainer does
    inputs = dict(collator(rows or ragged_rows(3, seed=1)))

    def loss_of(part, count):
        extra = {} if count is None else {"num_items_in_batch": torch.tensor(count)}
        with torch.no_grad():
            return float(model(**part, **extra).loss)

    return Trial(inputs, loss_of, find_head(model), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_shortcut_gives_the_gradient_of_the_whole_batch(name, way):
    model, rows, collator = build(name)
    with float64_everywhere():
        expected = reference_gradient(model, rows, collator)
        actual = shortcut_gradient(model, rows, collator, WAYS[way])
    assert relative_error(actual, expected) <= 1e-10


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_checks_let_a_model_take_what_is_exact_on_it(name):
    model, rows, collator = build(name)
    with float64_everywhere():
        trial = make_trial(model.eval(), rows[:3], collator=collator)
        assert trial.try_target_only_logits() == ""
        assert trial.try_without_mask() == ""
        assert trial.try_packed() == ""


class IgnoresShiftLabels(LlamaForCausalLM):
    """Computes its loss from what it is given as labels, and shifts."""

    def forward(self, input_ids, attention_mask=None, labels=None, shift_labels=None, **kwargs):
        return super().forward(input_ids, attention_mask, labels=labels, **kwargs)


class CountsAllPositions(LlamaForCausalLM):
    """Takes the mean over positions instead of targets."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        rows = output.logits.shape[0] * output.logits.shape[1]
        output.loss = output.loss * (1 + 1 / rows)
        return output


class MakesItsOwnMask(LlamaForCausalLM):
    """Fills in a mask of ones, which hides from Transformers that a row is packed."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return super().forward(input_ids, attention_mask=mask, **kwargs)


class LooksAhead(LlamaForCausalLM):
    """Adds the mean over all real tokens of a row to each of its embeddings."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        embedded = self.get_input_embeddings()(input_ids)
        mean = (embedded * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
        return super().forward(
            inputs_embeds=embedded + mean, attention_mask=attention_mask, **kwargs
        )


def broken(cls):
    model = tiny_llama()
    model.__class__ = cls
    return model.eval()


@pytest.mark.parametrize(
    ("cls", "check", "reason"),
    [
        (IgnoresShiftLabels, "try_target_only_logits", "shift_labels"),
        (CountsAllPositions, "try_target_only_logits", "shift_labels"),
        (MakesItsOwnMask, "try_packed", "packed loss"),
        (LooksAhead, "try_packed", "packed loss"),
        (LooksAhead, "try_without_mask", "without the mask"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_model_that_breaks_a_shortcut_refuses_it(cls, check, reason):
    leaky, sound = make_trial(broken(cls)), make_trial(tiny_llama().eval())
    with float64_everywhere():
        assert reason in getattr(leaky, check)()
        assert getattr(sound, check)() == ""


@pytest.mark.parametrize("name", ["mamba", "mamba2", "jamba"])
def test_a_recurrent_model_refuses_to_be_packed(name):
    model, rows, collator = build(name)
    with float64_everywhere():
        assert make_trial(model.eval(), rows[:3], collator=collator).try_packed() != ""
        packed = shortcut_gradient(model, rows, collator, WAYS["packed"])
        expected = reference_gradient(model, rows, collator)
    assert relative_error(packed, expected) > 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leak_that_rounding_hides_in_the_loss_is_seen_in_hidden_states(dtype):
    sound, leaky = tiny_llama().eval().to(dtype), broken(MakesItsOwnMask).to(dtype)
    assert make_trial(sound, dtype=dtype).try_packed() == ""
    trial = make_trial(leaky, dtype=dtype)
    object.__setattr__(trial, "loss_of", lambda part, count: make_loss_alike(trial, part, leaky))
    assert "hidden states" in trial.try_packed()


def make_loss_alike(trial, part, model):
    """Run the model, and claim the same loss whatever came out."""
    with torch.no_grad():
        model(**part)
    return 1.0


def test_a_head_that_is_bypassed_refuses_target_only_logits():
    model = tiny_llama().eval()
    trial = make_trial(model)
    object.__setattr__(trial, "head", nn.Linear(4, 4))  # never called
    assert "LM head" in trial.try_target_only_logits()


def test_rows_that_say_nothing_are_not_tried():
    inputs = dict(pad(ragged_rows(3, seed=1)))
    assert can_try_shortcuts(inputs)
    assert not can_try_shortcuts({k: v[:1] for k, v in inputs.items()})
    assert not can_try_shortcuts({**inputs, "labels": torch.full_like(inputs["labels"], -100)})
    assert not can_try_shortcuts({"labels": inputs["labels"][:, 0]})


# ---- layouts -----------------------------------------------------------------------------------


def test_only_masks_that_end_in_zeros_are_right_padded():
    assert is_right_padded(torch.tensor([[1, 1, 0], [1, 1, 1]]))
    for mask in ([[0, 1, 1]], [[1, 0, 1]], [[0, 0, 0]]):
        assert not is_right_padded(torch.tensor(mask))
        batch = {"attention_mask": torch.tensor(mask)}
        assert "attention_mask" in without_mask(batch)


def test_packing_keeps_every_target_and_makes_none():
    rows = ragged_rows(7, seed=3)
    batch = dict(pad(rows))
    packed = pack_rows(batch)
    assert packed["input_ids"].tolist() == [[t for row in rows for t in row["input_ids"]]]
    count = batch["labels"][:, 1:].ne(-100).sum()
    assert packed["labels"][:, 1:].ne(-100).sum() == packed["labels"].ne(-100).sum() == count


def test_packing_takes_left_padding_too():
    batch = dict(pad(ragged_rows(4, seed=3)))
    left = {key: value.flip(1) for key, value in batch.items()}
    packed = pack_rows(left)
    assert packed["position_ids"].eq(0).sum() == 4
    assert packed["labels"][packed["position_ids"].eq(0)].eq(-100).all()


def test_packing_refuses_features_it_cannot_place():
    batch = dict(pad(ragged_rows(2, seed=3)))
    with pytest.raises(ValueError, match=r"pixels has shape \(2, 3\)"):
        pack_rows({**batch, "pixels": torch.zeros(2, 3)})


def test_boundaries_are_what_flash_attention_takes():
    packed = pack_rows(dict(pad(ragged_rows(3, seed=2))), varlen=True)
    lengths = packed["cu_seq_lens_q"].diff()
    assert packed["cu_seq_lens_q"].dtype is torch.int32
    assert int(lengths.sum()) == packed["input_ids"].shape[1]
    assert packed["max_length_q"] == int(lengths.max())


def test_a_batch_without_a_target_is_left_alone():
    labels = torch.tensor([[5, -100, -100]])
    inputs, positions = keep_targets({"labels": labels})
    assert positions is None
    assert inputs["labels"] is labels


# ---- in the trainer ----------------------------------------------------------------------------

ROWS = ragged_rows(8, seed=4)


def train(tmp_path, **options):
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        ROWS,
        callbacks=[recorder],
        **{
            "learning_rate": 0.0,
            "effective_batch_size": 8,
            "remove_unused_columns": False,
            **options,
        },
    )
    with float64_everywhere():
        trainer.train()
    return trainer, recorder.gradients[0]


def expect():
    model = tiny_llama().train()
    with float64_everywhere():
        return reference_gradient(model, ROWS, pad)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["padded", "packed", "auto"])
@pytest.mark.parametrize("budget", [1, 30, 1000])
def test_layout_and_budget_do_not_change_the_gradient(tmp_path, layout, budget):
    trainer, gradient = train(tmp_path, layout=layout, max_tokens_per_micro_batch=budget)
    assert relative_error(gradient, expect()) <= 1e-10
    assert trainer.shortcuts.packed == (layout == "packed")  # SDPA does not pack for free
    assert trainer.shortcuts.target_only_logits
    assert trainer.shortcuts.drop_mask


def test_a_packed_update_counts_no_padding(tmp_path):
    trainer, _ = train(tmp_path, layout="packed", max_tokens_per_micro_batch=40, logging_steps=1)
    (log,) = [row for row in trainer.state.log_history if "padding_fraction" in row]
    tokens = sum(len(row["input_ids"]) for row in ROWS)
    assert log["padding_fraction"] == 0.0
    assert log["input_tokens_per_update"] == tokens
    assert log["micro_batches_per_update"] == -(-tokens // 40)


def test_a_branch_behind_a_gate_of_zero_is_not_packed(tmp_path):
    with pytest.raises(ConfigError, match="its gradient differs between a packed and a padded"):
        train(tmp_path, model=shifting_llama(), layout="packed")


def test_the_head_computes_one_row_of_logits_per_target(tmp_path):
    rows = []
    model = tiny_llama()
    model.lm_head.register_forward_hook(
        lambda module, args, out: rows.append(out[..., 0].numel()) if module.training else None
    )
    train(tmp_path, model=model, target_only_logits=True, chunked_loss=False)
    targets = sum(label != -100 for row in ROWS for label in row["labels"][1:])
    assert sum(rows) == targets


@pytest.mark.parametrize(
    "options",
    [{"label_smoothing_factor": 0.2}, {"weight_decay": 0.1}],
    ids=str,
)
def test_shortcuts_keep_what_else_is_asked_for(tmp_path, options):
    plain = {"target_only_logits": False, "drop_attention_mask": False, "layout": "padded"}
    _, expected = train(tmp_path, **options, **plain)
    for layout in ("padded", "packed"):
        _, gradient = train(tmp_path, **options, layout=layout)
        assert relative_error(gradient, expected) <= 1e-10


def test_a_recomputed_forward_takes_the_shortcuts_too():
    # Backward threads know nothing of `float64_everywhere`, hence its float32 parts remain.
    model = tiny_llama(attn_implementation="sdpa").train()
    expected = reference_gradient(model, ROWS, pad)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for way in WAYS.values():
        assert relative_error(shortcut_gradient(model, ROWS, pad, way), expected) <= 1e-6


def test_nothing_of_the_shortcut_stays_on_the_model(tmp_path):
    model = tiny_llama()
    train(tmp_path, model=model)
    assert not model.lm_head._forward_pre_hooks
    copy.deepcopy(model)


def test_a_loss_function_of_the_users_own_gets_all_logits(tmp_path):
    shapes = []

    def loss_func(outputs, labels, num_items_in_batch=None):
        shapes.append(outputs["logits"].shape[:2] == labels.shape)
        return nn.functional.cross_entropy(
            outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )

    trainer, gradient = train(tmp_path, trainer_options={"compute_loss_func": loss_func})
    assert all(shapes)
    assert not trainer.shortcuts.target_only_logits
    assert relative_error(gradient, expect()) <= 1e-10


def test_what_was_asked_for_and_cannot_be_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="layout = 'packed' would not give the same gradient"):
        train(tmp_path, model=broken(MakesItsOwnMask), layout="packed")
    with pytest.raises(ConfigError, match="target_only_logits = True"):
        train(tmp_path, model=broken(IgnoresShiftLabels), target_only_logits=True)


def test_what_was_left_to_the_check_is_not(tmp_path):
    trainer, gradient = train(tmp_path, model=broken(IgnoresShiftLabels))
    assert not trainer.shortcuts.target_only_logits
    assert "shift_labels" in trainer.shortcuts.reason("target_only_logits")
    assert relative_error(gradient, expect()) <= 1e-10


def test_a_router_loss_keeps_the_mask(tmp_path):
    case = Case("mixtral", "causal", router_loss=True)
    trainer, _ = train(tmp_path, model=case.build())
    assert trainer.shortcuts.reason("drop_attention_mask") == (
        "the router loss counts tokens by the mask"
    )


def test_a_subclass_with_a_loss_of_its_own_gets_all_logits():
    class Foreign(GradAccTrainer):
        def compute_loss(self, *args, **kwargs): ...

    assert has_foreign_loss(Foreign)
    assert not has_foreign_loss(GradAccTrainer)


def test_an_adapter_takes_shortcuts_and_a_prompt_in_front_refuses_them(tmp_path):
    def wrap(config):
        torch.manual_seed(0)
        return peft.get_peft_model(tiny_llama(use_cache=False), config)

    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    plain = {"target_only_logits": False, "drop_attention_mask": False}
    _, expected = train(tmp_path, model=wrap(lora), **plain)
    for layout in ("padded", "packed"):
        trainer, gradient = train(tmp_path, model=wrap(lora), layout=layout)
        assert trainer.shortcuts.target_only_logits
        assert relative_error(gradient, expected) <= 1e-10
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trial = make_trial(wrap(prompt).eval(), dtype=torch.float64)
    assert trial.try_target_only_logits() != ""


class Asserts(LlamaForCausalLM):
    """Insists on a mask."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        assert attention_mask is not None
        return super().forward(input_ids, attention_mask=attention_mask, **kwargs)


def test_a_model_that_breaks_on_a_shortcut_trains_without_it(tmp_path):
    trainer, gradient = train(tmp_path, model=broken(Asserts))
    assert "AssertionError" in trainer.shortcuts.reason("drop_attention_mask")
    assert relative_error(gradient, expect()) <= 1e-10


@pytest.mark.parametrize(
    ("attention", "packs"),
    [
        ("flash_attention_2", None),
        ("kernels-community/flash-attn3", None),
        ("flex_attention", None),
        ("sdpa", False),
        ("eager", False),
    ],
)
def test_packing_is_tried_under_every_attention_that_keeps_rows_apart(tmp_path, attention, packs):
    """Those of the kernels hub are named by the place they come from."""
    args = GradAccArguments(output_dir=str(tmp_path))
    model = nn.Linear(1, 1)
    model.config = SimpleNamespace(_attn_implementation=attention)
    assert Setting(args, LossFacts(TargetRule.NEXT_TOKEN)).wanted(model)["layout"] is packs


def fused_forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
    """As Liger's: in training mode the loss comes from hidden states; the head is not called."""
    if not self.training or labels is None:
        return type(self).forward(
            self, input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs
        )
    hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    logits = hidden @ self.lm_head.weight.T
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return {"loss": loss}


def test_no_logits_are_chosen_where_a_kernel_takes_the_loss_without_any(tmp_path, monkeypatch):
    """Evaluation mode has logits to choose from; in training there are none."""
    monkeypatch.setattr(fused_forward, "__module__", "liger_kernel.transformers.model.llama")
    model = tiny_llama()
    model.forward = fused_forward.__get__(model)
    trainer, gradient = train(tmp_path, model=model)
    assert relative_error(gradient, expect()) <= 1e-10
    assert not trainer.shortcuts.target_only_logits
    assert "Liger's kernel" in trainer.shortcuts.reason("target_only_logits")
    assert "Liger's kernel" in trainer.shortcuts.reason("chunked_loss")
    with pytest.raises(ConfigError, match="target_only_logits = True would not give the same"):
        train(tmp_path, model=model, target_only_logits=True)


@pytest.mark.parametrize("leak", ["padding", "scale", None])
def test_hidden_states_tell_of_a_mask_that_is_needed_where_the_loss_does_not(leak):
    """Too little to move a loss, and a head that does not see the scale of hidden states."""
    torch.manual_seed(0)
    table, head = torch.randn(64, 8), nn.Linear(8, 64)

    def loss_of(inputs, count):
        hidden = table[inputs["input_ids"]]
        if "attention_mask" not in inputs and leak == "padding":
            hidden = hidden + 1.5e-4 * hidden.mean(1, keepdim=True)
        if "attention_mask" not in inputs and leak == "scale":
            hidden = 1.01 * hidden
        head(hidden)
        return 1.0

    inputs = pad(ragged_rows(3, seed=1))
    trial = Trial(inputs, loss_of, head)
    assert bool(trial.try_without_mask()) == (leak is not None)
