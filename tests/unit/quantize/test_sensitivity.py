"""The error of the output with one layer quantized: by hand, over the whole schedule, and how well errors add up."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from diffpress.progress import SILENT
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.quantize.sensitivity import errors_in_context, output_error, probe_calls, swapped

CLOSE = 1.5
"""How far the square sum of errors may be from their measured sum, either way."""


def quantize(generator, context, **settings):
    """(twins by name, calls, errors in context): the float denoiser stays as it is."""
    denoiser = generator.denoiser
    before = dict(denoiser.named_modules())
    calls = probe_calls(generator, context, 2)
    applied = Int8(Int8Config(context_calls=2, **settings)).apply(generator, context)
    twins = {name: denoiser.get_submodule(name) for name in applied.metadata["layers"]}
    for name in twins:
        denoiser.set_submodule(name, before[name])
    return twins, calls, applied.metadata["in_context"]


@torch.no_grad()
def outputs(denoiser, calls):
    channels = next(iter(calls[0].inputs.values())).shape[1]
    return torch.cat([denoiser(**call.constants, **call.inputs)["sample"][:, :channels] for call in calls]).double()


def relative(found, exact):
    """Root of the mean over rows of the squared relative error."""
    rows = (found - exact).flatten(1).square().sum(1) / exact.flatten(1).square().sum(1)
    return rows.mean().sqrt().item()


def test_error_is_of_the_output_with_this_layer_alone(dit, context):
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


def states(calls):
    return {row.numpy().tobytes() for call in calls for row in call.inputs["hidden_states"]}


def test_errors_are_of_noise_that_nothing_was_fitted_to(dit, context):
    given = context(dit)
    fitted = states(dit.record(given.conditions, seeds=given.seeds, plan=given.plan))
    earlier = dataclasses.replace(given, seeds=[seed + 10 - len(given.seeds) for seed in given.seeds])
    assert not states(probe_calls(dit, given, 9)) & fitted
    later = dataclasses.replace(given, seeds=[seed + 10 for seed in given.seeds])
    fitted = states(dit.record(given.conditions, seeds=later.seeds, plan=given.plan))
    assert states(probe_calls(dit, earlier, 9)) & fitted  # control: calibrated on what those probe


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


def test_a_layer_in_two_places_is_swapped_in_both(dit):
    blocks, twin = dit.denoiser.transformer_blocks, nn.Identity()
    shared = blocks[1].ff.net[2] = blocks[0].ff.net[2]
    with swapped(dit.denoiser, {"transformer_blocks.0.ff.net.2": twin}):
        assert blocks[0].ff.net[2] is blocks[1].ff.net[2] is twin
    assert blocks[0].ff.net[2] is blocks[1].ff.net[2] is shared


def test_a_twin_that_rounds_nothing_has_no_error(dit, context):
    calls = probe_calls(dit, context(dit), 1)
    same = {"transformer_blocks.0.ff.net.2": dit.denoiser.transformer_blocks[0].ff.net[2]}
    assert errors_in_context(dit.denoiser, same, calls, SILENT) == {"transformer_blocks.0.ff.net.2": 0.0}
