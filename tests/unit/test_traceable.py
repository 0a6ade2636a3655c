"""Networks in a form that torch can trace: the stock ones to the last digits, from files of the stock class."""

import copy
import inspect

import pytest
import torch
from diffusers import Lumina2Transformer2DModel, ZImageTransformer2DModel
from families import make

from diffpress.errors import ConfigError
from diffpress.export.load import keep_plan
from diffpress.generator import Generator
from diffpress.sampling import SamplingPlan
from diffpress.structures import find_structures, masked
from diffpress.traceable import check_traceable, make_traceable, unread

STOCK = {"lumina2": Lumina2Transformer2DModel, "zimage": ZImageTransformer2DModel}
TIMES = torch.tensor([0.1, 0.5, 0.9])


@pytest.fixture(params=STOCK)
def pair(request):
    """(family, stock network, the traceable one)."""
    stock = make(request.param).transformer.eval()
    traceable = copy.deepcopy(stock)
    make_traceable(traceable)
    return request.param, stock, traceable


def texts(name, lengths, *, longest=None):
    """Features [n, longest, d] and what counts of them."""
    generator = torch.Generator().manual_seed(1)
    unit = 32 if name == "zimage" else 1
    longest = longest or -(-max(lengths) // unit) * unit
    features = torch.randn(len(lengths), longest, 16, generator=generator)
    return features, torch.arange(longest) < torch.tensor(lengths)[:, None]


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def of_stock(name, network, x, features, mask):
    if name == "lumina2":
        return network(x, TIMES, features, mask.long(), return_dict=False)[0]
    lists = [row.unsqueeze(1) for row in x], TIMES, [row[own] for row, own in zip(features, mask, strict=True)]
    return torch.stack(network(*lists, return_dict=False)[0]).squeeze(2)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(7, 7, 7), (5, 32, 47)])
