"""Out of memory: an update that fails is run again finer, and nothing else of the run changes."""

import contextlib
import functools
import json
import random
import tempfile

import numpy as np
import pytest
import torch
from support.failing import (
    Failure,
    beyond,
    run_out_of_memory_while_sharded,
    same,
    train,
    train_in_little_memory,
    train_ranks,
)
from support.ranks import run_ranks
from support.reference import float64_everywhere
from support.tiny import make_trainer, pad, ragged_rows, tiny_llama
from transformers import TrainerCallback

from hf_gradacc import MemoryBudgetError
from hf_gradacc.safety.out_of_memory import advice_on_pieces, is_out_of_memory, single_row_error
from hf_gradacc.tracking.run_files import LOG_NAME, read_log
from hf_gradacc.trainer import runner
from hf_gradacc.trainer.stopping import outside_error
from hf_gradacc.updates import update
from hf_gradacc.updates.budget import TokenBudget

NUM_MICRO_BATCHES = 3  # of the first update, at 40 tokens each


@functools.cache
def calm_run(**options):
    """A run in which nothing fails."""
    with tempfile.TemporaryDirectory() as out:
        return train(out, **options)


# ---- the weights are those of a run with the smaller budget ------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("place", range(NUM_MICRO_BATCHES))
def test_a_failure_anywhere_in_an_update_leaves_no_trace(tmp_path, where, place):
    failing = train(
        tmp_path,
        max_tokens_per_micro_batch=40,
        failure={"when": lambda rows, width, seen: seen == place, "where": where},
    )
    assert failing["raised"] == 1
    calm = calm_run(max_tokens_per_micro_batch=failing["cap"])
    other = calm_run(max_tokens_per_micro_batch=40)
    assert same(failing, calm)
    assert not same(failing, other)  # or the comparison could not tell anything


@pytest.mark.slow
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_budget_is_halved_until_it_fits(tmp_path, where):
    options = {"optim": "adamw_torch", "lr_scheduler_type": "linear", "num_train_epochs": 2}
    failing = train(
        tmp_path,
        max_tokens_per_micro_batch=144,
        failure={"when": beyond(40), "where": where},
        **options,
    )
    assert (failing["raised"], failing["cap"]) == (2, 36)
    assert same(failing, calm_run(max_tokens_per_micro_batch=36, **options))


@pytest.mark.slow
def test_a_failure_in_the_middle_of_a_run_changes_only_what_comes_after(tmp_path):
    failing = train(tmp_path, failure={"when": lambda rows, width, seen: seen == 5})
    calm = train(tmp_path, lower=(2, failing["cap"]))
    assert failing["raised"] == 1
    assert same(failing, calm)


@pytest.mark.slow
def test_adapters_recover_like_whole_weights(tmp_path):
    def add_adapters(model):
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
        inject_adapter_in_model(config, model)
        model.double()

    options = {"prepare": add_adapters, "optim": "adamw_torch"}
    failing = train(tmp_path / "failing", failure={"when": beyond(40)}, **options)
    calm = train(tmp_path / "calm", max_tokens_per_micro_batch=failing["cap"], **options)
    assert failing["raised"] > 0
    assert len(failing["optimizer"]) == 8  # the adapters' weights and nothing else
    assert same(failing, calm)


CASES = {
    "checkpointed": {"gradient_checkpointing": True},
    "checkpointed, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "bf16 weights, summed in float32": {"model": {"dtype": torch.bfloat16}},
    "bf16 weights, once in one piece": {
        "model": {"dtype": torch.bfloat16},
        "max_tokens_per_micro_batch": 4000,
    },
    "packed": {"layout": "packed", "model": {"attn_implementation": "sdpa"}},
    "smoothed": {"label_smoothing_factor": 0.1},
}


def run_of(case, **more):
    options = {**CASES[case]}
    options["model"] = {"dtype": torch.float32} | options.get("model", {})
    with tempfile.TemporaryDirectory() as out:
        return train(out, optim="adamw_torch", **options, **more)


