"""quantize.int8 under a budget: what is sensitive stays in float, what is slow goes first, and the promise is kept."""

import dataclasses
import itertools
import json

import pytest
import torch
from pydantic import ValidationError
from tiny import make_flux
from torch import nn

from diffpress import targets
from diffpress.artifact import load_weights, save_weights
from diffpress.errors import ConfigError
from diffpress.export import ExportConfig, export
from diffpress.generator import Generator, SamplingPlan
from diffpress.quantize.budgeted import decided_together
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.quantize.modules import QuantizedLayer
from diffpress.quantize.sensitivity import output_error, probe_calls, swapped
from diffpress.quantize.weights import Weights, WeightsConfig
from diffpress.targets import TARGETS

SPEED = {"float": 1.0, "static": 0.4, "dynamic": 0.5}


def precision_of(module):
    if not isinstance(module, QuantizedLayer):
        return "float"
    return "dynamic" if module.activation.dynamic else "static"


def priced(generator, *, slow=(), speed=SPEED, overhead=0.0):
    """An engine where a layer takes what its weights are, times its precision's factor; ``slow`` ones ten times that.

    ``overhead``: more for the whole call where both float and 8-bit layers are in it, which no sum foretells.
    """

    def latency(which):
        assert which is generator
        table, kinds = {"": 100.0}, set()
        for name, module in which.denoiser.named_modules():
            if isinstance(module, nn.Linear | QuantizedLayer) and "transformer_blocks" in name and ".norm" not in name:
                kind = precision_of(module)
                kinds.add(kind)
                table[name] = module.weight.numel() * speed[kind] / 10 * (10 if name in slow else 1)
        table[""] = (100.0 + sum(table.values())) * (1 + overhead * (len(kinds) > 1))
        return table

    return latency


def plant_sensitive(generator, name="transformer_blocks.0.ff.net"):
    """One channel far away that nobody reads: the function stays, what ff.net.2 reads has a hundred times the range."""
    with torch.no_grad():
        generator.denoiser.get_submodule(f"{name}.0.proj").bias[3] = 300.0
        generator.denoiser.get_submodule(f"{name}.2").weight[:, 3] = 0
    return f"{name}.2"


@pytest.fixture
def given(context):
    """``given(generator, target, **engine)``: a context with latencies; by default activations are static only."""

    def make(generator, target="tensorrt", **engine):
        return dataclasses.replace(context(generator, target), latency=priced(generator, **engine))

    return make


def test_a_planted_sensitive_layer_stays_in_float(dit, given):
    name = plant_sensitive(dit)
    applied = Int8(Int8Config(error=0.02, observer="minmax")).apply(dit, given(dit))
    precision, in_context = applied.metadata["precision"], applied.metadata["in_context"]
    assert max(in_context, key=in_context.get) == name
    assert precision[name] == "float"
    assert sum(kind == "static" for kind in precision.values()) == len(precision) - 1
    assert applied.metadata["decision"]["measured"] <= 0.02
    assert applied.metadata["output_error"] == pytest.approx(applied.metadata["decision"]["measured"])
    assert set(applied.metadata["layers"]) == set(precision) - {name}
    assert applied.metadata["sensitivity"].keys() == in_context.keys() == precision.keys()
    assert "11 of 12 layers" not in applied.summary  # of all layers of the network, not of those that may be quantized
    assert "(11 static); the output has moved by" in applied.summary
    assert "error budget 0.02: foretold" in applied.summary


def test_without_the_plant_it_does_not(dit, given):
    applied = Int8(Int8Config(error=0.02, observer="minmax")).apply(dit, given(dit))
    assert set(applied.metadata["precision"].values()) == {"static"}


def test_a_planted_slow_layer_goes_first(dit, given):
    name = "transformer_blocks.1.ff.net.0.proj"
    engine = given(dit, slow=(name,))
    applied = Int8(Int8Config(latency=0.8)).apply(dit, engine)
    precision = applied.metadata["precision"]
    assert precision[name] == "static"
    assert precision["transformer_blocks.0.ff.net.0.proj"] == "float"
    assert applied.metadata["decision"]["foretold"]["latency"] <= 0.8
    assert applied.metadata["decision"]["measured"] == pytest.approx(
        applied.metadata["decision"]["foretold"]["latency"]
    )


