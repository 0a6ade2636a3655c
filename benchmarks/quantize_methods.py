"""Each quantization method added one at a time, through the built engine: latent error, Fréchet distance, latency.

    python benchmarks/quantize_methods.py dit-int8 benchmarks/results/quantize-dit.json
    python benchmarks/quantize_methods.py unet-int8 benchmarks/results/quantize-unet.json evaluate.samples=512

The first argument is a shipped recipe; its stages are replaced by each variant's, everything else stays. Variants run
in one folder, so that the original's pictures, the same for all, are drawn once. Further arguments are overrides;
``--variants`` measures only those whose name contains one of the given words.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import yaml

import diffpress
from diffpress.compress.progress import RichProgress
from diffpress.compress.recipe import shipped_recipes
from diffpress.eval.machine import describe_machine


def int8(**settings: object) -> dict:
    return {"quantize.int8": settings}


SMOOTH = {"quantize.smooth": {"alpha": 0.5}}
SEARCH = {"quantize.smooth": {"alpha": "search"}}
REPARAM: dict = {"quantize.reparam": {}}
WHOLE = {"observer": "mse", "split_skips": False}  # convolutions read a skip concatenation as one tensor
GPTQ = {"observer": "mse", "rounding": "gptq", "bias_correction": True}
VARIANTS: dict[str, list[dict]] = {
    "min-max": [int8(observer="minmax", split_skips=False)],
    "range by squared error": [int8(**WHOLE)],
    "+ smoothing, alpha 0.5": [SMOOTH, int8(**WHOLE)],
    "+ alpha searched": [SEARCH, int8(**WHOLE)],
    "+ skips split": [SEARCH, int8(observer="mse")],
    "+ GPTQ": [SEARCH, int8(observer="mse", rounding="gptq")],
    "+ bias correction": [SEARCH, int8(**GPTQ)],
    "+ least-squares repair": [SEARCH, int8(refit=True, **GPTQ)],
    "all, range min-max": [SEARCH, int8(refit=True, **GPTQ | {"observer": "minmax"})],
    "all, reparameterized first": [REPARAM, SEARCH, int8(refit=True, **GPTQ)],
    "reparameterization alone": [REPARAM, int8(observer="mse")],
    "saliency, alpha 0.5": [{"quantize.smooth": {"alpha": 0.5, "importance": "saliency"}}, int8(**WHOLE)],
    "range by percentile 99.99": [int8(observer="percentile", split_skips=False)],
    "range by entropy": [int8(observer="entropy", split_skips=False)],
    "dynamic": [int8(activations="dynamic")],
    "dynamic, smoothing": [SEARCH, int8(activations="dynamic")],
}


def measure(recipe: dict, variant: str, overrides: list[str], folder: Path) -> dict:
    from rich.console import Console

    changed = recipe | {"stages": VARIANTS[variant]}
    progress = RichProgress(Console(stderr=True))
    report = diffpress.compress(recipe["model"], changed, folder, overrides=overrides, progress=progress).report
    whole = report.timing("engine")
    assert whole is not None
    rows = {row.name: row for row in (*report.quality, *report.paired)}
    return {
        "seconds of the stages": sum(stage.seconds for stage in report.stages),
        "quantized operators": report.engine.quantized_operators,
        "latent relative error": dataclasses.asdict(rows["relative_error"].mean),
        "Fréchet ratio": dataclasses.asdict(rows["frechet"].ratio) if rows["frechet"].ratio else None,
        "Fréchet": dataclasses.asdict(rows["frechet"].engine),
        "Fréchet of the original": dataclasses.asdict(rows["frechet"].original),
        "PSNR": dataclasses.asdict(rows["psnr"].mean),
        "speed-up of a whole image": dataclasses.asdict(whole.speedup) if whole.speedup else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=sorted(shipped_recipes()))
    parser.add_argument("output", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--variants", nargs="+", default=[""], metavar="WORD")
    args = parser.parse_args()
    recipe = yaml.safe_load(shipped_recipes()[args.recipe].read_text(encoding="utf-8")) | {"gate": {}}
    recipe["evaluate"]["baselines"] = ["eager"]
    dynamic = recipe["export"]["target"] == "onnxruntime"
    with tempfile.TemporaryDirectory() as folder:
        found = {
            variant: measure(recipe, variant, args.overrides, Path(folder) / "run")
            for variant in VARIANTS
            if (dynamic or "dynamic" not in variant) and any(word in variant for word in args.variants)
        }
    facts = {"recipe": recipe, "overrides": args.overrides, "machine": describe_machine(), "variants": found}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