calm_run_of = functools.cache(run_of)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo looks at them
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES)
def test_it_leaves_no_trace_however_the_model_runs(monkeypatch, case, where):
    # Recomputation and dynamo do not go together with what makes everything float64.
    monkeypatch.setattr("support.failing.float64_everywhere", contextlib.nullcontext)
    failing = run_of(case, failure={"when": beyond(40), "where": where})
    calm = calm_run_of(case, lower=(0, failing["cap"]))
    assert failing["raised"] > 0
    assert same(failing, calm)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"noise_scale_every": 1},
        {"max_tokens_per_micro_batch": "auto", "num_train_epochs": 6, "noise_scale_every": 3},
    ],
    ids=["noise measured", "budget tuned"],
)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_update_that_is_measured_or_timed_is_no_exception(tmp_path, where, options):
    options = {**options, "learning_rate": 1e-3}
    failing = train(tmp_path / "failing", failure={"when": beyond(40), "where": where}, **options)
    events = [row for row in read_log(tmp_path / "failing" / LOG_NAME) if "event" in row]
    step = max(row["step"] for row in events if row["event"] == "out_of_memory")
    calm = train(tmp_path / "calm", lower=(step - 1, failing["cap"]), **options)
    assert failing["raised"] > 0
    assert same(failing, calm)
    assert ("noise_scale_every" not in options) or len(failing["noise"]) > 0
    assert failing["noise"] == calm["noise"]


@pytest.mark.slow
def test_a_loss_of_the_users_own_is_inside_too(tmp_path):
    def loss_within(tokens):
        def loss(outputs, labels, num_items_in_batch=None):
            if outputs["logits"].requires_grad and labels.numel() > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            logits = outputs["logits"][:, :-1].flatten(0, 1)
            return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())

        return {"trainer_options": {"compute_loss_func": loss}}

    failing = train(tmp_path / "failing", **loss_within(40))
    assert failing["cap"] == 32
    assert same(failing, train(tmp_path / "calm", max_tokens_per_micro_batch=32, **loss_within(99)))


@pytest.mark.slow
def test_workers_that_still_hand_out_large_micro_batches_are_cut_down(tmp_path):
    failing = train(
        tmp_path, failure={"when": beyond(40)}, dataloader_num_workers=1, num_train_epochs=2
    )
    calm = calm_run(max_tokens_per_micro_batch=failing["cap"], num_train_epochs=2)
    assert same(failing, calm)


@pytest.mark.slow
def test_without_a_token_budget_only_micro_batches_as_large_are_cut(tmp_path):
    rows = ragged_rows(30, seed=5)
    rows[13] = {key: value * 20 for key, value in rows[13].items()}
    rows[13] = {key: value[:60] for key, value in rows[13].items()}
    # Padded to those 60 tokens the other rows use up memory.
    failing = train(
        tmp_path,
        rows=rows,
        failure={"when": beyond(120)},
        max_tokens_per_micro_batch=None,
        per_device_train_batch_size=5,
        dataloader_drop_last=False,
        effective_batch_size=10,
    )
    assert failing["raised"] == 1
    counts = [row["micro_batches_per_update"] for row in failing["logs"]]
    assert sorted(counts) == [2, 2, 3]  # the update with the long row; the others as ever


@pytest.mark.slow
def test_buffers_and_every_random_generator_go_back(tmp_path):
    drawn = []

    def add_state(model):
        norm = torch.nn.BatchNorm1d(16).double()
        model.model.layers[0].register_module("norm", norm)

        def use(module, args, output):
            if module.training:
                drawn.append((random.random(), float(np.random.rand())))
                norm((output[0] if isinstance(output, tuple) else output).flatten(0, 1))

        model.model.layers[0].register_forward_hook(use)

    def state_after(**options):
        random.seed(1)
        np.random.seed(1)
        drawn.clear()
        result = train(tmp_path, prepare=add_state, **options)
        return result, dict(result["trainer"].model.named_buffers()), drawn[-10:]

    failing, buffers, numbers = state_after(failure={"when": lambda rows, width, seen: seen == 2})
    calm, expected, expected_numbers = state_after(lower=(0, failing["cap"]))
    assert failing["raised"] == 1
    assert same(failing, calm)
    assert numbers == expected_numbers
    assert all(torch.equal(buffers[name], value) for name, value in expected.items())
    assert any("num_batches_tracked" in name for name in expected)


