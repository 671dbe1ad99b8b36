"""What is drawn for a row belongs to the row: to seed, epoch and row, not to the cut."""

import functools
import random

import datasets
import numpy as np
import pytest
import torch
from support.drawing import collators, mask_of, mask_words, mix_up, token_rows
from support.tiny import pad, ragged_rows

from hf_gradacc import UpdateCollator
from hf_gradacc.updates.batch import slice_rows
from hf_gradacc.updates.draws import rows as draws
from hf_gradacc.updates.draws.randomness import RandomSources, find_generators
from hf_gradacc.updates.draws.rows import DrawsByRow
from hf_gradacc.updates.loader import IndexedRows
from hf_gradacc.updates.recut import cut_to_limit
from hf_gradacc.updates.sampler import Share
from hf_gradacc.updates.stream import Rows

COLLATORS = collators()
ROWS = token_rows()


def rows_of(collate, rows, *, size, epoch=0, order=None, seed=0, max_tokens=None):
    """Collate 8 rows so many at a time; return each by its place, as far as it is no padding."""
    order = list(range(8)) if order is None else order
    collator = UpdateCollator(
        collate, max_sequences=None if max_tokens else size, max_tokens=max_tokens, seed=seed
    )
    share = Rows([rows[i] for i in order], indices=order, epoch=epoch, update=0)
    return by_place(collator(share))


def by_place(update):
    found = {}
    for micro_batch in update:
        for i, place in enumerate(micro_batch.rows):
            row = slice_rows(micro_batch.inputs, [i])
            found[place] = without_padding(row)
    return dict(sorted(found.items()))


def without_padding(row):
    mask = row.get("attention_mask")
    if mask is None:
        return {key: value.tolist() for key, value in row.items()}
    real = mask[0].ne(0)
    width = len(real)
    return {
        key: (value[0][real] if value.ndim == 2 and value.shape[1] == width else value).tolist()
        for key, value in row.items()
    }


@pytest.mark.parametrize("name", COLLATORS)
def test_a_row_is_drawn_alike_however_the_update_is_cut_and_ordered(name):
    collate, rows = COLLATORS[name]
    whole = rows_of(collate, rows, size=8)
    torch.rand(3), random.random(), np.random.rand(2)
    assert rows_of(collate, rows, size=4) == whole
    assert rows_of(collate, rows, size=3, order=[5, 2, 7, 0, 1, 6, 4, 3]) == whole
    assert rows_of(collate, rows, size=1) == whole
    assert rows_of(collate, rows, size=8, epoch=1) != whole
    assert rows_of(collate, rows, size=8, seed=1) != whole


@pytest.mark.parametrize("name", COLLATORS)
def test_drawing_leaves_no_trace_in_any_generator(name):
    collate, rows = COLLATORS[name]
    rows_of(collate, rows, size=4)  # some make their generator when first called
    sources = RandomSources(collate)
    before = sources.state()
    rows_of(collate, rows, size=4)
    assert not sources.has_moved(before)


def test_two_rows_of_the_same_words_are_drawn_apart():
    same = [ROWS[0]] * 8
    drawn = rows_of(mask_words(), same, size=4)
    assert len({str(row["labels"]) for row in drawn.values()}) > 4


