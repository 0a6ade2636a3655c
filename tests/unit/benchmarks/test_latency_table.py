"""Which blocks leave for a budget, and that the network without them still runs."""

import pytest
import torch
from denoisers.nets import find_net, make_pipeline
from latency_table import choose, removable, without

from diffpress.generator import Generator


@pytest.fixture(params=["tiny-dit", "tiny-unet"])
def generator(request):
    return Generator(make_pipeline(find_net(request.param), seed=0, outliers=False))


def test_blocks_leave_up_to_the_share():
    table = {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}
    for share in (0.25, 0.5, 0.75):
        for seed in range(8):
            gone = choose(table, list(table), share, seed=seed)
            kept = [table[name] for name in table if name not in gone]
            taken = sum(table[name] for name in gone)
            assert taken <= share * 10 < taken + min(kept)  # no more, and no other would have fitted
    assert choose({"a": 2.0, "b": 1.0}, ["a", "b"], 0.1, seed=0) == ["b"]


def test_a_network_without_its_blocks_runs(generator, first_call, relative):
    blocks = removable(generator.denoiser)
    assert len(blocks) == {"DiTTransformer2DModel": 2}.get(type(generator.denoiser).__name__, len(blocks)) >= 2
    whole, call = first_call(generator)
    assert torch.equal(first_call(without(generator, []), call)[0], whole)
    smaller = without(generator, blocks[1:])
    output = first_call(smaller, call)[0]
    assert output.shape == whole.shape
    assert relative(output, whole) > 1e-4
    count = [sum(p.numel() for p in item.denoiser.parameters()) for item in (smaller, generator)]
    assert count[0] < count[1]