@pytest.mark.slow
def test_a_collator_that_draws_is_not_asked_again(tmp_path):
    draws = torch.Generator().manual_seed(3)
    calls = []

    def drawing(rows):
        calls.append(len(rows))
        batch = pad(rows)
        hide = torch.rand(batch["labels"].shape, generator=draws) < 0.3
        batch["labels"] = batch["labels"].masked_fill(hide, -100)
        return batch

    def weights(**options):
        draws.manual_seed(3)
        calls.clear()
        model = {"attention_dropout": 0.0}
        result = train(tmp_path, data_collator=drawing, model=model, **options)
        return result["weights"], list(calls)

    failing, asked = weights(failure={"when": beyond(40)})
    calm, expected_calls = weights()
    assert asked == expected_calls
    for name, weight in calm.items():  # the same sequences with the same labels: only rounding
        torch.testing.assert_close(failing[name], weight, rtol=1e-12, atol=1e-14)


# ---- many ranks --------------------------------------------------------------------------------


@pytest.mark.slow
def test_ranks_recover_together_whoever_ran_out(tmp_path):
    base = {"effective_batch_size": 14, "max_tokens_per_micro_batch": 60}
    # Not with a budget of 30 from the start: by that the rows would be dealt to other ranks.
    scenarios = {"calm": {**base, "lower": (0, 30)}}
    for where, on_ranks in [("forward", (0,)), ("backward", (1,)), ("backward", (0, 1))]:
        name = f"{where} on {on_ranks}"
        scenarios[name] = {**base, "where": where, "on_ranks": on_ranks, "limit": 34}
    results = run_ranks(train_ranks, 2, scenarios=scenarios)
    for rank, result in enumerate(results):
        for name in scenarios.keys() - {"calm"}:
            failing = result[name]
            assert "error" not in failing, failing
            assert failing["cap"] == 30, name
            assert same(failing, result["calm"]), (rank, name)
    assert all(
        torch.equal(results[0]["calm"]["weights"][n], w)
        for n, w in results[1]["calm"]["weights"].items()
    )


@pytest.mark.slow
def test_no_rank_hangs_when_another_cannot_go_on(tmp_path):
    base = {"effective_batch_size": 14, "max_tokens_per_micro_batch": 60}
    scenarios = {
        "no row fits": {**base, "on_ranks": (1,), "limit": 2},
        "some other error": {**base, "on_ranks": (0,), "limit": 2, "error": KeyError("oops")},
    }
    first, second = run_ranks(train_ranks, 2, scenarios=scenarios)
    # The rank that ran out has heard the allocator's words; the others say the same without them.
    said = "  The allocator said: CUDA out of memory. Tried to allocate 2 GiB.\n"
    assert second["no row fits"]["text"].replace(said, "") == first["no row fits"]["text"]
    assert said in second["no row fits"]["text"]
    assert first["no row fits"]["error"] == "MemoryBudgetError"
    assert first["some other error"] == {"error": "KeyError", "text": "'oops'"}
    assert second["some other error"]["error"] == "RankFailedError"
    assert "another rank failed" in second["some other error"]["text"]


@pytest.mark.slow
def test_of_three_ranks_one_may_run_out_where_another_has_nothing_to_do(tmp_path):
    base = {"effective_batch_size": 14, "max_tokens_per_micro_batch": 60, "optim": "adamw_torch"}
    rows = ragged_rows(29, seed=5)  # the last update holds one row: two ranks have none
    scenarios = {
        "calm": {**base, "rows": rows, "lower": (0, 15)},
        "failing": {**base, "rows": rows, "where": "backward", "on_ranks": (2,), "limit": 15},
    }
    results = run_ranks(train_ranks, 3, scenarios=scenarios)
    for result in results:
        assert "error" not in result["failing"], result["failing"]
        assert result["failing"]["cap"] == 15
        assert same(result["failing"], result["calm"])


@pytest.mark.slow
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_inside_a_collective_all_ranks_stop_and_say_which_failed(where):
    first, second = run_ranks(run_out_of_memory_while_sharded, 2, where=where)
    assert second[0] == "MemoryBudgetError"
    assert "cannot be undone" in second[1]
    assert "smaller max_tokens_per_micro_batch" in second[1]
    assert first[0] == "RankFailedError"
    assert first[1].startswith("rank 1 failed with MemoryBudgetError: out of memory")


