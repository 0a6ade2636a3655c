"""Pictures compared by their own decoder: LPIPS by hand, gradient to the student alone, nothing left behind."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffpress.denoise import Conditioning
from diffpress.distill.decoded import Decoder, check_decoder, feature_distance, to_latents
from diffpress.distill.pairs import Edge, Pairs, PairSettings
from diffpress.distill.reflow import Reflow, ReflowConfig, ReflowLoss
from diffpress.distill.student import Conditions
from diffpress.errors import ConfigError
from diffpress.targets import TARGETS
from diffpress.training import TrainingSettings, draw_of

PAIRS = PairSettings(count=16, held_out=8, steps=8, batch_size=16)
TRAINING = TrainingSettings(steps=120, batch_size=8, learning_rate=3e-3, warmup=5, ema=0.9)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_feature_distance_is_lpips_with_weights_of_one():
    """Zhang et al. 2018, eq. 1, in loops; scale of a feature vector does not count, its direction does."""
    found, wanted = ([normal(seed, 2, 5, 3, 4), normal(seed + 1, 2, 7, 2, 2)] for seed in (0, 2))
    expected = np.zeros(2)
    for a, b in zip(found, wanted, strict=True):
        for row in range(2):
            _, _, height, width = a.shape
            for y in range(height):
                for x in range(width):
                    one, other = a[row, :, y, x].double().numpy(), b[row, :, y, x].double().numpy()
                    apart = one / np.sqrt((one**2).sum()) - other / np.sqrt((other**2).sum())
                    expected[row] += (apart**2).sum() / (height * width)
    distance = feature_distance(found, wanted)
    np.testing.assert_allclose(distance.numpy(), expected, rtol=1e-5)
    torch.testing.assert_close(feature_distance([3 * a for a in found], wanted), distance)
    assert not torch.allclose(feature_distance([a + 1 for a in found], wanted), distance, rtol=0.02)
    assert feature_distance(found, [-a for a in found]).tolist() == pytest.approx([8, 8])


def test_picture_is_that_of_the_pipeline(dit, sd, plan):
    """What the pipeline decodes, from the state that its last step gave."""
    for generator in (dit, sd):
        check_decoder(generator, None)
        drawn = generator.sample(generator.conditions(2), seeds=[0, 1], plan=plan)
        latents, config = torch.from_numpy(drawn.latents), generator.pipeline.vae.config
        x_0 = latents * config.scaling_factor
        torch.testing.assert_close(to_latents(x_0, config), latents)
        picture, features = Decoder.of(generator).decode(x_0)
        images = ((picture / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()
        assert np.abs(images - drawn.images).max() <= 1
        assert [len(each) for each in features] == [2, 2]
        unscaled, _ = Decoder.of(generator).decode(latents)
        assert not torch.allclose(unscaled, picture, atol=0.01)


def test_latents_are_shifted_back():
    """Inverse of how pipelines encode a picture: (z - shift_factor) scaling_factor, as Stable Diffusion 3 has it."""
    z = normal(0, 2, 16, 8, 8)
    config = SimpleNamespace(scaling_factor=1.5305, shift_factor=0.0609)
    torch.testing.assert_close(to_latents((z - config.shift_factor) * config.scaling_factor, config), z)
    assert not torch.allclose(to_latents(z, SimpleNamespace(scaling_factor=1.5305)), to_latents(z, config), atol=0.05)


def test_distance_is_zero_for_the_same_and_its_gradient_the_students(dit, hooks_of):
    """Decoder's weights and hooks are as before, also after an error; the sample has no gradient."""
    vae = dit.pipeline.vae
    weights, hooks = copy.deepcopy(vae.state_dict()), hooks_of(vae)
    decoder = Decoder.of(dit)
    found, wanted = (normal(seed, 3, 4, 8, 8).requires_grad_() for seed in (0, 1))
    assert torch.equal(decoder(wanted, wanted.detach()), torch.zeros(3))
    distance = decoder(found, wanted)
    assert (distance > 0.1).all()
    distance.sum().backward()
    assert wanted.grad is None
    assert found.grad.norm() > 0
    assert all(parameter.grad is None for net in (vae, decoder.autoencoder) for parameter in net.parameters())
    assert all(parameter.requires_grad for parameter in vae.parameters())
    with pytest.raises(RuntimeError):
        decoder(normal(0, 3, 5, 8, 8), wanted)
    assert hooks_of(decoder.autoencoder) == hooks_of(vae) == hooks
    assert all(torch.equal(value, weights[name]) for name, value in decoder.autoencoder.state_dict().items())


