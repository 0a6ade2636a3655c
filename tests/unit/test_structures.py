"""What can be narrowed in each family; a removed unit is one that was zero where it is read."""

import copy

import pytest
import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from families import make as make_family
from tiny import fill_zeros, make_flux
from torch import nn

from diffpress.errors import ConfigError
from diffpress.generator import Generator
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.structures import find_structures, masked

KINDS = ("heads", "mlp", "resnet")


def half(structures):
    """Every other unit of each structure that has more than one."""
    return {name: list(range(0, s.units, 2)) for name, s in structures.items() if s.units > 1}


def others(structures):
    return {name: list(range(1, s.units, 2)) for name, s in structures.items() if s.units > 1}


def narrowed(generator, kept):
    structures = find_structures(generator.denoiser, KINDS)
    for name, units in kept.items():
        structures[name].narrow(units)


@pytest.fixture
def flux():
    torch.manual_seed(0)
    return Generator(make_flux())


def test_structures_of_a_dit(dit):
    found = find_structures(dit.denoiser, KINDS)
    assert {name: (s.kind, s.units, s.size) for name, s in found.items() if ".0." in name} == {
        "transformer_blocks.0.attn1": ("heads", 2, 8),
        "transformer_blocks.0.ff": ("mlp", 64, 1),
    }
    assert list(find_structures(dit.denoiser, ("mlp",))) == ["transformer_blocks.0.ff", "transformer_blocks.1.ff"]


def test_structures_of_a_unet(sd):
    found = find_structures(sd.denoiser, KINDS)
    expected = [
        name
        for name, module in sd.denoiser.named_modules()
        if isinstance(module, Attention | FeedForward | ResnetBlock2D)
    ]
    assert list(found) == expected
    resnet = found["down_blocks.0.resnets.0"]
    assert (resnet.kind, resnet.units, resnet.size) == ("resnet", 4, 4)
    assert resnet.timed == tuple(f"down_blocks.0.resnets.0.{part}" for part in ("conv1", "norm2", "conv2"))


def test_structures_of_flux(flux):
    found = find_structures(flux.denoiser, KINDS)
    assert list(found) == [f"transformer_blocks.0.{part}" for part in ("attn", "ff", "ff_context")]
    assert list(found["transformer_blocks.0.attn"].consumers) == [
        "transformer_blocks.0.attn.to_out.0",
        "transformer_blocks.0.attn.to_add_out",
    ]


@pytest.mark.parametrize("family", ["dit", "sd", "ddpm", "flux"])
def test_narrow_network_is_the_masked_one(request, family, plan, relative):
    generator = request.getfixturevalue(family)
    call = generator.record(generator.conditions(2), seeds=[0, 1], plan=plan, limit=1)[0]
    kept = half(find_structures(generator.denoiser, KINDS))
    assert kept

    def output():
        with torch.no_grad():
            return generator.denoiser(**{**call.constants, **call.inputs, "return_dict": False})[0]

    with masked(find_structures(generator.denoiser, KINDS), kept):
        expected = output()
    assert relative(expected, call.output) > 1e-3
    wrong = copy.deepcopy(generator.denoiser)
    narrowed(generator, kept)
    assert relative(output(), expected) < 1e-5
    assert all(structure.units % 2 == 0 for structure in find_structures(wrong, KINDS).values() if structure.units > 1)
    setattr(generator.pipeline, generator.denoiser_name, wrong)
    narrowed(generator, others(find_structures(wrong, KINDS)))
    assert relative(output(), expected) > 1e-3


@pytest.mark.parametrize("time_embedding_norm", ["default", "scale_shift"])
def test_resnet_without_groups(time_embedding_norm, relative):
    torch.manual_seed(0)
    resnet = ResnetBlock2D(
        in_channels=6, out_channels=12, temb_channels=5, groups=2, groups_out=4, time_embedding_norm=time_embedding_norm
    )
    fill_zeros(resnet)
    network = nn.ModuleDict({"resnet": resnet})
    x, temb = torch.randn(2, 6, 4, 4), torch.randn(2, 5)
    structures = find_structures(network, KINDS)
    with torch.no_grad():
        with masked(structures, {"resnet": [0, 3]}):
            expected = resnet(x, temb)
        structures["resnet"].narrow([0, 3])
        assert relative(resnet(x, temb), expected) < 1e-5
    assert (resnet.norm2.num_groups, resnet.norm2.num_channels, resnet.conv2.in_channels) == (2, 6, 6)
    assert resnet.time_emb_proj.out_features == (6 if time_embedding_norm == "default" else 12)


