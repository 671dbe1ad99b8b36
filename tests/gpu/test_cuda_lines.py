"""Every line for CUDA runs here, on a device that is this host; `make gpu` runs them on a real one.

A new one that nothing below runs fails `test_no_line_for_cuda_is_left_out`.
"""

import json
from unittest import mock

import pytest
import torch
from support.pretend_cuda import CUDA, PACKAGE, PEAK_BYTES, cuda_lines, lines_run, pretend_cuda
from support.tiny import log_rows, make_trainer, pad, ragged_rows, tiny_llama

from hf_gradacc import GradAccArguments, GradAccTrainer
from hf_gradacc.loss.coupled.absent import Absent
from hf_gradacc.recipe.plan import screen as plan_screen
from hf_gradacc.safety.out_of_memory import free_memory
from hf_gradacc.safety.rollback import RandomState
from hf_gradacc.tracking.run_facts import describe_hardware
from hf_gradacc.updates.collator import make_micro_batch
from hf_gradacc.updates.update import Update, start_copy
from hf_gradacc.verify import parity, preflight

ROWS = ragged_rows(24, seed=3)


def run_on_it(out, dtype=torch.float32, **options):
    model = tiny_llama(dtype=dtype, attn_implementation="sdpa")
    trainer = make_trainer(
        out,
        ROWS,
        model=model,
        effective_batch_size=12,
        per_device_train_batch_size=4,
        use_cpu=False,
        dataloader_pin_memory=False,  # torch asks for a real device
        **options,
    )
    trainer.train()
    return trainer


def a_run(out):
    """Two updates, logged: copies, phases, peak memory, MFU."""
    with pretend_cuda() as stand_ins:
        trainer = run_on_it(out)
    row = log_rows(trainer)[-1]
    assert 0 < row["mfu"] < 1
    assert row["peak_memory_bytes"] == PEAK_BYTES
    assert row["forward_backward_seconds"] > 0
    assert stand_ins["reset_peak_memory_stats"].call_args.args == (CUDA,)
    facts = json.loads((out / "gradacc_run.json").read_text())
    assert "cuda" in json.dumps(facts)


def a_tensor_without_values(out):
    """It stays where it stands, whatever a loss moves it to."""
    absent = Absent.like(torch.ones(2), device=torch.device("cpu"))
    assert absent.cuda() is absent


def a_budget_that_tunes_itself(out):
    """It waits for the device around an update, and is remembered under the device's name."""
    from huggingface_hub import constants

    with pretend_cuda() as stand_ins, mock.patch.object(constants, "HF_HOME", str(out)):
        run_on_it(
            out,
            max_tokens_per_micro_batch="auto",
            remember_tuned_budget=True,
            num_train_epochs=12,
        )
    assert stand_ins["synchronize"].call_args.args == (CUDA,)
    assert stand_ins["get_device_name"].call_count > 0


class StaysOnTheHost(GradAccTrainer):
    def _move_model_to_device(self, model, device):
        return model


def a_preflight(out):
    """Its peak is the device's."""
    args = GradAccArguments(
        output_dir=str(out), per_device_train_batch_size=4, report_to=[], use_cpu=False
    )
    with pretend_cuda():
        found, wrong = preflight.run_preflight(
            StaysOnTheHost, tiny_llama(dtype=torch.float32), ROWS, args, {"data_collator": pad}
        )
    assert wrong == ""
    assert found.peak_memory_bytes == PEAK_BYTES
    assert found.device == "cuda:0"


def what_a_machine_has(out):
    """Where a device can be seen, its name and memory are told, and the caches emptied."""
    seen = mock.patch.object(torch.cuda, "is_available", return_value=True)
    with pretend_cuda() as stand_ins, seen:
        facts = describe_hardware(object())
        memory = plan_screen._memory_here()
        free_memory()
        arguments = mock.patch.object(parity, "GradAccArguments", dict)
        with arguments:
            assert parity._default_arguments(8)["use_cpu"] is False
    assert facts["device_name"] == "NVIDIA H200"
    assert memory == facts["device_memory_bytes"] == 141 * 2**30
    assert stand_ins["empty_cache"].call_count == 1


