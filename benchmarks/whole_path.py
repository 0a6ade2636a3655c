"""Networks of published sizes with random weights through the whole path: stages, engine, whole pictures, memory.

    python benchmarks/whole_path.py sd15 WORKDIR benchmarks/results/whole-path-sd15.json
    python benchmarks/whole_path.py dit-b WORKDIR benchmarks/results/whole-path-dit-b.json

``sd15``: a U-Net of Stable Diffusion 1.5's size (860 M parameters, 3.4 GB in fp32), 512 x 512 pixels; the autoencoder
and the text encoder are small, since it is the denoiser that has to fit. WORKDIR needs about 25 GB.
``dit-b``: DiT-B/2 with Stable Diffusion's autoencoder, 256 x 256 pixels.

Seconds and peak memory of every step come from the run's own history; a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from denoisers.nets import NETS
from diffusers import (
    AutoencoderKL,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from rich.console import Console
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import diffpress
from diffpress.artifact import write_json
from diffpress.compress.progress import RichProgress
from diffpress.eval.machine import describe_machine

ROOT = Path(__file__).resolve().parents[1]


def _autoencoder(channels: tuple[int, ...], layers: int, size: int) -> AutoencoderKL:
    """Stable Diffusion's for (128, 256, 512, 512) and 2 layers."""
    return AutoencoderKL(
        block_out_channels=channels,
        layers_per_block=layers,
        sample_size=size,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def _scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def sd15() -> Any:
    """Stable Diffusion with its U-Net's size, the rest small."""
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "models/emoji-unet/tokenizer")
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=768,
        num_hidden_layers=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return StableDiffusionPipeline(
        vae=_autoencoder((32, 32, 64, 64), 1, 512),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def dit_b() -> Any:
    """DiT-B/2 as published, 32 x 32 latents."""
    return DiTPipeline(NETS["dit-b"].make(), _autoencoder((128, 256, 512, 512), 2, 256), _scheduler())


class Case(NamedTuple):
    """A pipeline and what is done with it."""

    make: Callable[[], Any]
    recipe: dict[str, Any]


CASES = {
    "sd15": Case(
        sd15,
        {
            "calibration": {"samples": 2, "batch_size": 1},
            "stages": ["quantize.smooth", "quantize.int8"],
            "export": {"target": "openvino"},
            "evaluate": {
                "samples": 2,
                "batch_size": 1,
                "steps": 4,
                "guidance_scale": 3.0,
                "baselines": ["eager"],
                "latency_rounds": 3,
            },
        },
    ),
    "dit-b": Case(
        dit_b,
        {
            "calibration": {"samples": 4, "batch_size": 4},
            "stages": ["quantize.smooth", "quantize.int8", "quantize.weights"],
            "export": {"target": "openvino", "compute": "bfloat16", "timesteps": "plan"},
            "evaluate": {
                "samples": 4,
                "batch_size": 4,
                "steps": 20,
                "guidance_scale": 4.0,
                "baselines": ["eager", "medium", "compiled"],
                "latency_rounds": 10,
            },
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=sorted(CASES))
    parser.add_argument("work", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    case, model = CASES[args.case], args.work / "model"
    torch.manual_seed(0)
    pipeline = case.make()
    parameters = sum(parameter.numel() for parameter in pipeline.components[_denoiser(pipeline)].parameters())
    pipeline.save_pretrained(str(model))
    del pipeline  # before peak memory is looked at
    result = diffpress.compress(
        model, dict(case.recipe), args.work / "run", progress=RichProgress(Console(stderr=True))
    )
    history = json.loads((args.work / "run/history.json").read_text())
    facts = {
        "machine": describe_machine(),
        "recipe": case.recipe,
        "parameters": parameters,
        "seconds": sum(step["seconds"] for step in history),
        "peak memory, MiB": max(step["peak_memory_mib"] for step in history),
        "steps": [{key: step[key] for key in ("name", "seconds", "peak_memory_mib")} for step in history],
        "engine": dataclasses.asdict(result.report.engine),
        "latency": [dataclasses.asdict(timing) for timing in result.report.latency],
        "paired": [dataclasses.asdict(row) for row in result.report.paired],
    }
    write_json(args.output, facts)


def _denoiser(pipeline: Any) -> str:
    return "unet" if "unet" in pipeline.components else "transformer"


if __name__ == "__main__":
    main()
