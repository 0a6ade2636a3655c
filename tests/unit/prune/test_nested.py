"""Several widths in one set of weights: sorting changes nothing, a prefix is what pruning in that order leaves."""

import json

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from pydantic import ValidationError
from tiny import fill_zeros

from diffpress.artifact import load_weights, save_weights
from diffpress.errors import ConfigError
from diffpress.generator import Generator
from diffpress.prune.width import Width, WidthConfig, best_units
from diffpress.structures import Nested, find_structures, masked
from diffpress.targets import TARGETS

KINDS = ("heads", "mlp", "resnet")
SHARES = (1.0, 0.75, 0.5)
TARGET = TARGETS["onnxruntime"]


def applied(generator, given, **settings):
    stage = Width(WidthConfig(**{"align": 1} | settings))
    stage.check(generator, TARGET)
    return stage.apply(generator, given)


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("family", ["dit", "sd"])
def test_sorting_changes_nothing_but_the_order(request, family, context, first_call, relative):
    generator = request.getfixturevalue(family)
    before = {name: value.clone() for name, value in generator.denoiser.state_dict().items()}
    expected, call = first_call(generator)
    metadata = applied(generator, context(generator), nested=SHARES).metadata
    assert relative(first_call(generator, call)[0], expected) < 1e-5
    for name, value in generator.denoiser.state_dict().items():
        assert torch.equal(value.flatten().sort().values, before[name].flatten().sort().values)
    assert not all(torch.equal(value, before[name]) for name, value in generator.denoiser.state_dict().items())
    assert metadata["output_errors"]["1"] < 1e-5 < metadata["output_errors"]["0.75"] < metadata["output_errors"]["0.5"]
    assert generator.nested == Nested(shares=SHARES, kinds=KINDS, align=1)
    assert json.loads(json.dumps(metadata))["order"] == metadata["order"]


@pytest.mark.parametrize("family", ["dit", "sd"])
@pytest.mark.parametrize("share", [0.75, 0.5])
def test_a_slice_is_what_direct_pruning_in_that_order_leaves(request, family, share, context, first_call, relative):
    folder, found = request.getfixturevalue(f"{family}_folder"), {}
    for name in ("direct", "slice", "wrong"):
        generator = Generator.load(folder)
        given = context(generator)
        if name == "direct":
            applied(generator, given, keep=share, repair=False)
        else:
            applied(generator, given, nested=SHARES)
            if name == "wrong":  # the least important first: as a whole still the same network
                for structure in find_structures(generator.denoiser, KINDS).values():
                    structure.narrow(range(structure.units)[::-1])
            whole = {key: value.clone() for key, value in generator.denoiser.state_dict().items()}
            applied(generator, given, take=share)
            for key, value in generator.denoiser.state_dict().items():  # nothing is refitted
                halves = 2 if family == "sd" and ".ff.net.0." in key else 1  # of a gated MLP
                for part, of in zip(value.chunk(halves), whole[key].chunk(halves), strict=True):
                    assert torch.equal(part, of[tuple(slice(size) for size in part.shape)])
            assert generator.nested is None
        found[name] = first_call(generator)[0], parameters(generator.denoiser)
    assert len({count for _, count in found.values()}) == 1
    assert relative(found["slice"][0], found["direct"][0]) < 1e-5
    assert relative(found["wrong"][0], found["direct"][0]) > 1e-2


