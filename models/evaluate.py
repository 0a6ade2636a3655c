"""Score the generators, and write ``grid.png``, ``scores.json`` and the model card ``README.md`` of each model.

python models/evaluate.py                     # both generators and the classifier; about 6 minutes on 2 cores
python models/evaluate.py dit --guidance 2    # one of them, at another guidance scale
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import emoji
import numpy as np
import torch
from diffusers import DiffusionPipeline
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, ImageDraw, ImageFont
from safetensors.numpy import load_file
from scipy.spatial.distance import cdist
from scipy.stats import binomtest
from training import ROOT, pick_device
from transformers import ResNetForImageClassification

from diffpress.eval.distances import density_coverage, frechet_distance
from diffpress.eval.extractors import load_extractor

FEATURES = ROOT / "emoji-features"
GUIDANCE = {"dit": 3.0, "unet": 3.0}
STEPS, SEED = 20, 2024


def generate(pipeline: DiffusionPipeline, conditions: list, guidance: float, batch: int = 64) -> np.ndarray:
    """Images uint8 [n, 64, 64, 3]; ``conditions`` are class numbers or prompts. Batch k is drawn from seed + k."""
    parts = []
    for start in range(0, len(conditions), batch):
        output = pipeline(
            conditions[start : start + batch],
            guidance_scale=guidance,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(SEED + start // batch),
            output_type="np",
        )
        parts.append((output.images * 255).round().astype(np.uint8))
    return np.concatenate(parts)


def agreement(features: np.ndarray, labels: np.ndarray) -> dict:
    """Share of images that the classifier puts into the subgroup asked for, by image and as the mean over subgroups."""
    classifier = ResNetForImageClassification.from_pretrained(FEATURES).classifier
    with torch.no_grad():
        hit = classifier(torch.from_numpy(features)[..., None, None]).argmax(1).numpy() == labels
    low, high = binomtest(int(hit.sum()), len(hit)).proportion_ci(method="wilson")
    by_class = [hit[labels == label].mean() for label in np.unique(labels)]
    return {
        "images": len(hit),
        "agreement": round(hit.mean(), 4),
        "95 % interval": [round(low, 4), round(high, 4)],
        "subgroups": len(by_class),
        "mean over subgroups": round(float(np.mean(by_class)), 4),
    }


def nearest(x: np.ndarray, y: np.ndarray) -> float:
    """Median over x of the distance to the nearest row of y."""
    return round(float(np.median(cdist(x, y).min(1))), 3)


def flat(images: np.ndarray) -> np.ndarray:
    """Pixels so that the Euclidean distance of two pictures is their RMS difference in grey levels."""
    return images.reshape(len(images), -1) / np.sqrt(images[0].size)


def score(generated: np.ndarray, features: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> dict:
    """Distances of the generated set, and the same of real pictures beside them."""
    reference = load_file(FEATURES / "reference.safetensors")
    real = reference["train"][np.random.default_rng(SEED).permutation(len(train))[: len(features)]]
    return {
        "generated": len(generated),
        "held-out": len(held_out),
        "train": len(train),
        "Fréchet distance to held-out": round(frechet_distance(features, reference["held_out"]), 3),
        "floor: as many train pictures to held-out": round(frechet_distance(real, reference["held_out"]), 3),
        "Fréchet distance to train": round(frechet_distance(features, reference["train"]), 3),
        "coverage of train (k = 5)": round(density_coverage(features, reference["train"]).coverage, 4),
        "coverage of held-out (k = 5)": round(density_coverage(features, reference["held_out"]).coverage, 4),
        "density on train (k = 5)": round(density_coverage(features, reference["train"]).density, 4),
        "nearest train picture, features: generated": nearest(features, reference["train"]),
        "nearest train picture, features: held-out": nearest(reference["held_out"], reference["train"]),
        "nearest train picture, RMS grey levels: generated": nearest(flat(generated), flat(train)),
        "nearest train picture, RMS grey levels: held-out": nearest(flat(held_out), flat(train)),
    }


def grid(images: np.ndarray, captions: list[str], columns: int = 8) -> Image.Image:
    """Pictures with their captions, in tiles of 104 x 82 pixels."""
    font, rows = ImageFont.load_default(10), -(-len(images) // columns)
    canvas = Image.new("RGB", (104 * columns, 82 * rows), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = 104 * (index % columns), 82 * (index // columns)
        canvas.paste(Image.fromarray(image), (x + 20, y + 2))
        text = caption if len(caption) <= 19 else caption[:18] + "…"
        draw.text((x + 52, y + 73), text, fill="#555555", font=font, anchor="mm")
    return canvas


def evaluate(kind: str, samples: int, guidance: float) -> None:
    """All scores of one generator, from conditions drawn without replacement from the train split."""
    folder = ROOT / f"emoji-{kind}"
    images, names, classes = emoji.load()
    held_out = np.array([item.held_out for item in names])
    labels = np.array([classes.index(item.subgroup) for item in names])
    pipeline = DiffusionPipeline.from_pretrained(folder).to(pick_device())
    pipeline.set_progress_bar_config(disable=True)
    extract = load_extractor(str(FEATURES))

    def condition(index: int) -> int | str:
        return int(labels[index]) if kind == "dit" else names[index].name

    drawn = np.random.default_rng(SEED).permutation(np.flatnonzero(~held_out))[:samples]
    generated = generate(pipeline, [condition(index) for index in drawn], guidance)
    features = extract(generated)
    scores = {"steps": STEPS, "guidance": guidance, "seed": SEED}
    scores |= score(generated, features, images[~held_out], images[held_out])
    scores["label agreement"] = agreement(features, labels[drawn])
    scores["label agreement of the real train pictures"] = agreement(extract(images[drawn]), labels[drawn])
    scores["label agreement of the real held-out pictures"] = agreement(extract(images[held_out]), labels[held_out])
    if kind == "unet":
        unseen = generate(pipeline, [condition(index) for index in np.flatnonzero(held_out)], guidance)
        scores["label agreement on held-out names"] = agreement(extract(unseen), labels[held_out])
    captions = [names[index].subgroup if kind == "dit" else names[index].name for index in drawn[:64]]
    picture = grid(generated[:64], captions).convert("P", palette=Image.Palette.ADAPTIVE)  # a third of the size
    picture.save(folder / "grid.png", optimize=True)
    (folder / "scores.json").write_text(json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(scores, indent=1, ensure_ascii=False))


def write_card(kind: str) -> None:
    """``README.md`` of a model from ``card.md.j2``, its ``training.json`` and, for a generator, ``scores.json``."""
    folder = ROOT / f"emoji-{kind}"
    environment = Environment(
        loader=FileSystemLoader(ROOT), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    scores = folder / "scores.json"
    text = environment.get_template("card.md.j2").render(
        kind=kind,
        training=json.loads((folder / "training.json").read_text()),
        scores=json.loads(scores.read_text()) if scores.exists() else {},
        megabytes=sum(path.stat().st_size for path in weight_files(folder)) / 1e6,
    )
    (folder / "README.md").write_text(text.strip() + "\n")


def weight_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.safetensors") if path.name != "reference.safetensors"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=["dit", "unet", "features"], metavar="dit|unet|features")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--guidance", type=float, help=f"default: {GUIDANCE}")
    args = parser.parse_args()
    for kind in args.kinds:
        if kind in GUIDANCE:
            evaluate(kind, args.samples, args.guidance or GUIDANCE[kind])
        write_card(kind)


if __name__ == "__main__":
    main()
