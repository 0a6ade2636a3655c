"""Where a network is cut, which steps a fitted policy computes, and that it keeps to its budget."""

import dataclasses
import itertools
import json
import logging

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from families import deeper, make
from tiny import fill_zeros, make_flux

from diffpress.caching import CachePolicy, CacheState, Cut, cached, caught, extrapolate
from diffpress.errors import ConfigError
from diffpress.export.build import export
from diffpress.export.settings import ExportConfig
from diffpress.generator import Generator, SamplingPlan
from diffpress.prune import reuse
from diffpress.prune.cuts import check_cut, find_cut
from diffpress.prune.reuse import Candidate, Runs, feature_errors, fewer_and_fewer, final_latents, gram, refine
from diffpress.prune.steps import Steps, StepsConfig
from diffpress.prune.units import remove, units_named
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.stage import Context
from diffpress.targets import TARGETS

PLAN = SamplingPlan(steps=9, guidance_scale=3.0)


def cut_of(generator, plan=PLAN, **kept):
    kept = {"keep_first": None, "keep_last": None, "branch": None} | kept
    return find_cut(generator, generator.conditions(1), plan, **kept)


@pytest.fixture
def flux():
    torch.manual_seed(4)
    return Generator(make_flux())


@pytest.fixture
def given(context):
    """What the stage is given: 3 pictures of 9 steps, two at a time."""

    def make(generator, steps=9):
        plan = dataclasses.replace(PLAN, steps=steps)
        return dataclasses.replace(context(generator, count=3), plan=plan, batch_size=2)

    return make


def test_a_policy_is_fitted_to_the_engines_runs(dit, given):
    """Not to calibration runs, which may have other steps and no guidance."""
    final = dataclasses.replace(PLAN, steps=4)
    context = dataclasses.replace(given(dit), final=final)
    fitted = apply(dit, context, interval=2).metadata
    assert fitted["steps"] == 4
    other = apply(dit, dataclasses.replace(context, final=dataclasses.replace(final, guidance_scale=1.0)), interval=2)
    assert other.metadata["error"] != fitted["error"]


def apply(generator, context, **settings):
    stage = Steps(StepsConfig(**settings))
    stage.check(generator, TARGETS["onnxruntime"])
    return stage.apply(generator, context)


# cuts


def test_blocks_of_a_dit(dit):
    assert cut_of(dit) == Cut(
        start="transformer_blocks.1",
        end="transformer_blocks.1",
        arguments=("hidden_states",),
        origin="transformer_blocks.0",
        skipped=("transformer_blocks.1",),
    )
    whole = cut_of(dit, keep_first=0)
    assert (whole.start, whole.origin, whole.end) == ("transformer_blocks.0", None, "transformer_blocks.1")
    assert cut_of(dit, keep_first=0, keep_last=1).skipped == ("transformer_blocks.0",)


@pytest.mark.parametrize(
    ("removed", "origin", "start"),
    [
        (["transformer_blocks.0"], "transformer_blocks.1", "transformer_blocks.2"),
        (["transformer_blocks.1", "transformer_blocks.2.ff"], "transformer_blocks.0", "transformer_blocks.2"),
    ],
)
def test_what_stands_where_blocks_were_is_no_block(dit, given, removed, origin, start, relative, tmp_path):
    """It hands on what it is given, so a test of the first block's residual would always find it unchanged."""
    torch.manual_seed(0)
    dit.pipeline.transformer = fill_zeros(DiTTransformer2DModel.from_config({**dit.denoiser.config, "num_layers": 4}))
    generator, context = dit, given(dit)
    remove(generator.denoiser, units_named(generator.denoiser, removed))
    cut = cut_of(generator)
    assert (cut.origin, cut.start) == (origin, start)
    apply(generator, context, method="first_block", threshold=1e-9)
    assert generator.cache is None  # every step is new
    wanted = generator.sample(context.conditions, seeds=context.seeds, plan=context.plan).latents
    for settings in ({"interval": 3}, {"method": "first_block", "threshold": 0.5}):
        apply(generator, context, **settings)
        with cached(generator.denoiser, generator.cache):
            found = generator.sample(context.conditions, seeds=context.seeds, plan=context.plan).latents
        assert 0 < relative(found, wanted) < 0.5
    export(generator, tmp_path, ExportConfig(), plan=context.plan, conditions=context.conditions)  # proves itself
    with pytest.raises(ConfigError, match=rf"keep {len(generator.denoiser.transformer_blocks) - 1} blocks"):
        cut_of(generator, keep_first=len(generator.denoiser.transformer_blocks) - 1)


