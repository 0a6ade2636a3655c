"""Evaluation: features, distances, paired fidelity, latency, intervals and the gate.

Works on arrays and callables alone. Names load on first use, so that importing this package stays light.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "distances": (
        "Moments density_coverage frechet_distance frechet_from_moments kernel_distance kernel_distance_subsets "
        "moments precision_recall"
    ),
    "features": "BatchedExtractor Extractor Features extract load_extractor load_reference read_images save_features",
    "fidelity": "lpips psnr relative_error ssim",
    "gate": "Criterion JointVerdict Verdict decide join judge",
    "latency": "PeakMemory Timing benchmark latency_ratios peak_memory size_on_disk speedups",
    "machine": "describe_machine",
    "metrics": "METRICS Metric",
    "replicates": (
        "Replicates density_coverage_replicates frechet_replicates kernel_replicates precision_recall_replicates"
    ),
    "statistics": (
        "Estimate frechet_interval interval mean_interval median_interval median_ratio_interval paired_difference "
        "paired_frechet_difference paired_frechet_ratio paired_ratio"
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
