"""A cache may never change what is computed in full, pass from one picture to another, or stay unnoticed."""

import dataclasses
import itertools
import logging

import diffusers
import pytest
import torch
from diffusers import FirstBlockCacheConfig, PixArtSigmaPipeline, PixArtTransformer2DModel
from tiny import fill_zeros, make_autoencoder, make_flux, make_scheduler, make_t5_encoder, make_t5_tokenizer
from torch import nn

from diffpress.branches import first_number, time_name
from diffpress.caching import CachePolicy, CacheState, Cut, cached, caught
from diffpress.errors import ConfigError
from diffpress.generator import Generator, SamplingPlan, argument_names
from diffpress.prune.cuts import find_cut

PLAN = SamplingPlan(steps=6, guidance_scale=3.0)
TWICE = {"HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "PNDMScheduler"}
SCHEDULERS = sorted(
    TWICE
    | {
        "DDIMScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EDMEulerScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
        "TCDScheduler",
        "UniPCMultistepScheduler",
    }
)


def make_pixart():
    tokenizer = make_t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=16,
        caption_channels=16,
        norm_num_groups=4,
    )
    return PixArtSigmaPipeline(
        tokenizer, fill_zeros(make_t5_encoder(tokenizer)), fill_zeros(make_autoencoder()), fill_zeros(transformer),
        make_scheduler(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def families(dit_folder, sd_folder):
    torch.manual_seed(3)
    found = {name: Generator.load(folder) for name, folder in (("dit", dit_folder), ("sd", sd_folder))}
    return found | {"flux": Generator(make_flux()), "pixart": Generator(make_pixart())}


@pytest.fixture(params=["dit", "sd", "flux", "pixart"])
def generator(request, families):
    return families[request.param]


def run(generator, count=2, seeds=None, plan=PLAN, conditions=None):
    plan = plan if not hasattr(generator.pipeline, "text_encoder_2") else dataclasses.replace(plan, height=16, width=16)
    conditions = conditions or generator.conditions(count)
    seeds = seeds or range(len(conditions))
    return torch.as_tensor(generator.sample(conditions, seeds=list(seeds), plan=plan).latents)


def told(generator, plan=PLAN):
    """Timesteps of a run."""
    names, times = argument_names(generator.denoiser), []

    def see(module, args, kwargs):
        times.append(first_number((dict(zip(names, args, strict=False)) | kwargs)[time_name(names)]))

    handle = generator.denoiser.register_forward_pre_hook(see, with_kwargs=True)
    run(generator, 1, plan=plan)
    handle.remove()
    return tuple(times)


def fitted(generator, computed, **changes):
    """A policy for this generator: ``computed`` is repeated along the run."""
    times = told(generator)
    short = dataclasses.replace(PLAN, height=16, width=16) if hasattr(generator.pipeline, "text_encoder_2") else PLAN
    cut = find_cut(generator, generator.conditions(1), short, keep_first=None, keep_last=None, branch=None)
    steps = tuple(itertools.islice(itertools.cycle(computed), len(times)))
    return CachePolicy(**{"cut": cut, "kind": "schedule", "timesteps": times, "computed": steps, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"computed": (True,)},
        {"computed": (True,), "order": 2},
        {"kind": "threshold", "computed": (True, *[False] * 5)},
    ],
)
def test_no_reuse_is_the_plain_run_bit_for_bit(generator, changes, hooks_of):
    if changes.get("kind") and hasattr(generator.pipeline, "unet"):
        pytest.skip("the test is for blocks")
    before, hooks = run(generator), hooks_of(generator.denoiser)
    with cached(generator.denoiser, fitted(generator, **changes)) as caches:
        assert torch.equal(run(generator), before)
        assert caches.states[0].history == [True] * 6
    assert hooks_of(generator.denoiser) == hooks
    assert torch.equal(run(generator), before)
    with cached(generator.denoiser, fitted(generator, (True, False))):  # control
        assert not torch.allclose(run(generator), before, rtol=1e-4)


def test_what_is_left_out_does_not_run(generator):
    steps = fitted(generator, (True, False, False))
    calls = []
    inner = [m for name in steps.cut.skipped for m in generator.denoiser.get_submodule(name).modules()]
    handles = [
        m.register_forward_hook(lambda *_: calls.append(1)) for m in inner if isinstance(m, nn.Linear | nn.Conv2d)
    ]
    run(generator)
    everything = len(calls)
    calls.clear()
    with cached(generator.denoiser, steps) as caches:
        found = run(generator)
    for handle in handles:
        handle.remove()
    assert caches.states[0].history == [True, False, False] * 2
    assert torch.isfinite(found).all()
    assert len(calls) == everything // 3 > 0


def reference(generator, steps):
    """Reuse without leaving out: the end's output is replaced by what it was (U-Net) or by h_a and the residual."""
    cut, kept = steps.cut, {"step": -1}
    network = generator.denoiser
    with caught(network, cut) as tensors:

        def replace(module, args, output):
            values = output if isinstance(output, tuple) else (output,)
            kept["step"] += 1
            now = [tensors.get(f"start.{i}", torch.zeros(())) for i in range(len(values))]
            if steps.computed[kept["step"] % len(steps.computed)]:
                kept["values"] = [b - a for a, b in zip(now, values, strict=True)]
                return output
            new = tuple(a + delta for a, delta in zip(now, kept["values"], strict=True))
            return new if isinstance(output, tuple) else new[0]

        handle = network.get_submodule(cut.end).register_forward_hook(replace)
        try:
            return run(generator)
        finally:
            handle.remove()


def test_reuse_is_what_replacing_the_features_gives(generator):
    steps = fitted(generator, (True, False, False))
    with cached(generator.denoiser, steps):
        found = run(generator)
    torch.testing.assert_close(found, reference(generator, steps), rtol=1e-5, atol=1e-5)
    other = dataclasses.replace(steps, computed=(True, False, True, False, True, False))
    assert not torch.allclose(found, reference(generator, other), rtol=1e-3, atol=1e-3)


def test_first_block_cache_of_diffusers_agrees(families):
    """An independent implementation, which decides by the same number."""
    generator = families["flux"]
    found = {}
    for threshold in (0.02, 0.3):
        tested = fitted(generator, (True, *[False] * 5), kind="threshold", threshold=threshold)
        with cached(generator.denoiser, tested) as caches:
            found[threshold] = run(generator), caches.states[0].history
        generator.denoiser.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        expected = run(generator)
        generator.denoiser.disable_cache()
        torch.testing.assert_close(found[threshold][0], expected, rtol=1e-5, atol=1e-5)
    assert sum(found[0.02][1]) > sum(found[0.3][1])
    assert not torch.allclose(found[0.02][0], found[0.3][0], rtol=1e-3, atol=1e-3)


def test_a_constant_input_is_always_a_hit(families, first_call):
    generator = families["dit"]
    plain, call = first_call(generator)
    time = first_number(call.inputs["timestep"])
    still = dataclasses.replace(
        fitted(generator, (True,)),
        kind="threshold",
        threshold=1e-6,
        timesteps=(time,) * 4,
        computed=(True, False, False, False),
    )
    with cached(generator.denoiser, still) as caches:
        outputs = [first_call(generator, call)[0] for _ in range(4)]
    assert caches.states[0].history == [True, False, False, False]
    for output in outputs:
        torch.testing.assert_close(output, plain, rtol=1e-5, atol=1e-5)


def test_pictures_do_not_see_each_other(generator):
    steps = fitted(generator, (True, False))
    two = generator.conditions(2)
    with cached(generator.denoiser, steps):
        alone = run(generator, conditions=two[1:], seeds=[7])
    with cached(generator.denoiser, steps):
        run(generator, conditions=two[:1], seeds=[5])
        after = run(generator, conditions=two[1:], seeds=[7])
    assert torch.equal(after, alone)


def test_a_cache_that_is_not_cleared_is_seen(families, monkeypatch):
    generator = families["dit"]
    steps = fitted(generator, (True, *[False] * 5))
    with cached(generator.denoiser, steps):
        alone = run(generator, seeds=[7, 8])
    monkeypatch.setattr(CacheState, "begin", lambda self, *args: "reuse" if self.history else "compute")
    monkeypatch.setattr(CacheState, "predict", lambda self: self._differences[0])
    with cached(generator.denoiser, steps):
        run(generator, seeds=[5, 6])
        after = run(generator, seeds=[7, 8])
    assert not torch.allclose(after, alone, rtol=1e-3, atol=1e-3)


def test_rows_of_a_batch_are_independent(generator):
    steps = fitted(generator, (True, False, False), order=1)
    with cached(generator.denoiser, steps):
        both = run(generator, seeds=[3, 4])
        alone = run(generator, conditions=generator.conditions(2)[:1], seeds=[3])
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both[1:], alone, rtol=1e-2, atol=1e-2)


