"""Recovery of pruned networks: blocks are compared where they should be equal, both branches learn, controls do not."""

import copy
import json
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from tiny import fill_zeros, make_autoencoder, make_flux, make_scheduler
from torch import nn

from diffpress.denoise import denoise, encode, trajectory
from diffpress.distill import recover
from diffpress.distill.pairs import PairSettings
from diffpress.distill.recover import (
    Ends,
    Recover,
    RecoverConfig,
    RecoverLoss,
    origins,
    relative_distance,
    shared_blocks,
    watched,
)
from diffpress.distill.student import Conditions, collect, schedule_of, trailing
from diffpress.errors import ConfigError
from diffpress.generator import Generator, SamplingPlan
from diffpress.stage import Context
from diffpress.targets import TARGETS
from diffpress.training import TrainingSettings, draw_of

PAIRS = PairSettings(count=32, held_out=8, steps=8, batch_size=16)
TRAINING = TrainingSettings(steps=100, batch_size=8, learning_rate=3e-3, warmup=5, ema=0.95)
PLAN = SamplingPlan(steps=3, guidance_scale=3.0)
SMALL = replace(PLAN, height=16, width=16)


def make_dit(seed=0, blocks=4):
    """Class-conditional, with blocks to spare."""
    torch.manual_seed(seed)
    network = DiTTransformer2DModel(
        num_layers=blocks,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        sample_size=8,
        patch_size=2,
        norm_num_groups=4,
    )
    return Generator(DiTPipeline(fill_zeros(network), fill_zeros(make_autoencoder()), make_scheduler()))


def without(generator, *gone, name="transformer_blocks"):
    """The generator less blocks of a list."""
    blocks = getattr(generator.denoiser, name)
    setattr(generator.denoiser, name, nn.ModuleList(block for i, block in enumerate(blocks) if i not in gone))
    return generator


def context_of(tmp_path, original, conditions=(0, 1, 2, 3), plan=PLAN):
    conditions = list(conditions)
    return Context(
        TARGETS["onnxruntime"],
        conditions,
        range(len(conditions)),
        plan,
        pool=conditions,
        work=tmp_path / "work",
        original=original,
    )


def recovered(tmp_path, generator, original, conditions=(0, 1, 2, 3), plan=PLAN, **changes):
    stage = Recover(RecoverConfig(**{"pairs": PAIRS, "training": TRAINING} | changes))
    stage.check(generator, TARGETS["onnxruntime"])
    return stage.apply(generator, context_of(tmp_path, original, conditions, plan))


class Skip(nn.Module):
    """In place of a U-Net's layer of equal width."""

    def forward(self, hidden, *args, **kwargs):
        return hidden


@torch.no_grad()
def blocks_of(count, width=16):
    return [nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8)) for _ in range(count)]


@pytest.mark.parametrize("kept", [(0, 1, 2, 3, 4, 5), (0, 2, 3, 5), (1, 2, 4), (0, 1), (5,), (2, 3, 4, 5)])
def test_removed_blocks_are_found_by_weights(kept):
    """Also where the others are narrower by now and trained on; strangers only keep the order."""
    torch.manual_seed(0)
    teacher = blocks_of(6)
    left = copy.deepcopy([teacher[index] for index in kept])
    assert origins(left, teacher) == list(kept)
    for block, narrow in zip(left, blocks_of(len(kept), 12), strict=True):
        narrow[1].bias = nn.Parameter(block[1].bias + 0.02 * torch.randn(8))
        block[0], block[1] = narrow
    assert origins(left, teacher) == list(kept)
    found = origins(blocks_of(len(kept)), teacher)
    assert found == sorted(set(found))
    assert set(found) <= set(range(6))


@pytest.mark.parametrize(
    ("gone", "places"),
    [
        ((), [(0, 0), (1, 1), (2, 2), (3, 3)]),
        ((1,), [(0, 1), (1, 2), (2, 3)]),
        ((3,), [(0, 0), (1, 1), (2, 3)]),
        ((0, 1), [(0, 2), (1, 3)]),
        ((1, 2, 3), [(0, 3)]),
    ],
)
def test_a_block_is_compared_with_the_end_of_the_gap_behind_it(gone, places):
    """So that the next is given what it was given; with the blocks renumbered, or with nothing in their places."""
    teacher = make_dit().denoiser
    wanted = [(f"transformer_blocks.{a}", f"transformer_blocks.{b}") for a, b in places]
    assert shared_blocks(without(make_dit(), *gone).denoiser, teacher) == wanted
    hollow = make_dit().denoiser
    for index in gone:
        hollow.transformer_blocks[index] = Skip()
    own = [index for index in range(4) if index not in gone]
    assert shared_blocks(hollow, teacher) == [
        (f"transformer_blocks.{own[a]}", f"transformer_blocks.{b}") for a, b in places
    ]