# ---- one row too long --------------------------------------------------------------------------


def bomb(length=100):
    rows = ragged_rows(30, seed=5, longest=6)
    rows[17] = {key: [value[0]] * length for key, value in rows[17].items()}
    rows[17]["labels"][0] = -100
    return rows


LONG = {"max_position_embeddings": 512}


@pytest.mark.slow
def test_a_row_fifty_times_the_rest_trains_if_it_fits_alone(tmp_path):
    failing = train(
        tmp_path,
        rows=bomb(250),
        model=LONG,
        failure={"when": beyond(250)},
        per_device_train_batch_size=5,
        max_tokens_per_micro_batch=None,
    )
    assert failing["raised"] >= 1
    assert [row["effective_batch_size"] for row in failing["logs"]] == [10, 10, 10]


@pytest.mark.slow
def test_a_row_that_does_not_fit_is_refused_by_name(tmp_path):
    with pytest.raises(MemoryBudgetError) as caught:
        train(
            tmp_path,
            rows=bomb(250),
            model=LONG,
            failure={"when": beyond(200)},
            max_tokens_per_micro_batch=512,
        )
    for part in (
        "row 17",
        "250 tokens",
        "the row alone",
        "The allocator said: CUDA out of memory. Tried to allocate 2 GiB.",
        "max_length",
        "gradient_checkpointing",
    ):
        assert part in str(caught.value)


# ---- what the allocator said besides -----------------------------------------------------------

IN_PIECES = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 512.00 MiB is free. Including non-PyTorch memory, this process has 78.60 GiB memory in "
    "use. Of the allocated memory 70.10 GiB is allocated by PyTorch, and {} is reserved by PyTorch "
    "but unallocated. If reserved but unallocated memory is large try setting ... (...)"
)