def test_another_schedule_warns_once_and_computes_everything(generator, caplog):
    steps = fitted(generator, (True, False))
    other = dataclasses.replace(PLAN, steps=5)
    plain = run(generator, plan=other)
    with caplog.at_level(logging.WARNING), cached(generator.denoiser, steps) as caches:
        found = run(generator, plan=other)
        run(generator, plan=other)
    warned = [record.message for record in caplog.records if "another schedule" in record.message]
    assert len(warned) == 1
    assert "is none of its 6; computed in full" in warned[0]
    assert caches.unknown
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_scheduler_goes_with_it(families, monkeypatch, name):
    """Also those that call twice in a step, or draw noise."""
    generator = families["sd"]
    steps, config = fitted(generator, (True, False)), generator.pipeline.scheduler.config
    monkeypatch.setattr(generator.pipeline, "scheduler", getattr(diffusers, name).from_config(config))
    times = told(generator)
    assert (len(times) > PLAN.steps) == (name in TWICE)
    plain = run(generator)
    own = dataclasses.replace(steps, timesteps=times, computed=(True,) * len(times))
    with cached(generator.denoiser, own) as caches:
        assert torch.equal(run(generator), plain)
    assert caches.states[0].history == [True] * len(times)
    often = tuple(step % 3 == 0 for step in range(len(times)))
    with cached(generator.denoiser, dataclasses.replace(own, computed=often)) as caches:
        found = run(generator)
    assert caches.states[0].history == list(often)  # every call of the second kind is a step of its own
    assert not caches.unknown
    assert torch.isfinite(found).all()
    assert not torch.allclose(found, plain, rtol=1e-4)  # control


