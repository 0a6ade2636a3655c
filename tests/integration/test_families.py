"""From checkpoint to picture, for each family of pipelines that people have: tiny, random, of stock classes alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from families import FAMILIES, make

import diffpress
from diffpress.denoise import encode
from diffpress.errors import EngineError, ParityError
from diffpress.export.build import export
from diffpress.export.settings import ExportConfig
from diffpress.generator import Generator, SamplingPlan, has_tensor
from diffpress.quantize.folds import find_folds
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.quantize.smooth import Smooth, SmoothConfig
from diffpress.stage import Context
from diffpress.targets import TARGETS

pytestmark = pytest.mark.slow
PLAN = SamplingPlan(steps=2, guidance_scale=3.0, height=16, width=16)
TEXT, MASKED = {"encoder_hidden_states"}, {"encoder_hidden_states", "encoder_attention_mask"}
IDS = TEXT | {"txt_ids", "img_ids"}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a family: its parameterization and what its denoiser is given beside x_t and t."""

    parameterization: str
    inputs: set[str]
    encoders: int = 1
    calls: int = 1
    """Of the denoiser for one step with guidance."""
    size: str = "dynamic"
    batch: int | str = "dynamic"
    unit: int = 1
    """Pixels, in eights, of which a picture's sides are multiples."""


KNOWN = {
    "sdxl": Facts("eps", TEXT | {"added_cond_kwargs"}, encoders=2),
    "pixart": Facts("v", MASKED, size="static"),
    "sd3": Facts("flow", TEXT | {"pooled_projections"}, encoders=3),
    "flux": Facts("flow", IDS | {"pooled_projections", "guidance"}, encoders=2),
    "flux2": Facts("flow", IDS, calls=2),
    "chroma": Facts("flow", IDS | {"attention_mask"}, calls=2, batch=2),
    "auraflow": Facts("flow", TEXT),
    "sana": Facts("flow", MASKED, unit=4),
    "hunyuan": Facts(
        "v",
        TEXT
        | {
            "encoder_hidden_states_t5",
            "text_embedding_mask",
            "text_embedding_mask_t5",
            "image_meta_size",
            "image_rotary_emb",
            "style",
        },
        encoders=2,
        unit=2,
    ),
    "cogview4": Facts("flow", TEXT | {"original_size", "target_size", "crop_coords"}, calls=2, unit=2),
    "lumina2": Facts("flow", MASKED, calls=2, unit=2),
    "zimage": Facts("flow", MASKED, unit=2),
    "qwen": Facts("flow", {"encoder_hidden_states", "img_ids"}, calls=2, unit=2),
}


def sized(facts: Facts, height: int, width: int) -> SamplingPlan:
    """Sides in multiples of eight pixels, or of the family's unit."""
    return dataclasses.replace(PLAN, height=8 * height * facts.unit, width=8 * width * facts.unit)


@pytest.fixture(scope="module", params=KNOWN)
def folder(request, tmp_path_factory):
    """(name, checkpoint on disk)."""
    place = tmp_path_factory.mktemp(request.param) / "checkpoint"
    make(request.param).save_pretrained(place)
    return request.param, place


@pytest.fixture(scope="module")
def built(folder):
    """(name, quantized generator, its float original, engine folder)."""
    name, place = folder
    facts, plan = KNOWN[name], sized(KNOWN[name], 2, 2)
    generator, output = Generator.load(place), place.parent / "engine"
    conditions = generator.conditions(4)
    context = Context(TARGETS["onnxruntime"], conditions, range(4), plan, batch_size=4)
    smooth = [Smooth(SmoothConfig())] if find_folds(generator.denoiser) else []
    assert bool(smooth) == (name in ("sdxl", "sd3", "flux", "lumina2", "zimage", "qwen"))
    for stage in (*smooth, Int8(Int8Config())):
        stage.check(generator, context.target)
        stage.apply(generator, context)
    settings = ExportConfig(size=facts.size, batch=facts.batch)
    done = export(generator, output, settings, plan=plan, conditions=conditions[:2])
    sizes = 2 if facts.size == "dynamic" else 1  # a call each, of the denoiser also all of a run
    encoders = {f"text_encoder{number}": 1 for number in ("", "_2", "_3")[: facts.encoders]}
    autoencoder = {"vae_decoder": sizes, "vae_encoder": sizes}
    denoiser = {generator.denoiser_name: facts.calls * PLAN.steps + sizes}
    assert {item.component: item.calls for item in done.parity} == encoders | autoencoder | denoiser
    return name, generator, Generator.load(place), output


def test_is_read_from_the_pipeline_itself(folder):
    name, place = folder
    facts, generator = KNOWN[name], Generator.load(place)
    plan = sized(facts, 2, 2)
    conditions = generator.conditions(2, ["a cat", "a dog"])
    assert generator.conditioning_kind == "text"
    assert generator.schedule.parameterization == facts.parameterization
    alone, without = encode(generator, conditions, plan)
    shared = {name for name, value in alone.constants.items() if has_tensor(value)}
    assert set(alone.tensors) | shared == facts.inputs
    assert all("ids" in name or "rotary" in name for name in shared)
    if name == "flux":  # guidance is an input of the network
        assert without is None
    else:
        assert without is not None
        assert not torch.equal(alone.tensors["encoder_hidden_states"], without.tensors["encoder_hidden_states"])
    assert len(generator.record(conditions, seeds=[0, 1], plan=plan)) == facts.calls * plan.steps
    other = sized(facts, 3, 4)
    assert generator.sample(conditions, seeds=[0, 1], plan=other).images.shape == (2, other.height, other.width, 3)


def test_the_engine_draws_what_torch_draws(built, relative):
    name, quantized, original, output = built
    engine, plan = Generator(diffpress.load(output)), sized(KNOWN[name], 2, 2)
    conditions, seeds = quantized.conditions(4), [3, 1, 4, 2]
    of_torch, of_engine, of_float, other = (
        generator.sample(conditions, seeds=numbers, plan=plan, batch_size=2).latents
        for generator, numbers in ((quantized, seeds), (engine, seeds), (original, seeds), (engine, seeds[::-1]))
    )
    noise = relative(of_float, of_torch)
    assert relative(of_engine, of_torch) < max(noise, 1e-3)
    assert 1e-5 < noise < 0.1  # control: it is quantized
    assert relative(other, of_torch) > 0.1  # control: another seed is another picture


def test_another_size(built, relative):
    name, quantized, original, output = built
    engine, facts, words = Generator(diffpress.load(output)), KNOWN[name], ["a cat", "two dogs in the snow"]
    other = sized(facts, 3, 4)
    if facts.size == "static":
        with pytest.raises(EngineError, match="refuses"):
            engine.sample(words, seeds=[0, 1], plan=other)
        return
    of_torch, of_engine, of_float = (
        generator.sample(words, seeds=[0, 1], plan=other).latents for generator in (quantized, engine, original)
    )
    assert of_engine.shape == of_torch.shape
    noise = relative(of_float, of_torch)
    assert relative(of_engine, of_torch) < max(noise, 1e-3)
    assert noise < 0.1


@pytest.mark.parametrize("folder", ["pixart"], indirect=True)
def test_a_network_with_its_size_baked_in_is_named(folder, tmp_path):
    generator = Generator.load(folder[1])
    with pytest.raises(ParityError, match=r"'dynamic': transformer .* allowed for this model: static"):
        export(generator, tmp_path, ExportConfig(size="dynamic"), plan=PLAN, conditions=generator.conditions(2))


def test_every_family_is_here():
    assert list(KNOWN) == list(FAMILIES)
