"""The parity check passes what is exact, and is loud about what is not."""

import pytest
import torch
import transformers
from support.tiny import pad, ragged_rows, tiny_llama
from support.zoo import case_named
from torch import nn

from hf_gradacc import GradAccArguments, GradAccTrainer
from hf_gradacc.errors import ConfigError, DataError, LossError
from hf_gradacc.loss.facts import LossFacts
from hf_gradacc.verify.parity import verify_parity

ROWS = ragged_rows(9, seed=2)


def verify(model, rows=ROWS, **options):
    return verify_parity(model, rows, **{"data_collator": pad, **options})


def zoo_verify(name, *, dtype=torch.float32, **options):
    case = case_named(name)
    model = case.build().to(dtype)
    return verify_parity(model, case.rows(), data_collator=case.collator(model), **options)


class Wrapped(nn.Module):
    """A model whose loss somebody has changed."""

    main_input_name = "input_ids"

    def __init__(self, change):
        super().__init__()
        self.inner = tiny_llama(dtype=torch.float32)
        self.config = self.inner.config
        self.change = change

    def forward(self, input_ids, labels, attention_mask=None):
        return self.change(self.inner, input_ids, labels, attention_mask)


def as_it_is(inner, ids, labels, mask):
    return inner(ids, attention_mask=mask, labels=labels)


def a_sum(inner, ids, labels, mask):
    outputs = inner(ids, attention_mask=mask, labels=labels)
    outputs["loss"] = outputs["loss"] * (labels[:, 1:] != -100).sum()
    return outputs


def ignores_the_last_label(inner, ids, labels, mask):
    """Each row has one target less than its labels say."""
    labels, ends = labels.clone(), mask.sum(-1) - 1
    labels[torch.arange(len(labels)), ends] = -100
    return inner(ids, attention_mask=mask, labels=labels)


def ignores_one_token(inner, ids, labels, mask):
    """Whatever the vocabulary's favourite is, it is no target."""
    return inner(ids, attention_mask=mask, labels=labels.masked_fill(labels % 3 == 0, -100))


def normalizes_over_the_batch(inner, ids, labels, mask):
    """Rows influence each other: no cut can be exact."""
    outputs = inner(ids, attention_mask=mask, labels=labels)
    outputs["loss"] = outputs["loss"] * (1 + outputs["logits"].mean().sigmoid())
    return outputs


def test_a_right_model_passes_and_the_report_says_so():
    report = verify(tiny_llama(dtype=torch.float32))
    assert report.passed, report
    report.raise_if_failed()
    assert report.error <= 1e-5
    assert report.scale == pytest.approx(1, abs=1e-5)
    assert report.reference == "whole batch"
    assert report.num_micro_batches >= 3
    assert report.num_targets == report.num_targets_reached
    assert report.num_targets == sum(sum(y != -100 for y in r["labels"][1:]) for r in ROWS)
    assert str(report).startswith("PASS")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gpt2-causal", "bart-causal", "t5-seq2seq", "bert-mlm", "bert-qa", "xlnet-single"]
)
def test_other_heads_pass_where_the_stock_trainer_does_not(name):
    report = zoo_verify(name)
    assert report.passed, report
    assert report.error <= 1e-4
    assert report.stock_error > 10 * report.tolerance


@pytest.mark.slow
def test_what_the_stock_trainer_gives_is_measured():
    assert zoo_verify("llama-causal").stock_error <= 1e-4
    report = zoo_verify("bert-mlm")
    assert report.stock_scale == pytest.approx(report.num_micro_batches, rel=0.2)
    assert "stock" in str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-causal", "bert-qa", "roberta-single", "t5-seq2seq"])
def test_single_rows_are_the_same_reference(name):
    report = zoo_verify(name, reference="rows")
    assert report.passed, report
    assert report.reference == "single rows"
    assert report.error <= 1e-4


@pytest.mark.slow
def test_single_rows_are_the_reference_where_the_whole_does_not_fit():
    class Small(Wrapped):
        def forward(self, input_ids, labels, attention_mask=None):
            if len(input_ids) > 6:  # the probe's six short rows fit
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
            return super().forward(input_ids, labels, attention_mask)

    report = verify(Small(as_it_is))
    assert report.passed, report
    assert report.reference == "single rows"


