"""Which layers are reduced, exactness where nothing is, budgets, restored structure, and static engines."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny import make_flux

from diffpress.artifact import load_weights, save_weights
from diffpress.errors import ConfigError
from diffpress.export.components import flatten_inputs
from diffpress.generator import Generator
from diffpress.prune.reduction import CoarseBlocks, MergedTokens, PooledKeys, TokenGrid
from diffpress.prune.tokens import (
    Tokens,
    TokensConfig,
    candidates,
    find_grids,
    grid_of,
    install,
    milliseconds,
    reduced,
    work,
)
from diffpress.prune.units import find_units, remove
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.recorded import mean_error
from diffpress.targets import TARGETS

TARGET = TARGETS["onnxruntime"]
DIT = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")


def apply(generator, context, **settings):
    return Tokens(TokensConfig(**settings)).apply(generator, context)


def everywhere(generator, context, method, **settings):
    """The stage on every layer it could reduce that cells of 2 tile."""
    grids = find_grids(generator, context, method)
    names = tuple(name for name, grid in grids.items() if grid[0] % 2 == 0 and grid[1] % 2 == 0)
    return apply(generator, context, method=method, blocks=names, **settings)


def test_grids_of_each_family(dit, sd, ddpm, context):
    assert find_grids(dit, context(dit), "pool") == dict.fromkeys(DIT, (4, 4))
    assert find_grids(dit, context(dit), "coarse") == dict.fromkeys(
        ("transformer_blocks.0", "transformer_blocks.1"), (4, 4)
    )
    found = find_grids(sd, context(sd), "pool")
    assert set(found.values()) == {(4, 4)}
    assert all(name.endswith("attn1") for name in found)
    assert set(find_grids(ddpm, context(ddpm), "pool").values()) == {(4, 4)}
    assert "mid_block.attentions.0" in find_grids(ddpm, context(ddpm), "pool")
    assert find_grids(ddpm, context(ddpm), "merge") == {}


def test_grid_of_tokens():
    assert grid_of(torch.empty(1, 24, 3), torch.empty(1, 4, 8, 12)) == (4, 6)
    assert grid_of(torch.empty(1, 96, 3), torch.empty(1, 4, 8, 12)) == (8, 12)
    assert grid_of(torch.empty(1, 3, 5, 7), torch.empty(1, 4, 8, 12)) == (5, 7)
    assert grid_of(torch.empty(1, 25, 3), torch.empty(1, 4, 8, 12)) is None
    assert grid_of(torch.empty(1, 24, 3), torch.empty(1, 96, 16)) is None


@pytest.mark.parametrize(
    ("family", "method", "neutral"),
    [
        *itertools.product(["dit", "sd"], ["pool", "coarse"], [{"pool": 1}]),
        *itertools.product(["dit", "sd"], ["merge"], [{"ratio": 0}]),
        ("ddpm", "pool", {"pool": 1}),
    ],
)
def test_neutral_settings_are_the_same_network(request, family, method, neutral, context, first_call, relative):
    generator = request.getfixturevalue(family)
    expected, call = first_call(generator)
    everywhere(generator, context(generator), method, **neutral)
    assert relative(first_call(generator, call)[0], expected) < 1e-5


@pytest.mark.parametrize("family", ["dit", "sd"])
@pytest.mark.parametrize("method", ["pool", "coarse", "merge"])
def test_restored_network_is_the_same_to_the_bit(request, family, method, context, first_call, relative, tmp_path):
    folder, generator = request.getfixturevalue(f"{family}_folder"), request.getfixturevalue(family)
    whole, call = first_call(generator)
    applied = everywhere(generator, context(generator), method)
    expected, _ = first_call(generator, call)
    assert relative(expected, whole) > 1e-4
    assert applied.metadata["output_error"] > 1e-4
    save_weights(generator.denoiser, tmp_path / "denoiser.safetensors")
    again = Generator.load(folder)
    Tokens.restore(again, json.loads(json.dumps(applied.metadata)))
    load_weights(again.denoiser, tmp_path / "denoiser.safetensors")
    assert torch.equal(first_call(again, call)[0], expected)


def test_undone_it_is_as_it_was(sd, context, first_call):
    expected, call = first_call(sd)
    names = list(sd.denoiser.state_dict())
    for method in ("pool", "coarse", "merge"):
        grids = {name: TokenGrid(*grid, 2) for name, grid in find_grids(sd, context(sd), method).items()}
        with reduced(sd.denoiser, method, grids, 0.5):
            assert not torch.equal(first_call(sd, call)[0], expected)
        assert torch.equal(first_call(sd, call)[0], expected)
    assert list(sd.denoiser.state_dict()) == names


def test_neighbours_share_a_coarse_grid(dit):
    grids = {f"transformer_blocks.{index}": TokenGrid(4, 4, 2) for index in (0, 1)}
    install(dit.denoiser, "coarse", grids, 0.0)
    (only,) = dit.denoiser.transformer_blocks
    assert isinstance(only, CoarseBlocks)
    assert len(only.blocks) == 2


def test_blocks_apart_have_their_own(dit):
    before = dit.denoiser.transformer_blocks
    before.extend([before[0], before[1]])
    install(dit.denoiser, "coarse", {f"transformer_blocks.{index}": TokenGrid(4, 4, 2) for index in (0, 2, 3)}, 0.0)
    kinds = [len(getattr(block, "blocks", ())) for block in dit.denoiser.transformer_blocks]
    assert kinds == [1, 0, 2]


@pytest.mark.parametrize("method", ["pool", "coarse", "merge"])
def test_error_budget_is_kept(sd, context, method):
    given = context(sd)
    alone = apply(sd, given, method=method, error=1e3)
    assert len(alone.metadata["grids"]) == len(alone.metadata["errors"])
    budget = sorted(alone.metadata["errors"].values())[0] * 1.2
    sd.pipeline.unet = Generator.load(sd.source).denoiser
    applied = apply(sd, given, method=method, error=budget)
    assert applied.metadata["output_error"] <= budget
    assert 1 <= len(applied.metadata["grids"]) < len(alone.metadata["grids"])
    assert applied.metadata["errors"] == pytest.approx(alone.metadata["errors"], rel=1e-4)


def test_error_that_no_layer_keeps_to(dit, context):
    with pytest.raises(ConfigError, match=r"error 1e-09 cannot be met by any layer; the closest that can is .*attn1"):
        apply(dit, context(dit), error=1e-9)


def test_errors_are_those_of_each_layer_alone(dit, context):
    given = context(dit)
    applied = apply(dit, given, error=1e3)
    again = Generator.load(dit.source)
    calls = again.record(given.conditions, seeds=given.seeds, plan=given.plan)
    for name in DIT:
        with reduced(again.denoiser, "pool", {name: TokenGrid(4, 4, 2)}, 0.0):
            assert applied.metadata["errors"][name] == pytest.approx(mean_error(again.denoiser, calls) ** 0.5, rel=1e-3)
    assert len(set(applied.metadata["errors"].values())) == 2


def test_latency_budget_takes_what_changes_least(dit, context):
    def latency(generator):
        attentions = [module for module in generator.denoiser.modules() if hasattr(module, "processor")]
        pooled = sum(isinstance(attention.processor, PooledKeys) for attention in attentions)
        return {"": 10.0 - 3.0 * pooled} | dict.fromkeys(DIT, 4.0)

    given = replace(context(dit), latency=latency)
    errors = apply(dit, context(dit), error=1e3).metadata["errors"]
    dit.pipeline.transformer = Generator.load(dit.source).denoiser
    applied = apply(dit, given, latency=0.7)  # 3 ms of each can go
    assert list(applied.metadata["grids"]) == [min(errors, key=errors.__getitem__)]
    dit.pipeline.transformer = Generator.load(dit.source).denoiser
    applied = apply(dit, given, latency=0.41)
    assert list(applied.metadata["grids"]) == list(DIT)
    assert applied.metadata["latency"] == pytest.approx(0.4)
    assert "40% of the time measured" in applied.summary
    dit.pipeline.transformer = Generator.load(dit.source).denoiser
    with pytest.raises(ConfigError, match=r"latency 0\.3 cannot be met by pool 2; the closest that can is 0\.4"):
        apply(dit, given, latency=0.3)
    with pytest.raises(ConfigError, match="no timings; allowed: error, blocks"):
        apply(dit, context(dit), latency=0.5)


@pytest.mark.parametrize("removed", [["transformer_blocks.0.blocks.0"], ["transformer_blocks.0.blocks.1"]])
def test_a_coarse_block_goes(dit, context, removed):
    given = context(dit)
    Tokens(TokensConfig(method="coarse", blocks=("transformer_blocks.0", "transformer_blocks.1"))).apply(dit, given)
    whole = sum(parameter.numel() for parameter in dit.denoiser.parameters())
    units = [unit for unit in find_units(dit.denoiser, "block") if unit.name in removed]
    remove(dit.denoiser, units)
    assert sum(parameter.numel() for parameter in dit.denoiser.parameters()) < whole
    latents = dit.sample(given.conditions, seeds=given.seeds, plan=given.plan).latents
    assert np.isfinite(latents).all()


def test_time_and_work_that_is_saved(dit):
    table = {"a": 10.0, "a.to_q": 1.0, "a.to_k": 1.0, "a.to_out": 2.0}
    assert milliseconds("a", "pool", 0.25, table) == 0.75 * 7
    assert milliseconds("a", "coarse", 0.25, table) == 7.5
    assert milliseconds("other", "pool", 0.25, table) == 0
    block = dit.denoiser.transformer_blocks[0]  # 16 tokens of 16 channels, MLP of 64
    assert work(block.attn1, 16, "pool", 0.25) == 0.75 * 16 * (2 * 256 + 2 * 16 * 16)
    assert work(block.attn1, 16, "merge", 0.5) == 16 * (0.5 * 4 * 256 + 0.75 * 16 * 2 * 16)
    assert work(block, 16, "coarse", 0.25) == 16 * (0.75 * (4 * 256 + 2 * 16 * 64) + (1 - 0.25**2) * 16 * 2 * 16)


def test_size_that_cells_do_not_tile(dit, sd, context):
    with pytest.raises(ConfigError, match=r"pool 3 does not tile a grid of 4 x 4 tokens; allowed: 1, 2, 4"):
        apply(dit, context(dit), pool=3, error=1e3)
    with pytest.raises(ConfigError, match="pool 3 does not tile"):
        apply(dit, context(dit), pool=3, blocks=DIT[:1])
    given = replace(context(sd), plan=replace(context(sd).plan, height=24, width=24))  # latents of 12, tokens of 6 x 6
    with pytest.raises(ConfigError, match=r"pool 4 does not tile a grid of 6 x 6 tokens; allowed: 1, 2, 3, 6"):
        apply(sd, given, pool=4, error=1e3)


@pytest.mark.parametrize("method", ["pool", "coarse", "merge"])
def test_another_size_is_refused_when_drawn(sd, context, method):
    given = context(sd)
    everywhere(sd, given, method)
    sd.sample(given.conditions[:1], seeds=[0], plan=given.plan)
    with pytest.raises(ConfigError, match="fitted for 4 x 4: another picture size"):
        sd.sample(given.conditions[:1], seeds=[0], plan=replace(given.plan, height=32, width=32))


def test_layers_that_are_not_there(dit, sd, context):
    with pytest.raises(ConfigError, match=r"has no transformer_blocks\.9\.attn1 whose tokens pool can reduce; allowed"):
        Tokens(TokensConfig(blocks=("transformer_blocks.9.attn1",))).check(dit, TARGET)
    cross = next(name for name, _ in sd.denoiser.named_modules() if name.endswith("attn2"))
    with pytest.raises(ConfigError, match="attn2 whose tokens"):
        Tokens(TokensConfig(blocks=(cross,))).check(sd, TARGET)


def test_networks_that_are_refused(dit, ddpm, context):
    with pytest.raises(ConfigError, match="FluxTransformer2DModel has no layer whose tokens pool can reduce"):
        Tokens(TokensConfig(error=0.1)).check(Generator(make_flux()), TARGET)
    with pytest.raises(ConfigError, match="UNet2DModel has no layer whose tokens merge can reduce"):
        Tokens(TokensConfig(method="merge", error=0.1)).check(ddpm, TARGET)
    Int8(Int8Config()).apply(dit, context(dit))
    with pytest.raises(ConfigError, match="DiTTransformer2DModel is quantized already"):
        Tokens(TokensConfig(error=0.1)).check(dit, TARGET)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no budget given; allowed: one of blocks, error, latency"),
        ({"error": 0.1, "latency": 0.5}, "error and latency given"),
        ({"error": 0.1, "method": "merge", "ratio": 0.8}, "ratio 0.8 is more than pool 2 leaves"),
        ({"error": 0.1, "pool": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        TokensConfig(**settings)


def test_candidates_of_a_reduced_network_are_left(dit):
    install(dit.denoiser, "pool", {DIT[0]: TokenGrid(4, 4, 2)}, 0.0)
    assert list(candidates(dit.denoiser, "pool")) == [DIT[1]]


def test_a_block_that_pools_inside_is_not_made_coarse(dit, context):
    install(dit.denoiser, "pool", {f"{DIT[0]}": TokenGrid(4, 4, 2)}, 0.0)
    assert list(candidates(dit.denoiser, "coarse")) == ["transformer_blocks.1"]
    assert apply(dit, context(dit), method="coarse", error=1e3).metadata["grids"].keys() == {"transformer_blocks.1"}


def test_processors(dit):
    install(dit.denoiser, "merge", {DIT[0]: TokenGrid(4, 4, 2)}, 0.5)
    found = dit.denoiser.transformer_blocks[0].attn1.processor
    assert isinstance(found, MergedTokens)
    assert found.count == 8
    install(dit.denoiser, "pool", {DIT[1]: TokenGrid(4, 4, 2)}, 0.5)
    assert isinstance(dit.denoiser.transformer_blocks[1].attn1.processor, PooledKeys)


@pytest.mark.parametrize("family", ["dit", "sd"])
@pytest.mark.parametrize("method", ["pool", "coarse", "merge"])
def test_engine_computes_what_the_reduced_network_computes(
    request, family, context, method, engine, relative, tmp_path
):
    generator = request.getfixturevalue(family)
    given = context(generator)
    everywhere(generator, given, method)
    session, graph = engine(generator, given, tmp_path / "model.onnx")
    for call in generator.record(given.conditions[:1], seeds=[5], plan=given.plan):
        assert relative(session(flatten_inputs(call.inputs))[0], call.output) < 1e-4
    assert not [node.op_type for node in graph.node if node.op_type in ("If", "Loop", "NonZero")]


def test_pooled_network_in_8_bits(dit, context, first_call, relative):
    everywhere(dit, context(dit), "pool")
    pooled, call = first_call(dit)
    Int8(Int8Config()).apply(dit, context(dit))
    assert 0 < relative(first_call(dit, call)[0], pooled) < 0.2
