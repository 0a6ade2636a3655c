"""A DiT with blocks to spare, ways to prune it, and recovery of what is left."""

from dataclasses import replace

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from tiny import fill_zeros, make_autoencoder, make_scheduler
from torch import nn

from diffpress.distill.pairs import PairSettings
from diffpress.distill.recover import Recover, RecoverConfig
from diffpress.generator import Generator, SamplingPlan
from diffpress.stage import Context
from diffpress.targets import TARGETS
from diffpress.training import TrainingSettings

PAIRS = PairSettings(count=32, held_out=8, steps=8, batch_size=16)
TRAINING = TrainingSettings(steps=100, batch_size=8, learning_rate=3e-3, warmup=5, ema=0.95)
PLAN = SamplingPlan(steps=3, guidance_scale=3.0)
SMALL = replace(PLAN, height=16, width=16)


def make_dit(seed=0, blocks=4):
    """Class-conditional, with blocks to spare."""
    torch.manual_seed(seed)
    network = DiTTransformer2DModel(
        num_layers=blocks,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        sample_size=8,
        patch_size=2,
        norm_num_groups=4,
    )
    return Generator(DiTPipeline(fill_zeros(network), fill_zeros(make_autoencoder()), make_scheduler()))


def without(generator, *gone, name="transformer_blocks"):
    """The generator less blocks of a list."""
    blocks = getattr(generator.denoiser, name)
    setattr(generator.denoiser, name, nn.ModuleList(block for i, block in enumerate(blocks) if i not in gone))
    return generator


def context_of(tmp_path, original, conditions=(0, 1, 2, 3), plan=PLAN):
    conditions = list(conditions)
    return Context(
        TARGETS["onnxruntime"],
        conditions,
        range(len(conditions)),
        plan,
        pool=conditions,
        work=tmp_path / "work",
        original=original,
    )


def recovered(tmp_path, generator, original, conditions=(0, 1, 2, 3), plan=PLAN, **changes):
    stage = Recover(RecoverConfig(**{"pairs": PAIRS, "training": TRAINING} | changes))
    stage.check(generator, TARGETS["onnxruntime"])
    return stage.apply(generator, context_of(tmp_path, original, conditions, plan))


class Skip(nn.Module):
    """In place of a U-Net's layer of equal width."""

    def forward(self, hidden, *args, **kwargs):
        return hidden
