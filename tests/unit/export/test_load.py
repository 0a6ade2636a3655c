"""What a loaded pipeline does unasked, and what it refuses."""

import copy
import dataclasses
import json
import logging
import pickle

import onnx
import pytest
import torch
from diffusers import AutoencoderTiny
from tiny import fill_zeros, make_scheduler

from diffpress.errors import EngineError
from diffpress.export.build import export
from diffpress.export.load import keep_plan, keep_size, load
from diffpress.export.settings import ExportConfig
from diffpress.generator import Generator
from diffpress.sampling import SamplingPlan


@pytest.fixture(scope="module")
def sized_built(sd_folder, tmp_path_factory):
    """(generator, folder) in float, for two pictures of one size, with an autoencoder that is not variational."""
    torch.manual_seed(3)
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    vae = AutoencoderTiny(**channels, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    generator, folder = Generator.load(sd_folder), tmp_path_factory.mktemp("sized") / "engine"
    generator.pipeline.register_modules(vae=fill_zeros(vae).eval())
    settings = ExportConfig(target="openvino", batch=2, height=32, width=48)
    plan = SamplingPlan(steps=2, guidance_scale=3.0)
    export(generator, folder, settings, plan=plan, conditions=["a cat", "a dog"])
    return generator, folder


def test_the_size_of_the_settings_is_that_of_the_plan(sized_built):
    generator, folder = sized_built
    assert json.loads((folder / "diffpress.json").read_text())["plan"]["width"] == 48
    graph = onnx.load(folder / "unet" / "model.onnx", load_external_data=False).graph
    sides = [value.dim_value for value in graph.input[0].type.tensor_type.shape.dim[2:]]
    assert sides == [32 // generator.pipeline.vae_scale_factor, 48 // generator.pipeline.vae_scale_factor]


def test_an_engine_of_one_size_draws_it_unasked(sized_built):
    pipeline = load(sized_built[1])
    draw = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    assert pipeline(["a cat", "a dog"], **draw, height=None).images.shape == (2, 32, 48, 3)
    assert pipeline("a cat", **draw, num_images_per_prompt=2).images.shape == (2, 32, 48, 3)
    with pytest.raises(EngineError):
        pipeline(["a cat", "a dog"], **draw, height=48)


def test_an_autoencoder_that_is_not_variational(sized_built, relative):
    generator, folder = sized_built
    engine = load(folder)
    run = {"conditions": ["a cat", "a dog"], "seeds": [0, 1], "plan": SamplingPlan(steps=2, guidance_scale=3.0)}
    run["plan"] = dataclasses.replace(run["plan"], height=32, width=48)
    assert relative(Generator(engine).sample(**run).images, generator.sample(**run).images) < 1e-2
    x = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = generator.pipeline.vae.encode(x).latents
    assert relative(engine.vae.encode(x).latents, latents) < 1e-3
    assert relative(engine.vae.encode(x, return_dict=False)[0], latents) < 1e-3
    assert relative(engine.vae.encode(1 - x).latents, latents) > 0.1


def test_hidden_states_that_the_engine_has_not(sized_built):
    pipeline = load(sized_built[1])
    with pytest.raises(EngineError, match=r"made without hidden states, .* allowed: calls without clip_skip"):
        pipeline(["a cat", "a dog"], num_inference_steps=2, clip_skip=1)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_an_open_engine_stays_in_its_process(sized_built, copied):
    pipeline = load(sized_built[1])
    for holder in (pipeline, pipeline.unet, pipeline.vae):
        with pytest.raises(EngineError, match=r"cannot be pickled or copied; allowed: diffpress\.load"):
            copied(holder)
    copied(pipeline.scheduler)


class Echo:
    """A pipeline that returns what it is called with, and the timesteps that it goes through."""

    def __init__(self):
        self.scheduler = make_scheduler()

    def __call__(
        self,
        prompt=None,
        height=None,
        width=None,
        num_inference_steps=50,
        guidance_scale=7.5,
        timesteps=None,
        use_resolution_binning=True,
    ):
        given = dict(locals())
        self.scheduler.set_timesteps(num_inference_steps)
        return given | {"grid": self.scheduler.timesteps.tolist()}


def test_what_is_none_is_not_given(caplog):
    pipeline = Echo()
    keep_plan(pipeline, SamplingPlan(steps=2, guidance_scale=1.0, timesteps=(999, 300)))
    caplog.set_level(logging.WARNING)
    found = pipeline("a cat", None, num_inference_steps=None, guidance_scale=None, timesteps=None)
    assert (found["prompt"], found["num_inference_steps"], found["guidance_scale"]) == ("a cat", 2, 1.0)
    assert found["grid"] == [999, 300]
    assert not caplog.records
    assert pipeline("a cat", num_inference_steps=3)["grid"][1] != 300
    assert "made for num_inference_steps=2, called with 3" in caplog.text


def test_the_size_of_an_engine_is_its_pipelines_default():
    pipeline = Echo()
    keep_size(pipeline, SamplingPlan(height=32, width=48))
    found = pipeline("a cat", None)
    assert (found["height"], found["width"], found["use_resolution_binning"]) == (32, 48, False)
    assert pipeline("a cat", 64)["height"] == 64
    pipeline = Echo()
    keep_size(pipeline, SamplingPlan())
    assert pipeline("a cat")["use_resolution_binning"]
