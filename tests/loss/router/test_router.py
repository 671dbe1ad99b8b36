"""Router losses over whole updates: pieces against one backward over all rows at once, float64."""

import math

import pytest
import torch
from support import reference
from support.reference import Gradient
from support.zoo import Case, case_named

from hf_gradacc.errors import LossError
from hf_gradacc.loss.coupling import Exchange, ForwardEnded
from hf_gradacc.loss.router.balance import RouterLoss, find_router_loss
from hf_gradacc.loss.router.calls import find_functions
from hf_gradacc.updates.targets import TargetCounts
from hf_gradacc.updates.update import MicroBatch

EXACT = 1e-10
CUTS = ([3, 3, 3, 2], [1, 10], [5, 1, 1, 4])


class Rows:
    """Eleven ragged rows of a case, and its model; cut as asked for, padded alike."""

    def __init__(self, name: str, *, left: bool = False, has_mask: bool = True, **inputs):
        case: Case = case_named(name)
        self.head, self.model = case.head, case.build()
        batch = case.collator(self.model)(case.rows())
        if left:
            shifts = batch["attention_mask"].eq(0).sum(1).tolist()
            rolled = [(key, zip(value, shifts, strict=True)) for key, value in batch.items()]
            batch = {k: torch.stack([row.roll(n) for row, n in rows]) for k, rows in rolled}
        if not has_mask:
            del batch["attention_mask"]
        self.batch, self.inputs = batch, inputs

    def whole(self, *, loss=lambda outputs: outputs.loss) -> Gradient:
        return self.gradient(loss(self.model(**self.batch, **self.inputs)))

    def gradient(self, loss) -> Gradient:
        self.model.zero_grad()
        loss.backward()
        return reference.gradient_of(self.model)

    def cut(self, sizes):
        parts, start = [], 0
        for size in sizes:
            rows = {key: value[start : start + size] for key, value in self.batch.items()}
            parts.append(rows)
            start += size
        return parts

    def targets(self, part) -> int:
        labels = part["labels"][:, 1:] if self.head == "causal" else part["labels"]
        return int(labels.ne(-100).sum())


def gather(rows: Rows, router: RouterLoss, parts, *, may_end: bool = True) -> int:
    """The first pass; returns how many forwards were ended."""
    router.begin()
    ended = 0
    for part in parts:
        micro_batch = MicroBatch(part, TargetCounts(), 0, 0, 0)
        with torch.no_grad():
            try:
                with router.gathering(micro_batch, may_end=may_end):
                    rows.model(**part, **rows.inputs)
            except ForwardEnded:
                ended += 1
    return ended


def apply(rows: Rows, router: RouterLoss, parts, total: int, *, wrongly=None) -> Gradient:
    """The second pass, each micro-batch weighted by its targets; `wrongly`: times these."""
    rows.model.zero_grad()
    for index, part in enumerate(parts):
        divisor = total / rows.targets(part)
        scale = divisor * (1 if wrongly is None else wrongly[index])
        with router.applying(index, scale=scale):
            loss = router.loss_of(rows.model(**part, **rows.inputs).loss)
            (loss / divisor).backward()
    return reference.gradient_of(rows.model)


def two_passes(rows: Rows, sizes) -> Gradient:
    router = find_router_loss(rows.model)
    parts = rows.cut(sizes)
    gather(rows, router, parts)
    router.couple(Exchange())
    return apply(rows, router, parts, sum(rows.targets(part) for part in parts))


def routers(gradient: Gradient) -> Gradient:
    names = ("gate.weight", "router.weight", "router.layer.weight", "classifier.weight")
    return {name: g for name, g in gradient.items() if name.endswith(names)}


@pytest.fixture(autouse=True)
def _float64():
    with reference.float64_everywhere():
        yield


CASES = {
    "mixtral": ("mixtral-causal-router", {}),
    "left padding": ("qwen2_moe-causal-router", {"left": True}),
    "no mask": ("olmoe-causal-router", {"has_mask": False}),
    "two kinds of routers": ("jetmoe-causal-router", {}),
    "encoder and decoder": ("nllb-moe-seq2seq-router", {}),
    "balanced by row, and z": ("switch_transformers-seq2seq", {"output_router_logits": True}),
}


@pytest.mark.parametrize("kind", CASES)
def test_no_cut_changes_the_gradient_of_the_routers_nor_any_other(kind):
    name, options = CASES[kind]
    rows = Rows(name, **options)
    expected = rows.whole()
    assert routers(expected)
    for sizes in CUTS:
        actual = two_passes(rows, sizes)
        assert reference.relative_error(actual, expected) <= EXACT
        assert reference.relative_error(routers(actual), routers(expected)) <= EXACT


