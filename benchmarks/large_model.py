"""A U-Net of Stable Diffusion 1.5's size (860 M parameters, 3.4 GB in fp32, random weights) through the whole path.

    python benchmarks/large_model.py WORKDIR benchmarks/results/large-model.json

512 x 512 pixels; the autoencoder and the text encoder are small, since it is the denoiser that has to fit. Seconds and
peak memory of every step come from the run's own history. WORKDIR needs about 25 GB; a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from rich.console import Console
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import diffpress
from diffpress.compress.progress import RichProgress
from diffpress.eval.machine import describe_machine

ROOT = Path(__file__).resolve().parents[1]
RECIPE = {
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
}


def write_pipeline(folder: Path) -> int:
    """Save the pipeline in the stock layout; returns the U-Net's number of parameters."""
    torch.manual_seed(0)
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
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(32, 32, 64, 64), sample_size=512, **blocks),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(str(folder))
    return sum(parameter.numel() for parameter in unet.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    model = args.work / "model"
    began = time.monotonic()
    parameters = write_pipeline(model)
    written = time.monotonic()
    result = diffpress.compress(model, dict(RECIPE), args.work / "run", progress=RichProgress(Console(stderr=True)))
    history = json.loads((args.work / "run/history.json").read_text())
    facts = {
        "machine": describe_machine(),
        "recipe": RECIPE,
        "parameters": parameters,
        "seconds": {"write the checkpoint": written - began, "the run": time.monotonic() - written},
        "peak memory, MiB": max(step["peak_memory_mib"] for step in history),
        "steps": [{key: step[key] for key in ("name", "seconds", "peak_memory_mib")} for step in history],
        "engine": dataclasses.asdict(result.report.engine),
        "latency": [dataclasses.asdict(timing) for timing in result.report.latency],
        "paired": [dataclasses.asdict(row) for row in result.report.paired],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
