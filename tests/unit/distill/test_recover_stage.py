"""Recovery of pruned networks as a stage: both branches learn, wrong outputs teach nothing, what cannot be is told."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from pruned import PAIRS, PLAN, SMALL, TRAINING, Skip, context_of, make_dit, recovered, without
from tiny import make_flux

from diffpress.denoise import denoise, encode, trajectory
from diffpress.distill import recover
from diffpress.distill.recover import Recover, RecoverConfig, RecoverLoss
from diffpress.distill.student import trailing
from diffpress.errors import ArtifactError, ConfigError
from diffpress.generator import Generator, SamplingPlan
from diffpress.prune.width import Width, WidthConfig
from diffpress.structures import Nested, find_structures, masked


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


def nested_dit(tmp_path, shares=(1.0, 0.75, 0.5)):
    """Channels in an order that nobody chose, so that each width needs the training."""
    generator = make_dit(blocks=2)
    settings = WidthConfig(nested=shares, importance="random", kinds=("mlp",))
    Width(settings).apply(generator, context_of(tmp_path, None))
    return generator


def test_nested_widths_recover_together(tmp_path):
    """The whole network has nothing to learn, and keeps to what it was."""
    generator = nested_dit(tmp_path)
    weights = copy.deepcopy(generator.denoiser.state_dict())
    training = replace(TRAINING, learning_rate=1e-3)
    applied = recovered(tmp_path, generator, lambda: make_dit(blocks=2), training=training)
    rows = {row["share"]: row for row in applied.metadata["nested"]}
    assert list(rows) == ["1", "0.75", "0.5"]
    assert rows["1"]["before"] < 1e-4
    assert rows["1"]["error"] == applied.metadata["held_out_error"] < 0.5 * rows["0.5"]["error"]
    for share in ("0.75", "0.5"):
        assert rows[share]["error"] < 0.7 * rows[share]["before"]
        assert f"width {share}: {rows[share]['error']:.3f}, {rows[share]['before']:.3f} before" in applied.summary
    assert generator.nested is not None

    alone = nested_dit(tmp_path)  # the control: the whole network alone teaches the narrow ones nothing
    alone.denoiser.load_state_dict(weights)
    narrow = Nested(shares=(1.0, 1.0), kinds=("mlp",), align=16)
    made, alone.nested = alone.nested, narrow
    recovered(tmp_path / "alone", alone, lambda: make_dit(blocks=2), training=training)
    alone.nested = made
    assert nested_error(alone, 0.5) > 1.3 * nested_error(generator, 0.5)


@torch.no_grad()
def nested_error(generator, share):
    """Of the calls of a run, relative, at a width."""
    original = make_dit(blocks=2)
    run = trajectory(original, [0, 1], seeds=[1, 2], plan=replace(PLAN, steps=8))
    given = encode(original, [0, 1], PLAN)[0]
    structures = find_structures(generator.denoiser, ("mlp",))
    errors = []
    with masked(structures, generator.nested.kept(generator.denoiser, share)):
        for x_t, time in zip(run.states, run.timesteps, strict=False):
            found, wanted = (denoise(each.denoiser, x_t, time.expand(2), given) for each in (generator, original))
            errors.append(float((found - wanted).norm() / wanted.norm()))
    return sum(errors) / len(errors)


@pytest.mark.parametrize(("name", "value", "allowed"), [("rank", 4, "null"), ("compile", True, "false")])
def test_nested_widths_need_the_weights_themselves(tmp_path, name, value, allowed):
    message = rf"training\.{name} does not go with nested widths; allowed: {allowed}"
    with pytest.raises(ConfigError, match=message):
        recovered(
            tmp_path,
            nested_dit(tmp_path),
            lambda: make_dit(blocks=2),
            training=replace(TRAINING, **{name: value, "steps": 1}),
        )


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


def test_the_training_of_another_network_is_not_gone_on_with(tmp_path):
    original, few = make_dit(), replace(TRAINING, steps=3)
    recovered(tmp_path, without(make_dit(), 0), lambda: make_dit(), training=few)
    with pytest.raises(ArtifactError, match="belongs to another training; delete it"):
        recovered(tmp_path, without(make_dit(), 1), lambda: original, training=few)
    recovered(tmp_path, without(make_dit(), 0), lambda: original, training=few)


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
