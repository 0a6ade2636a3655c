"""Removable units of every family: bypass and removal agree, undo is exact, plain models are plain."""

import copy
from functools import partial

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from families import deeper
from tiny import fill_zeros

from diffpress.errors import ConfigError
from diffpress.generator import Generator, SamplingPlan
from diffpress.prune.units import (
    Skip,
    bypassed,
    find_units,
    going_whole,
    parameter_count,
    remove,
    restore,
    saved,
    units_named,
)
from diffpress.quantize.online import matches
from diffpress.traceable import unread

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}


def dit():
    """Four blocks with embeddings of their own, as when trained from scratch."""
    network = DiTTransformer2DModel(
        **HEADS, num_layers=4, in_channels=4, sample_size=8, norm_num_groups=4, num_embeds_ada_norm=10
    )
    labels = {"timestep": torch.tensor([7, 3]), "class_labels": torch.tensor([1, 2])}
    return network, {"hidden_states": torch.randn(2, 4, 8, 8), **labels}


def dit_of_one_embedding():
    """As converted checkpoints are: every block holds a copy of the same embedding."""
    network, inputs = dit()
    for block in network.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(network.transformer_blocks[0].norm1.emb.state_dict())
    return network, inputs


def pixart():
    network = PixArtTransformer2DModel(
        **HEADS, num_layers=3, in_channels=4, out_channels=8, sample_size=8, cross_attention_dim=16, caption_channels=12
    )
    text = {"encoder_hidden_states": torch.randn(2, 5, 12), "timestep": torch.tensor([7, 3])}
    return network, {"hidden_states": torch.randn(2, 4, 8, 8), "added_cond_kwargs": {}, **text}


def flux():
    network = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    inputs = {
        "hidden_states": torch.randn(2, 5, 16),  # as many tokens as the text has: only names tell them apart
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.tensor([0.7, 0.3]),
        "img_ids": torch.randn(5, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    return network, inputs


def sd3():
    network = SD3Transformer2DModel(
        **HEADS,
        sample_size=8,
        in_channels=4,
        num_layers=3,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.tensor([7, 3]),
    }
    return network, inputs


def unet(layers=2, blocks=1):
    """The second resnet of a down level keeps its width; cross-attention is around ``blocks`` blocks."""
    network = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=layers,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=2,
        transformer_layers_per_block=blocks,
    )
    text = {"encoder_hidden_states": torch.randn(2, 5, 12), "timestep": torch.tensor([7, 3])}
    return network, {"sample": torch.randn(2, 4, 8, 8), **text}


def deep_unet():
    """As SDXL: several transformer blocks in each attention layer."""
    return unet(layers=1, blocks=2)


def ddpm():
    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    )
    return network, {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([7, 3])}


def of_pipeline(name):
    """What the denoiser of a family's pipeline is given in its first call."""
    generator = Generator(deeper(name))
    plan = SamplingPlan(steps=1, guidance_scale=1.0, height=UNITS.get(name, 16), width=UNITS.get(name, 16))
    call = generator.record(generator.conditions(1), seeds=[0], plan=plan, limit=1)[0]
    return generator.denoiser, {
        name: value for name, value in (call.constants | call.inputs).items() if name != "return_dict"
    }


UNITS = {"sana": 32, "lumina2": 32, "zimage": 32, "qwen": 32}
PIPELINES = ("flux2", "chroma", "auraflow", "sana", "hunyuan", "cogview4", "lumina2", "zimage", "qwen")
FAMILIES = {make.__name__: make for make in (dit, dit_of_one_embedding, pixart, flux, sd3, unet, deep_unet, ddpm)}
FAMILIES |= {name: partial(of_pipeline, name) for name in PIPELINES}
PLAIN = {"dit_of_one_embedding", "pixart", "flux", "sd3", "flux2", "auraflow", "sana", "cogview4", "qwen"}
"""Whole blocks leave, whichever they are."""


@pytest.fixture(params=FAMILIES)
def family(request):
    """(name, network, inputs)."""
    torch.manual_seed(5)
    network, inputs = FAMILIES[request.param]()
    return request.param, fill_zeros(network), inputs


@torch.no_grad()
def answer(network, inputs):
    return network(**inputs, return_dict=False)[0]


def block_names(network):
    return [unit.name for unit in find_units(network, "block")]


