"""Distance between decoded pictures, as the generator's own decoder sees them: no foreign weights, no reference data.

LPIPS (Zhang et al. 2018) compares the features that a classifier computes of two pictures. Here they are those that the
decoder's up blocks compute on the way to them, as in the latent perceptual loss of Berrada et al. 2025.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from diffpress.denoise import trajectory
from diffpress.distill.student import trailing
from diffpress.errors import ConfigError
from diffpress.generator import Generator, SamplingPlan, patched


def feature_distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """sum_l mean_p ||y_lp / ||y_lp|| - y'_lp / ||y'_lp|| ||^2, [n], in [0, 4 layers]: LPIPS's eq. 1 with weights of 1.

    ``found`` and ``wanted`` hold one feature map [n, c_l, ...] for each layer l; norms are over the channels, the mean
    is over positions p. Float32.
    """
    layers = [normalize(a.float()) - normalize(b.float()) for a, b in zip(found, wanted, strict=True)]
    return torch.stack([layer.square().sum(1).flatten(1).mean(1) for layer in layers]).sum(0)


def to_latents(x_0: Tensor, config: Any) -> Tensor:
    """x_0 / scaling_factor + shift_factor: what the autoencoder decodes, from what the denoiser learned."""
    return x_0 / (getattr(config, "scaling_factor", None) or 1.0) + (getattr(config, "shift_factor", None) or 0.0)


@dataclass(frozen=True)
class Decoder:
    """A generator's autoencoder, frozen."""

    autoencoder: Any

    @classmethod
    def of(cls, generator: Generator) -> Decoder:
        """A copy, which decodes a batch at once."""
        autoencoder = copy.deepcopy(generator.pipeline.vae).eval().requires_grad_(False)
        for whole in ("use_slicing", "use_tiling"):
            setattr(autoencoder, whole, False)
        return cls(autoencoder)

    def __call__(self, found: Tensor, wanted: Tensor) -> Tensor:
        """mean |p - p'| + `feature_distance`, [n], of two x_0 [n, c, ...]; the gradient is that of ``found`` alone."""
        picture, features = self.decode(found)
        with torch.no_grad():
            goal, known = self.decode(wanted)
        return (picture - goal).abs().flatten(1).mean(1) + feature_distance(features, known)

    def decode(self, x_0: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The picture, float32 [n, 3, h, w] in about [-1, 1], and what each up block gave."""
        network, features = self.autoencoder.to(x_0.device), []

        def see(block: nn.Module, inputs: Any, output: Tensor) -> None:
            features.append(output)

        hooks = [block.register_forward_hook(see) for block in network.decoder.up_blocks]
        try:
            picture = network.decode(to_latents(x_0, network.config), return_dict=False)[0]
        finally:
            for hook in hooks:
                hook.remove()
        return picture.float(), features


def check_decoder(generator: Generator, scheduler: str | None) -> None:
    """Raises ConfigError for a generator whose samples `Decoder` cannot decode; one denoiser call.

    ``scheduler`` is that of the teacher's runs, None its own.
    """
    pipeline = generator.pipeline
    blocks = getattr(getattr(getattr(pipeline, "vae", None), "decoder", None), "up_blocks", None)
    if not blocks:
        raise ConfigError(
            f"decoded compares pictures by the up blocks of an autoencoder's decoder, and {type(pipeline).__name__} "
            "has none; allowed: 0"
        )
    plan = SamplingPlan(steps=1, guidance_scale=1.0)
    with patched(pipeline, "scheduler", trailing(pipeline.scheduler, scheduler)):
        conditions = generator.conditions(1)
        sample = trajectory(generator, conditions, seeds=[0], plan=plan).states[-1]
        decoded = generator.sample(conditions, seeds=[0], plan=plan).latents
    expected = to_latents(sample, pipeline.vae.config).cpu().numpy()
    if decoded is None or decoded.shape != expected.shape or not np.allclose(decoded, expected, rtol=1e-2, atol=1e-2):
        raise ConfigError(
            f"decoded decodes x_0 / scaling_factor + shift_factor, and {type(pipeline).__name__} something else; "
            "allowed: 0"
        )
