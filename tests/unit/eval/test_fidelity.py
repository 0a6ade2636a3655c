from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from diffpress.errors import CheckpointError, ConfigError, MissingDependencyError
from diffpress.eval import fidelity
from diffpress.eval.fidelity import lpips, psnr, relative_error, ssim


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    smooth = np.cumsum(random.normal(size=(3, 24, 30, 3)), axis=1)
    original = (255 * (smooth - smooth.min()) / np.ptp(smooth)).astype(np.uint8)
    noise = random.normal(scale=[[[[4]]], [[[12]]], [[[30]]]], size=original.shape)
    return original, np.clip(original + noise, 0, 255).round().astype(np.uint8)


def channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.astype(np.float64).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("chunk", [1 << 22, 1])
def test_psnr_matches_torchmetrics(pair, monkeypatch, chunk):
    functional = pytest.importorskip("torchmetrics.functional.image")
    monkeypatch.setattr(fidelity, "_CHUNK_VALUES", chunk)
    a, b = pair
    expected = functional.peak_signal_noise_ratio(
        channels_first(b), channels_first(a), data_range=255.0, reduction="none", dim=(1, 2, 3)
    )
    np.testing.assert_allclose(psnr(a, b, data_range=255), expected.numpy(), rtol=1e-6)
    assert np.abs(psnr(a, b, data_range=1) - expected.numpy()).min() > 1  # control: another range
    np.testing.assert_array_equal(psnr(a, a, data_range=255), 100.0)


def test_psnr_of_known_noise():
    a = np.zeros((2, 8, 8, 3))
    np.testing.assert_allclose(psnr(a, a + 0.1, data_range=1), 20.0)
    np.testing.assert_allclose(psnr(a, a + 0.1, data_range=2), 20.0 + 20 * np.log10(2))


@pytest.mark.parametrize("chunk", [1 << 22, 1])
def test_ssim_matches_torchmetrics(pair, monkeypatch, chunk):
    functional = pytest.importorskip("torchmetrics.functional.image")
    monkeypatch.setattr(fidelity, "_CHUNK_VALUES", chunk)
    a, b = pair
    whole, image = functional.structural_similarity_index_measure(
        channels_first(b), channels_first(a), data_range=255.0, reduction="none", return_full_image=True
    )
    expected = image[..., 5:-5, 5:-5].mean(dim=(1, 2, 3)).numpy()  # torchmetrics averages over its padding, too
    assert np.abs(ssim(a, b, data_range=255) - whole.numpy()).min() > 1e-3
    np.testing.assert_allclose(ssim(a, b, data_range=255), expected, atol=1e-6)
    assert np.abs(ssim(a, b, data_range=1) - expected).max() > 1e-3  # control: another range
    np.testing.assert_allclose(ssim(a, a, data_range=255), 1.0)
    assert (np.diff(ssim(a, b, data_range=255)) < 0).all()  # more noise, less alike


def test_relative_error_of_a_scaled_sample():
    a = np.random.default_rng(1).normal(size=(4, 4, 8, 8)).astype(np.float16)
    np.testing.assert_allclose(relative_error(a, a.astype(np.float64) * 1.25), 0.25, rtol=1e-6)
    np.testing.assert_allclose(relative_error(a.astype(np.float64) * 1.25, a), 0.2, rtol=1e-6)  # not symmetric


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda a: psnr(a, a[:1], data_range=1), "expected two equal ones"),
        (lambda a: psnr(a, a, data_range=0), "data_range is 0"),
        (lambda a: psnr(a, a * np.nan, data_range=1), "NaN"),
        (lambda a: ssim(a[:, :10], a[:, :10], data_range=1), "11 x 11"),
        (lambda a: ssim(a[0], a[0], data_range=1), "11 x 11"),
        (lambda a: relative_error(a * 0, a), "all zero"),
        (lambda a: psnr(a[:0], a[:0], data_range=1), "at least 1"),
        (lambda a: lpips(a, a, weights="w.pth", net="squeeze"), "allowed: alex, vgg"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ConfigError, match=words):
        call(np.ones((2, 16, 16, 3)))