def test_pixart(relative):
    """With cross-attention, whose heads are another structure."""
    torch.manual_seed(0)
    network = fill_zeros(
        PixArtTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=4,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            sample_size=8,
            cross_attention_dim=16,
            caption_channels=12,
            use_additional_conditions=False,
        )
    )
    text = {"encoder_hidden_states": torch.randn(2, 5, 12), "encoder_attention_mask": torch.ones(2, 5)}
    inputs = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 900]), **text}

    @torch.no_grad()
    def answer():
        return network(**inputs, return_dict=False)[0]

    structures = find_structures(network, KINDS)
    nested = Nested(shares=(1.0, 0.5), kinds=KINDS, align=1)
    scores = {name: torch.rand(structure.units) for name, structure in structures.items()}
    before = answer()
    with masked(structures, {name: best_units(scores[name], structures[name].units // 2) for name in structures}):
        expected = answer()
    for name, structure in structures.items():
        structure.narrow(scores[name].argsort(descending=True).tolist())
    assert relative(answer(), before) < 1e-5
    prefix = nested.kept(network, 0.5)
    assert set(prefix) == set(structures)
    assert nested.kept(network, 1.0) == {}
    with masked(structures, prefix):
        assert relative(answer(), expected) < 1e-5
    with masked(structures, {name: [units[-1] + 1 + unit for unit in units] for name, units in prefix.items()}):
        assert relative(answer(), expected) > 1e-2
    for name, units in prefix.items():
        structures[name].narrow(units)
    assert relative(answer(), expected) < 1e-5


@pytest.mark.parametrize("family", ["dit", "sd"])
def test_every_width_comes_back_from_one_file(request, family, context, first_call, tmp_path):
    generator, folder = request.getfixturevalue(family), request.getfixturevalue(f"{family}_folder")
    made = json.loads(json.dumps(applied(generator, context(generator), nested=SHARES, align=8).metadata))
    save_weights(generator.denoiser, tmp_path / "denoiser.safetensors")
    call = first_call(generator)[1]
    sizes = []
    for share in SHARES:
        again = Generator.load(folder)
        Width.restore(again, made)
        load_weights(again.denoiser, tmp_path / "denoiser.safetensors")
        structures = find_structures(again.denoiser, KINDS)
        with masked(structures, again.nested.kept(again.denoiser, share)):
            expected = first_call(again, call)[0]
        taken = json.loads(json.dumps(applied(again, context(again), take=share).metadata))
        torch.testing.assert_close(first_call(again, call)[0], expected, rtol=1e-4, atol=1e-5)
        sizes.append(parameters(again.denoiser))
        twin = Generator.load(folder)
        for metadata in (made, taken):
            Width.restore(twin, metadata)
        assert twin.nested is None
        twin.denoiser.load_state_dict(again.denoiser.state_dict())
        assert torch.equal(first_call(twin, call)[0], first_call(again, call)[0])
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[0] == parameters(generator.denoiser)


def test_widths_outlive_blocks_that_go(dit, context):
    """The order is each structure's own: it does not matter what else is removed between."""
    given = context(dit)
    applied(dit, given, nested=SHARES, kinds=("mlp",), align=16)
    del dit.denoiser.transformer_blocks[0]
    taken = applied(dit, given, take=0.5)
    assert taken.metadata["kept"] == {"transformer_blocks.0.ff": list(range(32))}
    assert "the nested width 50%: mlp 50%: " in taken.summary


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nested": (1.0,)}, "at least 2"),
        ({"nested": (0.75, 0.5)}, r"nested 0\.75, 0\.5; allowed: 1, then smaller and smaller"),
        ({"nested": (1.0, 0.5, 0.5)}, "allowed: 1, then smaller and smaller"),
        ({"nested": (1.0, 0.5), "take": 0.5}, "nested and take given; allowed: one of keep, latency, parameters"),
        ({"take": 0.0}, "greater than 0"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        WidthConfig(**settings)


def test_widths_that_cannot_be_are_refused(dit, context):
    given = context(dit)
    with pytest.raises(ConfigError, match=r"nested 0\.95 is as wide as 1 in multiples of 16; allowed: less"):
        applied(dit, given, nested=(1.0, 0.95, 0.5), align=16)
    with pytest.raises(ConfigError, match=r"take 0\.5: no widths are nested; allowed: after prune\.width with nested"):
        applied(dit, given, take=0.5)
    applied(dit, given, nested=SHARES)
    with pytest.raises(ConfigError, match=r"take 0\.6 is not nested; allowed: 1, 0\.75, 0\.5"):
        applied(dit, given, take=0.6)
