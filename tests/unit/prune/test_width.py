"""Budgets by brute force, exactness of what is kept, and repair beside the naive removal of as many channels."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from diffusers import DiTTransformer2DModel
from pydantic import ValidationError
from tiny import make_flux

from diffpress.artifact import load_weights, save_weights
from diffpress.errors import ConfigError
from diffpress.export.components import flatten_inputs
from diffpress.generator import Generator
from diffpress.prune.width import (
    Width,
    WidthConfig,
    best_units,
    cheapest_counts,
    cost,
    parameters_per_unit,
    uniform_counts,
    widths,
)
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.recorded import mean_error
from diffpress.structures import find_structures
from diffpress.targets import TARGETS

KINDS = ("heads", "mlp", "resnet")
TARGET = TARGETS["onnxruntime"]


def narrow(generator, context, **settings):
    return Width(WidthConfig(**{"align": 1, **settings})).apply(generator, context)


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def table_of(generator):
    """A millisecond for each thousand parameters of a module and all below it."""
    return {name: parameters(module) / 1000 for name, module in generator.denoiser.named_modules()}


def test_best_units_and_what_the_others_cost():
    scores = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0], dtype=torch.float64)
    assert best_units(scores, 3) == [0, 2, 4]
    assert [cost(scores, count) for count in (5, 4, 3, 1)] == [0, 1, 2, 9]


def test_widths_are_aligned_or_whole(sd):
    found = find_structures(sd.denoiser, KINDS)
    assert widths(found["down_blocks.0.resnets.0"], 8) == [2, 4]  # 4 groups of 4 channels
    assert widths(found["mid_block.attentions.0.transformer_blocks.0.ff"], 16) == list(range(16, 129, 16))
    assert len(widths(found["mid_block.attentions.0.transformer_blocks.0.ff"], 1)) <= 65
    assert widths(found["down_blocks.0.resnets.0"], 32) == [4]
    for structure in found.values():
        for align in (1, 8, 16):
            assert all(count * structure.size % align == 0 for count in widths(structure, align)[:-1])


def test_uniform_counts_are_the_nearest_allowed(dit):
    found = find_structures(dit.denoiser, KINDS)
    assert uniform_counts(found, 0.5, 16)["transformer_blocks.0.ff"] == 32
    assert uniform_counts(found, 0.6, 16)["transformer_blocks.0.ff"] == 32
    assert uniform_counts(found, 0.6, 8)["transformer_blocks.0.ff"] == 40
    assert uniform_counts(found, 0.01, 16)["transformer_blocks.0.ff"] == 16
    assert uniform_counts(found, 0.6, 8)["transformer_blocks.0.attn1"] == 1
    assert uniform_counts(found, 0.6, 16)["transformer_blocks.0.attn1"] == 2


def test_cheapest_counts_are_those_of_brute_force(dit):
    found = find_structures(dit.denoiser, KINDS)
    random = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(s.units, generator=random, dtype=torch.float64) for name, s in found.items()}
    weights = parameters_per_unit(found)
    allowed = {name: widths(structure, 8) for name, structure in found.items()}
    for budget in (4000, 6000, 9000):
        chosen = cheapest_counts(found, scores, weights, budget, align=8)
        every = [dict(zip(found, counts, strict=True)) for counts in itertools.product(*allowed.values())]
        fits = [counts for counts in every if sum(weights[name] * counts[name] for name in found) <= budget]
        best = min(sum(cost(scores[name], counts[name]) for name in found) for counts in fits)
        assert sum(cost(scores[name], chosen[name]) for name in found) == pytest.approx(best)
        assert chosen in fits


@pytest.mark.parametrize("importance", ["surgeon", "hessian", "taylor", "magnitude", "random"])
def test_all_kept_is_the_same_network(dit, context, importance):
    before = {name: value.clone() for name, value in dit.denoiser.state_dict().items()}
    applied = narrow(dit, context(dit), keep=1.0, importance=importance)
    assert applied.metadata["kept"] == {}
    assert applied.metadata["output_error"] < 1e-6
    for name, value in dit.denoiser.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("family", ["dit", "sd", "ddpm"])
def test_restored_network_is_the_same_to_the_bit(request, family, context, first_call, tmp_path):
    folder = request.getfixturevalue(f"{family}_folder")
    generator = request.getfixturevalue(family)
    applied = narrow(generator, context(generator), keep=0.5, align=8)
    assert applied.metadata["kept"]
    expected, call = first_call(generator)
    save_weights(generator.denoiser, tmp_path / "denoiser.safetensors")
    again = Generator.load(folder)
    Width.restore(again, json.loads(json.dumps(applied.metadata)))
    load_weights(again.denoiser, tmp_path / "denoiser.safetensors")
    assert torch.equal(first_call(again, call)[0], expected)
    other = Generator.load(folder)
    Width.restore(other, {"kept": {}})
    with pytest.raises(RuntimeError):
        other.denoiser.load_state_dict(generator.denoiser.state_dict())


@pytest.mark.parametrize("family", ["dit", "sd", "ddpm"])
def test_repair_beats_naive_removal_of_as_many(request, family, context):
    """On calls of seeds and conditions that the fit has not seen."""
    folder, given = request.getfixturevalue(f"{family}_folder"), None
    errors = {}
    for name, settings in {
        "ours": {},
        "not repaired": {"repair": False},
        "naive": {"importance": "magnitude", "repair": False},
    }.items():
        generator = Generator.load(folder)
        given = replace(context(generator, count=8), batch_size=8)
        calls = generator.record(generator.conditions(12)[8:], seeds=range(50, 54), plan=given.plan)
        applied = narrow(generator, given, keep=0.75, kinds=("mlp", "resnet"), **settings)
        errors[name] = mean_error(generator.denoiser, calls), applied.metadata["parameters"]
    assert len({left for _, left in errors.values()}) == 1
    assert errors["ours"][0] < errors["naive"][0]
    assert errors["ours"][0] < errors["not repaired"][0]


def test_parameter_budget_is_met(sd, context):
    before = parameters(sd.denoiser)
    applied = narrow(sd, context(sd), parameters=0.8, align=8)
    assert 0.77 < parameters(sd.denoiser) / before <= 0.8
    assert applied.metadata["parameters"] == pytest.approx(parameters(sd.denoiser) / before)
    assert "of the parameters" in applied.summary
    json.dumps(applied.metadata)


def test_latency_budget_is_met_by_the_table(dit, context):
    table = table_of(dit)
    applied = narrow(dit, replace(context(dit), latency=table_of), latency=0.95, align=8)
    left = table_of(dit)
    assert applied.metadata["latency"] <= 0.95
    assert applied.metadata["latency"] == pytest.approx(left[""] / table[""])
    assert f"{applied.metadata['latency']:.0%} of the time measured" in applied.summary


def test_an_engine_that_gains_less_than_the_table_says_loses_more(dit, context):
    """Half of what its layers take apart is overhead that stays, which a table cannot know."""

    def told(generator):
        table = table_of(generator)
        return table | {"": sum(ms for name, ms in table.items() if name.endswith((".attn1", ".ff")))}

    whole = told(dit)[""]

    def stubborn(generator):
        table = told(generator)
        return table | {"": (whole + table[""]) / 2}

    before, state = dit.denoiser, {name: value.clone() for name, value in dit.denoiser.state_dict().items()}
    applied = narrow(dit, replace(context(dit), latency=stubborn), latency=0.7, align=8)
    left = stubborn(dit)[""] / whole
    assert dit.denoiser is before
    assert state.keys() == dit.denoiser.state_dict().keys()
    assert applied.metadata["latency"] == pytest.approx(left)
    assert left <= 0.7
    again = Generator.load(dit.source)
    naive = narrow(again, replace(context(again), latency=told), latency=0.7, align=8)
    assert naive.metadata["parameters"] > applied.metadata["parameters"] + 0.03  # control: the table alone
    assert stubborn(again)[""] / whole > 0.7
    hopeless = Generator.load(dit.source)
    with pytest.raises(ConfigError, match=r"latency 0\.3 cannot be met .* closest that can is 0\.[4-9]"):
        narrow(hopeless, replace(context(hopeless), latency=stubborn), latency=0.3, align=8)


def test_what_takes_no_time_stays(dit, context):
    def latency(generator):
        table = {name: ms * name.startswith("transformer_blocks.1") for name, ms in table_of(generator).items()}
        return table | {"": table["transformer_blocks.1"]}

    given = replace(context(dit), latency=latency)
    applied = narrow(dit, given, latency=0.95, align=8)
    assert all(name.startswith("transformer_blocks.1") for name in applied.metadata["kept"])


def test_budget_that_cannot_be_met_names_the_closest(dit, context):
    with pytest.raises(
        ConfigError, match=r"parameters 0.05 cannot be met by mlp .* closest that can is (0\.\d+)"
    ) as no:
        Width(WidthConfig(parameters=0.05, kinds=("mlp",))).check(dit, TARGET)
    closest = float(str(no.value).rsplit(" ", 1)[1])
    Width(WidthConfig(parameters=closest, kinds=("mlp",))).check(dit, TARGET)
    with pytest.raises(ConfigError):
        Width(WidthConfig(parameters=closest - 0.01, kinds=("mlp",))).check(dit, TARGET)
    applied = narrow(dit, context(dit), parameters=closest, kinds=("mlp",), align=16)
    assert applied.metadata["parameters"] <= closest
    table = {name: 1.0 if name in ("", "transformer_blocks.0.ff") else 0.0 for name, _ in dit.denoiser.named_modules()}
    with pytest.raises(ConfigError, match=r"latency 0\.01 cannot be met"):
        narrow(dit, replace(context(dit), latency=lambda generator: table), latency=0.01)


def test_a_latency_that_cannot_be_met_is_refused_before_anything_is_scored(dit, context, monkeypatch):
    table = {name: float(not name) for name, _ in dit.denoiser.named_modules()}
    monkeypatch.setattr(Width, "_scores", None)
    with pytest.raises(ConfigError, match=r"latency 0\.5 cannot be met"):
        narrow(dit, replace(context(dit), latency=lambda generator: table), latency=0.5)


def test_latency_needs_a_table(dit, context):
    with pytest.raises(ConfigError, match=r"latency is 0.5, but there are no timings; allowed: keep, parameters"):
        narrow(dit, context(dit), latency=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no budget given"),
        ({"keep": 0.5, "latency": 0.5}, "keep and latency given; allowed: one of"),
        ({"keep": 0.0}, "greater than 0"),
        ({"keep": 0.5, "kinds": ()}, "kinds is empty"),
        ({"keep": 0.5, "ridge": 0.0}, "greater than 0"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        WidthConfig(**settings)


def test_generators_that_are_refused(dit, context):
    with pytest.raises(ConfigError, match=r"keep 0\.95 leaves every width as it is in multiples of 16; allowed: less"):
        Width(WidthConfig(keep=0.95)).check(dit, TARGET)
    with pytest.raises(ConfigError, match="DiTTransformer2DModel has no resnet that can be narrowed"):
        Width(WidthConfig(keep=0.5, kinds=("resnet",))).check(dit, TARGET)
    Int8(Int8Config()).apply(dit, context(dit))
    with pytest.raises(ConfigError, match="allowed: layers in float"):
        Width(WidthConfig(keep=0.5)).check(dit, TARGET)


def test_network_stays_of_its_class_and_draws(dit, context, plan):
    narrow(dit, context(dit), keep=0.5, align=8)
    assert type(dit.denoiser) is DiTTransformer2DModel
    block = dit.denoiser.transformer_blocks[0]
    assert (block.attn1.heads, block.attn1.to_q.weight.shape, block.attn1.to_out[0].weight.shape) == (
        1,
        (8, 16),
        (16, 8),
    )
    assert (block.ff.net[0].proj.out_features, block.ff.net[2].in_features) == (32, 32)
    pictures = dit.sample(dit.conditions(2), seeds=[0, 1], plan=plan).images
    assert pictures.std() > 0


def test_flux(context, plan):
    torch.manual_seed(0)
    flux = Generator(make_flux())
    given = replace(context(flux, count=2), plan=replace(plan, height=16, width=16))
    for importance in ("surgeon", "taylor"):
        applied = narrow(flux, given, keep=0.75 if importance == "surgeon" else 0.5, importance=importance)
        assert "transformer_blocks.0.ff_context" in applied.metadata["kept"]
    assert flux.sample(given.conditions, seeds=given.seeds, plan=given.plan).images.std() > 0


@pytest.mark.parametrize("family", ["dit", "sd"])
def test_engine_computes_what_the_narrow_network_computes(request, family, context, engine, relative, tmp_path):
    generator = request.getfixturevalue(family)
    given = context(generator)
    narrow(generator, given, keep=0.5, align=8)
    session, graph = engine(generator, given, tmp_path / "model.onnx")
    for call in generator.record(given.conditions[:1], seeds=[5], plan=given.plan):
        assert relative(session(flatten_inputs(call.inputs))[0], call.output) < 1e-4
    weights = sum(math.prod(value.dims) for value in graph.initializer if len(value.dims) > 1)
    assert weights < 1.1 * parameters(generator.denoiser)