def test_two_streams_from_one_list_of_blocks_to_the_next(flux):
    plan = dataclasses.replace(PLAN, height=16, width=16)
    cut = cut_of(flux, plan, keep_first=0)
    assert cut.arguments == ("encoder_hidden_states", "hidden_states")
    assert cut.skipped == ("transformer_blocks.0", "single_transformer_blocks.0")
    assert cut.main == "hidden_states"


@pytest.mark.parametrize(
    ("branch", "end", "runs"),
    [
        (0, "up_blocks.1.resnets.0", set()),
        (1, "up_blocks.0", {"down_blocks.0"}),
        (2, "up_blocks.0.attentions.0", {"down_blocks.0"}),
        (3, "mid_block", {"down_blocks.0", "down_blocks.1"}),
    ],
)
def test_layers_of_a_unet(sd, branch, end, runs):
    cut = cut_of(sd, branch=branch)
    assert cut.end == end
    assert {"down_blocks.0", "down_blocks.1"} - set(cut.skipped) == runs
    assert cut.start is None
    policy = CachePolicy(cut=cut, kind="schedule", timesteps=Runs(sd, _few(sd), 1).timesteps, computed=(True, False))
    with cached(sd.denoiser, policy):  # nothing of what is left out is missed
        assert torch.isfinite(final_latents(sd, sd.conditions(1), [0], dataclasses.replace(PLAN, steps=2))).all()


def _few(generator):
    from diffpress.stage import Context

    return Context(TARGETS["onnxruntime"], generator.conditions(1), [0], dataclasses.replace(PLAN, steps=2))


def test_what_is_left_out_too_much_is_seen(sd, given):
    """A skip connection that the kept layers read cannot be left out."""
    cut = cut_of(sd, branch=1)
    greedy = dataclasses.replace(cut, skipped=("down_blocks.0", *cut.skipped))
    runs = Runs(sd, given(sd), 1)
    policy = CachePolicy(cut=greedy, kind="schedule", timesteps=runs.timesteps, computed=(True, *[False] * 8))
    with pytest.raises(
        ConfigError, match=r"reads, beside what is kept, what lies between down_blocks\.0 and up_blocks\.0"
    ):
        runs.candidate(policy)