def test_stages_of_a_unet_are_compared_by_name(sd):
    teacher = copy.deepcopy(sd.denoiser)
    sd.denoiser.mid_block.resnets[0] = Skip()
    stages = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert sorted(shared_blocks(sd.denoiser, teacher)) == [(name, name) for name in stages]
    sd.denoiser.mid_block = None
    assert len(shared_blocks(sd.denoiser, teacher)) == 4


def test_what_is_seen_is_what_blocks_return(dit, hooks_of):
    blocks, seen_by_hand = dit.denoiser.transformer_blocks, []
    blocks[0].register_forward_hook(lambda module, args, output: seen_by_hand.append(output))
    before = hooks_of(dit.denoiser)
    with watched(dit.denoiser, ["transformer_blocks.0", "transformer_blocks.1"]) as seen:
        dit.record([0, 1], seeds=[0, 1], plan=PLAN, limit=1)
    assert torch.equal(seen["transformer_blocks.0"][0], seen_by_hand[0])
    assert not torch.equal(seen["transformer_blocks.1"][0], seen_by_hand[0])
    assert hooks_of(dit.denoiser) == before


def test_what_hands_on_what_it_was_given_is_not_seen():
    """As a first block that only keeps the embedding which the last layer reads."""
    network = nn.Sequential(nn.Linear(4, 4), Skip(), nn.Linear(4, 4))
    with watched(network, ["0", "1", "2"]) as seen:
        network(torch.zeros(2, 4))
    assert [len(seen[name]) for name in "012"] == [1, 0, 1]


def test_relative_distance_by_hand():
    found, wanted = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    expected = [float((f - w).square().sum() / w.square().sum()) for f, w in zip(found, wanted, strict=True)]
    torch.testing.assert_close(relative_distance(found, wanted, None), torch.tensor(expected))
    # The same whatever the unit of the features; not so the plain squared error.
    torch.testing.assert_close(relative_distance(100 * found, 100 * wanted, 2.0), relative_distance(found, wanted, 2.0))


def test_outliers_of_either_network_are_left_out():
    generator = torch.Generator().manual_seed(0)
    wanted = torch.rand(1, 100, generator=generator)  # nothing beyond two deviations
    found = wanted + 0.1
    plain = relative_distance(found, wanted, 2.0)
    torch.testing.assert_close(plain, relative_distance(found, wanted, None))
    for values in (found, wanted):
        values[0, 0] += 1000
        rest = (found[:, 1:] - wanted[:, 1:]).square().sum() / wanted[:, 1:].square().sum()
        torch.testing.assert_close(relative_distance(found, wanted, 2.0)[0], rest)
        assert abs(relative_distance(found, wanted, None) - rest) > 0.3 * rest
        values[0, 0] -= 1000


def test_features_lose_their_weight():
    def weights(**changes):
        settings = RecoverConfig(features=0.8, training=replace(TRAINING, steps=100), **changes)
        loss = RecoverLoss(None, None, None, None, settings)
        return [loss.weight(step) for step in (0, 25, 50, 99)]

    assert weights() == pytest.approx([0.8, 0.6, 0.4, 0.008])
    assert weights(decay=0.5) == pytest.approx([0.8, 0.4, 0, 0])
    assert weights(decay=0.0) == pytest.approx([0.8] * 4)


@pytest.fixture
def made(tmp_path):
    """``made(student, **changes)``: a loss towards the four-block DiT with its features, and the student it watches."""
    with ExitStack() as stack:

        def make(student=None, **changes):
            teacher, student = make_dit(), student or make_dit().denoiser
            settings = RecoverConfig(pairs=PAIRS, training=TRAINING, **changes)
            folder = tmp_path / f"{settings.states}-{settings.phase_count}"
            pairs, _ = collect(teacher, context_of(folder, None), settings.pairs, settings.phase_count)
            places, networks = shared_blocks(student, teacher.denoiser), (student, teacher.denoiser)
            names = zip(*places, strict=True)
            seen = [stack.enter_context(watched(*each)) for each in zip(networks, names, strict=True)]
            conditions, schedule = Conditions.of(teacher, pairs, PLAN), schedule_of(teacher, pairs)
            loss = RecoverLoss(pairs, teacher.denoiser, conditions, schedule, settings, Ends(places, *seen))
            return loss, student

        yield make