@pytest.fixture
def _no_allocator_settings(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_no_allocator_settings")
def test_memory_that_was_free_in_pieces_is_told_apart_from_memory_that_was_not_there(monkeypatch):
    advice = "7.50 GiB were free, but in pieces: start with PYTORCH_ALLOC_CONF=expandable_segments"
    assert advice in advice_on_pieces(IN_PIECES.format("7.50 GiB"))
    assert advice_on_pieces(IN_PIECES.format("900.00 MiB")) == ""
    assert advice_on_pieces("DefaultCPUAllocator: can't allocate memory") == ""
    full = torch.OutOfMemoryError(IN_PIECES.format("7.50 GiB"))
    assert advice in str(single_row_error(length=9, row=1, tried=[], message=str(full)))
    assert advice in str(outside_error(full, phase="optimizer", update=3))
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:True")
    assert advice_on_pieces(IN_PIECES.format("7.50 GiB")) == ""


@pytest.mark.usefixtures("_no_allocator_settings")
def test_an_update_that_is_cut_finer_for_want_of_one_piece_says_so(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(runner.logger, "warning", lines.append)
    error = torch.OutOfMemoryError(IN_PIECES.format("7.50 GiB"))
    assert train(tmp_path, failure={"when": beyond(40), "error": error})["raised"] > 0
    told = [line for line in lines if "runs again" in line]
    assert told
    assert all("7.50 GiB were free, but in pieces" in line for line in told)


class OfThisHost(torch.Tensor):
    """A tensor on the host, of a machine that has a CUDA device and no pinned memory left."""

    error = RuntimeError("CUDA error: out of memory")

    def is_pinned(self, *args):
        return False

    def pin_memory(self, *args):
        raise self.error

    def to(self, device, non_blocking=False):
        return ("copied to", device)


def test_a_host_without_pinned_memory_is_not_a_full_device(monkeypatch):
    lines = []
    monkeypatch.setattr(update.logger, "warning_once", lines.append)
    value = torch.ones(2).as_subclass(OfThisHost)
    device = torch.device("cuda", 0)
    assert update.start_copy(value, device) == ("copied to", device)
    assert "the host has no pinned memory left (CUDA error: out of memory)" in lines[0]
    monkeypatch.setattr(OfThisHost, "error", RuntimeError("CUDA error: device-side assert"))
    with pytest.raises(RuntimeError, match="device-side assert"):
        update.start_copy(value, device)


# ---- where no finer cut helps ------------------------------------------------------------------


class At(TrainerCallback):
    """Runs out of memory at an event of the trainer, once."""

    def __init__(self, event, *, step=1):
        self.step = step
        setattr(self, f"on_{event}", self._raise)

    def _raise(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")


@pytest.mark.slow
def test_between_micro_batches_it_is_as_in_one(tmp_path):
    failing = train(tmp_path / "failing", callbacks=[At("substep_end")])
    assert failing["cap"] is not None
    assert same(failing, train(tmp_path / "calm", lower=(1, failing["cap"])))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "place", "way_out"),
    [
        ("step_begin", "outside the micro-batches", "max_tokens_per_micro_batch"),
        ("pre_optimizer_step", "the optimizer's step", "adamw_8bit"),
        ("optimizer_step", "Weights may have been stepped in part", "LoRA"),
        ("evaluate", "between updates", "eval_accumulation_steps = 1"),
    ],
)
def test_elsewhere_it_is_an_error_that_says_where_and_what_to_set(tmp_path, event, place, way_out):
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": ragged_rows(4)}
    with pytest.raises(MemoryBudgetError) as caught:
        train(tmp_path, callbacks=[At(event)], **options)
    text = str(caught.value)
    assert place in text
    assert way_out in text
    assert "Tried to allocate 2 GiB." in text
    assert "More." not in text
    assert "last checkpoint" in text


@pytest.mark.slow
def test_before_the_first_update_it_says_that_not_even_a_few_rows_fit(tmp_path):
    def fail(model):
        Failure(model, beyond(0), evaluation=True)

    with pytest.raises(MemoryBudgetError, match="before the first update") as caught:
        train(tmp_path, prepare=fail)
    assert "last checkpoint" not in str(caught.value)


# ---- what is no recovery -----------------------------------------------------------------------


@pytest.mark.slow
def test_other_errors_are_raised_as_they_are(tmp_path):
    failure = {"when": beyond(40), "error": RuntimeError("shapes do not match")}
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(tmp_path, failure=failure)


@pytest.mark.slow
def test_recovery_can_be_turned_off(tmp_path):
    with pytest.raises(torch.OutOfMemoryError):
        train(tmp_path, failure={"when": beyond(40)}, recover_from_out_of_memory=False)


@pytest.mark.slow
def test_auto_find_batch_size_restarts_nothing(tmp_path):
    failing = train(tmp_path, failure={"when": beyond(40)}, auto_find_batch_size=True)
    assert failing["cap"] == 32
    assert [row["effective_batch_size"] for row in failing["logs"]] == [10, 10, 10]
    assert failing["trainer"].args.auto_find_batch_size is True
    with pytest.raises(MemoryBudgetError):
        train(tmp_path, failure={"when": beyond(2)}, auto_find_batch_size=True)


# ---- the budget --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_resumed_run_keeps_the_budget_that_fitted(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    whole = train(tmp_path, failure={"when": lambda rows, width, seen: seen == 0}, **options)
    assert whole["cap"] is not None
    with float64_everywhere():
        model = tiny_llama(attention_dropout=0.2)
        trainer = make_trainer(
            tmp_path,
            ragged_rows(30, seed=5),
            model=model,
            effective_batch_size=10,
            max_tokens_per_micro_batch=64,
            **options,
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.token_budget.cap == whole["cap"]
    for name, weight in model.named_parameters():
        assert torch.equal(weight, whole["weights"][name]), name


def test_the_budget_grows_back_after_many_updates_and_more_slowly_each_time():
    budget = TokenBudget(asked=1024)
    budget.shrink_to(budget.propose(900, num_rows=3))
    assert budget.cap == 512
    for _ in range(256):
        budget.note_success()
    assert budget.cap is None  # twice 512 is what was asked for: no limit of our own any more
    budget = TokenBudget(asked=1024)
    budget.shrink_to(256)
    for _ in range(256):
        budget.note_success()
    assert budget.cap == 512
    budget.shrink_to(256)
    for _ in range(256):
        budget.note_success()
    assert budget.cap == 256
    for _ in range(256):
        budget.note_success()
    assert budget.cap == 512


def test_a_budget_on_trial_is_on_trial_after_a_resume_too():
    budget = TokenBudget(asked=1024)
    budget.shrink_to(256)
    for _ in range(256):
        budget.note_success()
    resumed = TokenBudget()
    resumed.restore(json.loads(json.dumps(budget.state())))
    for one in (budget, resumed):
        one.shrink_to(256)
    assert resumed.state() == budget.state()
    assert resumed.patience == 512
    resumed.restore(None)  # a run of its own
    assert resumed.state() == TokenBudget().state()


@pytest.mark.slow
def test_a_budget_that_has_grown_back_cuts_as_before(tmp_path, monkeypatch):
    options = {"num_train_epochs": 4, "model": {"attention_dropout": 0.0}}
    monkeypatch.setattr(TokenBudget.__init__, "__defaults__", (*[None] * 5, 0, 5, False))
    failing = train(
        tmp_path / "failing", failure={"when": lambda rows, width, seen: seen == 0}, **options
    )
    calm = train(tmp_path / "calm", **options)
    cut, whole = (
        [row["micro_batches_per_update"] for row in run["logs"]] for run in (failing, calm)
    )
    assert failing["raised"] == 1
    assert failing["cap"] is None
    assert all(finer > coarse for finer, coarse in zip(cut[:5], whole[:5], strict=True))  # 16
    assert all(finer <= coarse for finer, coarse in zip(cut[5:10], cut[:5], strict=True))  # 32
    assert cut[10:] == whole[10:]  # 64, which was asked for


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 20.00 MiB",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "MPS backend out of memory (MPS allocated: 1 GB)",
        "[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasLtMatmul",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED",
        "cuFFT error: CUFFT_ALLOC_FAILED",
        "FIND was unable to find an engine to execute this computation",
        "HIP out of memory. Tried to allocate 256.00 MiB",
        "HIP error: out of memory",
        "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling hipblasCreate",
        "XPU out of memory. Tried to allocate 1.00 GiB",
        "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
        "NPU out of memory. Tried to allocate 2.00 GiB",
        "RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_each_backends_words_for_it_are_known(message):
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(ValueError(message))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 4x4)"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        MemoryBudgetError("row 3 does not fit: CUDA out of memory."),
    ],
    ids=str,
)
def test_other_trouble_is_not_taken_for_it(error):
    assert not is_out_of_memory(error)


