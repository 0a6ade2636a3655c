from __future__ import annotations

import sys
import types

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
        (lambda a: lpips(a, a, weights="w.pth"), "needs uint8"),
        (lambda a: lpips(a, a, weights="w.pth", net="squeeze"), "allowed: alex, vgg"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ConfigError, match=words):
        call(np.ones((2, 16, 16, 3)))


class _Backbone(torch.nn.Module):
    """Layers named as in the package lpips: ``slice<k>.<index in torchvision's features>``."""

    def __init__(self):
        super().__init__()
        self.slice1 = torch.nn.Sequential()
        self.slice1.add_module("0", torch.nn.Conv2d(3, 2, 1))


class _Package(torch.nn.Module):
    def __init__(self, *, net, pnet_rand, verbose):
        super().__init__()
        assert pnet_rand  # else the package downloads
        self.net = _Backbone()

    def forward(self, a, b):
        return (self.net.slice1(a) - self.net.slice1(b)).square().mean(dim=(1, 2, 3), keepdim=True)


def test_lpips_gives_the_package_the_users_backbone(pair, monkeypatch, tmp_path):
    a, b = pair
    path = tmp_path / "alex.pth"
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(MissingDependencyError, match=r"diffpress\[lpips\]"):
        lpips(a, b, weights=path)
    package = types.ModuleType("lpips")
    package.LPIPS = _Package
    monkeypatch.setitem(sys.modules, "lpips", package)
    with pytest.raises(ConfigError, match="nothing is downloaded"):
        lpips(a, b, weights=path)
    torch.save({"features.3.weight": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="weights of alex"):
        lpips(a, b, weights=path)
    torch.save({"features.0.weight": torch.ones(2, 3, 1, 1), "features.0.bias": torch.zeros(2)}, path)
    calls = []
    values = lpips(a, b, weights=path, batch_size=2, progress=lambda done, total: calls.append((done, total)))
    difference = (a.astype(np.float64) - b).sum(axis=3) / 127.5
    np.testing.assert_allclose(values, np.square(difference).mean(axis=(1, 2)), rtol=1e-4)
    assert calls == [(2, 3), (3, 3)]
    np.testing.assert_array_equal(lpips(a, a, weights=path), 0)
