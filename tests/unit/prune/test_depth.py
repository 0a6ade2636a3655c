"""Which blocks go: exact where nothing does, planted ones first, budgets met, and bad input refused."""

import copy
import itertools
import json
import math
import random
from dataclasses import replace

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from diffusers.models.resnet import ResnetBlock2D
from pydantic import ValidationError
from scipy.stats import spearmanr
from tiny import fill_zeros, make_autoencoder, make_flux, make_scheduler

from diffpress.artifact import load_weights, save_weights
from diffpress.errors import ConfigError
from diffpress.export import ExportConfig, export
from diffpress.generator import Generator
from diffpress.progress import SILENT
from diffpress.prune.depth import Budget, Depth, DepthConfig, blind, budget_of, effects, in_order, planned, select
from diffpress.prune.units import Skip, Unit, bypassed, find_units
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.recorded import mean_error, record
from diffpress.targets import TARGETS

TARGET = TARGETS["onnxruntime"]


@torch.no_grad()
def scale_gates(network, factors):
    """Both residual branches of block i times factors[i]."""
    for block, factor in zip(network.transformer_blocks, factors, strict=True):
        for rows in (2, 5):  # shift, scale, gate of attention; of the MLP
            for tensor in (block.norm1.linear.weight, block.norm1.linear.bias):
                tensor.chunk(6)[rows].mul_(factor)