@pytest.mark.parametrize("states", ["noised", "path"])
@pytest.mark.parametrize("kind", ["l2", "huber"])
def test_identical_networks_have_no_loss_and_no_gradient(made, states, kind):
    def found(student=None):
        loss, student = made(student, states=states, loss=kind)
        value = loss(student, draw_of(0, seed=0, batch_size=8))
        value.backward()
        slopes = [parameter.grad.norm() for parameter in student.parameters() if parameter.grad is not None]
        return value.item(), float(torch.stack(slopes).norm())

    value, slope = found()
    assert value == pytest.approx(0, abs=1e-7)
    assert slope == pytest.approx(0, abs=1e-6)
    value, slope = found(without(make_dit(), 1).denoiser)
    assert value > 1e-3
    assert slope > 1e-2


def test_features_weigh_what_the_option_says(made):
    values = []
    for weight in (0.0, 1.0, 2.0):
        loss, student = made(without(make_dit(), 1).denoiser, features=weight)
        values.append(loss(student, draw_of(0, seed=0, batch_size=8)).item())
        assert not loss.ends.student  # nothing holds the graph of the last call
        assert not loss.ends.teacher
    assert values[2] - values[0] == pytest.approx(2 * (values[1] - values[0]), rel=1e-4)
    assert values[1] > 1.1 * values[0]


@pytest.mark.parametrize("states", ["noised", "path"])
def test_draws_are_of_the_whole_batch(made, states):
    loss, student = made(without(make_dit(), 1).denoiser, states=states, unconditional=0.5)
    whole = loss(student, draw_of(0, seed=0, batch_size=16))
    halves = [loss(student, draw_of(0, seed=0, batch_size=16, rank=rank, processes=2)) for rank in range(2)]
    torch.testing.assert_close(sum(halves) / 2, whole, rtol=1e-4, atol=1e-6)
    assert halves[0] != halves[1]