def test_sliced_decoding_of_the_pipeline_changes_nothing(dit):
    found, wanted = normal(0, 3, 4, 8, 8), normal(1, 3, 4, 8, 8)
    whole = Decoder.of(dit)(found, wanted)
    dit.pipeline.vae.enable_slicing()
    torch.testing.assert_close(Decoder.of(dit)(found, wanted), whole)
    assert dit.pipeline.vae.use_slicing
    sliced = Decoder(dit.pipeline.vae)
    assert len(sliced.decode(found)[1]) == 3 * len(Decoder.of(dit).decode(found)[1])  # what would be wrong


@pytest.fixture
def loss(dit):
    """Over made-up records of two phases, with decoded pictures."""
    edges = [Edge(float(dit.schedule.alphas[i]), float(dit.schedule.sigmas[i]), float(i)) for i in (999, 499)]
    pairs = Pairs(normal(0, 8, 3, 4, 8, 8), [0] * 8, list(range(8)), (*edges, Edge(1.0, 0.0, None)))
    given = Conditioning({"class_labels": torch.tensor([1])}, {})
    conditions = Conditions([0], torch.zeros(8, dtype=torch.long), given, None)
    config = ReflowConfig(steps=2, decoded=0.5, pairs=PAIRS, training=TRAINING)
    return ReflowLoss(pairs, conditions, dit.schedule, config, decoder=Decoder.of(dit))


def test_only_the_last_phase_is_compared(loss):
    """There the ideal output's x_0 is the sample; in the first phase it is not, and is not decoded."""
    rows, phase = torch.arange(8), torch.arange(8) % 2
    example = loss.example(rows, phase, torch.zeros(8).double())
    distances = loss.pictures(example.wanted, example, phase, rows)
    assert torch.equal(distances[::2], torch.zeros(4))
    assert (distances < 1e-3).all()
    shown = loss.pictures(example.wanted, example, torch.ones(8, dtype=torch.long), rows)
    assert (shown[::2] > 0.1).all()  # had they been compared
    first = loss.pictures(example.wanted, example, torch.zeros(8, dtype=torch.long), rows)
    assert torch.equal(first, torch.zeros(8))
    worse = loss.pictures(example.wanted + 0.1, example, phase, rows)
    assert (worse[1::2] > 10 * distances[1::2]).all()


def test_weight_scales_the_term_and_nothing_else(loss, dit):
    def value(weight):
        draw = draw_of(0, seed=0, batch_size=16)
        return replace(loss, config=replace(loss.config, decoded=weight))(dit.denoiser, draw).item()

    plain = replace(loss, decoder=None)(dit.denoiser, draw_of(0, seed=0, batch_size=16)).item()
    assert value(0.0) == plain
    assert value(2.0) - plain == pytest.approx(4 * (value(0.5) - plain), rel=1e-3)
    assert value(0.5) > plain * 1.01


def test_rows_are_of_the_whole_batch(loss, dit):
    whole = loss(dit.denoiser, draw_of(0, seed=0, batch_size=8))
    halves = [loss(dit.denoiser, draw_of(0, seed=0, batch_size=8, rank=rank, processes=2)) for rank in range(2)]
    torch.testing.assert_close(sum(halves) / 2, whole)
    assert halves[0] != halves[1]


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_student_learns_pictures_and_leaves_the_autoencoder(dit, context, tmp_path, compute):
    training = replace(TRAINING, compute=compute)
    stage = Reflow(ReflowConfig(steps=1, decoded=0.2, pairs=PAIRS, training=training))
    stage.check(dit, TARGETS["onnxruntime"])
    weights = copy.deepcopy(dit.pipeline.vae.state_dict())
    applied = stage.apply(dit, replace(context(dit), work=tmp_path / "work"))
    assert applied.metadata["held_out_error"] < 0.8 * applied.metadata["teacher_error"]
    assert applied.metadata["losses"][-1] < 0.7 * applied.metadata["losses"][0]
    assert all(torch.equal(value, weights[name]) for name, value in dit.pipeline.vae.state_dict().items())


def test_latents_that_are_decoded_otherwise_are_refused(dit, monkeypatch):
    check_decoder(dit, None)
    scheduler = dit.pipeline.scheduler
    monkeypatch.setattr("diffpress.distill.decoded.to_latents", lambda x_0, config: x_0)
    with pytest.raises(ConfigError, match="DiTPipeline something else"):
        check_decoder(dit, None)
    assert dit.pipeline.scheduler is scheduler


def test_a_generator_without_autoencoder_is_refused_before_any_work(ddpm):
    stage = Reflow(ReflowConfig(decoded=1.0, pairs=replace(PAIRS, scheduler="DDIMScheduler")))
    with pytest.raises(ConfigError, match=r"autoencoder's decoder, and DDPMPipeline has none; allowed: 0"):
        stage.check(ddpm, TARGETS["onnxruntime"])
    Reflow(replace(stage.config, decoded=0.0)).check(ddpm, TARGETS["onnxruntime"])
