"""Train models/emoji-dit: a class-conditional latent diffusion transformer in the stock DiTPipeline layout.

python models/train_dit.py            # after train_autoencoder.py; about 40 minutes on 2 cores
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from pipelines import diffusion_loss, export, load_autoencoder, make_scheduler, train_latents, write_training
from training import ROOT, fit, pick_device

FOLDER = ROOT / "emoji-dit"
NULL = 1000  # DiTPipeline's null class is fixed
LABEL_DROP = 0.1


def build() -> DiTTransformer2DModel:
    """Zero-initialised adaLN gates and output (Peebles & Xie 2023), so that each block starts as the identity."""
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=NULL,
    )
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
        block.norm1.emb.class_embedder.dropout_prob = 0.0  # it drops in each block on its own; we drop in the batch
        block.attn1.set_processor(AttnProcessor())  # on the CPU the fused kernel's backward takes half of a step
        torch.nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
    for layer in (model.proj_out_1, model.proj_out_2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return model


def save(model: DiTTransformer2DModel, vae: AutoencoderKL, classes: list[str]) -> None:
    export(DiTPipeline(transformer=model, vae=vae, scheduler=make_scheduler()), FOLDER)
    index = json.loads((FOLDER / "model_index.json").read_text())
    index["id2label"] = dict(enumerate(classes))
    (FOLDER / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--peak", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--compile", action="store_true", help="torch.compile; needs a C++ compiler")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = pick_device()
    latents, names, classes = train_latents()
    labels = torch.tensor([classes.index(item.subgroup) for item in names], device=device)
    model, vae = build().to(device), load_autoencoder()
    forward = torch.compile(model) if args.compile else model
    alphas_cumprod = make_scheduler().alphas_cumprod.to(device)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        chosen = torch.from_numpy(rng.integers(len(names), size=args.batch)).to(device)
        variant = torch.from_numpy(rng.integers(len(latents), size=args.batch)).to(device)
        drop = torch.from_numpy(rng.random(args.batch) < LABEL_DROP).to(device)
        label = labels[chosen].masked_fill(drop, NULL)
        return diffusion_loss(
            lambda x, t: forward(x, timestep=t, class_labels=label).sample, latents[variant, chosen], alphas_cumprod
        )

    provenance = fit(
        model, loss_of, name="dit", steps=args.steps, peak=args.peak, export=lambda: save(model, vae, classes)
    )
    write_training(FOLDER, provenance)
    print(provenance)


if __name__ == "__main__":
    main()