def test_a_loss_that_is_a_sum_is_compared_as_one():
    report = verify(Wrapped(a_sum))
    assert report.passed, report


def in_one_pass(tmp_path):
    return GradAccArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, update_passes=1
    )


def test_a_report_that_fails_can_be_raised(tmp_path):
    report = verify(Wrapped(normalizes_over_the_batch), arguments=in_one_pass(tmp_path))
    assert str(report).startswith("FAIL")
    with pytest.raises(LossError, match="away from that of the whole batch"):
        report.raise_if_failed()


@pytest.mark.slow
@pytest.mark.parametrize("change", [ignores_the_last_label, ignores_one_token])
def test_a_loss_that_ignores_some_targets_fails_loudly(change):
    report = verify(Wrapped(change))
    assert not report.passed
    assert report.num_targets_reached < report.num_targets
    assert f"ignores {report.num_targets - report.num_targets_reached} of" in str(report)


def test_rows_that_influence_each_other_pass_in_two_passes():
    report = verify(Wrapped(normalizes_over_the_batch))
    assert report.passed, report


def test_rows_that_influence_each_other_fail_with_the_figure_in_one_pass(tmp_path):
    report = verify(Wrapped(normalizes_over_the_batch), arguments=in_one_pass(tmp_path))
    assert not report.passed
    assert report.error > report.tolerance
    assert "away from that of the whole batch" in str(report)


def test_the_wrapper_alone_fails_nothing():
    assert verify(Wrapped(as_it_is)).passed


def test_the_check_sees_a_weight_rule_that_is_off(monkeypatch):
    """Broken on purpose: every micro-batch weighs the same."""

    def alike(self, num_targets, *, of, num_micro_batches, factor=1):
        return num_micro_batches / factor

    monkeypatch.setattr(LossFacts, "divisor", alike)
    report = verify(tiny_llama(dtype=torch.float32))
    assert not report.passed
    assert report.error > 0.05


def test_the_model_is_left_as_it_was():
    model = tiny_llama(dtype=torch.bfloat16).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = verify(model, preflight_rows=[])
    assert report.dtype == "float32"  # where rounding hides less
    assert report.passed, report
    assert report.error <= 1e-4
    assert model.training
    assert "train" not in vars(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert value.dtype is torch.bfloat16
        assert torch.equal(value, before[name])


def test_mixed_precision_is_off_for_the_comparison_and_back_on_after_it(tmp_path):
    arguments = GradAccArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=3,
        max_steps=1,
        bf16=True,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
    )
    model = tiny_llama(dtype=torch.float32)
    trainer = GradAccTrainer(model, arguments, train_dataset=ROWS, data_collator=pad)
    report = verify(model, arguments=trainer.args, preflight_rows=[])
    assert report.passed, report
    assert report.error <= 1e-4
    assert trainer.accelerator.mixed_precision == "bf16"
    trainer.train()


def test_nothing_is_printed_and_the_log_level_stays(capsys):
    level = transformers.logging.get_verbosity()
    verify(tiny_llama(dtype=torch.float32), preflight_rows=[])
    assert capsys.readouterr().out == ""
    assert transformers.logging.get_verbosity() == level


def test_experts_keep_the_capacity_that_eval_mode_writes_over():
    case = case_named("nllb-moe-seq2seq")
    model = case.build().float()
    verify_parity(model, case.rows(), data_collator=case.collator(model))
    capacities = {m.expert_capacity for m in model.modules() if hasattr(m, "expert_capacity")}
    assert capacities == {model.config.expert_capacity}


def test_dropout_does_not_enter_the_comparison():
    model = tiny_llama(dtype=torch.float32, attention_dropout=0.5)
    assert verify(model).passed


def test_the_users_micro_batches_are_the_ones_compared(tmp_path):
    arguments = GradAccArguments(
        output_dir=str(tmp_path),
        max_tokens_per_micro_batch=30,
        effective_batch_size=64,
        learning_rate=1.0,
        max_grad_norm=1e-3,
        use_cpu=True,
        report_to=[],
    )
    report = verify(tiny_llama(dtype=torch.float32), arguments=arguments)
    assert report.passed, report
    assert report.num_micro_batches > 3
    assert arguments.effective_batch_size == 64  # not ours to change
    assert list(tmp_path.iterdir()) == []


