"""A token of a tree stands where it stands in its rows, and sees what it sees there."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.alike import paths
from support.reference import float64_everywhere, model_loss, relative_error, weighted_gradient
from support.tiny import VOCABULARY, pad, tiny_llama
from support.zoo import Case
from torch import nn

from hf_gradacc.loss.trees import hooks as tree_hooks
from hf_gradacc.loss.trees import masks
from hf_gradacc.loss.trees.hooks import computing_these, computing_trees, watching_bodies
from hf_gradacc.loss.trees.layout import lay_out_trees
from hf_gradacc.loss.trees.masks import tree_masks, why_no_masks


def padded(rows, *, left=False):
    """Pad with a token that rows hold, so that only the mask tells padding."""
    width = max(map(len, rows))
    fills = [[7] * (width - len(row)) for row in rows]
    ids = [fill + row if left else row + fill for row, fill in zip(rows, fills, strict=True)]
    ones = [[1] * len(row) for row in rows]
    zeros = [[0] * len(fill) for fill in fills]
    mask = [z + o if left else o + z for o, z in zip(ones, zeros, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def random_rows(seed, *, longest=9):
    draw = random.Random(seed)
    rows = [[draw.randrange(2) for _ in range(draw.randint(1, longest))] for _ in range(6)]
    return [*rows, list(rows[0]), rows[1][: len(rows[1]) // 2 + 1]]


CASES = {
    **{f"random {seed}": (random_rows(seed), [range(8)]) for seed in range(6)},
    "two trees": (random_rows(9), [(6, 0, 3), (7, 1, 2, 4, 5)]),
    "a tree and single rows": (random_rows(10), [(3,), (0, 1, 6, 7), (2,), (4,), (5,)]),
    "single rows": (random_rows(11), [(row,) for row in range(8)]),
    "nothing in common": ([[1, 2, 3], [2, 3], [3, 1, 2, 5]], [range(3)]),
    "three times one row": ([[1, 2, 3]] * 3, [range(3)]),
    "one goes on": ([[1, 2, 3, 4], [1, 2], [1, 2, 3]], [range(3)]),
    "prefixes within prefixes": (paths(), [range(13)]),
}


@pytest.fixture(params=CASES)
def rows_and_trees(request):
    return CASES[request.param]


def seen_by(rows, window=None, chunk=None):
    """By definition: which tokens of its row each token sees, as the beginnings that end there."""
    sees = {}
    for row in rows:
        for i in range(len(row)):
            seen = {
                tuple(row[: j + 1])
                for j in range(i + 1)
                if (window is None or i - j < window)
                and (chunk is None or i // chunk == j // chunk)
            }
            assert sees.setdefault(tuple(row[: i + 1]), seen) == seen
    return sees


def names_of_nodes(rows, laid, mask):
    """The beginning of a row that ends at each node, by flattened place."""
    names = {}
    for row, nodes, of_row in zip(rows, laid.nodes, mask.ne(0), strict=True):
        for n, node in enumerate(nodes[of_row].tolist()):
            assert names.setdefault(node, tuple(row[: n + 1])) == tuple(row[: n + 1])
    return names


def dense(masks, laid):
    """What each node sees, in flattened places."""
    num_trees, width = laid.ids.shape
    assert masks.shape == (num_trees, 1, width, width)
    allowed = masks if masks.dtype == torch.bool else masks.eq(0)
    sees = {}
    for tree in range(num_trees):
        for i in range(width):
            seen = allowed[tree, 0, i].nonzero().squeeze(-1).tolist()
            sees[tree * width + i] = {tree * width + j for j in seen}
    return sees


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_rows_are_laid_out_token_by_token(rows_and_trees, left):
    rows, trees = rows_and_trees
    ids, mask = padded(rows, left=left)
    laid = lay_out_trees(ids, mask, trees)
    flat_ids, positions = laid.ids.reshape(-1), laid.positions.reshape(-1)
    for row, nodes, of_row in zip(rows, laid.nodes, mask.ne(0), strict=True):
        assert flat_ids[nodes[of_row]].tolist() == row
        assert positions[nodes[of_row]].tolist() == list(range(len(row)))
        assert set(nodes[~of_row].tolist()) <= {int(nodes[of_row][0])}
    sizes = [len({name for row in tree for name in prefixes(rows[row])}) for tree in trees]
    assert laid.num_tokens == sum(sizes)
    assert laid.ids.shape == (len(trees), max(sizes))
    assert laid.rows is ids


def prefixes(row):
    return [tuple(row[: n + 1]) for n in range(len(row))]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("window", "chunk"), [(None, None), (1, None), (3, None), (None, 1), (None, 3)]
)
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_a_token_sees_what_it_sees_in_its_row(rows_and_trees, left, window, chunk, attention):
    rows, trees = rows_and_trees
    ids, mask = padded(rows, left=left)
    laid = lay_out_trees(ids, mask, trees)
    masks = tree_masks(laid, config_of(attention, window, chunk), dtype=torch.float64)
    if chunk is not None:
        masks = masks["chunked_attention"]
    names, expected = names_of_nodes(rows, laid, mask), seen_by(rows, window, chunk)
    tree_of_row = {row: place for place, tree in enumerate(trees) for row in tree}
    width = laid.ids.shape[1]
    for row, of_row in enumerate(laid.nodes):
        assert set((of_row // width).tolist()) == {tree_of_row[row]}
    for node, seen in dense(masks, laid).items():
        if node not in names:  # padding, which must see something
            assert seen == {node}
            continue
        assert [names[other] for other in sorted(seen)] == sorted(expected[names[node]], key=len)


def config_of(attention, window=None, chunk=None):
    config = SimpleNamespace(_attn_implementation=attention, sliding_window=window)
    if chunk is not None:
        config.layer_types, config.attention_chunk_size = ["chunked_attention"], chunk
    return config


def test_flex_attention_is_given_the_same_mask():
    rows = paths(unit=2)
    laid = lay_out_trees(*padded(rows), [range(6), range(6, 13)])
    for window in (None, 4):
        blocks = tree_masks(laid, config_of("flex_attention", window), dtype=torch.float32)
        bools = tree_masks(laid, config_of("sdpa", window), dtype=torch.float32)
        num_trees, width = laid.ids.shape
        i, j = torch.arange(width)[:, None], torch.arange(width)[None]
        for tree in range(num_trees):
            found = blocks.mask_mod(torch.tensor(tree), torch.tensor(0), i, j)
            assert torch.equal(found, bools[tree, 0])


def test_masks_go_by_the_kinds_of_layers():
    laid = lay_out_trees(*padded(paths()), [range(13)])
    config = config_of("sdpa", window=3)
    config.layer_types = ["full_attention", "sliding_attention"]
    masks = tree_masks(laid, config, dtype=torch.float32)
    assert sorted(masks) == ["full_attention", "sliding_attention"]
    assert masks["sliding_attention"].sum() < masks["full_attention"].sum()
    config.layer_types = ["full_attention"] * 2  # a window that no layer has
    alone = tree_masks(laid, config, dtype=torch.float32)
    assert torch.equal(alone, masks["full_attention"])


def test_masks_of_other_layers_and_kernels_cannot_be_made():
    flash = SimpleNamespace(_attn_implementation="flash_attention_2")
    assert "takes no mask of any shape" in why_no_masks(flash)
    hybrid = SimpleNamespace(_attn_implementation="sdpa", layer_types=["linear_attention"])
    assert "carry a state" in why_no_masks(hybrid)
    assert why_no_masks(config_of("sdpa", window=4)) == ""


# ---- through the body of a model ----------------------------------------------------------------

ROWS = [
    {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * (n % 4) + ids[n % 4 :]}
    for n, ids in enumerate(paths(low=3, high=VOCABULARY))
]
TREES = [(0, 4, 2, 8, 5, 12), (1, 3), (6, 7, 9, 10, 11)]


def body_of(model, batch):
    with watching_bodies(model) as watched, torch.no_grad():
        model(**batch)
    return watched.bodies


def trees_for(batch):
    return lay_out_trees(batch["input_ids"], batch["attention_mask"], TREES)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_a_model_returns_for_trees_what_it_returns_for_rows(attention, left):
    with float64_everywhere():
        model = tiny_llama(attn_implementation=attention)
        batch = pad(ROWS)
        if left:  # a row's first label would be predicted from padding
            batch["labels"][:, 0] = -100
            batch = {k: aligned_right(v, batch["attention_mask"]) for k, v in batch.items()}
            positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
            expected = model(**batch, position_ids=positions)
        else:
            expected = model(**batch)
        trees = trees_for(batch)
        with computing_these(
            body_of(model, batch), trees, batch["input_ids"], batch.get("attention_mask")
        ) as computed:
            actual = model(**batch)
    assert len(computed) == 1
    assert computed[0].num_tokens < int(batch["attention_mask"].sum())
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(actual.logits[real], expected.logits[real], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-12, atol=0)


def aligned_right(value, mask):
    return torch.stack(
        [
            torch.cat((row[~of_row], row[of_row]))
            for row, of_row in zip(value, mask.bool(), strict=True)
        ]
    )


@pytest.mark.filterwarnings("ignore")  # flex attention on a CPU says that it is slow
def test_flex_attention_computes_trees_forward():
    model = tiny_llama(attn_implementation="flex_attention", dtype=torch.float32, head_dim=16)
    batch = pad(ROWS)
    # Compiling takes a minute, and there is no backward on a CPU.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = model(**batch).logits
        with computing_these(
            body_of(model, batch), trees_for(batch), batch["input_ids"], batch.get("attention_mask")
        ) as done:
            actual = model(**batch).logits
    real = batch["attention_mask"].bool()
    assert len(done) == 1
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "opt", "llama4"])
def test_what_layers_return_comes_back_as_rows_too(name):
    """Hidden states of every layer, for whoever asks for them."""
    case = Case(name, "causal")
    with float64_everywhere():
        model = case.build()
        model.config.use_cache = False
        batch = pad(ROWS)
        expected = model(**batch, output_hidden_states=True).hidden_states
        with computing_these(
            body_of(model, batch), trees_for(batch), batch["input_ids"], batch.get("attention_mask")
        ) as done:
            actual = model(**batch, output_hidden_states=True).hidden_states
    real = batch["attention_mask"].bool()
    assert len(done) == 1
    assert len(actual) == len(expected) > 2
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine[real], theirs[real], rtol=1e-10, atol=1e-12)


def hooks_of(model):
    return [
        (name, len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
        if module._forward_pre_hooks or module._forward_hooks
    ]


def test_hooks_leave_nothing_behind():
    model, batch = tiny_llama(), pad(ROWS)
    before = model(**batch).logits
    bodies = body_of(model, batch)
    assert hooks_of(model) == []
    with computing_these(bodies, trees_for(batch), batch["input_ids"], batch.get("attention_mask")):
        model(**batch)
    assert hooks_of(model) == []
    assert torch.equal(model(**batch).logits, before)


class Failing(nn.Module):
    def forward(self, *args, **kwargs):
        raise KeyError("a layer")


def test_hooks_leave_nothing_behind_after_an_error():
    model, batch = tiny_llama(), pad(ROWS)
    bodies, layer = body_of(model, batch), model.model.layers[1]
    model.model.layers[1] = Failing()
    for context in (
        computing_these(bodies, trees_for(batch), batch["input_ids"], batch.get("attention_mask")),
        watching_bodies(model),
    ):
        with pytest.raises(KeyError, match="a layer"), context:
            model(**batch)
    assert hooks_of(model) == []
    model.model.layers[1] = layer
    with computing_these(
        bodies, trees_for(batch), batch["input_ids"], batch.get("attention_mask")
    ) as done:
        model(**batch)
    assert len(done) == 1


def test_a_body_that_failed_within_a_context_computes_the_next_call():
    model, batch = tiny_llama(), pad(ROWS)
    bodies, layer = body_of(model, batch), model.model.layers[1]
    expected = model(**batch).logits
    with computing_these(bodies, trees_for(batch), batch["input_ids"], batch.get("attention_mask")):
        model.model.layers[1] = Failing()
        with pytest.raises(KeyError):
            model(**batch)
        model.model.layers[1] = layer
        other = model(input_ids=batch["input_ids"][:2]).logits
        again = model(**batch).logits
    assert other.shape[:2] == (2, batch["input_ids"].shape[1])
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(again[real], expected[real])


def other_calls():
    batch = pad(ROWS)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    width = ids.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    embeds = torch.randn(*ids.shape, 16, generator=torch.Generator().manual_seed(0)).double()
    return {
        "embeddings": {"inputs_embeds": embeds, "attention_mask": mask},
        "positions": {"input_ids": ids, "position_ids": torch.arange(width)[None] + 3},
        "a mask of another shape": {
            "input_ids": ids,
            "attention_mask": torch.zeros(1, 1, width, width).masked_fill(~causal, -1e9).double(),
        },
        "other rows": {"input_ids": ids.flip(0), "attention_mask": mask.flip(0)},
        "fewer rows": {"input_ids": ids[:3], "attention_mask": mask[:3]},
        "attentions": {"input_ids": ids, "attention_mask": mask, "output_attentions": True},
    }


@pytest.mark.parametrize("name", other_calls())
def test_a_body_that_is_called_with_something_else_computes_that(name):
    model, call = tiny_llama(), other_calls()[name]
    batch = pad(ROWS)
    expected = model(**call).logits
    with computing_these(
        body_of(model, batch), trees_for(batch), batch["input_ids"], batch.get("attention_mask")
    ) as done:
        actual = model(**call).logits
    assert done == []
    assert torch.equal(actual, expected)


def test_a_body_that_goes_on_from_a_cache_computes_that():
    model, batch = tiny_llama(), pad(ROWS)
    ids = batch["input_ids"]
    first = model(input_ids=ids[:, :4], use_cache=True)
    expected = model(input_ids=ids[:, 4:], past_key_values=first.past_key_values).logits
    first = model(input_ids=ids[:, :4], use_cache=True)
    here = {"input_ids": ids[:, 4:], "attention_mask": torch.ones_like(ids[:, 4:])}
    with computing_trees(body_of(model, batch), lambda *_: trees_for(here)) as done:
        actual = model(input_ids=ids[:, 4:], past_key_values=first.past_key_values).logits
    assert done == []
    assert torch.equal(actual, expected)


def test_rows_are_known_by_their_tokens_where_a_trainer_hands_on_a_copy():
    model, batch = tiny_llama(), pad(ROWS)
    with computing_these(
        body_of(model, batch), trees_for(batch), batch["input_ids"], batch.get("attention_mask")
    ) as done:
        model(input_ids=batch["input_ids"].clone(), attention_mask=batch["attention_mask"])
    assert len(done) == 1


def test_what_a_head_passes_on_for_its_loss_is_no_other_call():
    model, batch = tiny_llama(), pad(ROWS)
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    with computing_these(
        body_of(model, batch), trees_for(batch), batch["input_ids"], batch.get("attention_mask")
    ) as done:
        model(**batch, shift_labels=labels, num_items_in_batch=torch.tensor(50))
    assert len(done) == 1


# ---- gradients, and variants that must not pass --------------------------------------------------


def gradients(monkeypatch=None, break_it=None, **changes):
    """The gradient of the rows, and that of their trees, laid out in a broken way if asked."""
    with float64_everywhere():
        model, batch = tiny_llama(**changes), pad(ROWS)
        expected = weighted_gradient(model, [batch], [1.0])
        trees = trees_for(batch)
        if break_it is not None:
            trees = break_it(trees, monkeypatch)
        with computing_these(
            body_of(model, batch), trees, batch["input_ids"], batch.get("attention_mask")
        ) as done:
            actual = weighted_gradient(model, [batch], [1.0])
        assert len(done) == 1
    return relative_error(actual, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_trees_have_the_gradient_of_their_rows(attention):
    assert gradients(attn_implementation=attention) <= 1e-14


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "llama4"])
def test_attention_row_by_row_has_that_gradient_too(name):
    with float64_everywhere():
        model, batch = Case(name, "causal").build(), pad(ROWS)
        model.config.use_cache = False
        if getattr(model.config, "sliding_window", None):
            model.config.sliding_window = 5
        expected = weighted_gradient(model, [batch], [1.0])
        ids, mask = batch["input_ids"], batch["attention_mask"]
        trees = lay_out_trees(ids, mask, TREES, by_rows=True)
        with computing_these(body_of(model, batch), trees, ids, mask) as done:
            actual = weighted_gradient(model, [batch], [1.0])
    assert len(done) == 1
    assert trees.ids.shape == (1, trees.num_tokens)
    assert relative_error(actual, expected) <= 1e-14


def siblings_seen(trees, _):
    width = trees.ids.shape[1]
    return replace(trees, ends=torch.full_like(trees.ends, width))


def positions_go_on(trees, _):
    return replace(trees, positions=torch.arange(trees.ids.shape[1]).expand_as(trees.ids))


def shared_counted_once(trees, monkeypatch):
    """Let only one row that holds a token send its gradient back."""
    stock = tree_hooks._as_rows

    def once(output, trees, *kept):
        found = stock(output, trees, *kept)
        if isinstance(found, torch.Tensor) and found.shape[:2] == trees.nodes.shape:
            flat, seen = trees.nodes.reshape(-1).tolist(), set()
            first = [not (node in seen or seen.add(node)) for node in flat]
            keep = torch.tensor(first).view(*trees.nodes.shape, *[1] * (found.ndim - 2))
            found = torch.where(keep, found, found.detach())
        return found

    monkeypatch.setattr(tree_hooks, "_as_rows", once)
    return trees


BROKEN = {
    "siblings see each other": siblings_seen,
    "positions go on over the tree": positions_go_on,
    "what is shared counts once": shared_counted_once,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_layout_does_not_have_that_gradient(monkeypatch, name):
    assert gradients(monkeypatch, BROKEN[name]) > 1e-4


def test_windows_are_counted_along_the_row(monkeypatch):
    def error():
        with float64_everywhere():
            model, batch = Case("mistral", "causal").build(), pad(ROWS)
            model.config.sliding_window, model.config.use_cache = 4, False
            expected = weighted_gradient(model, [batch], [1.0], loss_of=model_loss)
            bodies = body_of(model, batch)
            with computing_these(
                bodies, trees_for(batch), batch["input_ids"], batch.get("attention_mask")
            ):
                actual = weighted_gradient(model, [batch], [1.0])
        return relative_error(actual, expected)

    assert error() <= 1e-14
    stock = masks._mask

    def over_the_tree(trees, config, **options):
        places = torch.arange(trees.ids.shape[1]).expand_as(trees.ids)
        return stock(replace(trees, positions=places), config, **options)

    monkeypatch.setattr(masks, "_mask", over_the_tree)
    assert error() > 1e-3