def test_the_choice_is_the_best_of_all_by_measurement_too(dit, given):
    """Every assignment of this network measured: what the sum of squares chooses is close to the best that fits."""
    plant_sensitive(dit)
    context = given(dit)
    before = dict(dit.denoiser.named_modules())
    calls = probe_calls(dit, context, 4)
    applied = Int8(Int8Config(latency=0.75, observer="minmax")).apply(dit, context)
    chosen = applied.metadata["precision"]
    for name in applied.metadata["layers"]:
        dit.denoiser.set_submodule(name, before[name])
    Int8(Int8Config(observer="minmax")).apply(dit, context)
    twins = {name: dit.denoiser.get_submodule(name) for name in chosen}
    for name in twins:
        dit.denoiser.set_submodule(name, before[name])
    groups = decided_together({name: name.replace("to_k", "to_q").replace("to_v", "to_q") for name in chosen}, chosen)
    assert len(groups) == 8
    found, total = {}, context.latency(dit)[""]
    for picked in itertools.product([False, True], repeat=len(groups)):
        names = frozenset(name for group, on in zip(groups, picked, strict=True) if on for name in group)
        with swapped(dit.denoiser, {name: twins[name] for name in names}):
            if context.latency(dit)[""] <= 0.75 * total:
                found[names] = output_error(dit.denoiser, calls)
    ours = found[frozenset(name for name, kind in chosen.items() if kind == "static")]
    ranked = sorted(found.values())
    assert ours <= 1.1 * ranked[0]
    assert ranked[len(ranked) // 2] > 1.1 * ranked[0]  # control: not every assignment would have done


def test_on_a_cpu_that_would_not_take_ranges_at_run_time_there_are_two_choices(dit_folder, given, monkeypatch):
    for has, found in ((False, {"static"}), (True, {"static", "dynamic"})):
        monkeypatch.setattr(targets, "has_dot_products", lambda has=has: has)
        generator = Generator.load(dit_folder)
        context = given(generator, "openvino", speed=SPEED | {"dynamic": 0.3})
        precision = Int8(Int8Config(latency=0.7)).apply(generator, context).metadata["precision"]
        assert set(precision.values()) - {"float"} <= found
        assert ("dynamic" in precision.values()) == has


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_static_and_dynamic_live_in_one_network(dit_folder, given, first_call, plan, tmp_path, target):
    """Where one layer is faster dynamic; saved and restored, and through the engine."""
    if not TARGETS[target].dynamic_here:
        pytest.skip("needs a CPU with 8-bit dot products")
    generator = Generator.load(dit_folder)
    name = "transformer_blocks.0.ff.net.2"
    plain = priced(generator)

    def latency(which):
        table = plain(which)
        saved = 0.3 * table[name] * (precision_of(which.denoiser.get_submodule(name)) == "dynamic")
        return table | {name: table[name] - saved, "": table[""] - saved}

    context = dataclasses.replace(given(generator, target), latency=latency)
    applied = Int8(Int8Config(latency=0.62)).apply(generator, context)
    assert applied.metadata["precision"][name] == "dynamic"
    assert {"static", "dynamic"} <= set(applied.metadata["precision"].values())
    expected, call = first_call(generator)
    save_weights(generator.denoiser, tmp_path / "weights.safetensors")
    again = Generator.load(generator.source)
    Int8.restore(again, json.loads(json.dumps(applied.metadata)))
    load_weights(again.denoiser, tmp_path / "weights.safetensors")
    assert torch.equal(first_call(again, call)[0], expected)
    config = ExportConfig(target=target)
    built = export(generator, tmp_path / "engine", config, plan=plan, conditions=generator.conditions(2))
    counted = ("static", "dynamic") if target == "onnxruntime" else ("static",)  # what has 8-bit inputs in the graph
    assert built.quantized_layers == sum(kind in counted for kind in applied.metadata["precision"].values())
    assert built.quantized_ops == built.quantized_layers


def test_what_a_budget_leaves_in_float_keeps_its_weights(dit_folder, given):
    """By the weights' stage after it, at once and restored; unless that is told to by name."""
    generator = Generator.load(dit_folder)
    name = plant_sensitive(generator)
    applied = Int8(Int8Config(error=0.02, observer="minmax")).apply(generator, given(generator))
    assert applied.metadata["precision"][name] == "float"
    assert name not in Weights(WeightsConfig()).layers(generator.denoiser)
    assert name in Weights(WeightsConfig(layers=("*",))).layers(generator.denoiser)
    again = Generator.load(dit_folder)
    assert name in Weights(WeightsConfig()).layers(again.denoiser)
    Int8.restore(again, applied.metadata)
    assert name not in Weights(WeightsConfig()).layers(again.denoiser)


@pytest.mark.parametrize("settings", [{"error": 0.02}, {"latency": 0.7}])
def test_other_families(sd, given, settings):
    applied = Int8(Int8Config(**settings)).apply(sd, given(sd, "onnxruntime"))
    decision = applied.metadata["decision"]
    assert decision["measured"] <= next(iter(settings.values()))
    kinds = {name: precision_of(sd.denoiser.get_submodule(name)) for name in applied.metadata["precision"]}
    assert kinds == applied.metadata["precision"]


def test_layers_that_share_an_input_are_decided_together(given):
    """Flux: queries, keys and values of picture and of text; a single block's MLP reads what its attention does."""
    generator = Generator(make_flux())
    plan = SamplingPlan(steps=2, guidance_scale=3.5, height=32, width=32)
    context = dataclasses.replace(given(generator), plan=plan)
    precision = Int8(Int8Config(latency=0.8)).apply(generator, context).metadata["precision"]
    assert set(precision.values()) == {"static", "float"}
    for attention in ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"):
        for kind in ("to_{}", "add_{}_proj"):
            names = [f"{attention}.{kind.format(letter)}" for letter in "qkv"]
            assert len({precision[name] for name in names if name in precision}) <= 1


def test_an_engine_slower_than_foretold_is_corrected(dit, given):
    applied = Int8(Int8Config(latency=0.72)).apply(dit, given(dit, overhead=0.05))
    decision = applied.metadata["decision"]
    assert decision["first"]["measured"] > 0.72 >= decision["measured"]
    assert decision["first"]["foretold"] <= 0.72


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latency": 0.1}, r"latency 0\.1 cannot be met; the closest that can is 0\.\d+"),
        ({"error": 1e-7}, r"error 1e-07 cannot be met; the closest that can is 0\.\d+"),
    ],
)
def test_budgets_that_cannot_be_met(dit, given, settings, message):
    before = dict(dit.denoiser.named_modules())
    with pytest.raises(ConfigError, match=message):
        Int8(Int8Config(**settings)).apply(dit, given(dit))
    assert all(dit.denoiser.get_submodule(name) is module for name, module in before.items())


def test_a_budget_needs_latencies(dit, context):
    with pytest.raises(ConfigError, match=r"error 0\.1 needs latencies measured on the engine, and none are there"):
        Int8(Int8Config(error=0.1)).apply(dit, context(dit))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"error": 0.1, "latency": 0.5}, "at most one"),
        ({"error": 0.1, "activations": "dynamic"}, "allowed: static"),
        ({"latency": 0.5, "context_calls": 0}, "allowed: 1 and more, null"),
        ({"latency": 1.0}, "less than 1"),
        ({"error": 0.0}, "greater than 0"),
        ({"activations": "dynamic", "convolutions": True}, "convolutions true does not go with activations dynamic"),
    ],
)
def test_configs_that_contradict_themselves(settings, message):
    with pytest.raises(ValidationError, match=message):
        Int8Config(**settings)


def test_decided_together_is_what_one_module_reads_from_one_tensor():
    leaders = {"a.q": "a.q", "a.k": "a.q", "a.o": "a.o", "b.k": "a.q", "b.v": "a.q"}
    assert decided_together(leaders, list(leaders)) == [["a.q", "a.k"], ["a.o"], ["b.k", "b.v"]]
