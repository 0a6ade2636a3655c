"""The error of the output with one layer quantized: by hand, over the whole schedule, and how well errors add up."""

import math

import pytest
import torch
from torch import nn

from diffpress.generator import Call
from diffpress.progress import SILENT
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.quantize.sensitivity import errors_in_context, output_error, spread_calls, swapped

CLOSE = 1.5
"""How far the square sum of errors may be from their measured sum, either way."""


def quantize(generator, context, **settings):
    """(twins by name, calls, errors in context): the float denoiser stays as it is."""
    denoiser = generator.denoiser
    before = dict(denoiser.named_modules())
    calls = spread_calls(generator, context, 2)
    applied = Int8(Int8Config(context_calls=2, **settings)).apply(generator, context)
    twins = {name: denoiser.get_submodule(name) for name in applied.metadata["layers"]}
    for name in twins:
        denoiser.set_submodule(name, before[name])
    return twins, calls, applied.metadata["in_context"]


@torch.no_grad()
def outputs(denoiser, calls):
    channels = next(iter(calls[0].inputs.values())).shape[1]
    return torch.cat([denoiser(**call.constants, **call.inputs)["sample"][:, :channels] for call in calls]).double()


def test_error_is_of_the_output_with_this_layer_alone(dit, context, relative):
    twins, calls, found = quantize(dit, context(dit))
    exact = outputs(dit.denoiser, calls)
    assert found.keys() == twins.keys()
    name = "transformer_blocks.0.ff.net.2"
    with swapped(dit.denoiser, {name: twins[name]}):
        expected = relative(outputs(dit.denoiser, calls), exact)
    assert found[name] == pytest.approx(expected, rel=1e-3)
    with swapped(dit.denoiser, twins):
        assert relative(outputs(dit.denoiser, calls), exact) > 1.2 * expected  # control: all of them are another number
    assert torch.equal(outputs(dit.denoiser, calls), exact)


@pytest.mark.parametrize(("family", "target"), [("dit", "onnxruntime"), ("sd", "openvino")])
def test_squares_add_up(family, target, request, context):
    generator = request.getfixturevalue(family)
    twins, calls, found = quantize(generator, context(generator, target), split_skips=False)
    all_names = list(twins)
    for names in (all_names[: len(all_names) // 2], all_names[::3], all_names):
        with swapped(generator.denoiser, {name: twins[name] for name in names}):
            measured = output_error(generator.denoiser, calls)
        foretold = math.hypot(*(found[name] for name in names))
        assert foretold / CLOSE < measured < foretold * CLOSE
    assert sum(found.values()) > CLOSE * measured  # control: errors themselves do not add up


@pytest.mark.parametrize(
    ("steps", "count", "expected"), [(3, 4, [0, 1, 2]), (3, 1, [1]), (6, 2, [1, 4]), (7, 3, [1, 3, 5])]
)
def test_calls_are_spread_over_the_schedule_with_both_branches(dit, context, steps, count, expected):
    given = context(dit)
    plan = type(given.plan)(steps=steps, guidance_scale=3.0)
    given = type(given)(given.target, given.conditions, given.seeds, plan, batch_size=4)
    every = dit.record(given.conditions[:2], seeds=given.seeds[:2], plan=plan)
    calls = spread_calls(dit, given, count)
    assert len(every) == steps
    assert [call.inputs["timestep"][0].item() for call in calls] == [
        every[index].inputs["timestep"][0].item() for index in expected
    ]
    assert torch.equal(calls[0].output, every[expected[0]].output)
    assert len(calls[0].output) == 4  # two pictures, two branches
    assert 1000 in calls[0].inputs["class_labels"]


def test_channels_of_a_variance_do_not_count():
    class Shifted(nn.Module):
        def forward(self, sample, return_dict):
            return (torch.cat([sample + 1, sample + 100], dim=1),)

    x = torch.full((2, 3, 4, 4), 5.0)
    call = Call({"sample": x}, {}, torch.cat([x, x], dim=1))
    assert output_error(Shifted(), [call]) == pytest.approx(1 / 5)
    assert output_error(Shifted(), [Call({"sample": x}, {}, torch.cat([x + 1, x], dim=1))]) == 0


def test_layers_come_back_after_an_error(dit, context):
    twin = nn.Identity()
    layer = dit.denoiser.transformer_blocks[0].ff.net[2]
    found = []

    def fail():
        with swapped(dit.denoiser, {"transformer_blocks.0.ff.net.2": twin}):
            found.append(dit.denoiser.transformer_blocks[0].ff.net[2])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert found == [twin]
    assert dit.denoiser.transformer_blocks[0].ff.net[2] is layer


def test_a_twin_that_rounds_nothing_has_no_error(dit, context):
    calls = spread_calls(dit, context(dit), 1)
    same = {"transformer_blocks.0.ff.net.2": dit.denoiser.transformer_blocks[0].ff.net[2]}
    assert errors_in_context(dit.denoiser, same, calls, SILENT) == {"transformer_blocks.0.ff.net.2": 0.0}
