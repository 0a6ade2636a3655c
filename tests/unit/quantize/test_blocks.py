"""Block reconstruction: which layers go together, what a block sees and gives, and that its output comes closer."""

import dataclasses
import itertools

import pytest
import torch
from pydantic import ValidationError
from tiny import make_flux
from torch import nn

from diffpress.generator import Generator, SamplingPlan
from diffpress.progress import SILENT
from diffpress.quantize.adaround import AdaRoundSettings, Workshop
from diffpress.quantize.blocks import (
    Block,
    Example,
    SoftTwin,
    _examples,
    block_of,
    blocks_in_order,
    squared_error,
    train_block,
)
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.quantize.modules import Activation, quantized
from diffpress.quantize.sensitivity import probe_calls, swapped
from diffpress.targets import TARGETS

QUICK = AdaRoundSettings(reconstruct="block", steps=150, calls=3)


class Pair(nn.Module):
    """Two layers with something between that is not linear."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def activation_for(x):
    activation = Activation(TARGETS["onnxruntime"])
    activation.set_range(min(0.0, float(x.min())), max(0.0, float(x.max())), TARGETS["onnxruntime"])
    return activation


@pytest.fixture
def pair():
    """``pair(seed)``: a block in a network with twins that are rounded to nearest, and examples of correlated rows."""

    def make(seed):
        torch.manual_seed(seed)
        network = nn.Sequential(Pair()).requires_grad_(False)
        for layer in (network[0].up, network[0].down):
            layer.weight[:, 0] *= 20  # the steps are coarse: weights make most of the error, not inputs
        network[0].up.weight[0] *= 0.05
        network[0].up.bias[0] *= 0.05
        mixing = torch.randn(4, 12)
        examples = []
        for _ in range(3):
            x = torch.randn(64, 4) @ mixing + 0.1 * torch.randn(64, 12)
            x[:, 0] *= 0.05
            examples.append(Example((x,), {}, (network(x),)))
        everything = torch.cat([example.args[0] for example in examples])
        ranges = {"0.up": everything, "0.down": torch.relu(network[0].up(everything))}
        layers = {name: network.get_submodule(name) for name in ranges}
        twins = {name: quantized(layers[name], activation_for(x)) for name, x in ranges.items()}
        return Block(network, "0", layers, twins), examples

    return make


def old_output(block, example):
    with torch.no_grad(), swapped(block.network, block.twins):
        return block.module(*example.args)


@pytest.mark.parametrize("seed", range(4))
def test_output_of_the_block_comes_closer(pair, tmp_path, seed):
    block, examples = pair(seed)
    settings = AdaRoundSettings(reconstruct="block")
    trained = train_block(block, examples, settings=settings, workshop=Workshop(tmp_path, 0, SILENT))
    assert block.error(trained, examples) < 0.85 * block.error(block.twins, examples)
    for name, layer in block.layers.items():
        steps = layer.weight / trained[name].weight_scale[:, None]
        codes = trained[name].weight.T
        assert ((codes == steps.floor()) | (codes == steps.ceil())).all()
        assert not torch.equal(trained[name].weight, block.twins[name].weight)
    assert isinstance(block.module.up, nn.Linear)
    assert not any(parameter.requires_grad for parameter in block.network.parameters())


def test_without_gain_the_old_codes_stay(pair, tmp_path):
    """One update with a large step: the soft codes are anywhere, and their rounding is worse."""
    block, examples = pair(0)
    wild = AdaRoundSettings(reconstruct="block", steps=1, learning_rate=50.0)
    found = train_block(block, examples, settings=wild, workshop=Workshop(tmp_path, 0, SILENT))
    assert all(found[name] is twin for name, twin in block.twins.items())


def test_what_is_kept_is_judged_on_calls_that_training_does_not_see(pair, tmp_path):
    """Where those want something else, learning the others by heart is no gain."""
    block, examples = pair(0)
    settings = AdaRoundSettings(reconstruct="block")
    old = Example(examples[0].args, {}, (old_output(block, examples[0]),))
    for last, kept in ((examples[0], False), (old, True)):  # of ``old`` the old codes make no error
        found = train_block(
            block, [*examples, last], settings=settings, workshop=Workshop(tmp_path / str(kept), 0, SILENT)
        )
        assert all((found[name] is twin) == kept for name, twin in block.twins.items())


def test_a_soft_twin_begins_as_the_float_layer_behind_a_quantized_input(pair):
    block, examples = pair(1)
    layer, twin = block.layers["0.up"], block.twins["0.up"]
    x = examples[0].args[0].clone().requires_grad_()
    soft = SoftTwin(layer, twin)(x)
    torch.testing.assert_close(soft, layer(twin.activation(x)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(soft, twin(x), rtol=1e-4, atol=1e-5)  # control: not as the hard one
    soft.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x), rtol=1e-3, atol=1e-4)


def test_a_soft_convolution_too():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 8, 8)
    twin = quantized(layer, activation_for(x))
    torch.testing.assert_close(SoftTwin(layer, twin)(x), layer(twin.activation(x)), rtol=1e-4, atol=1e-5)


def test_error_is_relative_and_of_all_outputs():
    class Two(nn.Module):
        def forward(self, x):
            return x + 1, 3 * x

    x = torch.full((4,), 2.0)
    assert squared_error(Two(), Example((x,), {}, (x, 2 * x)), "cpu") == pytest.approx(1 / 4 + 1 / 4)


def test_outputs_of_zeros(pair, tmp_path):
    x = torch.zeros(4)
    assert squared_error(nn.Identity(), Example((x,), {}, (x,)), "cpu") == 0
    assert squared_error(nn.Identity(), Example((x + 1e-10,), {}, (x,)), "cpu") > 1  # control
    block, examples = pair(0)
    for parameter in block.module.parameters():
        parameter.zero_()
    silent = [
        Example((torch.zeros_like(example.args[0]),), {}, (torch.zeros_like(example.args[0]),)) for example in examples
    ]
    twins = {name: quantized(layer, block.twins[name].activation) for name, layer in block.layers.items()}
    dead = Block(block.network, block.name, block.layers, twins)
    found = train_block(dead, silent, settings=QUICK, workshop=Workshop(tmp_path, 0, SILENT))
    assert all(found[name] is twin for name, twin in twins.items())


def test_blocks_of_families(dit, sd, context):
    def blocks(generator, target):
        given = context(generator, target)
        names = list(Int8(Int8Config()).layers(generator.denoiser, given.target))
        return blocks_in_order(generator.denoiser, names, probe_calls(generator, given, 1)[0]), names

    found, names = blocks(dit, "onnxruntime")
    assert list(found) == ["transformer_blocks.0", "transformer_blocks.1"]
    assert sorted(itertools.chain(*found.values())) == sorted(names)
    found, names = blocks(sd, "openvino")
    order = list(found)
    assert sorted(itertools.chain(*found.values())) == sorted(names)
    assert order.index("down_blocks.0.resnets.0") < order.index("mid_block.resnets.0")
    assert order.index("mid_block.resnets.0") < order.index("up_blocks.0.resnets.0")
    assert "down_blocks.1.attentions.0.transformer_blocks.0" in found
    assert block_of(sd.denoiser, "down_blocks.1.attentions.0.proj_in") == "down_blocks.1.attentions.0.proj_in"


def test_a_block_reads_what_quantized_ones_give_and_aims_at_float(dit, context):
    given = context(dit)
    calls = probe_calls(dit, given, 2)
    before = dit.denoiser.transformer_blocks[0].ff.net[2]
    applied = Int8(Int8Config()).apply(dit, given)
    twin = dit.denoiser.transformer_blocks[0].ff.net[2]
    again = Generator.load(dit.source)
    name = "transformer_blocks.0.ff.net.2"
    plain, behind = (_examples(again.denoiser, "transformer_blocks.1", done, calls) for done in ({}, {name: twin}))
    assert len(plain) == len(calls) == 2
    assert name in applied.metadata["layers"]
    assert isinstance(before, nn.Linear)
    for left, right in zip(plain, behind, strict=True):
        assert torch.equal(left.outputs[0], right.outputs[0])
        assert not torch.equal(left.args[0], right.args[0])
        found = again.denoiser.transformer_blocks[1](*left.args, **left.kwargs)
        torch.testing.assert_close(found, left.outputs[0])


def test_blocks_with_two_outputs(context, tmp_path):
    """Flux: a block gives text and picture tokens, and reads rotary positions as a tuple."""
    generator = Generator(make_flux())
    plan = SamplingPlan(steps=2, guidance_scale=3.5, height=32, width=32)
    given = dataclasses.replace(context(generator, count=2), work=tmp_path, plan=plan)
    settings = AdaRoundSettings(reconstruct="block", steps=30, calls=2)
    applied = Int8(Int8Config(rounding="adaround", adaround=settings)).apply(generator, given)
    blocks = sorted(path.name for path in (tmp_path / "adaround" / "static-blocks").iterdir())
    assert {"single_transformer_blocks.0", "transformer_blocks.0"} <= set(blocks)
    assert all(error < 0.2 for error in applied.metadata["sensitivity"].values())


@pytest.mark.parametrize(("family", "target"), [("dit", "onnxruntime"), ("sd", "openvino")])
def test_the_stage_reconstructs_blocks(family, target, request, context, tmp_path):
    folder, outputs = request.getfixturevalue(f"{family}_folder"), {}
    skip = ("down_blocks.*", "up_blocks.*") if family == "sd" else ()
    for settings in (
        {"rounding": "gptq"},
        {"rounding": "adaround", "adaround": AdaRoundSettings(reconstruct="block", steps=40, calls=2)},
    ):
        generator = Generator.load(folder)
        given = dataclasses.replace(context(generator, target), work=tmp_path)
        flags = {name: p.requires_grad for name, p in generator.denoiser.named_parameters()}
        applied = Int8(Int8Config(skip=skip, **settings)).apply(generator, given)
        outputs[settings["rounding"]] = {
            name: generator.denoiser.get_submodule(name).weight for name in applied.metadata["layers"]
        }
        assert all(flags[name] == p.requires_grad for name, p in generator.denoiser.named_parameters())
    assert any(not torch.equal(outputs["gptq"][name], outputs["adaround"][name]) for name in outputs["gptq"])


def test_refit_does_not_go_with_blocks():
    with pytest.raises(ValidationError, match=r"refit does not go with adaround\.reconstruct block"):
        Int8Config(rounding="adaround", refit=True, adaround=QUICK)


def test_twins_are_not_left_in_the_network(pair, tmp_path):
    block, examples = pair(2)
    with swapped(block.network, {}):
        train_block(block, examples, settings=QUICK, workshop=Workshop(tmp_path, 0, SILENT))
    assert block.module.up is block.layers["0.up"]
    assert block.module.down is block.layers["0.down"]
