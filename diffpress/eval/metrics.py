"""What is measured: name, unit and direction of every metric, in one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Direction = Literal["lower", "higher"]
"""Which way is better."""


@dataclass(frozen=True)
class Metric:
    """One metric. ``source`` is the paper or definition it follows."""

    name: str
    """Key in reports and recipes."""
    title: str
    """What people read."""
    unit: str
    """Unit of the figure; ``1`` for a pure number."""
    direction: Direction
    """Which way is better."""
    source: str
    """Paper or definition."""


_ALL = (
    Metric("frechet", "Fréchet distance", "feature²", "lower", "Heusel et al. 2017"),
    Metric("frechet_unbiased", "Fréchet distance, n → ∞", "feature²", "lower", "frechet, jackknifed (Quenouille 1956)"),
    Metric("kernel", "kernel distance (KID)", "1", "lower", "Bińkowski et al. 2018"),
    Metric("precision", "precision", "share", "higher", "Kynkäänniemi et al. 2019"),
    Metric("recall", "recall", "share", "higher", "Kynkäänniemi et al. 2019"),
    Metric("density", "density", "1", "higher", "Naeem et al. 2020"),
    Metric("coverage", "coverage", "share", "higher", "Naeem et al. 2020"),
    Metric("psnr", "PSNR", "dB", "higher", "10 log10(range² / mean squared error)"),
    Metric("ssim", "SSIM", "1", "higher", "Wang et al. 2004"),
    Metric("lpips", "LPIPS", "1", "lower", "Zhang et al. 2018"),
    Metric("relative_error", "relative error", "1", "lower", "‖a − b‖ / ‖a‖"),
    Metric("latency", "latency", "ms", "lower", "wall clock, median"),
    Metric("speedup", "speed-up", "x", "higher", "baseline's median / candidate's median"),
    Metric("throughput", "throughput", "images/s", "higher", "batch / median latency"),
    Metric("peak_memory", "peak memory", "MiB", "lower", "resident set, sampled"),
    Metric("peak_device_memory", "peak device memory", "MiB", "lower", "torch.cuda.max_memory_allocated"),
    Metric("size", "size on disk", "MiB", "lower", "sum of file sizes"),
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
"""Every metric by name."""
