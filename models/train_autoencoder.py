"""Train the autoencoder that both generators share: AutoencoderKL f4, 64x64x3 to 16x16x4 latents.

    python models/train_autoencoder.py            # about 15 minutes on 2 cores

The channels of a plain KL autoencoder have unequal means and spreads, and diffusers pipelines know one scaling factor
only. So the 1x1 convolutions at the latent end take in a standardization of each channel: latents come out with mean 0
and deviation 1, exactly, and ``scaling_factor`` is 1.
"""

from __future__ import annotations

import argparse

import emoji
import numpy as np
import torch
from diffusers import AutoencoderKL
from pipelines import to_tensor
from torch.nn import functional as F
from training import WORK, fit, pick_device, write_provenance


def build() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def gradient_l1(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean |d(x - y)| along both image axes: keeps edges sharp."""
    d = x - y
    return (d[..., 1:, :] - d[..., :-1, :]).abs().mean() + (d[..., :, 1:] - d[..., :, :-1]).abs().mean()


@torch.no_grad()
def standardize(vae: AutoencoderKL, images: np.ndarray) -> None:
    """Fold z' = (z - mean) / deviation, by channel, into quant_conv, and its inverse into post_quant_conv."""
    device = next(vae.parameters()).device
    moments = torch.cat([vae.encode(to_tensor(part, device)).latent_dist.mode() for part in np.array_split(images, 20)])
    mean, deviation = moments.mean((0, 2, 3)), moments.std((0, 2, 3))
    out, back = vae.quant_conv, vae.post_quant_conv
    out.weight[:4] /= deviation[:, None, None, None]
    out.bias[:4] = (out.bias[:4] - mean) / deviation
    out.bias[4:] -= 2 * deviation.log()  # the second half is the log variance
    back.bias += torch.einsum("oi,i->o", back.weight[..., 0, 0], mean)
    back.weight *= deviation[None, :, None, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()

    device = pick_device()
    torch.manual_seed(0)
    images, names, _ = emoji.load()
    train = np.array([index for index, item in enumerate(names) if not item.held_out])
    flips = np.array([item.may_flip for item in names])
    vae = build().to(device, memory_format=torch.channels_last)
    torch.nn.init.constant_(vae.quant_conv.bias[4:], -6.0)  # little noise at first

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        chosen = rng.choice(train, args.batch)
        x = to_tensor(emoji.augment(images[chosen], flips[chosen], rng), device)
        posterior = vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist
        y = vae.decode(posterior.sample()).sample.float()
        return F.l1_loss(y, x) + F.mse_loss(y, x) + 0.5 * gradient_l1(y, x) + 1e-3 * posterior.kl().mean() / 256

    provenance = fit(vae, loss_of, name="autoencoder", steps=args.steps, peak=1e-3, ema_decay=0.99)
    vae.to(memory_format=torch.contiguous_format)
    standardize(vae, images[train])
    with torch.no_grad():
        x = to_tensor(images[~np.isin(np.arange(len(names)), train)], device)
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
    psnr = float((10 * torch.log10(4 / (x - y).square().mean((1, 2, 3)))).mean())
    if psnr < 20:
        raise SystemExit(f"held-out PSNR is {psnr:.1f} dB, a working autoencoder has 27: it has not learned")
    provenance["held-out PSNR, dB"] = round(psnr, 2)
    vae.save_pretrained(WORK / "autoencoder")
    write_provenance(WORK / "autoencoder", provenance)
    print(provenance)


if __name__ == "__main__":
    main()