def test_units_are_found_by_structure():
    found = {
        name: [(unit.name, unit.kind) for unit in find_units(make()[0], "block")] for name, make in FAMILIES.items()
    }
    assert found["dit"] == [(f"transformer_blocks.{index}", "block") for index in range(4)]
    assert found["flux"][-1] == ("single_transformer_blocks.2", "block")
    assert len(found["flux"]) == 5
    assert found["sd3"] == [("transformer_blocks.0", "block"), ("transformer_blocks.1", "block")]  # the last ends text
    assert set(found["unet"]) == {
        *((f"down_blocks.{level}.resnets.{index}", "resnet") for level, index in ((0, 0), (0, 1), (1, 1))),
        *((f"down_blocks.0.attentions.{index}", "attention") for index in (0, 1)),
        *((f"up_blocks.1.attentions.{index}", "attention") for index in (0, 1, 2)),
        *((f"mid_block.resnets.{index}", "resnet") for index in (0, 1)),
        ("mid_block.attentions.0", "attention"),
    }
    assert ("mid_block.attentions.0.transformer_blocks.1", "block") in found["deep_unet"]
    assert ("mid_block.attentions.0", "attention") not in found["deep_unet"]
    assert ("down_blocks.1.attentions.0", "attention") in found["ddpm"]


def test_sublayers_are_found_by_structure():
    kinds = {unit.name: unit.kind for unit in find_units(dit()[0], "sublayer")}
    assert kinds["transformer_blocks.3.attn1"] == "attention"
    assert kinds["transformer_blocks.3.ff"] == "mlp"
    assert len(kinds) == 8
    assert len(find_units(pixart()[0], "sublayer")) == 9  # cross-attention too
    flux_names = [unit.name for unit in find_units(flux()[0], "sublayer")]
    assert "transformer_blocks.1.ff_context" in flux_names
    assert "single_transformer_blocks.1" in flux_names  # attention and MLP share a projection there
    unet_names = [unit.name for unit in find_units(unet()[0], "sublayer")]
    assert "mid_block.attentions.0.transformer_blocks.0.attn2" in unet_names
    assert "mid_block.attentions.0" not in unet_names
    assert "mid_block.resnets.1" in unet_names


def saved_parameters(name, network, unit):
    """Of a block 0 that leaves the list the embedding goes too, which `saved` takes to stay."""
    more = 0
    if (name, unit.name) == ("dit_of_one_embedding", "transformer_blocks.0"):
        more = parameter_count(network.transformer_blocks[0].norm1.emb)
    return more + saved(network, unit, lambda module: parameter_count(network.get_submodule(module)))


@pytest.mark.parametrize("granularity", ["block", "sublayer"])
def test_every_unit_bypassed_equals_removed_and_comes_back(family, granularity):
    name, network, inputs = family
    before, state = answer(network, inputs), {name: value.clone() for name, value in network.state_dict().items()}
    units = find_units(network, granularity)
    outputs = {}
    for unit in units:
        with bypassed(network, [unit]):
            outputs[unit.name] = answer(network, inputs)
        assert torch.equal(answer(network, inputs), before)
        smaller = copy.deepcopy(network)
        remove(smaller, [unit])
        assert torch.equal(answer(smaller, inputs), outputs[unit.name])
        assert not torch.allclose(outputs[unit.name], before, atol=1e-5)  # each does something
        assert parameter_count(network) - parameter_count(smaller) == saved_parameters(name, network, unit) > 0
    distinct = list(outputs.values())
    assert not any(
        torch.equal(x, y) for i, x in enumerate(distinct) for y in distinct[:i]
    )  # another unit, another output
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("granularity", ["block", "sublayer"])
def test_bypassed_blocks_add_no_residual(family, granularity):
    """All units gone: what is left computes, and depends on no weight that was removed."""
    _, network, inputs = family
    units = find_units(network, granularity)
    with bypassed(network, units):
        left = answer(network, inputs)
        for unit in units:
            module = network.get_submodule(unit.name)
            kept = {id(p) for name, p in module.named_parameters() if name.startswith("norm1.emb")}
            with torch.no_grad():
                for parameter in module.parameters():
                    if id(parameter) not in kept:
                        parameter.fill_(float("nan"))
        assert torch.equal(answer(network, inputs), left)
    assert torch.isfinite(left).all()
    assert not torch.isfinite(answer(network, inputs)).all()


@pytest.mark.parametrize("granularity", ["block", "sublayer"])
def test_restored_structure_takes_the_weights_and_computes_the_same_bits(family, granularity):
    _, network, inputs = family
    other = fill_zeros(type(network).from_config(network.config))
    units = find_units(network, granularity)[1::2]
    metadata = remove(network, units)
    restore(other, metadata)
    assert not torch.equal(answer(other, inputs), answer(network, inputs))
    other.load_state_dict(network.state_dict())
    assert torch.equal(answer(other, inputs), answer(network, inputs))


