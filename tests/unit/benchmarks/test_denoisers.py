"""Rows and tables that keep failures; graphs kept as long as their sources; nets with outliers."""

import numpy as np
import pytest
import torch
from denoisers import nets, results
from denoisers.shelf import Shelf


def rows():
    shared = {"build_s": 1.0, "open_s": 2.0, "provider": "none", "bytes": 10**6}
    good = {"fast": (True, 0.01), "slow": (True, 0.02), "peer": (False, 0.04)}
    found = {
        name: {"title": name, "ours": ours, "errors": [error, error], **shared} for name, (ours, error) in good.items()
    }
    return found | {"broken": {"title": "broken", "ours": False, "failed": "ValueError: no such kernel"}}


def test_rates_and_ratio_to_the_fastest_of_ours():
    samples = {"fast": [10.0] * 4, "slow": [20.0] * 4, "peer": [15.0] * 4}
    found = results.summarize(rows(), samples, flop=2e9, peak_gops=800.0)
    assert found["peer"]["ratio_to_ours"]["value"] == pytest.approx(1.5)
    assert found["fast"]["gflops"] == pytest.approx(200.0)
    assert found["fast"]["share_of_int8_peak"] == pytest.approx(0.25)
    assert found["broken"]["failed"] == "ValueError: no such kernel"


def test_table_and_plot_keep_what_failed(tmp_path):
    found = results.summarize(rows(), {"fast": [10.0] * 4, "slow": [20.0] * 4, "peer": [15.0] * 4}, flop=1, peak_gops=1)
    data = {"nets": {"net": {"title": "Net", "parameters": 10**6}}, "cells": {"net/1": {"routes": found}}}
    text = "\n".join(results.table(data))
    assert "| broken | failed |" in text
    assert "| **fast** | 10.0 (10.0–10.0), p95 10.0 | 1.00 (1.00–1.00) |" in text
    results.plot([data], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_shelf_keeps_what_has_the_same_key_only(tmp_path):
    shelf = Shelf(tmp_path / "shelf", "a")
    shelf.put("graph", {"seconds": 1.0})
    (shelf.folder / "model.onnx").touch()
    assert "graph" in Shelf(tmp_path / "shelf", "a")
    assert "graph" not in Shelf(tmp_path / "shelf", "b")
    assert not (shelf.folder / "model.onnx").exists()


@pytest.mark.parametrize("name", nets.SMOKE)
def test_outliers_reach_what_norms_give(name):
    peaks = []
    for outliers in (False, True):
        denoiser = getattr(
            pipeline := nets.make_pipeline(nets.find_net(name), seed=0, outliers=outliers),
            "unet" if hasattr(pipeline, "unet") else "transformer",
        )
        seen = []
        block = next(m for m in denoiser.modules() if type(m).__name__ == "BasicTransformerBlock")
        block.attn1.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        torch.manual_seed(1)
        size, context = denoiser.config.sample_size, nets.find_net(name).context
        given = (
            {"class_labels": torch.tensor([3])}
            if context is None
            else {"encoder_hidden_states": torch.randn(1, 7, context)}
        )
        with torch.no_grad():
            output = denoiser(torch.randn(1, 4, size, size), timestep=torch.tensor([500]), **given).sample
        assert np.isfinite(output.numpy()).all()
        channels = seen[0].abs().amax(dim=(0, 1))
        peaks.append((channels.max() / channels.median()).item())
    assert peaks[1] > 10 * peaks[0]