def pinned_updates(out):
    """The DataLoader pins an update through its own method."""
    update = Update([make_micro_batch(pad(ROWS[:3]))])
    with mock.patch("torch.utils.data._utils.pin_memory.pin_memory", lambda inputs: inputs):
        assert update.pin_memory() is update


def a_device_torch_knows_nothing_of(out):
    """Without a peak there is no MFU: on a CPU, and if somebody hands us no device."""
    from types import SimpleNamespace

    from hf_gradacc.tracking.mfu import peak_flops_of_this_device

    assert peak_flops_of_this_device(SimpleNamespace(device=None), tiny_llama()) is None


def a_run_with_noise(out):
    """NEFTune's noise goes to the tokens of the rows, whose places are copied."""
    with pretend_cuda():
        trainer = run_on_it(out, neftune_noise_alpha=5.0)
    assert trainer.state.global_step == 2


def a_run_of_low_precision_weights(out):
    """Free memory decides how they are stepped."""
    with pretend_cuda() as stand_ins:
        trainer = run_on_it(out, dtype=torch.bfloat16)
    assert stand_ins["mem_get_info"].call_args.args == (CUDA,)
    assert trainer.optimizer_steps.rounding == "master"


RUNS = (
    a_run,
    a_run_of_low_precision_weights,
    a_run_with_noise,
    a_budget_that_tunes_itself,
    a_preflight,
    what_a_machine_has,
    pinned_updates,
    a_device_torch_knows_nothing_of,
    a_tensor_without_values,
)


def all_cuda_lines():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        found |= cuda_lines(path.read_text(), name=name)
    return found


@pytest.mark.slow
def test_no_line_for_cuda_is_left_out(tmp_path):
    lines = all_cuda_lines()
    assert len(lines) >= 30
    left = dict(lines)
    for run in RUNS:
        (tmp_path / run.__name__).mkdir()
        with lines_run() as found:
            run(tmp_path / run.__name__)
        newly = {line for line in left if line in found}
        assert newly, f"{run.__name__} runs no line for CUDA that the runs before it left out"
        left = {line: text for line, text in left.items() if line not in newly}
    assert left == {}


def test_a_line_that_nothing_runs_is_noticed(tmp_path):
    source = (PACKAGE / "trainer" / "budget.py").read_text()
    new = source + "\n\ndef _new(device):\n    if device.type == 'cuda':\n        device.wait()\n"
    more = cuda_lines(new, name="trainer/budget.py").keys() - all_cuda_lines().keys()
    assert len(more) == 2
    with lines_run() as found:
        pinned_updates(tmp_path)
    assert ("updates/update.py", 0) not in found
    assert not more & found


@pytest.mark.parametrize("wrong", ["synchronize(1, 2, 3)", "max_memory_allocated(gpu=0)"])
def test_a_call_that_torch_would_refuse_is_refused_by_the_stand_ins(wrong):
    with pretend_cuda(), pytest.raises(TypeError):
        eval(f"torch.cuda.{wrong}")


def test_the_random_state_of_the_device_is_kept_and_put_back():
    with pretend_cuda() as stand_ins:
        state = RandomState(CUDA)
        state.restore()
    assert stand_ins["get_rng_state"].call_args.args == (CUDA,)
    kept, device = stand_ins["set_rng_state"].call_args.args
    assert device == CUDA
    assert kept is state._on_devices[CUDA]


def test_a_micro_batch_is_pinned_before_it_is_copied():
    """From pageable memory the host would wait for each copy."""
    with pretend_cuda() as stand_ins:
        start_copy(torch.ones(2), CUDA)
    assert stand_ins["copies"] == ["pin", True]