def test_a_fraction_of_the_micro_batch_a_rolling_one_and_a_wrong_count_are_told_apart():
    rows = Rows("mixtral-causal-router")
    expected = routers(rows.whole())
    parts = rows.cut(CUTS[0])
    counts = [rows.targets(part) for part in parts]

    def error(gradient):
        return reference.relative_error(routers(gradient), expected)

    by_share = reference.share_weighted_gradient(rows.model, parts, counts)
    router = find_router_loss(rows.model)

    def rolling(index):
        gather(rows, router, parts[: index + 1])
        router.couple(Exchange())

    rows.model.zero_grad()
    for index, part in enumerate(parts):  # what has been seen of the update so far
        rolling(index)
        with router.applying(index, scale=sum(counts) / counts[index]):
            (rows.model(**part).loss * (counts[index] / sum(counts))).backward()
    of_what_was_seen = reference.gradient_of(rows.model)

    # A mean over tokens, weighted as if it were over targets.
    tokens = [int(part["attention_mask"].sum()) for part in parts]
    by_targets = [
        (count / sum(counts)) / (own / sum(tokens))
        for count, own in zip(counts, tokens, strict=True)
    ]
    gather(rows, router, parts)
    router.couple(Exchange())
    of_targets = apply(rows, router, parts, sum(counts), wrongly=by_targets)

    assert error(two_passes(rows, CUTS[0])) <= EXACT
    assert error(by_share) > 1e-3
    assert error(of_what_was_seen) > 1e-3
    assert error(of_targets) > 1e-3


def test_ranks_balance_together_one_of_them_without_a_micro_batch():
    """Three ranks, of which the last has nothing; then the second is forgotten."""
    ranks = [Rows("mixtral-causal-router") for _ in range(3)]
    expected = ranks[0].whole()
    cut = ranks[0].cut(CUTS[2])
    shares = [cut[:1], cut[1:], []]
    for forgotten, is_exact in ((None, True), (1, False)):
        coupled = [find_router_loss(rank.model) for rank in ranks]
        for rank, router, share in zip(ranks, coupled, shares, strict=True):
            gather(rank, router, share)
        sums = [router._sums for i, router in enumerate(coupled) if i != forgotten]
        total = sum(s for s in sums if s is not None)
        forms = [router._forms for router in coupled]

        def add_up(own, total=total):
            assert own.shape == total.shape
            return total

        gradients = []
        for rank, router, share in zip(ranks, coupled, shares, strict=True):
            router.couple(Exchange(add_up, lambda own, forms=forms: forms))
            gradients.append(apply(rank, router, share, sum(map(rank.targets, cut))))
        actual = {n: sum(g[n] for g in gradients if n in g) for n in gradients[0]}
        assert (reference.relative_error(routers(actual), routers(expected)) <= EXACT) is is_exact
        loads = [router.metrics()["expert_load_max"] for router in coupled]
        assert loads[0] == loads[1] == loads[2]


def test_a_forward_ends_with_the_last_router_and_counts_what_a_whole_one_does():
    rows = Rows("qwen3_moe-causal-router")
    parts = rows.cut(CUTS[0])
    head_calls = []
    rows.model.lm_head.register_forward_hook(lambda *_: head_calls.append(1))
    last = rows.model.model.layers[-1].mlp.experts
    expert_calls = []
    last.register_forward_hook(lambda *_: expert_calls.append(1))
    router = find_router_loss(rows.model)
    assert gather(rows, router, parts, may_end=False) == 0
    whole = router._sums
    assert gather(rows, router, parts) == 3  # the first shows where the logits come from
    assert len(head_calls) == len(expert_calls) == 4 + 1
    assert router._sums.equal(whole)


def test_only_what_is_known_to_be_called_is_replaced_and_always_put_back():
    rows = Rows("mixtral-causal-router")
    (function,) = find_functions(rows.model)
    assert function.name == "load_balancing_loss_func"
    router = find_router_loss(rows.model)
    rows.batch["labels"] = rows.batch["labels"] * 10**6
    with pytest.raises(IndexError):
        gather(rows, router, [rows.batch], may_end=False)
    assert function.namespace[function.name] is function.original
    assert find_router_loss(case_named("llama-causal").build()) is None
    assert find_router_loss(case_named("deepseek_v3-causal-router").build()) is None


def test_the_log_tells_the_loss_of_the_update_and_the_busiest_and_the_idlest_expert():
    rows = Rows("mixtral-causal-router")
    chosen = []
    gates = [layer.mlp.gate for layer in rows.model.model.layers]
    for gate in gates:
        gate.register_forward_hook(lambda _, args, output: chosen.append(output[0]))
    with torch.no_grad():
        outputs = rows.model(**rows.batch)
    mask = rows.batch["attention_mask"].reshape(-1).bool()
    loads = [
        torch.bincount(logits.topk(2).indices[mask].reshape(-1), minlength=4) / (2 * mask.sum())
        for logits in chosen
    ]
    router = find_router_loss(rows.model)
    gather(rows, router, rows.cut(CUTS[1]))
    router.couple(Exchange())
    figures = {key: float(value) for key, value in router.metrics().items()}
    assert math.isclose(figures["router_loss"], float(outputs.aux_loss), rel_tol=1e-12)
    assert math.isclose(figures["expert_load_max"], float(torch.stack(loads).max()))
    assert math.isclose(figures["expert_load_min"], float(torch.stack(loads).min()))


def test_micro_batches_that_call_the_router_loss_differently_are_refused_with_a_way_out():
    rows = Rows("mixtral-causal-router")
    router = find_router_loss(rows.model)
    router.begin()
    once = rows.model.forward

    def twice(*args, **kwargs):
        once(*args, **kwargs)
        return once(*args, **kwargs)

    gather(rows, router, [rows.batch])
    rows.model.forward = twice
    with pytest.raises(LossError, match="update_passes = 1"):
        gather(rows, router, [rows.batch], may_end=False)
