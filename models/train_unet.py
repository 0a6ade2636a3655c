"""Train models/emoji-unet: a text-to-image latent U-Net in the stock StableDiffusionPipeline layout.

    python models/train_unet.py           # after train_autoencoder.py; about an hour on 2 cores

The tokenizer (CLIP's byte-level BPE) and the text encoder are trained here too, on the names of the emoji.
"""

from __future__ import annotations

import argparse
import json

import emoji
import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from pipelines import diffusion_loss, export, load_autoencoder, make_scheduler, train_latents, write_training
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from training import ROOT, WORK, fit, pick_device
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

FOLDER = ROOT / "emoji-unet"
CAPTION_DROP = 0.1
LENGTH = 24  # tokens of a prompt
WIDTH = 192  # of the text encoder


def train_tokenizer(captions: list[str], merges: int = 1200) -> CLIPTokenizer:
    """CLIP's vocabulary: each byte, each byte that ends a word, the merges, start and end of text."""
    blank = CLIPTokenizer()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = blank.backend_tokenizer.normalizer, blank.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + merges, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    pairs = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    words = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *dict.fromkeys("".join(pair) for pair in pairs)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=pairs, model_max_length=LENGTH)


def find_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """The one a resumed run began with: merges of equal count come in another order each time they are learned."""
    folder = WORK / "tokenizer"
    if not folder.exists():
        train_tokenizer(captions).save_pretrained(str(folder))
    return CLIPTokenizer.from_pretrained(str(folder))


class TextToImage(torch.nn.Module):
    """The two networks that are trained together."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                projection_dim=WIDTH,
                num_hidden_layers=3,
                num_attention_heads=6,
                max_position_embeddings=LENGTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            block_out_channels=(96, 128, 160),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=4,  # the number of heads, whatever diffusers calls it
            norm_num_groups=16,
        )
        self.unet.set_attn_processor(AttnProcessor())  # on the CPU the fused kernel's backward takes a third of a step
        self.text_encoder.set_attn_implementation("eager")
        torch.nn.init.zeros_(self.unet.conv_out.weight)

    def forward(self, x: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.unet(x, t, self.text_encoder(tokens).last_hidden_state).sample


def save(model: TextToImage, vae: AutoencoderKL, tokenizer: CLIPTokenizer, prompts: list[str]) -> None:
    """The tokenizer also as vocab.json and merges.txt, which transformers before 5 reads; all names as prompts.txt."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    export(pipeline, FOLDER)
    tokenizer.backend_tokenizer.model.save(str(FOLDER / "tokenizer"))
    (FOLDER / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    path = FOLDER / "text_encoder/config.json"
    config = json.loads(path.read_text()) | {"dtype": "float32"}  # loaded as diffusers loads the rest by default
    path.write_text(json.dumps(config, indent=2) + "\n")


def caption_choices(item: emoji.Emoji) -> list[str]:
    """The name mostly; sometimes with what kind of thing it is."""
    kind = item.subgroup.replace("-", " ")
    return [item.name, item.name, item.name, f"{item.name}, {kind}", f"{kind}: {item.name}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--peak", type=float, default=8e-4, help="highest learning rate")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = pick_device()
    latents, names, _ = train_latents()
    choices = [caption_choices(item) for item in names]
    tokenizer = find_tokenizer([text for texts in choices for text in texts])
    tokens = torch.stack(
        [tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids for texts in choices]
    ).to(device)  # [count, choices, LENGTH]
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids.to(device)
    prompts = [names[index].name for index in np.random.default_rng(0).permutation(len(names))]
    model, vae = TextToImage(tokenizer).to(device), load_autoencoder()
    alphas_cumprod = make_scheduler().alphas_cumprod.to(device)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        chosen = torch.from_numpy(rng.integers(len(names), size=args.batch)).to(device)
        variant = torch.from_numpy(rng.integers(len(latents), size=args.batch)).to(device)
        choice = torch.from_numpy(rng.integers(tokens.shape[1], size=args.batch)).to(device)
        drop = torch.from_numpy(rng.random((args.batch, 1)) < CAPTION_DROP).to(device)
        prompt = torch.where(drop, empty, tokens[chosen, choice])
        return diffusion_loss(lambda x, t: model(x, t, prompt), latents[variant, chosen], alphas_cumprod)

    provenance = fit(
        model,
        loss_of,
        name="unet",
        steps=args.steps,
        peak=args.peak,
        export=lambda: save(model, vae, tokenizer, prompts),
    )
    write_training(FOLDER, provenance)
    print(provenance)


if __name__ == "__main__":
    main()
