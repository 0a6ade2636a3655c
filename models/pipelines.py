"""What the two generators share: latents, the diffusion loss, the scheduler, and how a pipeline is written."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import emoji
import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DPMSolverMultistepScheduler
from training import WORK, pick_device, write_provenance

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
VARIANTS = 8  # augmented copies of each picture whose latents are kept


def make_scheduler() -> DPMSolverMultistepScheduler:
    """Deterministic second-order solver; 20 steps are enough. (The offset, unused here, is what pipelines expect.)"""
    return DPMSolverMultistepScheduler(
        **SCHEDULE, prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=1
    )


def load_autoencoder() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(WORK / "autoencoder").eval()


def write_training(folder: Path, provenance: dict) -> None:
    """With that of the autoencoder, whose weights lie in the same pipeline."""
    autoencoder = json.loads((WORK / "autoencoder/training.json").read_text())
    write_provenance(folder, provenance | {"autoencoder": autoencoder})


@torch.no_grad()
def train_latents(seed: int = 0) -> tuple[torch.Tensor, list[emoji.Emoji], list[str]]:
    """Latents [variant, count, 4, 16, 16] of the train split, its emoji, and the classes.

    Variant 0 is the plain picture; the others are flipped and shifted. Kept in ``work/latents.pt``.
    """
    images, names, classes = emoji.load()
    train = [index for index, item in enumerate(names) if not item.held_out]
    images, names = images[train], [names[index] for index in train]
    path, device = WORK / "latents.pt", pick_device()
    if not path.exists() or path.stat().st_mtime < (WORK / "autoencoder/config.json").stat().st_mtime:
        vae, rng = load_autoencoder().to(device), np.random.default_rng(seed)
        flips = np.array([item.may_flip for item in names])
        variants = [images, *(emoji.augment(images, flips, rng) for _ in range(VARIANTS - 1))]
        parts = [part for variant in variants for part in np.array_split(variant, len(variant) // 64)]
        latents = torch.cat([vae.encode(to_tensor(part, device)).latent_dist.mode().cpu() for part in parts])
        torch.save(latents.unflatten(0, (VARIANTS, -1)), path)
    return torch.load(path, weights_only=True).to(device), names, classes


def to_tensor(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 [n, h, w, 3] to float [n, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def diffusion_loss(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x_0: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """mean_t min(SNR + 1, 6) / (SNR + 1) * |v_hat - v|^2 with v = sqrt(a) eps - sqrt(1 - a) x_0.

    The cap takes weight from the nearly clean steps, where v is noise that nobody sees (Hang et al. 2023, gamma 5).
    Timesteps are stratified over the batch.
    """
    n = len(x_0)
    t = ((torch.randperm(n) + torch.rand(n)) / n * len(alphas_cumprod)).long().to(x_0.device)
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    noise = torch.randn_like(x_0)
    v_hat = predict(a.sqrt() * x_0 + (1 - a).sqrt() * noise, t)
    error = (v_hat.float() - (a.sqrt() * noise - (1 - a).sqrt() * x_0)).square().mean((1, 2, 3))
    return (error * ((6 * (1 - a.flatten())).clamp(max=1))).mean()  # SNR + 1 = 1 / (1 - a)


def export(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write ``pipeline`` in fp16 into ``folder``, part by part, beside what else lies there.

    The pipeline's networks are replaced by fp16 copies; the caller's own stay as they are.
    """
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    pipeline.register_modules(**{name: copy.deepcopy(part).half() for name, part in networks.items()})
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.save_pretrained(fresh)
    for path in fresh.glob("*/config.json"):  # where a part was loaded from says nothing elsewhere
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")
    folder.mkdir(exist_ok=True)
    for part in sorted(fresh.iterdir()):
        if (folder / part.name).is_dir():
            shutil.rmtree(folder / part.name)
        part.replace(folder / part.name)
    fresh.rmdir()