def alexnet_features():
    """The convolutional part of torchvision's AlexNet, by the numbers of the paper."""
    nn = torch.nn
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    ).eval()


@pytest.fixture
def package(monkeypatch):
    """torchmetrics' port of the package, under the package's name; its linear layers are the published ones."""
    port = pytest.importorskip("torchmetrics.functional.image.lpips")
    monkeypatch.setattr(port, "_get_tv_model_features", lambda net, pretrained: alexnet_features())
    module = types.ModuleType("lpips")
    module.__spec__ = importlib.machinery.ModuleSpec("lpips", None)

    def make(*, net, pnet_rand, verbose):
        assert pnet_rand  # else the package downloads
        return port._LPIPS(net=net, pnet_rand=pnet_rand)

    module.LPIPS = make
    monkeypatch.setitem(sys.modules, "lpips", module)
    return Path(port.__file__).parent / "lpips_models" / "alex.pth"


@pytest.fixture
def backbone(tmp_path):
    """(random AlexNet, its file in torchvision's layout)."""
    torch.manual_seed(0)
    features = alexnet_features()
    path = tmp_path / "alexnet.pth"
    torch.save({f"features.{key}": value for key, value in features.state_dict().items()}, path)
    return features, path


@torch.no_grad()
def lpips_by_its_formula(a, b, features, linear):
    """Zhang et al. 2018, eq. 1: ImageNet-normalised input, five unit-length features, weighted squared differences."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    found = []
    for images in (a, b):
        x = ((torch.from_numpy(images).float() / 255 - mean) / std).permute(0, 3, 1, 2)
        layers = []
        for layer in features:
            x = layer(x)
            if isinstance(layer, torch.nn.ReLU):
                layers.append(x / x.norm(dim=1, keepdim=True))
        found.append(layers)
    weights = [linear[f"lin{index}.model.1.weight"] for index in range(5)]
    parts = [(w * (x - y).square()).sum(1).mean((1, 2)) for w, x, y in zip(weights, *found, strict=True)]
    return sum(parts).numpy()


def test_lpips_is_its_formula(package, backbone):
    random = np.random.default_rng(1)
    a = random.integers(0, 256, size=(3, 64, 48, 3)).astype(np.uint8)
    b = np.clip(a + random.normal(scale=[[[[4]]], [[[12]]], [[[60]]]], size=a.shape), 0, 255).astype(np.uint8)
    features, path = backbone
    linear = torch.load(package, map_location="cpu", weights_only=True)
    calls = []
    values = lpips(a, b, weights=path, batch_size=2, progress=lambda done, total: calls.append((done, total)))
    np.testing.assert_allclose(values, lpips_by_its_formula(a, b, features, linear), rtol=5e-3)
    assert (np.diff(values) > 0).all()
    assert calls == [(2, 3), (3, 3)]
    np.testing.assert_array_equal(lpips(a, a, weights=path), 0)
    torch.manual_seed(1)
    assert np.abs(values / lpips_by_its_formula(a, b, alexnet_features(), linear) - 1).max() > 0.01  # control


def test_lpips_says_what_it_needs(package, backbone, monkeypatch, tmp_path):
    _, path = backbone
    images = np.zeros((2, 32, 32, 3), dtype=np.uint8)
    for call, words in (
        (lambda: lpips(images, images, weights=tmp_path / "none.pth"), "nothing is downloaded.*alexnet-owt"),
        (lambda: lpips(images.astype(float), images, weights=path), "needs uint8"),
        (lambda: lpips(images[:, :16], images[:, :16], weights=path), "at least 32 pixels"),
    ):
        with pytest.raises(ConfigError, match=words):
            call()
    torch.save({"features.3.weight": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="weights of alex"):
        lpips(images, images, weights=path)
    monkeypatch.delitem(sys.modules, "lpips")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"diffpress\[lpips\]"):
        lpips(images, images, weights=path)