@pytest.mark.parametrize(
    ("family", "settings", "match"),
    [
        ("dit", {"keep_first": 2}, "keep 2 blocks; DiTTransformer2DModel has 2 in all"),
        ("dit", {"keep_first": 1, "keep_last": 1}, "keep 2 blocks"),
        ("dit", {"branch": 0}, "branch is for U-Nets"),
        ("sd", {"branch": 4}, "branch 4 of UNet2DConditionModel, which has 4 up layers"),
        ("sd", {"keep_last": 1}, "keep_first and keep_last are for blocks"),
        ("sd", {"method": "first_block"}, "allowed: interval, taylor"),
    ],
)
def test_a_cut_that_is_not_there(request, family, settings, match):
    generator = request.getfixturevalue(family)
    with pytest.raises(ConfigError, match=match):
        Steps(StepsConfig(**settings)).check(generator, TARGETS["onnxruntime"])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"method": "first_block", "interval": 2}, "first_block takes threshold"),
        ({"threshold": 0.1}, "interval takes interval"),
        ({"method": "first_block", "keep_first": 0}, "leaves first_block nothing to test"),
        ({"interval": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_make_no_sense(settings, match):
    with pytest.raises(ValueError, match=match):
        StepsConfig(**settings)


# fitting


def schedule(*computed, order=0):
    times = tuple(float(step) for step in range(len(computed), 0, -1))
    return CachePolicy(
        cut=Cut(end="a", skipped=("a",)), kind="schedule", timesteps=times, computed=computed, order=order
    )


@pytest.mark.parametrize("order", [0, 1, 2])
def test_errors_from_products_are_those_of_the_features(order):
    torch.manual_seed(0)
    features = torch.randn(6, 40, dtype=torch.float64).cumsum(0)
    policy = schedule(True, True, False, True, False, False, order=order)
    state, expected = CacheState(policy), []
    for step, timestep in enumerate(policy.timesteps):
        if state.begin(timestep, ()) == "compute":
            state.store((features[step],))
            expected.append(0.0)
        else:
            expected.append(float((state.predict()[0] - features[step]).norm() / features[step].norm()))
    found = feature_errors(policy, features @ features.T)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-9)
    assert float(feature_errors(policy, torch.eye(6, dtype=torch.float64))[2]) != pytest.approx(expected[2])  # control


@pytest.mark.parametrize(
    ("family", "blocks"),
    [
        ("flux2", "transformer_blocks"),
        ("chroma", "transformer_blocks"),
        ("auraflow", "single_transformer_blocks"),
        ("sana", "transformer_blocks"),
        ("hunyuan", "blocks"),
        ("cogview4", "transformer_blocks"),
    ],
)
def test_where_families_are_cut(family, blocks):
    """Between the first and the last of the longest chain, which ends where texts and pictures are joined."""
    generator = Generator(deeper(family))
    side = 32 if family == "sana" else 16
    found = cut_of(generator, SamplingPlan(steps=2, guidance_scale=1.0, height=side, width=side))
    last = len(generator.denoiser.get_submodule(blocks)) - 1
    assert (found.start, found.end) == (f"{blocks}.1", f"{blocks}.{last}")


def test_conditions_that_change_from_step_to_step_leave_nothing_to_reuse(dit, given):
    runs = Runs(dit, given(dit), 3)
    count = len(runs.timesteps)
    policy = CachePolicy(
        cut=cut_of(dit), kind="schedule", timesteps=runs.timesteps, computed=(True,) + (False,) * (count - 1)
    )
    assert runs.candidate(policy).computed == 1
    calls = itertools.count()

    def restless(module, args, given):
        return args, given | {"class_labels": (given["class_labels"] + next(calls)) % 3}

    handle = dit.denoiser.register_forward_pre_hook(restless, with_kwargs=True)
    try:
        with pytest.raises(ConfigError, match="is told other conditions from step to step"):
            runs.candidate(policy)
    finally:
        handle.remove()


def test_a_cut_between_layers_without_an_attention_each():
    blocks = ("SkipDownBlock2D", "AttnSkipDownBlock2D"), ("AttnSkipUpBlock2D", "SkipUpBlock2D")
    for ups, within, edge in ((blocks[1], 3, 5), (blocks[1][::-1], 0, 2)):
        network = UNet2DModel(
            sample_size=8, block_out_channels=(32, 32), attention_head_dim=8,
            down_block_types=blocks[0], up_block_types=ups,
        )  # fmt: skip
        layers = [len(block.resnets) for block in network.up_blocks]
        assert layers == [3, 3]
        with pytest.raises(ConfigError, match=rf"branch {within} cuts up_blocks.* such as {edge}"):
            check_cut(network, keep_first=None, keep_last=None, branch=within)
        check_cut(network, keep_first=None, keep_last=None, branch=edge)


def test_branches_of_two_calls_are_kept_apart():
    """CogView4 calls its denoiser for each branch of guidance, with texts of two lengths."""
    generator = Generator(make("cogview4"))
    plan = SamplingPlan(steps=3, guidance_scale=3.0, height=16, width=16)
    runs = Runs(generator, Context(TARGETS["onnxruntime"], generator.conditions(2), range(2), plan), 2)
    cut = find_cut(generator, generator.conditions(1), plan, keep_first=1, keep_last=0, branch=None)
    policy = CachePolicy(cut=cut, kind="schedule", timesteps=runs.timesteps, computed=(True, False, True))
    kept = list(runs.features(policy))
    assert [len(steps) for steps in kept] == [3, 3]
    assert [len({len(features) for features in steps}) for steps in kept] == [1, 1]
    assert len(kept[0][0]) != len(kept[1][0])
    assert gram(runs, policy).diagonal().min() > 0


def test_gram_is_that_of_what_the_network_keeps(dit, given):
    runs, cut = Runs(dit, given(dit), 3), cut_of(dit)
    policy = CachePolicy(cut=cut, kind="schedule", timesteps=runs.timesteps, computed=(True,) * 9)
    expected = torch.zeros(9, 9, dtype=torch.float64)
    for conditions, seeds in runs.batches:
        deltas = []
        with caught(dit.denoiser, cut) as tensors:
            handle = dit.denoiser.register_forward_hook(
                lambda *_, d=deltas, t=tensors: d.append((t["end.0"] - t["start.0"]).double().flatten())
            )
            final_latents(dit, conditions, seeds, runs.plan)
            handle.remove()
        stacked = torch.stack(deltas)
        expected += stacked @ stacked.T
    torch.testing.assert_close(gram(runs, policy), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_few_steps_are_chosen_nearly_as_well_as_by_trying_all(seed):
    generator = torch.Generator().manual_seed(seed)
    count, fixed = 9, (True, *[False] * 7, True)
    features = torch.randn(count, 30, dtype=torch.float64, generator=generator).cumsum(0)
    products, worth = features @ features.T, torch.rand(count, dtype=torch.float64, generator=generator)

    def cost(policy):
        return float(worth @ feature_errors(policy, products))

    chain = fewer_and_fewer(schedule(*[True] * count), fixed, cost)
    assert [sum(policy.computed) for policy in chain] == list(range(count, 1, -1))
    for policy in chain:
        assert all(on for on, wanted in zip(policy.computed, fixed, strict=True) if wanted)
        ways = itertools.product([True, False], repeat=count - 2)
        same = [schedule(True, *way, True) for way in ways if sum(way) + 2 == sum(policy.computed)]
        costs = [cost(other) for other in same]
        assert min(costs) <= cost(policy) + 1e-12
        assert cost(policy) <= 1.25 * min(costs) + 1e-12
    middle = [cost(other) for other in same_size(chain[4])]
    assert max(middle) > 1.25 * cost(chain[4])  # control: there are worse choices


def same_size(policy):
    inner = len(policy.computed) - 2
    ways = itertools.product([True, False], repeat=inner)
    return [schedule(True, *way, True) for way in ways if sum(way) + 2 == sum(policy.computed)]


@pytest.mark.parametrize("family", ["dit", "sd"])
@pytest.mark.parametrize("method", ["interval", "taylor", "first_block"])
def test_a_fitted_policy_keeps_to_its_budget_in_real_runs(request, given, family, method):
    if (family, method) == ("sd", "first_block"):
        pytest.skip("for blocks")
    generator = request.getfixturevalue(family)
    context = given(generator)
    loose = apply(generator, context, method=method, error=0.3, samples=3).metadata
    policy = generator.cache
    found = Runs(generator, context, 3).candidate(policy)
    assert found.error == pytest.approx(loose["error"], abs=1e-6)
    assert found.error <= 0.3
    assert found.computed == loose["computed"] < 9
    assert policy.computed[0]
    assert policy.computed[-1]
    assert policy.order == (method == "taylor")
    tight = apply(generator, context, method=method, error=0.3 * loose["error"], samples=3).metadata
    assert tight["error"] <= 0.3 * loose["error"]
    assert tight["computed"] > loose["computed"]


class Planted:
    """Runs whose error is that of features given, each step worth as much as the next."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(9, 30, dtype=torch.float64, generator=generator).cumsum(0)
        self.products, self.tries = features @ features.T, 0

    def candidate(self, policy):
        self.tries += 1
        return Candidate(policy, float(feature_errors(policy, self.products).sum()), sum(policy.computed))


@pytest.mark.parametrize("seed", range(4))
def test_real_runs_go_on_where_the_estimate_stops(seed):
    fixed, runs, probes = (True, *[False] * 7, True), Planted(seed), Planted(seed)
    bad = max(map(runs.candidate, same_size(schedule(*[True] * 6, *[False] * 2, True))), key=lambda item: item.error)
    steps = []
    found = refine(bad, runs, probes, fixed, budget=bad.error, advance=steps.append)
    assert len(steps) == probes.tries <= 4 * 7  # each policy once
    assert found[0].computed == bad.computed
    assert found[0].error < 0.8 * bad.error  # moved to better steps
    within = [item for item in found if item.error <= bad.error]
    assert min(item.computed for item in within) < bad.computed  # and then fewer
    assert found[:-1] == within[: len(found) - 1]  # it ends with the first that is beyond the budget
    assert all(item.policy.computed[0] and item.policy.computed[-1] for item in found)
    (last,) = refine(found[0], runs, probes, fixed, budget=0.0, advance=steps.append)  # nothing better near it
    assert last.computed == bad.computed - 1


def test_a_move_that_only_the_probes_like_does_not_end_the_search():
    fixed, probes = (True, *[False] * 7, True), Planted(0)
    bad = max(map(probes.candidate, same_size(schedule(*[True] * 6, *[False] * 2, True))), key=lambda item: item.error)

    class Others(Planted):
        def candidate(self, policy):
            moved = policy is not bad.policy and sum(policy.computed) == bad.computed
            return Candidate(policy, 2.0 if moved else 0.5, sum(policy.computed))

    best = Candidate(bad.policy, 0.5, bad.computed)
    found = refine(best, Others(0), probes, fixed, budget=1.0, advance=lambda n: None)
    assert found[0].error == 2.0
    assert found[0].computed == bad.computed
    assert found[1].error == 0.5
    assert found[1].computed == bad.computed - 1


def test_an_interval_is_computed_every_so_many_steps(dit, given):
    applied = apply(dit, given(dit), interval=3, warmup=2, tail=1)
    computed = [step for step, on in enumerate(dit.cache.computed) if on]
    assert computed == [0, 1, 4, 7, 8]
    assert applied.metadata["computed"] == 5
    assert applied.summary.startswith("5 of 9 steps are computed in full, reuse in the others: error 0.")
    assert applied.metadata["error"] > 0


def test_an_interval_of_one_reuses_nothing(dit, given, caplog):
    with caplog.at_level(logging.WARNING):
        applied = apply(dit, given(dit), interval=1)
    assert applied.metadata["error"] == 0
    assert dit.cache is None
    assert applied.metadata["policy"] is None
    assert "nothing is reused" in caplog.text
    assert "left as it was" in applied.summary


def test_a_budget_that_nothing_keeps_to_says_the_closest(dit, given, caplog):
    with caplog.at_level(logging.WARNING):
        applied = apply(dit, given(dit), error=1e-9)
    assert dit.cache is None
    assert "no step can be within an error of 1e-09" in caplog.text
    assert "the closest tried: 8 of 9 steps, error " in caplog.text
    assert applied.metadata["policy"] is None


def test_few_steps_warn(dit, given, caplog):
    with caplog.at_level(logging.WARNING):
        apply(dit, given(dit, steps=5), interval=2)
    assert "5 steps; a cache seldom pays below 8" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        apply(dit, given(dit, steps=8), interval=2)
    assert caplog.text == ""


def test_more_steps_than_a_fit_tries_are_refused(dit, given, monkeypatch):
    monkeypatch.setattr("diffpress.prune.steps.MOST_STEPS", 8)
    with pytest.raises(ConfigError, match="fitting tries each of the 9 steps; allowed: up to 8, or an interval"):
        apply(dit, given(dit))


def test_a_run_that_cannot_be_cached_is_refused_before_it_is_drawn(dit, given, monkeypatch):
    monkeypatch.setattr(dit, "sample", None)
    monkeypatch.setattr(dit, "draw", None)
    with pytest.raises(ConfigError, match="a run of 1 step has nothing to use again; allowed: 2 and more"):
        apply(dit, given(dit, steps=1), interval=2)
    with pytest.raises(ConfigError, match="fitting tries each of the 101 steps; allowed: up to 100"):
        apply(dit, given(dit, steps=101))


def test_branches_that_cannot_be_told_apart_are_told():
    """Chroma marks no branch; where a whole batch is the negative prompt, both of its calls look the same."""
    generator = Generator(make("chroma"))
    plan = SamplingPlan(steps=3, guidance_scale=3.0, height=16, width=16)
    for prompts in (["a cat", ""], ["", "a cat"]):
        with pytest.raises(ConfigError, match=r"guidance branches of .* cannot be told apart"):
            Runs(generator, Context(TARGETS["onnxruntime"], prompts, range(2), plan, batch_size=1), 2)
    told = Runs(generator, Context(TARGETS["onnxruntime"], ["a cat", "a dog"], range(2), plan, batch_size=1), 2)
    assert len(told.timesteps) == 3


def test_a_unet_without_a_middle_keeps_no_more_than_it_has():
    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_type=None,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    check_cut(network, keep_first=None, keep_last=None, branch=2)
    with pytest.raises(ConfigError, match="branch 3 of UNet2DModel, which has 3 up layers; allowed: below"):
        check_cut(network, keep_first=None, keep_last=None, branch=3)


def test_restore_gives_the_policy_back(dit, dit_folder, given):
    applied = apply(dit, given(dit), method="taylor", interval=2)
    other = Generator.load(dit_folder)
    Steps.restore(other, json.loads(json.dumps(applied.metadata)))
    assert other.cache == dit.cache
    assert other.cache.order == 1
    Steps.restore(other, {"policy": None})
    assert other.cache is None


def test_the_weights_stay_and_nothing_is_left_behind(dit, given, hooks_of):
    before = {name: value.clone() for name, value in dit.denoiser.state_dict().items()}
    apply(dit, given(dit), interval=2)
    after = dit.denoiser.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert hooks_of(dit.denoiser) == 0
    assert not any("forward" in vars(module) for module in dit.denoiser.modules())


def test_after_int8(dit, given):
    context = given(dit)
    Int8(Int8Config()).apply(dit, context)
    assert StepsConfig.after_quantization
    applied = apply(dit, context, interval=2)
    assert 0 < applied.metadata["error"] < 1


def test_a_grid_of_ones_own(dit, given):
    plan = SamplingPlan(steps=8, guidance_scale=3.0, timesteps=(999, 900, 800, 700, 500, 300, 100, 20))
    apply(dit, dataclasses.replace(given(dit), plan=plan), interval=2)
    assert dit.cache.timesteps == (999, 900, 800, 700, 500, 300, 100, 20)


def test_fitting_is_not_fooled_by_the_sign_of_an_extrapolation(dit, given, monkeypatch):
    """With the wrong sign the same steps err by more, and the measured error says so."""
    runs = Runs(dit, given(dit), 2)
    policy = CachePolicy(
        cut=cut_of(dit),
        kind="schedule",
        timesteps=runs.timesteps,
        computed=(True, True, *[False, True] * 3, True),
        order=1,
    )
    right = runs.candidate(policy).error
    monkeypatch.setattr("diffpress.caching.extrapolate", lambda terms, steps: extrapolate(terms, -steps))
    assert runs.candidate(policy).error > 1.5 * right
    assert reuse.TRIALS == 8