@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("left", [False, True])
def test_rows_put_together_are_padded_as_their_collator_pads_them(left, multiple):
    """A collator that pads four features four ways, and draws a number beside them."""

    def plain(rows):
        width = max(len(row["input_ids"]) for row in rows)
        width = -(-width // (multiple or 1)) * (multiple or 1)
        batch = {}
        for key, fill in {"input_ids": 9, "attention_mask": 0, "labels": -100, "kinds": 3}.items():
            padded = []
            for row in rows:
                ids = [1] * len(row["input_ids"]) if key == "attention_mask" else row["input_ids"]
                extra = [fill] * (width - len(ids))
                padded.append(extra + ids if left else ids + extra)
            batch[key] = torch.tensor(padded)
        batch["pairs"] = torch.zeros(len(rows), width, width)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            place = slice(width - n, width) if left else slice(0, n)
            batch["pairs"][i, place, place] = 1.0
        return batch

    drawn = DrawsByRow(lambda rows: {**plain(rows), "u": torch.rand(len(rows))})
    for chosen in (range(3), range(9), range(4, 9)):
        rows = [ROWS[i] for i in chosen]
        joined, expected = drawn(rows, list(chosen), epoch=0), plain(rows)
        joined.pop("u")
        assert drawn.by_row
        assert list(joined) == list(expected)
        for key, value in expected.items():
            assert joined[key].dtype == value.dtype
            assert torch.equal(joined[key], value), key


def test_a_batch_keeps_the_type_its_collator_gives_it():
    drawn = DrawsByRow(mask_words())
    batch = drawn(ROWS[:4], range(4), epoch=0)
    assert type(batch) is type(mask_words()(ROWS[:4]))


def test_a_collator_that_draws_nothing_is_called_as_ever():
    calls = []

    def counted(rows):
        calls.append(len(rows))
        return pad(rows)

    rows = ragged_rows(9, seed=51)
    collator = UpdateCollator(counted, max_sequences=3)
    update = collator(rows)
    assert calls == [3, 3, 3]
    for micro_batch in update:
        expected = pad([rows[i] for i in micro_batch.rows])
        assert all(torch.equal(expected[key], micro_batch.inputs[key]) for key in expected)


def test_a_collator_that_takes_columns_out_of_its_rows_still_finds_them():
    def popping(rows):
        labels = [row.pop("label") for row in rows]
        return {**mask_of(rows), "label": torch.tensor(labels), "u": torch.rand(len(rows))}

    rows = [{**row, "label": i} for i, row in enumerate(ROWS)]
    for size in (1, 4):
        found = rows_of(popping, rows, size=size)
        assert [row["label"] for row in found.values()] == [[i] for i in range(8)]


def test_a_mixup_stays_one_and_says_that_it_depends_on_the_cut(told):
    def collate(epoch):
        return drawn(ROWS[:4], range(4), epoch=epoch)["weights"]

    drawn = DrawsByRow(mix_up)
    batches = [collate(epoch) for epoch in range(8)]
    assert any(bool(((batch > 0) & (batch < 1)).any()) for batch in batches)
    assert all(torch.equal(batch, collate(epoch)) for epoch, batch in enumerate(batches))
    assert len(told) == 1
    assert "a row comes out otherwise beside other rows" in told[0]


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(draws.logger, "warning_once", lines.append)
    return lines


def one_size_per_batch(rows):
    size = random.choice([4, 6, 8])
    return {"pixel_values": torch.rand(len(rows), 3, size, size)}


def one_weight_per_batch(rows):
    return {**mask_of(rows), "weight": torch.rand(())}


def end_to_end(rows):
    ids = [i for row in rows for i in row["input_ids"]]
    return {"input_ids": torch.tensor([ids]), "u": torch.rand(1, len(ids))}


def not_one_row(rows):
    assert len(rows) > 1
    return {**mask_of(rows), "u": torch.rand(len(rows))}


def a_list(rows):
    return [torch.rand(2) for _ in rows]


@pytest.mark.parametrize(
    "collate", [one_size_per_batch, one_weight_per_batch, end_to_end, not_one_row, a_list]
)
def test_what_cannot_be_put_together_is_collated_as_ever_and_told(collate, told):
    drawn = DrawsByRow(collate)
    batch = drawn(ROWS[:4], range(4), epoch=0)
    assert drawn.by_row is False
    assert len(told) == 1
    again = DrawsByRow(collate)(ROWS[:4], range(4), epoch=0)
    other = drawn(ROWS[:4], range(4, 8), epoch=0)  # another rank: not the same numbers
    assert str(batch) == str(again) != str(other)


def seed_by_update(self, *entropy):
    self._sources.seed(7)


def seed_by_place(self, *entropy, count=[0]):  # noqa: B006
    count[0] += 1
    self._sources.seed(count[0])


def no_seed(self, *entropy):
    pass


@pytest.mark.parametrize("broken", [seed_by_update, seed_by_place, no_seed])
def test_seeds_of_another_kind_are_noticed(monkeypatch, broken):
    """What the first test says of a row must be false of these."""
    monkeypatch.setattr(DrawsByRow, "_seed", broken)
    first = rows_of(mask_words(), ROWS, size=8)
    is_same_by_cut = rows_of(mask_words(), ROWS, size=4) == first
    is_same_by_epoch = rows_of(mask_words(), ROWS, size=8, epoch=1) == first
    assert not is_same_by_cut or is_same_by_epoch


def test_an_update_cut_again_holds_what_a_loader_with_the_smaller_limit_draws():
    collator = UpdateCollator(mask_words(), max_sequences=8)
    share = Rows(ROWS[:8], indices=range(8), epoch=2, update=1)
    again = cut_to_limit(collator(share), collator, max_tokens=40)
    smaller = UpdateCollator(mask_words(), max_sequences=8, max_tokens=40)(share)
    assert len(again) == len(smaller) > 1
    for a, b in zip(again, smaller, strict=True):
        assert a.rows == b.rows
        assert all(torch.equal(a.inputs[key], b.inputs[key]) for key in b.inputs)


def test_one_width_for_all_keeps_what_is_drawn():
    collator = UpdateCollator(mask_words(), max_sequences=2)
    collator.pad_to_one_width = True
    update = collator(Rows(ROWS[:8], indices=range(8), epoch=0, update=0))
    assert len({mb.inputs["input_ids"].shape[1] for mb in update}) == 1
    assert by_place(update) == rows_of(mask_words(), ROWS, size=8)


def test_a_row_that_comes_again_in_a_pass_is_drawn_anew_if_a_sampler_repeats_rows():
    def draw(update, repeats):
        collator = UpdateCollator(mask_words(), max_sequences=4)
        collator.rows_repeat = repeats
        return by_place(collator(Rows(ROWS[:4], indices=range(4), epoch=0, update=update)))

    assert draw(0, False) == draw(1, False)
    assert draw(0, True) != draw(1, True)


class Augmented:
    """A dataset that draws in ``__getitem__``."""

    def __init__(self):
        self.generator = np.random.default_rng(3)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"x": index + float(torch.rand(())) + random.random() + self.generator.random()}


