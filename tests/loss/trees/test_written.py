"""Writes to weights are noticed in whatever holds them, and nothing else is taken for one."""

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from hf_gradacc.loss.trees.written import Weights

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.int64,
    torch.uint8,
    torch.bool,
]


def holding(weight):
    module = nn.Module()
    module.register_buffer("weight", weight)
    return module


@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_write_by_data_is_noticed_in_weights_of_any_type(dtype, shape):
    module = holding(torch.zeros(shape).to(dtype))
    weights = Weights([module])
    assert not weights.differ(module)
    flat = module.weight.data.view(-1)
    flat[-1:] = torch.ones(1).to(dtype)
    assert weights.differ(module)


def test_a_write_to_the_imaginary_part_alone_is_noticed():
    module = holding(torch.zeros(3, 4, dtype=torch.complex64))
    weights = Weights([module])
    module.weight.data[1, 2] = 1j
    assert weights.differ(module)


def test_sums_that_are_no_numbers_are_no_write():
    both = torch.tensor([[torch.inf, -torch.inf], [torch.nan, 1.0], [2.0, 3.0]])
    module = holding(both)
    weights = Weights([module])
    assert not weights.differ(module)
    module.weight.data[2, 0] = torch.nan
    assert weights.differ(module)


class CannotAdd(TwoTensor):
    """Like a quantized weight: two tensors in one, for which torch knows no sum."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        if func.overloadpacket in (torch.ops.aten.sum, torch.ops.aten.clone):
            raise NotImplementedError("sum")
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_of_weights_made_of_several_tensors_each_is_watched():
    parts = torch.ones(3, 4), torch.ones(3, 4)
    module = nn.Module()
    module.weight = nn.Parameter(CannotAdd(*parts), requires_grad=False)
    weights = Weights([module])
    assert not weights.differ(module)
    parts[1].data[0, 0] = 5.0
    assert weights.differ(module)