def test_smaller_network_is_a_plain_model_where_its_class_can_say_so(family, tmp_path):
    name, network, inputs = family
    names = block_names(network)
    for place, gone in enumerate(([names[0]], [names[1]], names[:2])):
        smaller = copy.deepcopy(network)
        metadata = remove(smaller, units_named(smaller, gone))
        assert metadata["plain"] == (name in PLAIN or (name == "dit" and place == 1))
        assert metadata["removed"] == gone
        if not metadata["plain"]:
            assert any(isinstance(module, Skip) for module in smaller.modules())
            continue
        assert not any(isinstance(module, Skip) for module in smaller.modules())
        smaller.save_pretrained(tmp_path / str(place))
        loaded = type(network).from_pretrained(tmp_path / str(place))
        assert type(loaded) is type(network)
        torch.testing.assert_close(answer(loaded.eval(), inputs), answer(smaller, inputs))  # Sana rounds otherwise
        assert not torch.allclose(answer(loaded, inputs), answer(network, inputs), atol=1e-5)


def test_all_blocks_gone_leaves_a_dit_its_embedding():
    torch.manual_seed(0)
    network, inputs = dit()
    fill_zeros(network)
    units = find_units(network, "block")
    with bypassed(network, units):
        expected = answer(network, inputs)
    assert not remove(network, units)["plain"]
    assert torch.equal(answer(network, inputs), expected)
    left = [name for name in network.state_dict() if "blocks" in name]
    assert left
    assert all(name.startswith("transformer_blocks.0.norm1.emb.") for name in left)


def test_block_without_its_branches_is_removed_whole():
    torch.manual_seed(0)
    network, inputs = dit()
    fill_zeros(network)
    units = units_named(network, ["transformer_blocks.2.ff", "transformer_blocks.2.attn1"])
    with bypassed(network, units):
        expected = answer(network, inputs)
    metadata = remove(network, units)
    assert metadata == {"removed": ["transformer_blocks.2"], "plain": True}
    assert network.config.num_layers == 3
    torch.testing.assert_close(answer(network, inputs), expected, rtol=0, atol=0)


def test_more_than_the_branches_goes_with_a_whole_block(family):
    name, network, _ = family
    blocks = going_whole(network, find_units(network, "sublayer"))
    for block, branches in list(blocks.items())[:2]:
        smaller = copy.deepcopy(network)
        units = units_named(network, branches)
        remove(smaller, units)
        gone = parameter_count(network) - parameter_count(smaller)
        assert gone == saved_parameters(name, network, block)
        assert gone >= sum(saved_parameters(name, network, unit) for unit in units) > 0
        assert not going_whole(network, units[1:])
    undivided = ("ddpm", "auraflow", "hunyuan", "lumina2", "zimage", "qwen")  # no branch of theirs can go alone
    assert bool(blocks) == (name not in undivided)


def without_gradient(network, inputs):
    network(**inputs, return_dict=False)[0].square().sum().backward()
    return {name for name, parameter in network.named_parameters() if parameter.grad is None}


@pytest.mark.parametrize("granularity", ["block", "sublayer"])
def test_nothing_dead_stays_behind(family, granularity):
    """A training carries no parameter that the output does not read, but those of the network as it was."""
    _, network, inputs = family
    for part in (slice(None, None, 3), slice(-1, None)):
        smaller = copy.deepcopy(network)
        remove(smaller, find_units(smaller, granularity)[part])
        left = without_gradient(smaller, inputs)
        assert len(left) == len(without_gradient(copy.deepcopy(network), inputs))
        assert all(matches(name, unread(smaller)) for name in left)
    smaller.unread = torch.nn.Linear(2, 2)
    assert without_gradient(smaller, inputs) - left == {"unread.weight", "unread.bias"}


def test_removing_twice_composes():
    torch.manual_seed(0)
    network, inputs = unet()
    fill_zeros(network)
    units = units_named(network, ["mid_block.attentions.0", "down_blocks.0.resnets.1"])
    with bypassed(network, units):
        expected = answer(network, inputs)
    for unit in units:
        remove(network, [unit])
    assert torch.equal(answer(network, inputs), expected)
    assert not {unit.name for unit in units} & set(block_names(network))


def test_names_that_are_no_units_are_refused():
    network = unet()[0]
    with pytest.raises(ConfigError, match=r"no removable up_blocks\.0\.resnets\.0; allowed: down_blocks"):
        units_named(network, ["up_blocks.0.resnets.0"])  # it reads a skip connection
    with pytest.raises(ConfigError, match=r"no removable transformer_blocks\.9"):
        restore(dit()[0], {"removed": ["transformer_blocks.9"], "plain": True})


def test_bypass_is_undone_after_an_error():
    torch.manual_seed(0)
    network, inputs = dit()
    fill_zeros(network)
    before = answer(network, inputs)
    with pytest.raises(ZeroDivisionError), bypassed(network, find_units(network, "block")[:1]):
        1 / 0  # noqa: B018
    assert torch.equal(answer(network, inputs), before)
    assert not any("forward" in vars(module) for module in network.modules())
