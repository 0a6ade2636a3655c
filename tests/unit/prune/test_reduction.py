"""Pooling against torch's own, merging against a plain loop, blocks on a coarse grid against what they should be."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn
from torch.nn import functional as F

from diffpress.errors import ConfigError
from diffpress.export.graph import export_graph
from diffpress.export.session import open_session
from diffpress.prune.reduction import CoarseBlocks, MergedTokens, PooledKeys, TokenGrid


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def attention(**settings):
    return Attention(16, heads=2, dim_head=8, bias=True, **settings).eval()


def test_average_is_that_of_torch():
    x = torch.randn(2, 24, 3)  # 4 x 6
    found = TokenGrid(4, 6, 2).average(x)
    expected = F.avg_pool2d(x.transpose(1, 2).unflatten(2, (4, 6)), 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(TokenGrid(6, 4, 2).average(x), expected)


def test_spread_is_that_of_torch():
    x = torch.randn(2, 6, 3)  # 2 x 3 cells
    found = TokenGrid(4, 6, 2).spread(x)
    pictures = F.interpolate(x.transpose(1, 2).unflatten(2, (2, 3)), scale_factor=2, mode="nearest")
    assert torch.equal(found, pictures.flatten(2).transpose(1, 2))
    torch.testing.assert_close(TokenGrid(4, 6, 2).average(found), x)


def test_cells_of_one_token_change_nothing():
    x, grid = torch.randn(2, 24, 3), TokenGrid(4, 6, 1)
    assert grid.average(x) is x
    assert torch.equal(grid.spread(x), x)


def test_grid_that_is_not_tiled():
    with pytest.raises(ConfigError, match=r"pool 4 does not tile a grid of 6 x 12 tokens; allowed: 1, 2, 3, 6"):
        TokenGrid(6, 12, 4)


def test_another_grid_is_refused():
    for work in (TokenGrid(4, 6, 2).average, PooledKeys(TokenGrid(4, 6, 2), AttnProcessor2_0()).grid.average):
        with pytest.raises(ConfigError, match=r"16 tokens, but token reduction was fitted for 4 x 6"):
            work(torch.randn(1, 16, 3))


def test_pooled_keys_are_attention_to_the_means():
    layer, x = attention(), torch.randn(2, 16, 16)
    expected = layer(x, encoder_hidden_states=TokenGrid(4, 4, 2).average(x))
    q, k, v = (
        projection(x).unflatten(-1, (2, 8)).transpose(1, 2) for projection in (layer.to_q, layer.to_k, layer.to_v)
    )
    pooled = [value.transpose(1, 2).flatten(2) for value in (k, v)]
    pooled = [TokenGrid(4, 4, 2).average(value).unflatten(-1, (2, 8)).transpose(1, 2) for value in pooled]
    by_hand = layer.to_out[0]((F.softmax(q @ pooled[0].mT / 8**0.5, -1) @ pooled[1]).transpose(1, 2).flatten(2))
    before = layer(x)
    layer.set_processor(PooledKeys(TokenGrid(4, 4, 2), layer.processor))
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x), by_hand)  # pooled after the projections: the same
    assert not torch.allclose(layer(x), before, atol=1e-3)


def test_pooled_keys_of_constant_tokens_are_the_same():
    layer, x = attention(), torch.randn(2, 1, 16).expand(-1, 16, -1)
    before = layer(x)
    layer.set_processor(PooledKeys(TokenGrid(4, 4, 2), layer.processor))
    torch.testing.assert_close(layer(x), before)


def test_pooled_keys_of_a_feature_map_are_normed_first():
    layer = attention(norm_num_groups=4, residual_connection=True)
    nn.init.normal_(layer.group_norm.weight)
    x = torch.randn(2, 16, 4, 4) + 2
    normed = layer.group_norm(x.flatten(2)).transpose(1, 2)
    plain = attention()
    plain.load_state_dict({name: v for name, v in layer.state_dict().items() if "group_norm" not in name})
    expected = plain(normed, encoder_hidden_states=TokenGrid(4, 4, 2).average(normed)).mT.unflatten(2, (4, 4)) + x
    layer.set_processor(PooledKeys(TokenGrid(4, 4, 2), layer.processor))
    torch.testing.assert_close(layer(x), expected)


def merged_by_loop(layer, x, count):
    """One picture [16, c] of 4 x 4 tokens: sources into destinations at even rows and columns."""
    first = [row * 4 + column for row in (0, 2) for column in (0, 2)]
    sources = [index for index in range(16) if index not in first]
    unit = x / x.norm(dim=-1, keepdim=True)
    likeness = unit[sources] @ unit[first].T
    best = likeness.amax(1).argsort(descending=True)[:count].tolist()
    into = {sources[row]: int(likeness[row].argmax()) for row in best}
    groups = [
        [place, *(source for source, cell in into.items() if cell == number)] for number, place in enumerate(first)
    ]
    groups += [[source] for source in sources if source not in into]
    out = layer(torch.stack([x[group].mean(0) for group in groups])[None])[0]
    result = torch.empty_like(x)
    for value, group in zip(out, groups, strict=True):
        result[group] = value
    return result


@pytest.mark.parametrize("count", [0, 1, 5, 12])
def test_merged_tokens_are_those_of_a_loop(count):
    layer, x = attention(), torch.randn(3, 16, 16)
    with torch.no_grad():
        expected = torch.stack([merged_by_loop(layer, picture, count) for picture in x])
        unmerged = layer(x)
        layer.set_processor(MergedTokens(TokenGrid(4, 4, 2), count, layer.processor))
        found = layer(x)
    torch.testing.assert_close(found, expected)
    assert torch.allclose(found, unmerged, atol=1e-5) == (count == 0)


def test_merging_nothing_is_what_an_engine_runs(tmp_path):
    """No tensor without tokens; other grids are refused all the same."""
    layer, x = attention(), torch.randn(2, 16, 16)
    layer.set_processor(MergedTokens(TokenGrid(4, 4, 2), 0, layer.processor))

    class Flat(nn.Module):
        def forward(self, *tensors):
            return layer(*tensors)

    export_graph(Flat().eval(), {"x": x}, ["y"], tmp_path / "model.onnx", free={"x": {}}, opset=20)
    session = open_session(tmp_path / "model.onnx", target="onnxruntime")
    with torch.no_grad():
        torch.testing.assert_close(session({"x": x})[0], layer(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"64 tokens, but token reduction was fitted for 4 x 4"):
        layer(torch.randn(2, 64, 16))


def test_merging_keeps_the_count_and_its_inverse_the_places():
    x = torch.randn(2, 16, 8)
    merge, unmerge = MergedTokens(TokenGrid(4, 4, 2), 7, None).matching(x)
    assert merge(x).shape == (2, 9, 8)
    constant = torch.ones(2, 16, 1)
    torch.testing.assert_close(unmerge(merge(constant)), constant)
    places = torch.arange(16.0)[None, :, None].expand(2, -1, -1)
    back = unmerge(merge(places))
    assert ((back == places).sum(1) >= 1).all()
    assert (back != places).any()


def test_duplicates_are_merged_exactly():
    layer = attention()
    x = torch.randn(2, 4, 16)[:, [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]]  # every cell is one token
    with torch.no_grad():
        before = layer(x)
        layer.set_processor(MergedTokens(TokenGrid(4, 4, 2), 12, layer.processor))
        torch.testing.assert_close(layer(x), before)


class Scaled(nn.Module):
    """x (1 + t), and a norm where a DiT would have its embedding."""

    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(3)

    def forward(self, x, other=None, *, timestep):
        return x * (1 + timestep)


def test_coarse_blocks_add_to_every_token_what_its_cell_gets():
    x, grid = torch.randn(2, 16, 3), TokenGrid(4, 4, 2)
    coarse = CoarseBlocks([Scaled(), Scaled()], grid)
    found = coarse(x, None, timestep=0.5)
    torch.testing.assert_close(found, x + grid.spread(grid.average(x)) * (1.5**2 - 1))
    assert coarse.norm1 is coarse.blocks[0].norm1


def test_coarse_blocks_of_one_token_are_the_blocks():
    x = torch.randn(2, 16, 3)
    assert torch.equal(CoarseBlocks([Scaled(), Scaled()], TokenGrid(4, 4, 1))(x, timestep=0.5), x * 1.5 * 1.5)
