"""A report with realistic figures, made up, for tests and for looking at the page."""

import dataclasses

import numpy as np

from diffpress.compress.loading import load_recipe
from diffpress.compress.recipe import recipe_data
from diffpress.compress.report import (
    EngineFacts,
    Latency,
    LayerError,
    Metric,
    ModelFacts,
    PairedMetric,
    Parity,
    Provenance,
    Report,
    StageRun,
)
from diffpress.compress.verdict import judge
from diffpress.eval.statistics import Estimate

RECIPE = {
    "model": "models/emoji-dit",
    "evaluate": {"features": "models/emoji-features"},
    "gate": {"frechet_ratio": 1.05, "speedup": 3.0},
}
MEDIANS = {"engine": 231.0, "eager": 795.0, "medium": 502.0, "compiled": 372.0}


def estimate(
    value: float, spread: float, *, n: int = 1024, unit: str = "1", method: str = "basic bootstrap"
) -> Estimate:
    return Estimate(value=value, low=value - spread, high=value + spread, level=0.95, n=n, unit=unit, method=method)


def latencies(*, slow: float = 1.0, seed: int = 0, rounds: int = 30) -> tuple[Latency, ...]:
    """Timings of all candidates at both scopes; the engine ``slow`` times as slow as it should be."""
    random = np.random.default_rng(seed)
    rows = []
    for scope, factor in (("whole image", 1.0), ("denoiser call", 0.045)):
        eager = None
        for candidate in ("eager", "medium", "compiled", "engine"):
            centre = MEDIANS[candidate] * factor * (slow if candidate == "engine" else 1)
            samples = centre * random.lognormal(0, 0.03, rounds)
            median = float(np.median(samples))
            eager = eager or median
            ratio = estimate(eager / median, 0.04 * eager / median, n=rounds, unit="x")
            rows.append(
                Latency(
                    scope=scope,
                    candidate=candidate,
                    batch=4,
                    median=estimate(median, 0.012 * median, n=rounds, unit="ms", method="percentile bootstrap"),
                    p95_ms=float(np.percentile(samples, 95)),
                    samples_ms=tuple(samples.round(3).tolist()),
                    speedup=None if candidate == "eager" else ratio,
                    peak_memory_mib={"engine": 412.0, "eager": 655.0, "medium": 651.0, "compiled": 898.0}[candidate],
                )
            )
    return tuple(rows)


def fabricate(*, slow: float = 1.0, worse: float = 1.0, seed: int = 0) -> Report:
    """A report of an engine whose time is ``slow`` times, and Fréchet distance ``worse`` times, what they should be."""
    recipe = load_recipe(RECIPE, methods={})
    quality = (
        Metric(
            name="frechet",
            label="Fréchet distance",
            unit="1",
            direction="lower",
            n=1024,
            original=estimate(11.42, 0.44),
            engine=estimate(11.61 * worse, 0.46),
            difference=estimate(11.61 * worse - 11.42, 0.21),
            ratio=estimate(1.017 * worse, 0.018),
        ),
        Metric(
            name="kernel",
            label="KID ×1000",
            unit="1",
            direction="lower",
            n=1024,
            original=estimate(3.21, 0.35),
            engine=estimate(3.27, 0.36),
            difference=estimate(0.06, 0.09),
            ratio=estimate(1.019, 0.031),
        ),
        Metric(
            name="coverage",
            label="Coverage",
            unit="1",
            direction="higher",
            n=1024,
            original=estimate(0.912, 0.014),
            engine=estimate(0.908, 0.014),
            difference=estimate(-0.004, 0.007),
        ),
    )
    paired = (
        PairedMetric(
            name="psnr",
            label="PSNR",
            unit="dB",
            direction="higher",
            n=1024,
            mean=estimate(31.4, 0.3, unit="dB"),
            median=31.9,
            p5=24.2,
            p95=37.8,
        ),
        PairedMetric(
            name="ssim",
            label="SSIM",
            unit="1",
            direction="higher",
            n=1024,
            mean=estimate(0.961, 0.003),
            median=0.969,
            p5=0.893,
            p95=0.991,
        ),
        PairedMetric(
            name="relative_error",
            label="Latent relative error",
            unit="1",
            direction="lower",
            n=1024,
            mean=estimate(0.081, 0.004),
            median=0.069,
            p5=0.031,
            p95=0.192,
        ),
    )
    latency = latencies(slow=slow, seed=seed)
    return Report(
        verdict=judge(recipe.gate, quality=quality, paired=paired, latency=latency),
        model=ModelFacts(
            name="models/emoji-dit",
            revision=None,
            pipeline="DiTPipeline",
            denoiser="DiTTransformer2DModel",
            parameters=9_471_232,
            size_mib=24.1,
            hash="4be1" * 16,
        ),
        recipe=recipe_data(recipe),
        stages=(
            StageRun(
                name="quantize.smooth",
                config={"alpha": 0.5},
                seconds=6.2,
                peak_memory_mib=812.0,
                summary="36 linear layers smoothed; folded into 24 norms",
            ),
            StageRun(
                name="quantize.int8",
                config={"activations": "static", "observer": "mse"},
                seconds=21.7,
                peak_memory_mib=958.0,
                summary="74 of 77 layers in 8 bits; embeddings stay in float",
            ),
        ),
        engine=EngineFacts(
            target="onnxruntime",
            provider="CPUExecutionProvider",
            quantized_operators=74,
            float_operators=27,
            opset=20,
            size_mib=14.9,
            hash="9c0d" * 16,
            seconds=14.3,
        ),
        parity=Parity(max_relative_error=0.0041, limit=0.02, calls=16),
        quality=quality,
        paired=paired,
        latency=latency,
        sensitivity=tuple(
            LayerError(layer=f"transformer_blocks.{index % 12}.{kind}", error=float(0.09 * 0.83**index))
            for index, kind in enumerate(["ff.net.2", "attn1.to_out.0", "ff.net.0.proj", "attn1.to_q"] * 6)
        ),
        provenance=Provenance(
            diffpress="0.1.0",
            machine={
                "cpu": {"model": "AMD EPYC 9R45", "logical_cores": 2, "flags": ["avx512_vnni"]},
                "memory_mib": 24_000,
                "os": "Linux 6.1",
                "python": "3.11.9",
                "versions": {"torch": "2.13.0", "diffusers": "0.42.1", "onnxruntime": "1.31.1"},
                "threads": {"torch": 2},
                "gpu": None,
            },
            seeds={"pictures": 0, "calibration": 1_000_000},
            preprocessing="f00d" * 16,
            started="2026-11-20T10:00:00Z",
            finished="2026-11-20T10:02:41Z",
            command="diffpress run quickstart --output demo",
        ),
    )


def changed(report: Report, section: str, **values: object) -> Report:
    """``report`` with fields of one of its sections replaced."""
    return dataclasses.replace(report, **{section: dataclasses.replace(getattr(report, section), **values)})