def test_a_custom_loss_function_is_verified_as_it_is():
    def squared(outputs, labels, num_items_in_batch=None):
        logits, targets = outputs["logits"][:, :-1], labels[:, 1:]
        kept = targets != -100
        likely = logits.softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (1 - likely[kept]).square().mean()

    report = verify(tiny_llama(dtype=torch.float32), compute_loss_func=squared)
    assert report.passed, report
    assert report.stock_scale == pytest.approx(report.num_micro_batches, rel=0.5)


def test_an_adapter_is_verified_as_it_is():
    import peft

    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"]
    )
    model = peft.get_peft_model(tiny_llama(dtype=torch.float32), config)
    assert verify(model).passed


@pytest.mark.slow
@pytest.mark.parametrize("passes", ["auto", 1])
def test_a_router_loss_is_verified_as_the_whole_or_in_one_pass_as_its_share(passes, tmp_path):
    arguments = GradAccArguments(
        output_dir=str(tmp_path),
        update_passes=passes,
        per_device_train_batch_size=3,
        use_cpu=True,
        report_to=[],
    )
    report = zoo_verify("olmoe-causal-router", arguments=arguments)
    assert report.passed, report
    if passes == 1:
        assert report.share_error <= 1e-5
        assert report.error > report.tolerance  # what is left of it, and the report says so
    assert (report.share_error is None) == (passes == "auto")
    assert ("nonlinearity" in str(report)) == (passes == 1)


def test_a_router_loss_counted_more_than_once_fails():
    """Broken on purpose: each micro-batch brings its router loss at full weight."""

    class EveryTime(GradAccTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            if torch.is_grad_enabled() and self.state.global_step == 0 and not self.referring:
                extra = self.current_gradient_accumulation_steps - 1
                loss = loss + extra * model.config.router_aux_loss_coef * outputs["aux_loss"]
            return (loss, outputs) if return_outputs else loss

        @property
        def referring(self):
            return self._update_runner._running is None  # only the plan runs micro-batches

    report = zoo_verify("olmoe-causal-router", trainer_class=EveryTime)
    assert not report.passed
    assert report.error > 1e-3


@pytest.mark.slow
def test_the_preflight_runs_the_longest_rows():
    many = ragged_rows(40, seed=7, longest=20)
    report = verify(tiny_llama(dtype=torch.float32), preflight_rows=many)
    longest = max(len(row["input_ids"]) for row in many)
    assert report.preflight.longest == longest
    assert report.preflight.num_sequences == 3
    assert report.preflight.num_tokens == 3 * longest
    assert report.preflight.seconds > 0
    assert report.preflight.peak_memory_bytes > 1e6
    weights = sum(p.numel() * 4 for p in tiny_llama().parameters())
    assert report.preflight.optimizer_state_bytes == 2 * weights
    assert "peak" in str(report)


@pytest.mark.slow
def test_a_preflight_that_does_not_fit_is_a_problem_with_a_way_out():
    class Small(Wrapped):
        def forward(self, input_ids, labels, attention_mask=None):
            if input_ids.shape[1] > 15:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
            return super().forward(input_ids, labels, attention_mask)

    many = ragged_rows(40, seed=7, longest=20)
    report = verify(Small(as_it_is), preflight_rows=many)
    assert not report.passed
    assert report.preflight is None
    assert "set max_tokens_per_micro_batch below" in str(report)


def test_without_a_target_or_with_one_row_there_is_nothing_to_verify():
    masked = [{**row, "labels": [-100] * len(row["labels"])} for row in ROWS]
    with pytest.raises(DataError, match="none of the 9 training rows has a target"):
        verify(tiny_llama(dtype=torch.float32), masked)
    with pytest.raises(DataError, match="two or more"):
        verify(tiny_llama(dtype=torch.float32), ROWS[:1])


def test_engines_that_shard_are_refused(tmp_path):
    arguments = GradAccArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    arguments.fsdp = True
    with pytest.raises(ConfigError, match="without DeepSpeed or FSDP"):
        verify(tiny_llama(dtype=torch.float32), arguments=arguments)
