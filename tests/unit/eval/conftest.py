from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from unittest.mock import MagicMock

import numpy as np
import pytest


class _StandIn(types.ModuleType):
    """torchvision for the moment of an import: torch-fidelity imports it at its top but computes no metric with it."""

    __path__ = ()

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


@pytest.fixture(scope="session")
def fidelity_package():
    """torch-fidelity's modules for metrics on features, and its Inception."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed")
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("torchvision") is None:
            for name in (
                "torchvision",
                "torchvision.transforms",
                "torchvision.transforms.functional",
                "torchvision.datasets",
            ):
                patch.setitem(sys.modules, name, _StandIn(name))
        names = ("metric_fid", "metric_kid", "metric_prc", "feature_extractor_inceptionv3")
        return types.SimpleNamespace(**{name: importlib.import_module(f"torch_fidelity.{name}") for name in names})


@pytest.fixture
def two_sets() -> tuple[np.ndarray, np.ndarray]:
    """Features that differ in mean, spread and correlation."""
    random = np.random.default_rng(0)
    mixing = random.normal(size=(16, 16)) / 4
    x = random.normal(size=(300, 16)) @ mixing + 0.3
    y = random.normal(size=(260, 16)) * 0.4
    return x, y
