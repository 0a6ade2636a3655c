"""Tiny random pipelines in the stock layout, on disk, and what tests share around them."""

import itertools
import json
import os

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tiny import fill_zeros, make_autoencoder, make_scheduler, make_text_encoder, make_tokenizer

from diffpress.generator import Generator, SamplingPlan
from diffpress.stage import Context
from diffpress.targets import TARGETS

SHORT = SamplingPlan(steps=3, guidance_scale=3.0)


def pytest_configure(config):
    """Workers that run beside each other get cores of their own: run-times that each want all of them crawl."""
    worker = getattr(config, "workerinput", None)
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        mine = cores[int(worker["workerid"].removeprefix("gw")) :: worker["workercount"]] or cores
        os.sched_setaffinity(0, mine)
        torch.set_num_threads(len(mine))


@pytest.fixture(scope="session")
def dit_folder(tmp_path_factory):
    """Class-conditional: 2 blocks, 2 heads of 8, latents 8x8, four named classes of a thousand."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipelines") / "dit"
    transformer = DiTTransformer2DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    )
    DiTPipeline(fill_zeros(transformer), fill_zeros(make_autoencoder()), make_scheduler()).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {"0": "cat", "1": "dog", "2": "owl", "3": "fox"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    """Text-to-image: a two-level U-Net with cross-attention, a one-layer CLIP text encoder."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("pipelines") / "sd"
    tokenizer = make_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    pipeline = StableDiffusionPipeline(
        vae=fill_zeros(make_autoencoder()),
        text_encoder=fill_zeros(make_text_encoder(tokenizer)),
        tokenizer=tokenizer,
        unet=fill_zeros(unet),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ddpm_folder(tmp_path_factory):
    """Unconditional, in pixels."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("pipelines") / "ddpm"
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    )
    DDPMPipeline(fill_zeros(unet), DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def dit(dit_folder):
    return Generator.load(dit_folder)


@pytest.fixture
def sd(sd_folder):
    return Generator.load(sd_folder)


@pytest.fixture
def ddpm(ddpm_folder):
    return Generator.load(ddpm_folder)


@pytest.fixture(params=["dit", "sd", "ddpm"])
def any_generator(request):
    """Each family in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def plan():
    return SHORT


@pytest.fixture(scope="session")
def context():
    """Make what a stage is given: ``context(generator, target)``."""

    def make(generator, target="onnxruntime", count=4):
        return Context(TARGETS[target], generator.conditions(count), list(range(count)), SHORT, batch_size=count)

    return make


@pytest.fixture(scope="session")
def first_call():
    """The denoiser's output on its own first recorded inputs, or on ``call``'s: ``first_call(generator)``."""

    @torch.no_grad()
    def run(generator, call=None):
        if call is None:
            call = generator.record(generator.conditions(2), seeds=[0, 1], plan=SHORT, limit=1)[0]
        return generator.denoiser(**{**call.constants, **call.inputs, "return_dict": True}).sample, call

    return run


@pytest.fixture(scope="session")
def relative():
    """||actual - expected|| / ||expected||, in float64."""

    def error(actual, expected):
        actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
        return float((actual - expected).norm() / expected.norm())

    return error


@pytest.fixture(scope="session")
def hooks_of():
    """How many forward hooks a module and its children carry."""

    def count(module):
        tables = itertools.chain.from_iterable((m._forward_hooks, m._forward_pre_hooks) for m in module.modules())
        return sum(len(table) for table in tables)

    return count
