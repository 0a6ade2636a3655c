"""Does an engine give the same pictures in optimum as in diffpress?

The two cannot share an environment (optimum-onnx needs an older transformers), so this runs twice:

    python benchmarks/optimum_parity.py make out/unet-int8/engine pictures.npy         # where diffpress is installed
    python benchmarks/optimum_parity.py compare out/unet-int8/engine pictures.npy      # where optimum-onnx is

``compare`` prints JSON. Differences are of pictures from the same noise, in steps of an 8-bit picture (1/255 of the
range). An environment for it: pip install torch optimum-onnx==0.1.0 transformers==4.57.6 diffusers==0.39.0 onnxruntime
"""

from __future__ import annotations

import argparse
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

PROMPTS = ("red apple", "grinning face", "dog face", "snowman")
VERSIONS = ("torch", "diffusers", "transformers", "onnxruntime", "optimum-onnx")


def draw(pipeline: Any, engine: Path) -> np.ndarray:
    """One picture for each prompt, float32 [n, h, w, 3] in [0, 1], as the engine's own plan says, seeds 0, 1, ..."""
    plan = json.loads((engine / "diffpress.json").read_text(encoding="utf-8"))["plan"]
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        output = pipeline(
            list(PROMPTS),
            num_inference_steps=plan["steps"],
            guidance_scale=plan["guidance_scale"],
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))],
            output_type="np",
        )
    return np.asarray(output.images, dtype=np.float32)


def make(engine: Path, pictures: Path) -> dict[str, Any]:
    """Draw with diffpress and keep the pictures."""
    from diffpress.export.load import load

    pipeline = load(engine)
    np.save(pictures, draw(pipeline, engine))
    return {"pictures": len(PROMPTS), "providers": pipeline.providers}


def compare(engine: Path, pictures: Path) -> dict[str, Any]:
    """Draw with optimum and measure how far its pictures are from the kept ones."""
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    pipeline = ORTStableDiffusionPipeline.from_pretrained(str(engine), provider="CPUExecutionProvider")
    expected, found = np.load(pictures).astype(np.float64), draw(pipeline, engine).astype(np.float64)
    if expected.shape != found.shape:
        raise SystemExit(f"{pictures} holds pictures of shape {expected.shape}, optimum draws {found.shape}")
    difference = 255 * np.abs(expected - found)
    others = 255 * np.abs(expected - np.roll(found, 1, axis=0))  # the scale: what two different pictures differ by
    return {
        "pictures": len(PROMPTS),
        "unit": "1/255 of the range",
        "max_difference": round(float(difference.max()), 4),
        "mean_difference": round(float(difference.mean()), 6),
        "mean_difference_of_other_pictures": round(float(others.mean()), 2),
        "versions": {name: metadata.version(name) for name in VERSIONS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("make", "compare"))
    parser.add_argument("engine", type=Path, help="an engine folder (DIR/engine of a run)")
    parser.add_argument("pictures", type=Path, help="where the pictures are kept, .npy")
    arguments = parser.parse_args()
    action = make if arguments.action == "make" else compare
    print(json.dumps(action(arguments.engine, arguments.pictures), indent=2))


if __name__ == "__main__":
    main()