def transformed(fn):
    dataset = datasets.Dataset.from_dict({"x": list(range(8))})
    dataset.set_transform(fn)
    return dataset


def jitter(batch):
    return {"x": [x + np.random.rand() for x in batch["x"]]}


def jitter_mixed(batch):
    return {
        "x": [x + y for x, y in zip(batch["x"], np.random.permutation(batch["x"]), strict=True)]
    }


@pytest.mark.parametrize("make", [Augmented, functools.partial(transformed, jitter)])
def test_a_dataset_that_draws_does_so_by_row(make):
    def read(*shares, epoch=0):
        rows = IndexedRows(make(), seed=1)
        found = {}
        for share in shares:
            read = rows.__getitems__(Share(share, epoch=epoch, update=0))
            found |= {i: row["x"] for i, row in zip(share, read, strict=True)}
        return dict(sorted(found.items()))

    whole = read([0, 1, 2, 3])
    assert read([3, 1], [0, 2]) == whole
    assert read([0], [1], [2], [3]) == whole
    assert read([0, 1, 2, 3], epoch=1) != whole
    assert {int(x) - i for i, x in whole.items()} <= {0, 1, 2}


def test_a_transform_that_mixes_rows_still_does_and_is_told(told):
    rows = IndexedRows(transformed(jitter_mixed), seed=1)
    read = rows.__getitems__(Share(range(6), epoch=0, update=0))
    assert [row["x"] for row in read] != [2 * i for i in range(6)]
    assert sum(row["x"] for row in read) == 30
    assert len(told) == 1


def test_a_dataset_that_draws_nothing_is_read_at_once():
    calls = []

    def note(batch):
        calls.append(len(batch["x"]))
        return batch

    rows = IndexedRows(transformed(note))
    rows.__getitems__(Share(range(6), epoch=0, update=0))
    assert calls == [6]


def test_generators_are_found_wherever_code_keeps_them():
    generator = random.Random(1)

    def of_closure():
        return generator.random()

    class Holder:
        def __init__(self):
            self.inner = {"list": [functools.partial(of_closure)]}
            self.own = np.random.default_rng(2)

    found = find_generators(Holder())
    assert generator in found
    assert len(found) == 2
    assert find_generators(mask_words()) == []
    assert find_generators(random.SystemRandom().random) == []