@pytest.fixture
def deep():
    """A DiT of six blocks."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_layers=6,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        sample_size=8,
        norm_num_groups=4,
    )
    return Generator(DiTPipeline(fill_zeros(transformer), fill_zeros(make_autoencoder()), make_scheduler()))


@pytest.fixture
def measured(deep, context):
    """(network, calls, units) of the deep DiT."""
    calls = record(deep, context(deep), 3, "recording")
    return deep.denoiser, calls, in_order(deep.denoiser, find_units(deep.denoiser, "block"), calls[0])


def prune(generator, given, **settings):
    stage = Depth(DepthConfig(**{"calls": 2} | settings))
    stage.check(generator, given.target)
    return stage.apply(generator, given)


def timed(generator, ms, overhead=0.0):
    """Latencies of 10 ms in all, ``ms`` of them in the blocks, known by their weights; a share stays without them."""

    def mark(block):
        return float(block.attn1.to_q.weight.double().sum())

    own = {mark(block): each for block, each in zip(generator.denoiser.transformer_blocks, ms, strict=True)}

    def latency(generator):
        there = [own[mark(block)] for block in generator.denoiser.transformer_blocks if hasattr(block, "attn1")]
        return {"": 10.0 - (1 - overhead) * (sum(ms) - sum(there))} | dict(
            zip(blocks(*range(len(there))), there, strict=True)
        )

    return latency


def blocks(*numbers):
    return [f"transformer_blocks.{number}" for number in numbers]


@pytest.mark.parametrize("settings", [{"remove": 0.0}, {"parameters": 1.0}, {"latency": 1.0}])
def test_all_blocks_kept_reproduces_the_output(any_generator, context, first_call, settings):
    before, call = first_call(any_generator)
    state = {name: value.clone() for name, value in any_generator.denoiser.state_dict().items()}
    given = replace(context(any_generator), latency=lambda generator: {"": 10.0})
    applied = prune(any_generator, given, **settings)
    assert applied.metadata["removed"] == []
    assert torch.equal(first_call(any_generator, call)[0], before)
    assert all(torch.equal(value, state[name]) for name, value in any_generator.denoiser.state_dict().items())
    prune(any_generator, given, remove=0.5)
    assert not torch.allclose(first_call(any_generator, call)[0], before, atol=1e-5)


@pytest.mark.parametrize("planted", [0, 3, 5])
def test_a_planted_identity_is_the_first_to_go(deep, context, first_call, planted):
    scale_gates(deep.denoiser, [0.0 if index == planted else 1.0 for index in range(6)])
    before, call = first_call(deep)
    applied = prune(deep, context(deep), remove=1 / 6)
    assert applied.metadata["removed"] == blocks(planted)
    assert applied.metadata["error"] == 0.0
    assert torch.equal(first_call(deep, call)[0], before)
    assert applied.metadata["plain"] == (planted != 0)  # block 0's embedding is read by the network's end


def test_a_planted_identity_of_a_unet_is_the_first_to_go(sd, context):
    units = [unit.name for unit in find_units(sd.denoiser, "block")]
    planted = [name for name in units if isinstance(sd.denoiser.get_submodule(name), ResnetBlock2D)]
    assert len(planted) > 1
    for name in planted:
        generator = Generator.load(sd.source)
        last = generator.denoiser.get_submodule(name).conv2
        with torch.no_grad():
            last.weight.zero_()
            last.bias.zero_()
        applied = prune(generator, context(generator), remove=1 / len(units))
        assert applied.metadata["removed"] == [name]
        assert applied.metadata["error"] == 0.0
    assert prune(sd, context(sd), remove=1 / len(units)).metadata["error"] > 1e-6  # control


def test_planted_identities_among_the_sublayers_go_first(deep, context):
    with torch.no_grad():
        for block, row in ((1, 2), (4, 5)):
            linear = deep.denoiser.transformer_blocks[block].norm1.linear
            for tensor in (linear.weight, linear.bias):
                tensor.chunk(6)[row].zero_()
    applied = prune(deep, context(deep), remove=2 / 12, granularity="sublayer")
    assert set(applied.metadata["removed"]) == {"transformer_blocks.1.attn1", "transformer_blocks.4.ff"}
    assert applied.metadata["error"] == 0.0


def test_planted_importances_are_found_in_their_order(deep, context):
    factors = [0.3, 0.02, 0.6, 0.1, 1.0, 0.005]
    scale_gates(deep.denoiser, factors)
    metadata = prune(deep, context(deep), remove=0.5, rescore=None).metadata
    found = {unit["name"]: unit["score"] for unit in metadata["units"]}
    assert sorted(found, key=found.__getitem__) == blocks(5, 1, 3, 0, 2, 4)
    assert metadata["order"] == blocks(5, 1, 3)
    assert metadata["removed"] == blocks(1, 3, 5)
    assert all(a == b for a, b in zip(found, blocks(*range(6)), strict=True))


def test_effects_are_those_of_the_removal_alone(measured):
    network, calls, units = measured
    found = effects(network, calls, units, [], SILENT)
    with bypassed(network, [units[2]]):
        assert found[units[2].name] == mean_error(network, calls)
    beside = effects(network, calls, units, units[:1], SILENT)
    assert set(beside) == {unit.name for unit in units[1:]}
    with bypassed(network, units[:2]):
        assert beside[units[1].name] == pytest.approx(mean_error(network, calls) - found[units[0].name], rel=1e-6)
    wrong = [replace(call, output=other.output) for call, other in zip(calls, calls[1:] + calls[:1], strict=True)]
    assert effects(network, wrong, units, [], SILENT) != found


def test_sum_of_effects_ranks_what_joint_removal_does(deep, measured):
    network, calls, units = measured
    scale_gates(network, [0.3, 0.05, 0.6, 0.15, 0.4, 0.08])
    calls = [
        replace(call, output=network(**call.inputs | call.constants, return_dict=False)[0].detach()) for call in calls
    ]
    solo = effects(network, calls, units, [], SILENT)
    joint, predicted, shuffled = [], [], []
    mixed = dict(zip(solo, random.Random(1).sample(list(solo.values()), len(solo)), strict=True))
    for group in itertools.chain(itertools.combinations(units, 2), itertools.combinations(units, 3)):
        with bypassed(network, group):
            joint.append(mean_error(network, calls))
        predicted.append(sum(solo[unit.name] for unit in group))
        shuffled.append(sum(mixed[unit.name] for unit in group))
    assert spearmanr(joint, predicted).statistic > 0.8
    assert spearmanr(joint, shuffled).statistic < 0.6


UNITS = [Unit(f"b{index}", "block") for index in range(6)]


def joint_effect(removed):
    """Solo effects of 1, 2, ... but the first two stand for each other: both gone is far worse than their sum."""
    names = {unit.name for unit in removed}
    return sum(int(name[1:]) + 1.0 for name in names) + 100.0 * ({"b0", "b1"} <= names)


def score(removed):
    rest = [unit for unit in UNITS if unit not in removed]
    return {unit.name: joint_effect([*removed, unit]) - joint_effect(removed) for unit in rest}


def test_measuring_again_sees_units_that_stand_for_each_other():
    budget = Budget({unit.name: 1.0 for unit in UNITS}, 6, 4)
    once, solo = select(score, UNITS, budget, None)
    again, _ = select(score, UNITS, budget, 1)
    assert solo == {f"b{index}": index + 1.0 for index in range(6)}
    assert [unit.name for unit in once] == ["b0", "b1"]
    assert [unit.name for unit in again] == ["b0", "b2"]
    best = min(joint_effect(pair) for pair in itertools.combinations(UNITS, 2))
    assert joint_effect(again) == best < joint_effect(once)


@pytest.mark.parametrize("group", [1, 2, None])
def test_budget_is_met_whatever_the_weights(group):
    draw = random.Random(0)
    for _ in range(10):
        weights = {unit.name: draw.uniform(0.1, 2.0) for unit in UNITS}
        total = 1.0 + sum(weights.values())
        budget = Budget(weights, total, draw.uniform(1.0 + min(weights.values()), total))
        removed, _ = select(score, UNITS, budget, group)
        assert budget.left(removed) <= budget.kept * (1 + 1e-9)
        assert len(set(removed)) == len(removed) < len(UNITS)


def brute_force(costs, budget, removed=()):
    """The least sum of costs of more units that meets the budget."""
    free = [name for name in costs if name not in removed]
    sets = itertools.chain.from_iterable(itertools.combinations(free, size) for size in range(len(free) + 1))
    fits = [names for names in sets if budget.total - budget.saved({*names, *removed}) <= budget.kept]
    return min(sum(max(costs[name], 0.0) for name in names) for names in fits)


@pytest.mark.parametrize("removed", [(), ("a0", "b1"), ("c0", "a1")])
def test_plan_is_that_of_brute_force_where_blocks_go_whole(removed):
    draw = random.Random(0)
    names = ["a0", "a1", "a2", "b0", "b1", "c0", "d0"]
    more = []
    for _ in range(30):
        costs = {name: draw.uniform(-0.1, 1.0) for name in names}
        weights = {name: float(draw.randint(1, 9)) for name in names}
        rests = {("a0", "a1", "a2"): float(draw.randint(0, 9)), ("b0", "b1"): float(draw.randint(0, 9))}
        total = 5.0 + sum(weights.values()) + sum(rests.values())
        budget = Budget(weights, total, draw.randint(7, int(total)), rests)
        plan = planned(costs, removed, budget)
        assert plan.issuperset(removed)
        assert budget.total - budget.saved(plan) <= budget.kept
        found = sum(max(costs[name], 0.0) for name in plan.difference(removed))
        assert found == pytest.approx(brute_force(costs, budget, removed))
        try:
            alone = planned(costs, removed, replace(budget, rests={}))
        except ConfigError:  # it does not know that the rest of a block goes too
            more.append(True)
        else:
            more.append(sum(max(costs[name], 0.0) for name in alone.difference(removed)) > found + 1e-9)
    assert any(more)


@pytest.mark.parametrize("share", [0.8, 0.5, 0.35])
def test_sublayers_meet_a_budget_at_the_least_cost(deep, context, share):
    total = sum(p.numel() for p in deep.denoiser.parameters())
    settings = {"parameters": share, "granularity": "sublayer", "rescore": None}
    budget = budget_of(deep.denoiser, find_units(deep.denoiser, "sublayer"), DepthConfig(**settings))
    metadata = prune(deep, context(deep), **settings).metadata
    costs = {unit["name"]: unit["score"] for unit in metadata["units"]}
    assert sum(max(costs[name], 0.0) for name in metadata["order"]) == pytest.approx(brute_force(costs, budget))
    left = sum(p.numel() for p in deep.denoiser.parameters()) / total
    assert left == pytest.approx(metadata["left"], abs=1e-9)
    assert left <= share
    naive = replace(budget, rests={})
    assert naive.left(find_units(deep.denoiser, "sublayer")) > budget.left(find_units(deep.denoiser, "sublayer"))


def test_parameters_and_latency_are_budgets(deep, context):
    total = sum(p.numel() for p in deep.denoiser.parameters())
    applied = prune(deep, context(deep), parameters=0.6)
    left = sum(p.numel() for p in deep.denoiser.parameters())
    assert left <= 0.6 * total < left + 16_000
    assert applied.metadata["left"] == pytest.approx(left / total)
    assert f"{left / total:.0%} of the parameters left" in applied.summary
    blocks_left = len(deep.denoiser.transformer_blocks)

    given = replace(context(deep), latency=timed(deep, [3.0] + [0.5] * (blocks_left - 1)))
    applied = prune(deep, given, latency=0.72)
    assert applied.metadata["removed"] == blocks(0)  # nothing else takes so long
    assert applied.metadata["left"] == applied.metadata["latency"] == pytest.approx(0.7)
    assert "70% of the time measured" in applied.summary
    assert {unit["weight"] for unit in applied.metadata["units"]} == {3.0, 0.5}


@pytest.mark.parametrize("remove", [1 / 3, 1 / 2, 5 / 6])
def test_blind_criteria_go_by_place(deep, context, remove):
    names = blocks(*range(6))
    count = round(6 * remove)
    wanted = {"first": names[:count], "last": names[6 - count :]}
    wanted["uniform"] = {2: blocks(1, 4), 3: blocks(1, 3, 5), 5: blocks(0, 1, 3, 4, 5)}[count]
    units = find_units(deep.denoiser, "block")
    budget = Budget(dict.fromkeys(names, 1.0), 6, 6 - count)
    for criterion, expected in wanted.items():
        assert [unit.name for unit in blind(criterion, units, budget, 0)] == expected
    drawn = {tuple(unit.name for unit in blind("random", units, budget, seed)) for seed in range(5)}
    assert len(drawn) > 1
    assert {len(names) for names in drawn} == {count}
    assert blind("random", units, budget, 3) == blind("random", units, budget, 3)


def test_criteria_remove_different_blocks_and_ours_moves_the_output_least(deep, context):
    scale_gates(deep.denoiser, [1.0, 0.05, 1.0, 0.02, 1.0, 1.0])
    given, errors = context(deep), {}
    for criterion in ("output", "uniform", "first", "last", "random"):
        generator = Generator(DiTPipeline(copy.deepcopy(deep.denoiser), deep.pipeline.vae, make_scheduler()))
        applied = prune(generator, given, remove=1 / 3, criterion=criterion)
        assert len(applied.metadata["removed"]) == 2
        assert applied.metadata["units"][0]["score"] is None or criterion == "output"
        errors[criterion] = applied.metadata["error"]
    assert errors["output"] < 0.5 * min(errors[name] for name in errors if name != "output")


def test_pruned_dit_is_a_plain_model_on_disk(deep, context, tmp_path, first_call):
    scale_gates(deep.denoiser, [1.0, 0.1, 1.0, 0.1, 1.0, 1.0])
    before, call = first_call(deep)
    applied = prune(deep, context(deep), remove=1 / 3)
    assert applied.metadata["plain"]
    output = first_call(deep, call)[0]
    deep.denoiser.save_pretrained(tmp_path)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path).eval()
    assert loaded.config.num_layers == 4
    with torch.no_grad():
        found = loaded(**call.inputs | call.constants, return_dict=False)[0]
    assert torch.equal(found, output)
    assert not torch.equal(found, before)


@pytest.mark.parametrize(
    ("family", "granularity"),
    [("dit", "block"), ("dit", "sublayer"), ("sd", "block"), ("sd", "sublayer"), ("ddpm", "block")],
)
def test_restored_from_metadata_and_weights(request, context, tmp_path, first_call, family, granularity):
    generator, folder = request.getfixturevalue(family), request.getfixturevalue(f"{family}_folder")
    given = context(generator)
    applied = prune(generator, given, remove=0.5, granularity=granularity)
    with torch.no_grad():
        for parameter in generator.denoiser.parameters():
            parameter.mul_(1.01)  # as a later training would
    output, call = first_call(generator)
    save_weights(generator.denoiser, tmp_path / "denoiser.safetensors")
    again = Generator.load(folder)
    Depth.restore(again, json.loads(json.dumps(applied.metadata)))
    assert not torch.equal(first_call(again, call)[0], output)
    load_weights(again.denoiser, tmp_path / "denoiser.safetensors")
    assert torch.equal(first_call(again, call)[0], output)
    drawn = [each.sample(given.conditions, seeds=given.seeds, plan=given.plan).images for each in (again, generator)]
    assert (drawn[0] == drawn[1]).all()


def test_units_of_a_unet_are_in_the_order_in_which_they_run(sd, context):
    calls = record(sd, context(sd), 1, "recording")
    names = [unit.name for unit in in_order(sd.denoiser, find_units(sd.denoiser, "block"), calls[0])]
    levels = [name.split(".")[0] for name in names]
    assert levels == sorted(levels, key=["down_blocks", "mid_block", "up_blocks"].index)
    assert (
        names.index("mid_block.resnets.0") < names.index("mid_block.attentions.0") < names.index("mid_block.resnets.1")
    )
    assert [unit.name for unit in find_units(sd.denoiser, "block")] != names


def test_flux_loses_blocks_of_both_kinds(context, first_call):
    torch.manual_seed(0)
    generator = Generator(make_flux())
    given = replace(context(generator), plan=replace(context(generator).plan, height=16, width=16))
    applied = prune(generator, given, remove=0.5)
    assert applied.metadata["plain"]
    config = generator.denoiser.config
    assert config.num_layers + config.num_single_layers == 1
    assert math.isfinite(applied.metadata["error"])
    assert applied.metadata["error"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("family", "granularity"), [("dit", "sublayer"), ("ddpm", "block")])
def test_pruned_denoiser_exports(request, family, granularity, context, tmp_path):
    generator = request.getfixturevalue(family)
    given = context(generator)
    prune(generator, given, remove=0.5, granularity=granularity)
    assert any(isinstance(module, Skip) for module in generator.denoiser.modules())
    settings = ExportConfig(target="onnxruntime", size="static")
    built = export(generator, tmp_path / "engine", settings, plan=given.plan, conditions=given.conditions)
    assert built.parity  # compared with torch, or it would have raised


def test_pruned_denoiser_quantizes(sd, context, first_call, relative):
    prune(sd, context(sd), remove=0.5, granularity="sublayer")
    before, call = first_call(sd)
    layers = len(Int8(Int8Config()).layers(sd.denoiser, TARGET))
    Int8(Int8Config()).apply(sd, context(sd))
    assert layers > 0
    assert 0 < relative(first_call(sd, call)[0], before) < 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "budgets given: none; allowed: exactly one"),
        ({"remove": 0.5, "latency": 0.5}, "budgets given: remove, latency"),
        ({"parameters": 0.5, "criterion": "gates"}, "criterion gates does not go with a budget of parameters"),
        ({"remove": 1.0}, "less than 1"),
        ({"remove": 0.5, "criterion": "magnitude"}, "'output', 'gates', 'uniform'"),
        ({"remove": 0.5, "granularity": "head"}, "'block' or 'sublayer'"),
        ({"remove": 0.5, "rescore": 0}, "greater than or equal to 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        DepthConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"remove": 0.95}, "remove 0.95 of 6 units is 6; allowed: 0, or 1 to 5 of them"),
        ({"remove": 0.01}, "remove 0.01 of 6 units is 0"),
        ({"parameters": 0.01}, r"parameters 0.01 cannot be met with a unit left; the closest that can is 0\.17"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused_before_work(deep, settings, message):
    with pytest.raises(ConfigError, match=message):
        Depth(DepthConfig(**settings)).check(deep, TARGET)


def test_closest_budget_that_is_named_can_be_met(deep, context):
    with pytest.raises(ConfigError) as refused:
        Depth(DepthConfig(parameters=0.01)).check(deep, TARGET)
    closest = float(str(refused.value).rsplit(" ", 1)[1])
    applied = prune(deep, context(deep), parameters=closest + 1e-4)
    assert len(applied.metadata["removed"]) == 5


def test_latency_needs_a_table_and_one_that_suffices(deep, context, monkeypatch):
    with pytest.raises(ConfigError, match=r"latency 0\.5 needs latencies measured on the engine"):
        prune(deep, context(deep), latency=0.5)
    given = replace(context(deep), latency=timed(deep, [1.0] * 6))
    with monkeypatch.context() as patch:
        patch.delattr("diffpress.prune.depth.record")  # refused before any run
        with pytest.raises(
            ConfigError, match=r"latency 0\.4 cannot be met with a unit left; the closest that can is 0\.5"
        ):
            prune(deep, given, latency=0.4)
    whole = Generator(copy.deepcopy(deep.pipeline), deep.source)
    assert prune(deep, given, latency=0.5).metadata["left"] == pytest.approx(0.5)
    stubborn = replace(context(whole), latency=timed(whole, [1.0] * 6, overhead=0.5))
    with pytest.raises(
        ConfigError, match=r"latency 0\.6 cannot be met with a unit left; the closest that can is 0\.75"
    ):
        prune(whole, stubborn, latency=0.6)
    assert len(prune(whole, stubborn, latency=0.8).metadata["removed"]) == 4  # by the table two would do


def test_quantized_denoiser_is_refused(dit, context):
    Int8(Int8Config()).apply(dit, context(dit))
    with pytest.raises(ConfigError, match="DiTTransformer2DModel is quantized already; allowed: before quantization"):
        Depth(DepthConfig(remove=0.5)).check(dit, TARGET)


def test_denoiser_without_units_is_refused(deep, ddpm):
    with pytest.raises(
        ConfigError, match="UNet2DModel has no sublayers that can go alone; allowed: granularity 'block'"
    ):
        Depth(DepthConfig(remove=0.5, granularity="sublayer")).check(ddpm, TARGET)
    del deep.denoiser.transformer_blocks[1:]
    with pytest.raises(ConfigError, match="has 1 removable blocks that diffpress knows; allowed: two and more"):
        Depth(DepthConfig(remove=0.5)).check(deep, TARGET)