@pytest.mark.parametrize("size", [(8, 16), (6, 10)])  # 32 patches, and 15 that ZImage fills up to 32
def test_computes_what_the_stock_network_does(pair, size, lengths):
    name, stock, traceable = pair
    x = torch.randn(3, 4, *size)
    features, mask = texts(name, lengths)
    expected = of_stock(name, stock, x, features, mask)
    found = traceable(x, TIMES, features, mask, return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    other = mask.clone()
    other[0, 3:] = False  # control: of the first text less counts
    assert not torch.allclose(traceable(x, TIMES, features, other).sample[0], found[0], atol=1e-4)
    torch.testing.assert_close(traceable(x, TIMES, features, other).sample[1:], found[1:])


@torch.no_grad()
def test_longer_padding_changes_nothing(pair):
    name, _, traceable = pair
    x, (features, mask) = torch.randn(3, 4, 8, 8), texts(name, (5, 9, 32))
    wide = torch.cat([features, torch.randn(3, 32, 16)], dim=1)
    found = traceable(x, TIMES, wide, torch.cat([mask, torch.zeros(3, 32, dtype=torch.bool)], dim=1)).sample
    torch.testing.assert_close(found, traceable(x, TIMES, features, mask).sample, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_its_files_are_those_of_the_stock_class(pair, tmp_path):
    name, stock, traceable = pair
    traceable.save_pretrained(tmp_path)
    again = STOCK[name].from_pretrained(tmp_path).eval()
    twin = type(traceable).from_config(traceable.config).eval()
    twin.load_state_dict(stock.state_dict())
    assert again.config["_class_name"] == STOCK[name].__name__
    x, (features, mask) = torch.randn(3, 4, 8, 8), texts(name, (5, 9, 32))
    expected = of_stock(name, stock, x, features, mask)
    torch.testing.assert_close(of_stock(name, again, x, features, mask), expected)
    torch.testing.assert_close(twin(x, TIMES, features, mask).sample, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_called_with_lists_it_gives_lists():
    stock = make("zimage").transformer.eval()
    traceable = copy.deepcopy(stock)
    make_traceable(traceable)
    make_traceable(traceable)  # nothing happens twice
    assert next(iter(inspect.signature(traceable.forward).parameters)) == "hidden_states"
    pictures, prompts = [torch.randn(4, 1, 6, 8) for _ in range(2)], [torch.randn(size, 16) for size in (3, 40)]
    expected = stock(list(pictures), TIMES[:2], list(prompts)).sample
    for found in (traceable(pictures, TIMES[:2], prompts).sample, traceable(pictures, TIMES[:2], prompts, False)[0]):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="siglip_feats"):
        traceable(pictures, TIMES[:2], prompts, siglip_feats=[None])


@torch.no_grad()
@pytest.mark.parametrize("patches", [(3, 4), (2, 6)])
def test_places_by_the_shapes_of_pictures(patches):
    """As Qwen-Image's pipeline calls it: with the shapes for all, without a mask where no text is shorter."""
    stock = make("qwen").transformer.eval()
    traceable = copy.deepcopy(stock)
    make_traceable(traceable)
    call = {"hidden_states": torch.randn(3, 12, 16), "encoder_hidden_states": torch.randn(3, 9, 16), "timestep": TIMES}
    shapes = {"img_shapes": [[(1, *patches)]] * 3, "guidance": None, "attention_kwargs": {}}
    _, mask = texts("qwen", (9, 4, 2))
    for given in ({}, {"encoder_hidden_states_mask": mask.long()}):
        expected = stock(**call, **given, **shapes).sample
        torch.testing.assert_close(traceable(**call, **given, **shapes).sample, expected, rtol=1e-5, atol=1e-5)
        shapes_of_others = shapes | {"img_shapes": [[(1, *patches[::-1])]] * 3}
        other = traceable(**call, **given, **shapes_of_others).sample
        assert not torch.allclose(other, expected, atol=1e-4)  # control
    with pytest.raises(ConfigError, match=r"attention_kwargs is \{'scale': 0.5\}; allowed: none"):
        traceable(**call, **shapes | {"attention_kwargs": {"scale": 0.5}})
    assert unread(traceable) == ("transformer_blocks.1.attn.to_add_out*", "transformer_blocks.1.txt_mlp*")
    assert unread(make("lumina2").transformer) == ()


@torch.no_grad()
def test_what_is_unread_changes_nothing(relative):
    network, call = make("qwen").transformer, {"hidden_states": torch.randn(1, 4, 16), "timestep": TIMES[:1]}
    call |= {"encoder_hidden_states": torch.randn(1, 9, 16), "img_shapes": [[(1, 2, 2)]], "return_dict": False}
    before = network(**call)[0]
    for pattern in unread(network):
        network.get_submodule(pattern[:-1]).apply(lambda layer: [weight.zero_() for weight in layer.parameters()])
    assert torch.equal(network(**call)[0], before)
    network.transformer_blocks[0].txt_mlp.apply(lambda layer: [weight.zero_() for weight in layer.parameters()])
    assert relative(network(**call)[0], before) > 1e-4  # control: in the other block it is read


def test_settings_that_the_forward_does_not_know_are_refused():
    network = make("qwen").transformer
    forward = type(network).forward
    network.register_to_config(zero_cond_t=True)
    make_traceable(network)
    assert type(network).forward is forward
    with pytest.raises(
        ConfigError, match=r"QwenImageTransformer2DModel with zero_cond_t computes .*; allowed: without"
    ):
        check_traceable(network)
    network.register_to_config(zero_cond_t=False)
    make_traceable(network)
    check_traceable(network)
    assert type(network).forward is not forward


def test_guidance_beside_a_negative_prompt():
    stock, generator = make("qwen"), Generator(make("qwen"))
    stock.set_progress_bar_config(disable=True)
    plan = SamplingPlan(steps=2, guidance_scale=3.0, height=32, width=32)
    size = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np", "generator": generators(5)}
    expected = stock("a cat", negative_prompt=" ", true_cfg_scale=3.0, **size).images
    assert abs(generator.draw(["a cat"], seeds=[5], plan=plan).images - expected).max() < 1e-4
    keep_plan(stock, plan)  # the pipeline of an engine that was made for a plan
    both = stock(["a cat", "a dog"], height=32, width=32, output_type="np", generator=generators(5, 6)).images
    assert abs(both[:1] - expected).max() < 1e-4
    alone = SamplingPlan(steps=2, guidance_scale=1.0, height=32, width=32)
    assert len(generator.record(["a cat"], seeds=[5], plan=alone)) == 2
    assert abs(generator.draw(["a cat"], seeds=[5], plan=alone).images - expected).max() > 1e-4


def test_narrower_it_is_as_with_zeros_where_channels_went(pair, relative):
    name, _, traceable = pair
    x, (features, mask) = torch.randn(3, 4, 8, 8), texts(name, (5, 9, 32))
    structures = find_structures(traceable, ("heads", "mlp"))
    kinds = {structure.kind for structure in structures.values()}
    assert kinds == ({"mlp"} if name == "lumina2" else {"heads", "mlp"})  # Lumina's heads share keys
    kept = {key: list(range(0, structure.units, 2)) for key, structure in structures.items()}
    with torch.no_grad():
        with masked(structures, kept):
            expected = traceable(x, TIMES, features, mask).sample
        assert relative(traceable(x, TIMES, features, mask).sample, expected) > 1e-3
        for key, units in kept.items():
            structures[key].narrow(units)
        assert relative(traceable(x, TIMES, features, mask).sample, expected) < 1e-5


def test_guidance_of_one_is_none_where_the_pipeline_counts_from_zero():
    stock, generator = make("zimage"), Generator(make("zimage"))
    stock.set_progress_bar_config(disable=True)
    plan = SamplingPlan(steps=2, guidance_scale=1.0, height=32, width=32)
    assert len(generator.record(["a cat"], seeds=[0], plan=plan)[0].inputs["hidden_states"]) == 1
    for ours, theirs in ((1.0, 0.0), (3.0, 2.0)):
        plan = SamplingPlan(steps=2, guidance_scale=ours, height=32, width=32)
        expected = stock(
            "a cat",
            num_inference_steps=2,
            guidance_scale=theirs,
            height=32,
            width=32,
            generator=generators(5),
            output_type="np",
        ).images
        found = generator.draw(["a cat"], seeds=[5], plan=plan).images
        assert abs(found - expected).max() < 1e-4
        assert abs(found - generator.draw(["a cat"], seeds=[6], plan=plan).images).max() > 1e-2  # control
