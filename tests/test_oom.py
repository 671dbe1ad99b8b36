"""Out of memory: an update that fails is run again finer, and nothing else of the run changes."""

import functools
import random
import tempfile

import numpy as np
import pytest
import torch
from support.failing import (
    Failure,
    beyond,
    same,
    train,
    train_in_little_memory,
    train_ranks,
)
from support.ranks import run_ranks
from support.reference import float64_everywhere
from support.tiny import make_trainer, pad, ragged_rows, tiny_llama

from hf_gradacc import MemoryBudgetError
from hf_gradacc.oom import MemoryBudget, is_out_of_memory

NUM_MICRO_BATCHES = 3  # of the first update, at 40 tokens each


@functools.cache
def calm_run(**options):
    """A run in which nothing fails."""
    with tempfile.TemporaryDirectory() as out:
        return train(out, **options)


# ---- the weights are those of a run with the smaller budget ------------------------------------


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


def test_a_failure_in_the_middle_of_a_run_changes_only_what_comes_after(tmp_path):
    failing = train(tmp_path, failure={"when": lambda rows, width, seen: seen == 5})
    calm = train(tmp_path, lower=(2, failing["cap"]))
    assert failing["raised"] == 1
    assert same(failing, calm)


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


def test_workers_that_still_hand_out_large_micro_batches_are_cut_down(tmp_path):
    failing = train(
        tmp_path, failure={"when": beyond(40)}, dataloader_num_workers=1, num_train_epochs=2
    )
    calm = calm_run(max_tokens_per_micro_batch=failing["cap"], num_train_epochs=2)
    assert same(failing, calm)


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


def test_no_rank_hangs_when_another_cannot_go_on(tmp_path):
    base = {"effective_batch_size": 14, "max_tokens_per_micro_batch": 60}
    scenarios = {
        "no row fits": {**base, "on_ranks": (1,), "limit": 2},
        "some other error": {**base, "on_ranks": (0,), "limit": 2, "error": KeyError("oops")},
    }
    first, second = run_ranks(train_ranks, 2, scenarios=scenarios, timeout=100)
    assert first["no row fits"] == second["no row fits"]
    assert first["no row fits"]["error"] == "MemoryBudgetError"
    assert first["some other error"] == {"error": "KeyError", "text": "'oops'"}
    assert second["some other error"]["error"] == "RankFailedError"
    assert "another rank failed" in second["some other error"]["text"]


# ---- one row too long --------------------------------------------------------------------------


def bomb(length=100):
    rows = ragged_rows(30, seed=5, longest=6)
    rows[17] = {key: [value[0]] * length for key, value in rows[17].items()}
    rows[17]["labels"][0] = -100
    return rows


LONG = {"max_position_embeddings": 512}


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


def test_a_row_that_does_not_fit_is_refused_by_name(tmp_path):
    with pytest.raises(MemoryBudgetError) as caught:
        train(
            tmp_path,
            rows=bomb(250),
            model=LONG,
            failure={"when": beyond(200)},
            max_tokens_per_micro_batch=512,
        )
    for part in ("row 17", "250 tokens", "the row alone", "max_length", "gradient_checkpointing"):
        assert part in str(caught.value)


# ---- what is no recovery -----------------------------------------------------------------------


def test_other_errors_are_raised_as_they_are(tmp_path):
    failure = {"when": beyond(40), "error": RuntimeError("shapes do not match")}
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(tmp_path, failure=failure)


def test_recovery_can_be_turned_off(tmp_path):
    with pytest.raises(torch.OutOfMemoryError):
        train(tmp_path, failure={"when": beyond(40)}, recover_from_out_of_memory=False)


def test_auto_find_batch_size_restarts_nothing(tmp_path):
    failing = train(tmp_path, failure={"when": beyond(40)}, auto_find_batch_size=True)
    assert failing["cap"] == 32
    assert [row["effective_batch_size"] for row in failing["logs"]] == [10, 10, 10]
    assert failing["trainer"].args.auto_find_batch_size is True
    with pytest.raises(MemoryBudgetError):
        train(tmp_path, failure={"when": beyond(2)}, auto_find_batch_size=True)


# ---- the budget --------------------------------------------------------------------------------


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
    assert trainer.budget.cap == whole["cap"]
    for name, weight in model.named_parameters():
        assert torch.equal(weight, whole["weights"][name]), name


def test_the_budget_grows_back_after_many_updates_and_more_slowly_each_time():
    budget = MemoryBudget()
    budget.shrink_to(budget.propose(900, num_rows=3, asked=1024), asked=1024)
    assert budget.cap == 512
    for _ in range(256):
        budget.note_success()
    assert budget.cap is None  # twice 512 is what was asked for: no limit of our own any more
    budget = MemoryBudget()
    budget.shrink_to(256, asked=1024)
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


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 20.00 MiB",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "MPS backend out of memory (MPS allocated: 1 GB)",
        "[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_each_backends_words_for_it_are_known(message):
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(ValueError(message))


def test_a_real_allocator_that_gives_up_is_recovered_from():
    """The kernel refuses the memory: nothing is injected."""
    [(cap, error)] = run_ranks(train_in_little_memory, 1)
    assert cap is not None
    assert error < 1e-12


# ---- evaluation --------------------------------------------------------------------------------


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
