"""Random-weight denoisers in stock pipelines, and the calls that a sampling run makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffpress.generator import Generator, SamplingPlan

from .calls import IMAGES, STEPS

PLAN = SamplingPlan(steps=STEPS, guidance_scale=1.0)  # without guidance a batch of pictures is a batch of the net
OUTLIER_CHANNELS = 4
OUTLIER_FACTOR = 50.0


def _dit(layers: int, heads: int, size: int = 32) -> Callable[[], nn.Module]:
    return lambda: DiTTransformer2DModel(
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        sample_size=size,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )


def _unet(channels: tuple[int, ...], context: int, size: int = 32) -> Callable[[], nn.Module]:
    levels = len(channels) - 1
    return lambda: UNet2DConditionModel(
        sample_size=size,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * levels,
        layers_per_block=1,
        cross_attention_dim=context,
        attention_head_dim=8,
    )


@dataclass(frozen=True)
class Net:
    """A denoiser with its name in tables."""

    title: str
    make: Callable[[], Any]
    context: int | None = None
    """Width of the text encoder; None: conditioned on classes."""


NETS = {
    "dit-s": Net("DiT-S/2", _dit(12, 6)),
    "dit-b": Net("DiT-B/2", _dit(12, 12)),
    "unet-small": Net("UNet-small", _unet((128, 256, 384, 512), 768), context=768),
}
SMOKE = {  # seconds instead of minutes, to try the machinery
    "tiny-dit": Net("tiny DiT", _dit(2, 2, size=16)),
    "tiny-unet": Net("tiny UNet", _unet((32, 64), 64, size=16), context=64),
}


def find_net(name: str) -> Net:
    """A net by name, the tiny ones included."""
    return (NETS | SMOKE)[name]


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


def _text(width: int) -> dict[str, Any]:
    """CLIP's tokenizer without merges (one token for each byte) and a one-layer encoder."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width,
            projection_dim=width,
            num_hidden_layers=1,
            num_attention_heads=width // 64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return {"tokenizer": tokenizer, "text_encoder": encoder.eval()}


def make_pipeline(net: Net, *, seed: int, outliers: bool) -> Any:
    """A stock pipeline around the net, every weight drawn from ``seed``."""
    torch.manual_seed(seed)
    denoiser = net.make().eval()
    if outliers:
        plant_outliers(denoiser, seed=seed)
    scheduler = DPMSolverMultistepScheduler(prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=1)
    if net.context is None:
        return DiTPipeline(denoiser, _autoencoder().eval(), scheduler)
    return StableDiffusionPipeline(
        vae=_autoencoder().eval(),
        unet=denoiser,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **_text(net.context),
    )


@torch.no_grad()
def plant_outliers(denoiser: nn.Module, *, seed: int) -> None:
    """A few channels x 50 after every LayerNorm: its gain, or adaLN-zero's scale. The net computes another function."""
    random = torch.Generator().manual_seed(seed)
    for module in denoiser.modules():
        if isinstance(module, AdaLayerNormZero):
            size = module.linear.out_features // 6  # shift, scale, gate of attention, then of the feed-forward
            for part in (1, 4):
                channels = torch.randperm(size, generator=random)[:OUTLIER_CHANNELS]
                module.linear.bias[part * size + channels] += OUTLIER_FACTOR - 1
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            channels = torch.randperm(len(module.weight), generator=random)[:OUTLIER_CHANNELS]
            module.weight[channels] *= OUTLIER_FACTOR


def prepare(name: str, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Write ``folder``/pipeline and the calls of each batch size; returns the net's facts.

    Raises ValueError where an output is not finite, constant, or the same for every call.
    """
    torch.set_num_threads(options["threads"])
    pipeline = make_pipeline(find_net(name), seed=options["seed"], outliers=options["outliers"])
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(str(folder / "pipeline"))
    generator = Generator.load(folder / "pipeline")
    denoiser = generator.denoiser.eval()
    conditions = generator.conditions(2 * IMAGES)
    flop = {}
    for batch in options["batches"]:
        if IMAGES % batch:
            raise ValueError(f"batch is {batch}; allowed: 1, 2, {IMAGES}")
        calibration = _calls(generator, conditions[:IMAGES], range(IMAGES), batch)
        others = _calls(generator, conditions[IMAGES:], range(IMAGES, 2 * IMAGES), batch)
        held_out = [others[step][step % len(others[step])] for step in range(len(others))]
        with torch.no_grad():
            outputs = [denoiser(**call, return_dict=False)[0] for call in held_out]
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # flash attention is not seen
                denoiser(**held_out[0], return_dict=False)
        flop[str(batch)] = counter.get_total_flops()
        _check_outputs(outputs)
        _save(folder / f"calls-{batch}.npz", [call for calls in calibration for call in calls], held_out, outputs)
    return {
        "title": find_net(name).title,
        "parameters": sum(item.numel() for item in denoiser.parameters()),
        "flop": flop,
    }


def _calls(generator: Generator, conditions: list[Any], seeds: range, batch: int) -> list[list[dict[str, Tensor]]]:
    """The denoiser's inputs in one sampling run, for each step cut into batches; timesteps have an axis."""
    steps = []
    for call in generator.record(conditions, seeds=seeds, plan=PLAN):
        inputs = {name: value.reshape(-1) if name == "timestep" else value for name, value in call.inputs.items()}
        cuts = range(0, IMAGES, batch)
        steps.append(
            [
                {name: value[at : at + batch] if len(value) == IMAGES else value for name, value in inputs.items()}
                for at in cuts
            ]
        )
    return steps


def _check_outputs(outputs: list[Tensor]) -> None:
    both = torch.stack(outputs)
    if not torch.isfinite(both).all():
        raise ValueError("the net's output is not finite")
    if min(output.std() for output in outputs) < 1e-3 or both.std(dim=0).max() < 1e-3:
        raise ValueError("the net's output is constant")


def _save(path: Path, calibration: list[dict[str, Tensor]], held_out: list[dict[str, Tensor]], outputs: list) -> None:
    held_out = [{**call, "output": output} for call, output in zip(held_out, outputs, strict=True)]
    splits = {"calibration": calibration, "held out": held_out}
    arrays = {
        f"{split}/{index}/{name}": value.numpy()
        for split, calls in splits.items()
        for index, call in enumerate(calls)
        for name, value in call.items()
    }
    np.savez(path, **arrays)  # type: ignore[arg-type]
