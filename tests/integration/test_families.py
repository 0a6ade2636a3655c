"""From checkpoint to picture, for each family of pipelines that people have: tiny, random, of stock classes alone."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny import (
    fill_zeros,
    make_autoencoder,
    make_flux,
    make_scheduler,
    make_t5_encoder,
    make_t5_tokenizer,
    make_text_encoder,
    make_tokenizer,
)
from transformers import CLIPTextModelWithProjection

import diffpress
from diffpress.denoise import encode
from diffpress.errors import EngineError, ParityError
from diffpress.export.build import export
from diffpress.export.settings import ExportConfig
from diffpress.generator import Generator, SamplingPlan
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.quantize.smooth import Smooth, SmoothConfig
from diffpress.stage import Context
from diffpress.targets import TARGETS

pytestmark = pytest.mark.slow
PLAN = SamplingPlan(steps=2, guidance_scale=3.0, height=16, width=16)
OTHER = SamplingPlan(steps=2, guidance_scale=3.0, height=24, width=32)


def sdxl():
    """Two text encoders, sizes as a condition, nested arguments."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    tokenizer = make_tokenizer()
    return StableDiffusionXLPipeline(
        vae=fill_zeros(make_autoencoder()),
        text_encoder=fill_zeros(make_text_encoder(tokenizer)),
        text_encoder_2=fill_zeros(make_text_encoder(tokenizer, CLIPTextModelWithProjection)),
        tokenizer=tokenizer,
        tokenizer_2=make_tokenizer(),
        unet=fill_zeros(unet),
        scheduler=EulerDiscreteScheduler(),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def pixart():
    """T5 with a mask, variance beside the noise, adaLN shared by the blocks."""
    tokenizer = make_t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=16,
        caption_channels=16,
    )
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=fill_zeros(make_t5_encoder(tokenizer)),
        vae=fill_zeros(make_autoencoder()),
        transformer=fill_zeros(transformer),
        scheduler=make_scheduler(),
    )


FAMILIES = {
    "sdxl": (sdxl, "eps", {"encoder_hidden_states", "added_cond_kwargs"}),
    "pixart": (pixart, "v", {"encoder_hidden_states", "encoder_attention_mask"}),
    "flux": (make_flux, "flow", {"encoder_hidden_states", "pooled_projections", "guidance", "txt_ids", "img_ids"}),
}


BUILT = FAMILIES
# Calls compared with torch: one and, for the denoiser, two of a run; with a free size one more at another size.
RESIZED = {"text_encoder": 1, "text_encoder_2": 1, "vae_decoder": 2, "vae_encoder": 2}
CALLS = {
    "sdxl": {**RESIZED, "unet": 4},
    "pixart": {"text_encoder": 1, "transformer": 3, "vae_decoder": 1, "vae_encoder": 1},
    "flux": {**RESIZED, "transformer": 4},
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """(name, checkpoint on disk)."""
    torch.manual_seed(3)
    place = tmp_path_factory.mktemp(request.param) / "checkpoint"
    FAMILIES[request.param][0]().save_pretrained(place)
    return request.param, place


@pytest.fixture(scope="module")
def built(folder):
    """(name, quantized generator, its float original, engine folder)."""
    name, place = folder
    generator, output = Generator.load(place), place.parent / "engine"
    conditions = generator.conditions(4)
    context = Context(TARGETS["onnxruntime"], conditions, range(4), PLAN, batch_size=4)
    smooth = [Smooth(SmoothConfig())] if name == "sdxl" else []  # it does not know the others' blocks
    for stage in (*smooth, Int8(Int8Config())):
        stage.check(generator, context.target)
        stage.apply(generator, context)
    settings = ExportConfig(size="static" if name == "pixart" else "dynamic")
    done = export(generator, output, settings, plan=PLAN, conditions=conditions[:2])
    assert {item.component: item.calls for item in done.parity} == CALLS[name]
    return name, generator, Generator.load(place), output


def test_is_read_from_the_pipeline_itself(folder):
    name, place = folder
    _, parameterization, inputs = FAMILIES[name]
    generator = Generator.load(place)
    conditions = generator.conditions(2, ["a cat", "a dog"])
    assert generator.conditioning_kind == "text"
    assert generator.schedule.parameterization == parameterization
    alone, without = encode(generator, conditions, PLAN)
    assert set(alone.tensors) == inputs
    if name == "flux":  # guidance is an input of the network
        assert without is None
    else:
        assert without is not None
        assert not torch.equal(alone.tensors["encoder_hidden_states"], without.tensors["encoder_hidden_states"])
    assert len(generator.record(conditions, seeds=[0, 1], plan=PLAN)) == PLAN.steps
    assert generator.sample(conditions, seeds=[0, 1], plan=OTHER).images.shape == (2, 24, 32, 3)


@pytest.mark.parametrize("folder", BUILT, indirect=True)
def test_the_engine_draws_what_torch_draws(built, relative):
    _, quantized, original, output = built
    engine = Generator(diffpress.load(output))
    conditions, seeds = quantized.conditions(4), [3, 1, 4, 2]
    of_torch, of_engine, of_float, other = (
        generator.sample(conditions, seeds=numbers, plan=PLAN, batch_size=2).latents
        for generator, numbers in ((quantized, seeds), (engine, seeds), (original, seeds), (engine, seeds[::-1]))
    )
    noise = relative(of_float, of_torch)
    assert relative(of_engine, of_torch) < max(noise, 1e-3)
    assert 1e-5 < noise < 0.1  # control: it is quantized
    assert relative(other, of_torch) > 0.1  # control: another seed is another picture


@pytest.mark.parametrize("folder", BUILT, indirect=True)
def test_another_size(built, relative):
    name, quantized, _, output = built
    engine = Generator(diffpress.load(output))
    if name == "pixart":
        with pytest.raises(EngineError, match="refuses"):
            engine.sample(["a cat"], seeds=[0], plan=OTHER)
        return
    of_torch, of_engine = (
        generator.sample(["a cat"], seeds=[0], plan=OTHER).latents for generator in (quantized, engine)
    )
    assert of_engine.shape == (1, 4, 12, 16)
    assert relative(of_engine, of_torch) < 1e-2


@pytest.mark.parametrize("folder", ["pixart"], indirect=True)
def test_a_network_with_its_size_baked_in_is_named(folder, tmp_path):
    generator = Generator.load(folder[1])
    with pytest.raises(ParityError, match=r"'dynamic': transformer .* allowed for this model: static"):
        export(generator, tmp_path, ExportConfig(size="dynamic"), plan=PLAN, conditions=generator.conditions(2))
