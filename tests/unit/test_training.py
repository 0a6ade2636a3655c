"""The loop that the reference generators are trained with: a killed run goes on as if nothing had happened."""

import importlib.util
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).parents[2] / "models" / "training.py"
STEPS = 620


@pytest.fixture
def training(monkeypatch, tmp_path):
    monkeypatch.setenv("EMOJI_WORK", str(tmp_path))
    spec = importlib.util.spec_from_file_location("training", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(training, name, *, killed_at=None, spoiled_at=None):
    """(final weights, losses every 100 steps) of a map that learns to turn its inputs around."""
    torch.manual_seed(0)
    model, calls = torch.nn.Linear(4, 4), []

    def loss_of(rng):
        calls.append(None)
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        x = torch.from_numpy(rng.normal(size=(8, 4))).float() + 0.01 * torch.randn(8, 4)
        loss = (model(x) - x.flip(1)).square().mean()
        return loss * torch.nan if len(calls) == spoiled_at else loss

    provenance = training.fit(model, loss_of, name=name, steps=STEPS, peak=1e-2)
    return model.weight.detach(), provenance["loss every 100 steps"]


def test_a_killed_run_ends_with_the_same_weights(training):
    whole, losses = train(training, "whole")
    with pytest.raises(KeyboardInterrupt):
        train(training, "killed", killed_at=560)
    again, _ = train(training, "killed")
    assert torch.equal(whole, again)
    assert len(losses) == 7
    assert losses[-1] < losses[0] / 10
    assert torch.allclose(whole, torch.eye(4).flip(0), atol=0.1)  # the moving average has learned it too


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(training, tmp_path):
    with pytest.raises(SystemExit, match=r"spoiled: loss is nan at step 509; .*spoiled\.checkpoint\.pt"):
        train(training, "spoiled", spoiled_at=510)
    stored = torch.load(tmp_path / "spoiled.checkpoint.pt", weights_only=True)
    assert stored["state"]["step"] == 500
    assert all(value.isfinite().all() for value in stored["model"].values())
