"""Train models/emoji-features: a small ResNet that names the subgroup of an emoji, for feature distances.

    python models/train_features.py       # after train_autoencoder.py; about 5 minutes on 2 cores

It sees the train split only, half of it through the autoencoder, so that a decoded picture is no surprise to it.
Then it writes the features of the plain train and held-out renders into ``reference.safetensors``.
"""

from __future__ import annotations

import argparse
import json

import emoji
import numpy as np
import torch
from pipelines import load_autoencoder, to_tensor
from torch.nn import functional as F
from training import ROOT, fit, pick_device, write_provenance
from transformers import ResNetConfig, ResNetForImageClassification

from diffpress.eval.extractors import load_extractor
from diffpress.eval.features import extract, save_features

FOLDER = ROOT / "emoji-features"
SIZE, MEAN, STD = 64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # so the network's input is [-1, 1], as the autoencoder's


def build(classes: list[str]) -> ResNetForImageClassification:
    config = ResNetConfig(
        embedding_size=48,
        hidden_sizes=[48, 96, 160, 64],  # 16, 8, 4 and 2 pixels wide; the pooled feature has 64 values
        depths=[1, 2, 2, 1],
        layer_type="basic",
        id2label=dict(enumerate(classes)),
        label2id={name: index for index, name in enumerate(classes)},
    )
    return ResNetForImageClassification(config)


def jitter(x: torch.Tensor, may_flip: torch.Tensor) -> torch.Tensor:
    """Random scale, turn, shift, flip, colour, blur and noise; [n, 3, h, w] in [-1, 1], the outside white."""
    n, device = len(x), x.device
    scale = 1 / (1 + 0.15 * (2 * torch.rand(n, device=device) - 1))
    angle = 0.15 * torch.randn(n, device=device)
    flip = torch.where(may_flip & (torch.rand(n, device=device) < 0.5), -1.0, 1.0)
    shift = 0.12 * (2 * torch.rand(n, 2, 1, device=device) - 1)
    rows = [angle.cos() * scale * flip, -angle.sin() * scale, angle.sin() * scale * flip, angle.cos() * scale]
    theta = torch.cat([torch.stack(rows, 1).view(n, 2, 2), shift], 2)  # [n, 2, 3]
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x - 1, grid, align_corners=False) + 1
    gain = 1 + 0.15 * torch.randn(n, 3, 1, 1, device=device) * torch.rand(n, 1, 1, 1, device=device)
    x = (x - 1) * gain + 1  # keeps white white
    blur = 0.7 * torch.rand(n, 1, 1, 1, device=device) ** 2
    x = x + blur * (F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x)
    return x + 0.1 * torch.rand(n, 1, 1, 1, device=device) ** 2 * torch.randn_like(x)


@torch.no_grad()
def reconstruct(images: torch.Tensor) -> torch.Tensor:
    """Through the autoencoder and back, clamped to what a picture can hold."""
    vae = load_autoencoder().to(images.device)
    parts = [vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1) for part in images.split(64)]
    return torch.cat(parts)


@torch.no_grad()
def evaluate(model: ResNetForImageClassification, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled features [n, 64] and logits [n, classes] in float32."""
    features = torch.cat([model.resnet(part).pooler_output.flatten(1) for part in x.split(128)])
    return features, model.classifier(features[..., None, None])


def write_preprocessor() -> None:
    """In the format of transformers' ViTImageProcessor: resize, then x / 255, then (x - mean) / std."""
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": SIZE, "width": SIZE},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    (FOLDER / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


def write_reference(images: np.ndarray, held_out: np.ndarray) -> None:
    """Features of the plain renders, with the identity of the saved classifier."""
    extractor = load_extractor(str(FOLDER))
    parts = {"train": images[~held_out], "held_out": images[held_out]}
    found = {name: extract(extractor, part, source="renders of Noto Color Emoji") for name, part in parts.items()}
    save_features(FOLDER / "reference.safetensors", found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()

    torch.manual_seed(0)
    device = pick_device()
    images, names, classes = emoji.load(SIZE)
    labels = torch.tensor([classes.index(item.subgroup) for item in names], device=device)
    flips = torch.tensor([item.may_flip for item in names], device=device)
    held_out = torch.tensor([item.held_out for item in names], device=device)
    x = to_tensor(images, device)
    y, may_flip = labels[~held_out], flips[~held_out]
    sources = torch.stack([x[~held_out], reconstruct(x[~held_out])])
    model = build(classes).to(device, memory_format=torch.channels_last)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        chosen = torch.from_numpy(rng.integers(len(y), size=args.batch)).to(device)
        source = torch.from_numpy(rng.integers(2, size=args.batch)).to(device)
        picture = jitter(sources[source, chosen], may_flip[chosen])
        other, share = torch.randperm(args.batch, device=device), float(rng.beta(0.2, 0.2))  # mixup
        mixed = (share * picture + (1 - share) * picture[other]).contiguous(memory_format=torch.channels_last)
        logits = model(mixed).logits.float()
        return sum(
            weight * F.cross_entropy(logits, target, label_smoothing=0.1)
            for weight, target in ((share, y[chosen]), (1 - share, y[chosen][other]))
        )

    provenance = fit(model, loss_of, name="features", steps=args.steps, peak=2e-3, weight_decay=0.05, ema_decay=0.99)
    model.to(memory_format=torch.contiguous_format)
    _, logits = evaluate(model, x)
    hit = (logits.argmax(1) == labels).float()
    seen = (evaluate(model, sources[1])[1].argmax(1) == y).float()
    provenance |= {
        "held-out accuracy": round(hit[held_out].mean().item(), 4),
        "train accuracy": round(hit[~held_out].mean().item(), 4),
        "train accuracy through the autoencoder": round(seen.mean().item(), 4),
    }
    model.save_pretrained(FOLDER)
    write_preprocessor()
    write_reference(images, held_out.numpy())
    write_provenance(FOLDER, provenance)
    print(provenance)


if __name__ == "__main__":
    main()