class Branches(nn.Module):
    """A network that is called once for each guidance branch."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, sample, timestep, encoder_hidden_states):
        return (self.c(self.b(self.a(sample) + encoder_hidden_states)) + timestep,)

    def cache_context(self, name):
        raise AssertionError("replaced")


@torch.no_grad()
def test_guidance_branches_that_are_called_in_turns_have_caches_of_their_own():
    torch.manual_seed(0)
    network, cut = Branches(), Cut(end="b", skipped=("a", "b"))
    times = (900.0, 700.0, 500.0, 300.0, 100.0)
    steps = CachePolicy(cut=cut, kind="schedule", timesteps=times, computed=(True, *[False] * 4))
    x, conditions = torch.randn(5, 2, 4), {"cond": torch.randn(2, 4), "uncond": torch.randn(2, 4)}

    def along(*branches):
        found = {name: [] for name in branches}
        with cached(network, steps) as caches:
            for timestep, sample in zip(times, x, strict=True):
                for name in branches:
                    with network.cache_context(name):
                        found[name].append(
                            network(sample, timestep=timestep, encoder_hidden_states=conditions[name])[0]
                        )
        assert all(state.history == [True] + [False] * 4 for state in caches.states)
        return {name: torch.stack(outputs) for name, outputs in found.items()}

    together = along("cond", "uncond")
    for name, outputs in together.items():
        assert torch.equal(outputs, along(name)[name])
    assert not torch.allclose(together["cond"], together["uncond"], atol=0.1)


def test_a_network_without_the_blocks_is_refused(families):
    steps = fitted(families["dit"], (True,))
    gone = dataclasses.replace(
        steps.cut, end="transformer_blocks.7", skipped=("transformer_blocks.1", "transformer_blocks.7")
    )
    with (
        pytest.raises(ConfigError, match=r"cut at transformer_blocks\.7, which DiTTransformer2DModel does not have"),
        cached(families["dit"].denoiser, dataclasses.replace(steps, cut=gone)),
    ):
        pass