def test_a_kind_of_its_own_and_pythons_are_known():
    assert is_out_of_memory(torch.OutOfMemoryError("whatever"))
    assert is_out_of_memory(MemoryError())


@pytest.mark.slow
def test_a_real_allocator_that_gives_up_is_recovered_from():
    """The kernel refuses the memory: nothing is injected."""
    [(cap, error)] = run_ranks(train_in_little_memory, 1)
    assert cap is not None
    assert error < 1e-12


# ---- evaluation --------------------------------------------------------------------------------


@pytest.mark.slow
def test_evaluation_goes_on_with_fewer_rows_and_gives_the_same(tmp_path):
    rows = ragged_rows(14, seed=4)
    model = tiny_llama()
    trainer = make_trainer(tmp_path, None, model=model, per_device_eval_batch_size=14)
    with float64_everywhere():
        plain = trainer.predict(rows)
        failure = Failure(model, lambda rows, width, seen: rows > 4, evaluation=True)
        split = trainer.predict(rows)
        assert failure.raised == 2  # on 14 rows, then on 7; from then on it is 3 at a time
        assert split.metrics["test_loss"] == pytest.approx(plain.metrics["test_loss"], rel=1e-13)
        assert split.predictions.shape == plain.predictions.shape
        real = plain.label_ids != -100
        torch.testing.assert_close(
            torch.tensor(split.predictions[real]), torch.tensor(plain.predictions[real])
        )
        assert (split.label_ids == plain.label_ids).all()
        failure.when = lambda rows, width, seen: True
        with pytest.raises(MemoryBudgetError, match="of 11 tokens"):
            trainer.predict(rows)