@pytest.mark.parametrize("activation", ["geglu", "swiglu", "gelu-approximate", "geglu-approximate", "linear-silu"])
def test_mlp_without_channels(activation, relative):
    torch.manual_seed(0)
    mlp = FeedForward(4, mult=4, activation_fn=activation).eval()
    x, kept = torch.randn(2, 3, 4), [1, 2, 7, 11, 15]
    structures = find_structures(nn.ModuleDict({"ff": mlp}), KINDS)
    with torch.no_grad():
        with masked(structures, {"ff": kept}):
            expected = mlp(x)
        structures["ff"].narrow(kept)
        assert relative(mlp(x), expected) < 1e-5
    assert mlp.net[0].proj.weight.shape == (len(kept) * structures["ff"].producers[0][1], 4)


@pytest.mark.parametrize("family", ["dit", "sd", "flux"])
def test_parameters_of_a_unit_are_what_goes(request, family):
    network = request.getfixturevalue(family).denoiser
    for name, structure in find_structures(network, KINDS).items():
        if structure.units > 1:
            before = sum(p.numel() for p in network.parameters())
            structure.narrow(range(structure.units - 1))
            assert before - sum(p.numel() for p in network.parameters()) == structure.unit_parameters, name


def test_widths_are_multiples_of_the_alignment():
    resnet = ResnetBlock2D(in_channels=96, temb_channels=None, groups=16)
    structure = find_structures(nn.ModuleDict({"resnet": resnet}), KINDS)["resnet"]
    assert (structure.units, structure.size) == (16, 6)
    assert [structure.step(align) for align in (1, 3, 8, 16, 4)] == [1, 1, 4, 8, 2]


def test_heads_that_a_norm_spans_stay():
    network = nn.ModuleDict(
        {
            "across": Attention(16, heads=2, dim_head=8, kv_heads=2, qk_norm="layer_norm_across_heads"),
            "each": Attention(16, heads=2, dim_head=8, qk_norm="rms_norm"),
            "grouped": Attention(16, heads=2, dim_head=8, kv_heads=1),
        }
    )
    assert list(find_structures(network, KINDS)) == ["each"]


def test_quantized_layers_are_refused(dit, context):
    Int8(Int8Config()).apply(dit, context(dit))
    with pytest.raises(ConfigError, match=r"transformer_blocks\.0\.attn1 has a \w*Linear; allowed: layers in float"):
        find_structures(dit.denoiser, KINDS)


def test_fused_projections_are_refused(sd):
    sd.denoiser.fuse_qkv_projections()
    with pytest.raises(ConfigError, match="unfuse_qkv_projections"):
        find_structures(sd.denoiser, KINDS)


def test_masks_leave_nothing_behind(dit, hooks_of):
    structures = find_structures(dit.denoiser, KINDS)
    with masked(structures, half(structures)):
        assert hooks_of(dit.denoiser) == 4
    assert hooks_of(dit.denoiser) == 0


def pixart():
    network = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        cross_attention_dim=16,
        caption_channels=12,
        use_additional_conditions=False,
    )
    given = {"encoder_hidden_states": torch.randn(2, 5, 12), "encoder_attention_mask": torch.ones(2, 5)}
    return network, {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 900]), **given}


def sd3():
    network = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=6,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    given = {"encoder_hidden_states": torch.randn(2, 5, 12), "pooled_projections": torch.randn(2, 6)}
    return network, {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3.0, 900.0]), **given}


def test_attention_that_shares_its_projection_with_the_mlp_stays():
    """Flux 2's single blocks."""
    network = make_family("flux2").transformer
    assert set(find_structures(network, KINDS)) == {"transformer_blocks.0.attn"}


@pytest.mark.parametrize(("make", "count"), [(pixart, 6), (sd3, 5)])  # the last block of SD3 ends the text's stream
def test_other_families(make, count, relative):
    torch.manual_seed(0)
    network, inputs = make()
    fill_zeros(network)
    structures = find_structures(network, KINDS)
    assert len(structures) == count
    with torch.no_grad():
        with masked(structures, half(structures)):
            expected = network(**inputs, return_dict=False)[0]
        assert relative(network(**inputs, return_dict=False)[0], expected) > 1e-3
        for name, units in half(structures).items():
            structures[name].narrow(units)
        assert relative(network(**inputs, return_dict=False)[0], expected) < 1e-5