def test_states_are_noised_samples_or_those_of_the_runs(made):
    rows, uniform = torch.arange(8), torch.linspace(0, 0.99, 8)
    noise = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    loss, _ = made()
    x_t, told = loss.state(rows, uniform, noise)
    assert (told[0], told[-1]) == (0, 990)
    for row in range(8):
        at = int(told[row])
        by_hand = loss.schedule.alphas[at] * loss.pairs.states[row, -1] + loss.schedule.sigmas[at] * noise[row]
        torch.testing.assert_close(x_t[row], by_hand.float())
    loss, _ = made(states="path", phases=4)
    x_t, told = loss.state(rows, uniform, noise)
    assert told.tolist() == [999, 999, 749, 749, 499, 499, 249, 249]
    assert all(torch.equal(x_t[row], loss.pairs.states[row, row // 2]) for row in range(8))


@torch.no_grad()
def test_both_branches_are_shown(made):
    """A record without its condition is given the pipeline's own unconditional one."""
    loss, _ = made()
    conditional, free = encode(make_dit(), [0, 1, 2, 3], PLAN)
    rows = torch.tensor([1, 2, 3, 0])
    labels = loss.conditions.mixed(rows, torch.tensor([False, True, False, True])).tensors["class_labels"]
    assert labels.tolist() == [1, int(free.tensors["class_labels"][0]), 3, 1000]
    assert conditional.tensors["class_labels"].tolist() == [0, 1, 2, 3]


# Whole stages.


@pytest.mark.parametrize("changes", [{}, {"features": 0.0}, {"states": "path"}, {"loss": "huber"}, {"mask": None}])
def test_dit_recovers(tmp_path, changes):
    """Over seeds the error falls to 0.15 to 0.3 of what it was."""
    generator = without(make_dit(), 1)
    applied = recovered(tmp_path, generator, make_dit, **changes)
    facts = applied.metadata
    assert facts["held_out_error"] < 0.45 * facts["pruned_error"]
    assert f"held-out error {facts['held_out_error']:.3f}, {facts['pruned_error']:.3f} before" in applied.summary
    assert json.loads(json.dumps(facts)) == facts
    assert len(generator.denoiser.transformer_blocks) == 3


def test_reported_errors_are_those_of_the_sampled_latents(tmp_path):
    generator = without(make_dit(), 1)
    pruned = copy.deepcopy(generator.denoiser)
    applied = recovered(tmp_path, generator, make_dit)
    scheduler, original = generator.pipeline.scheduler, make_dit()
    assert type(scheduler) is type(original.pipeline.scheduler)
    assert generator.plan is None
    original.pipeline.scheduler = generator.pipeline.scheduler = trailing(scheduler)
    first, plan = 5_000_000, replace(PLAN, steps=8)
    wanted = trajectory(original, [0, 1, 2, 3] * 2, seeds=range(first, first + 8), plan=plan).states[-1].flatten(1)
    for name, network in (("held_out_error", generator.denoiser), ("pruned_error", pruned)):
        generator.pipeline.transformer = network
        found = trajectory(generator, [0, 1, 2, 3] * 2, seeds=range(first, first + 8), plan=plan).states[-1].flatten(1)
        error = ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).mean()
        assert applied.metadata[name] == pytest.approx(float(error), rel=1e-3)


def test_unet_recovers(sd, tmp_path):
    original = sd.source
    for part in (sd.denoiser.mid_block.resnets, sd.denoiser.down_blocks[1].attentions):
        part[0] = Skip()
    sd.denoiser.down_blocks[1].attentions[0].forward = lambda hidden, *args, **kwargs: (hidden,)
    applied = recovered(
        tmp_path, sd, lambda: Generator.load(original), ["a cat", "a dog"], training=replace(TRAINING, steps=150)
    )
    assert applied.metadata["held_out_error"] < 0.6 * applied.metadata["pruned_error"]


def test_pixels_without_guidance_recover(ddpm, tmp_path):
    """Samples of a random pixel network go wherever any change sends them: its calls are judged."""
    ddpm.denoiser.mid_block.resnets[0] = Skip()
    original, pairs = ddpm.source, replace(PAIRS, scheduler="DDIMScheduler")
    losses = recovered(tmp_path, ddpm, lambda: Generator.load(original), [None], pairs=pairs).metadata["losses"]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_flux_recovers_as_told_its_guidance(tmp_path):
    def flux():
        torch.manual_seed(0)
        pipeline = make_flux()
        pipeline.transformer.single_transformer_blocks.extend(
            [copy.deepcopy(pipeline.transformer.single_transformer_blocks[0]) for _ in range(2)]
        )
        for index, block in enumerate(pipeline.transformer.single_transformer_blocks):
            torch.manual_seed(index)
            for parameter in block.parameters():
                parameter.data.normal_(std=0.1)
        return Generator(pipeline)

    student, told = without(flux(), 1, name="single_transformer_blocks"), set()
    student.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: told.update(kwargs["guidance"].tolist()), with_kwargs=True
    )
    training = replace(TRAINING, steps=40, batch_size=4)
    pairs = replace(PAIRS, guidance_scale=2.5, count=8, held_out=2, steps=4)
    applied = recovered(tmp_path, student, flux, ["a cat"], SMALL, pairs=pairs, training=training)
    assert told == {2.5}
    assert applied.metadata["held_out_error"] < 0.8 * applied.metadata["pruned_error"]


@torch.no_grad()
def guided_error(generator, branch):
    """Of calls on states of the original's guided runs, relative: of one branch, or both as guidance joins them."""
    original = make_dit()
    plan = replace(PLAN, steps=8)
    run = trajectory(original, [0, 1, 2, 3], seeds=range(100, 104), plan=plan)
    weights = {"conditional": (1, 0), "unconditional": (0, 1), "guided": (3, -2)}[branch]
    given, errors = encode(original, [0, 1, 2, 3], plan), []
    for x_t, time in zip(run.states, run.timesteps, strict=False):
        found, wanted = (
            sum(w * denoise(network, x_t, time.expand(4), g) for w, g in zip(weights, given, strict=True))
            for network in (generator.denoiser, original.denoiser)
        )
        errors.append(float((found - wanted).norm() / wanted.norm()))
    return sum(errors) / len(errors)


def test_guided_calls_are_recovered_by_both_branches(tmp_path):
    """Unlike the conditional branch alone, which leaves the other behind."""
    before = {branch: guided_error(without(make_dit(), 1), branch) for branch in ("unconditional", "guided")}
    after = {}
    for share in (0.25, 0.0):
        generator = without(make_dit(), 1)
        recovered(tmp_path / str(share), generator, make_dit, unconditional=share)
        after[share] = {branch: guided_error(generator, branch) for branch in before}
    assert after[0.25]["guided"] < 0.5 * before["guided"]
    assert after[0.25]["unconditional"] < 0.5 * before["unconditional"]
    assert after[0.0]["unconditional"] > 1.2 * after[0.25]["unconditional"]


def test_outputs_of_other_records_teach_nothing(tmp_path, monkeypatch):
    """The negative control: the teacher answers for another record's state and condition."""
    original = recover.denoise

    def shuffled(network, x_t, timesteps, conditioning):
        output = original(network, x_t, timesteps, conditioning)
        return output if output.requires_grad else output.roll(1, 0)

    monkeypatch.setattr(recover, "denoise", shuffled)
    facts = recovered(tmp_path, without(make_dit(), 1), make_dit, features=0.0).metadata
    assert facts["held_out_error"] > 1.5 * facts["pruned_error"]


def test_killed_and_run_again_it_gives_the_same_bits(tmp_path, monkeypatch):
    short = replace(TRAINING, steps=8, checkpoint_every=1e-9)
    whole = without(make_dit(), 1)
    recovered(tmp_path / "whole", whole, make_dit, training=short)
    called = RecoverLoss.__call__

    def lethal(self, network, draw):
        if draw.step == 5:
            raise KeyboardInterrupt
        return called(self, network, draw)

    monkeypatch.setattr(RecoverLoss, "__call__", lethal)
    with pytest.raises(KeyboardInterrupt):
        recovered(tmp_path / "killed", without(make_dit(), 1), make_dit, training=short)
    monkeypatch.undo()
    again = without(make_dit(), 1)
    recovered(tmp_path / "killed", again, make_dit, training=short)
    for one, other in zip(again.denoiser.parameters(), whole.denoiser.parameters(), strict=True):
        assert torch.equal(one, other)


def test_adapters_in_bfloat16(tmp_path, hooks_of):
    generator = without(make_dit(), 1)
    names = list(generator.denoiser.state_dict())
    training = replace(TRAINING, rank=4, compute="bfloat16", learning_rate=1e-2)
    applied = recovered(tmp_path, generator, make_dit, training=training)
    assert applied.metadata["held_out_error"] < 0.7 * applied.metadata["pruned_error"]
    assert list(generator.denoiser.state_dict()) == names
    assert hooks_of(generator.denoiser) == 0


def test_the_original_is_not_recovered(tmp_path):
    with pytest.raises(ConfigError, match="denoiser is the original's: there is nothing to recover"):
        recovered(tmp_path, make_dit(), make_dit)


def test_a_changed_function_of_the_same_weights_is_recovered(tmp_path, caplog):
    """As where the number of tokens changes; a block's end of another shape is not compared."""
    generator = make_dit()
    first, last = generator.denoiser.transformer_blocks[1:3]
    first.register_forward_hook(lambda module, args, output: 0.5 * torch.cat([output, output[:, :4]], 1))
    last.register_forward_hook(lambda module, args, output: output[:, :16])
    with caplog.at_level("INFO"):
        applied = recovered(tmp_path, generator, make_dit)
    assert applied.metadata["held_out_error"] < 0.8 * applied.metadata["pruned_error"]
    assert "3 of 4 blocks' ends are compared" in caplog.text


def test_quantized_and_distilled_networks_are_refused(tmp_path):
    generator = without(make_dit(), 1)
    generator.plan = SamplingPlan(steps=4, guidance_scale=1.0)
    with pytest.raises(ConfigError, match=r"another function; allowed: prune.recover before a stage"):
        recovered(tmp_path, generator, make_dit)
    generator = without(make_dit(), 1)
    generator.denoiser.register_buffer("codes", torch.zeros(2, dtype=torch.int8))
    with pytest.raises(ConfigError, match="codes is quantized and cannot be trained"):
        recovered(tmp_path, generator, make_dit)


def test_without_the_original_nothing_is_done(tmp_path):
    with pytest.raises(ConfigError, match=r"give Context\(original=...\)"):
        recovered(tmp_path, without(make_dit(), 1), None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"states": "path", "phases": 5}, "phases 5 must divide the original's pairs.steps 24"),
        ({"unconditional": 1.0}, "less than 1"),
        ({"mask": 0.0}, "greater than 0"),
        ({"decay": 1.5}, "less than or equal to 1"),
    ],
)
def test_settings_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        RecoverConfig(**wrong)


def test_restore_has_nothing_to_do(tmp_path):
    generator = without(make_dit(), 1)
    before = str(generator.denoiser)
    Recover.restore(generator, {"losses": [1.0], "held_out_error": 0.1, "pruned_error": 0.2})
    assert str(generator.denoiser) == before
    assert generator.plan is None
