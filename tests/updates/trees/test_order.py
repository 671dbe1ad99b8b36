"""What rows share is sorted out once for a dataset, and holds for every update of it."""

import itertools
import random

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from hf_gradacc import GradAccArguments
from hf_gradacc.updates.loader import ModelFacts, load_updates
from hf_gradacc.updates.trees.order import PrefixOrder

tokens = st.lists(st.lists(st.integers(1, 3), max_size=6), min_size=1, max_size=20)


def as_found(found):
    return found.order.tolist(), found.lengths.tolist(), found.shared.tolist()


def shared_by_pairs(rows, found):
    """What each row has in common with the one before it in the order found, token by token."""
    sorted_rows = [rows[i] for i in found.order]
    pairs = itertools.pairwise(sorted_rows)
    return [
        0,
        *(next((k for k in range(len(b)) if a[: k + 1] != b[: k + 1]), len(b)) for a, b in pairs),
    ]


@given(tokens, st.data())
def test_rows_of_an_update_share_what_they_would_share_if_sorted_by_themselves(rows, data):
    members = data.draw(st.lists(st.sampled_from(range(len(rows))), max_size=12))
    found = PrefixOrder([{"input_ids": row} for row in rows])(members)
    chosen = [rows[i] for i in members]
    assert [chosen[i] for i in found.order] == sorted(
        chosen, key=lambda r: np.array(r, np.int32).tobytes()
    )
    if members:
        assert found.shared.tolist() == shared_by_pairs(chosen, found)
    assert found.lengths.tolist() == [len(chosen[i]) for i in found.order]


def rows_of_heads(count, *, seed=0):
    draw = random.Random(seed)
    heads = [[draw.randrange(3, 48) for _ in range(20)] for _ in range(4)]
    rows = []
    for _ in range(count):
        ids = draw.choice(heads)[: draw.choice([5, 20, 20])]
        ids = ids + [draw.randrange(3, 48) for _ in range(draw.randint(2, 12))]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)})
    return rows


def test_a_table_is_sorted_like_a_list_whatever_was_selected_of_it():
    rows = rows_of_heads(60)
    table = datasets.Dataset.from_list(rows)
    members = random.Random(1).sample(range(60), 16)
    expected = as_found(PrefixOrder(rows)(members))
    assert as_found(PrefixOrder(table)(members)) == expected
    mixed = table.shuffle(seed=3)
    expected = as_found(PrefixOrder([dict(row) for row in mixed])(members))
    assert as_found(PrefixOrder(mixed)(members)) == expected
    halves = datasets.concatenate_datasets([table.select(range(7, 40)), table.select(range(30))])
    expected = as_found(PrefixOrder([dict(row) for row in halves])(members))
    assert as_found(PrefixOrder(halves)(members)) == expected


def test_of_a_dataset_too_large_to_hold_each_row_s_first_tokens_count():
    rows = rows_of_heads(60)
    members = list(range(40))
    whole, cut = PrefixOrder(rows)(members), PrefixOrder(rows, most_tokens=60 * 7)(members)
    assert max(whole.shared) >= 20
    assert max(cut.shared) == 7
    assert cut.lengths.max() == whole.lengths.max()
    truth = shared_by_pairs([rows[i]["input_ids"] for i in members], cut)
    assert cut.shared.tolist() == np.minimum(truth, 7).tolist()


def test_rows_of_other_than_tokens_and_rows_made_when_read_have_no_order():
    table = datasets.Dataset.from_list(rows_of_heads(8))
    assert PrefixOrder([{"input_values": [0.5]}, {"input_values": [0.1]}])([0, 1]) is None
    assert PrefixOrder(table.rename_column("input_ids", "prompt_ids"))([0, 1]) is None
    assert PrefixOrder(datasets.Dataset.from_dict({"input_ids": [[0.5], [1.5]]}))([0, 1]) is None
    assert PrefixOrder(table.with_transform(lambda rows: rows))([0, 1]) is None


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize("form", [list, datasets.Dataset.from_list, Stream])
def test_ranks_agree_on_who_has_which_rows_of_every_update_and_trees_stay_together(form):
    rows = rows_of_heads(90)
    options = {"output_dir": "out", "use_cpu": True, "report_to": "none", "noise_scale_every": 3}
    arguments = GradAccArguments(**options, max_tokens_per_micro_batch=128)

    def shares(shares_prefixes):
        found = []
        for rank in range(3):
            loader = load_updates(
                form(rows),
                list,
                arguments,
                model=ModelFacts(hidden_size=16),
                effective_batch_size=30,
                max_sequences=8,
                rank=rank,
                world_size=3,
            )
            loader.collator.shares_prefixes = shares_prefixes
            source = loader.batch_sampler or loader.dataset
            found.append([list(getattr(share, "indices", share)) for share in source])
        return list(zip(*found, strict=True))

    apart, together = shares(False), shares(True)
    for update, before in zip(together, apart, strict=True):
        assert sorted(itertools.chain(*update)) == sorted(itertools.chain(*before))
    assert together[0] == apart[0]  # its noise is measured: dealt at random
    for update in (1, 2):
        assert together[update] != apart[update]
        assert distinct(rows, together[update]) < distinct(rows, apart[update])


def distinct(rows, shares):
    """Tokens that ranks compute if each computes what its rows share once."""
    prefixes = [
        {
            tuple(rows[i]["input_ids"][: k + 1])
            for i in share
            for k in range(len(rows[i]["input_ids"]))
        }
        for share in shares
    ]
    return sum(map(len, prefixes))
