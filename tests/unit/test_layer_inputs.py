"""Rows of what layers read: patches against unfold, hooks that leave nothing behind, and what bounds the memory."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffpress.layer_inputs import (
    LARGEST,
    ROWS,
    columns,
    groups,
    positions,
    pre_hooks,
    rows_at,
    rows_per_call,
    summable,
)

CONVOLUTIONS = [
    nn.Conv2d(3, 5, 3, padding=1),
    nn.Conv2d(3, 5, 1),
    nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
]


@pytest.mark.parametrize("layer", CONVOLUTIONS)
def test_patches_are_what_a_convolution_multiplies(layer):
    x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    places = torch.arange(positions(layer, x))
    rows = rows_at(layer, x, places)
    unfolded = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # [n, columns, places]
    assert torch.equal(rows, unfolded.transpose(1, 2).flatten(0, 1))
    expected = layer(x).movedim(1, -1).reshape(-1, 5)
    found = rows @ layer.weight.flatten(1).T + layer.bias
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(rows_at(layer, x, places.roll(1)) @ layer.weight.flatten(1).T + layer.bias, expected)


def test_what_is_not_summed():
    assert summable(nn.Linear(LARGEST, 1))
    assert not summable(nn.Linear(LARGEST + 1, 1))
    assert summable(CONVOLUTIONS[2])
    assert columns(CONVOLUTIONS[2]) == 18
    for other in ({"groups": 4}, {"padding": "same"}, {"padding_mode": "reflect", "padding": 1}):
        assert not summable(nn.Conv2d(4, 4, 3, **other))


def test_groups_keep_to_the_limit():
    sizes = {"a": 4, "b": 5, "c": 6, "d": 20, "e": 1}
    assert list(groups(sizes, limit=10)) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert list(groups(sizes, limit=100)) == [list(sizes)]
    assert list(groups({})) == []


def test_hooks_show_every_call_and_leave_nothing_behind(hooks_of):
    layer, seen = nn.Linear(2, 1), []
    with pre_hooks({"layer": layer}, lambda name, x: seen.append((name, tuple(x.shape)))):
        layer(torch.ones(3, 2))
        layer(torch.ones(1, 2))
    layer(torch.ones(5, 2))
    assert seen == [("layer", (3, 2)), ("layer", (1, 2))]
    assert hooks_of(layer) == 0


def test_all_calls_together_give_enough_rows(dit, context):
    given = context(dit)  # 3 steps, one batch
    assert 3 * rows_per_call(nn.Linear(4, 1), given) >= ROWS > 3 * (rows_per_call(nn.Linear(4, 1), given) - 1)
    assert rows_per_call(nn.Linear(6000, 1), given) == 16000
