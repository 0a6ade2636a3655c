"""What calibration keeps is bounded, and a fair share of all that passed by."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import make
from scipy.stats import chisquare

from diffpress.generator import Generator, SamplingPlan
from diffpress.quantize.folds import find_folds
from diffpress.quantize.streams import Extremes, Rows, as_rows, observe_folds
from diffpress.stage import Context
from diffpress.targets import TARGETS


def stream(rows, calls=40, size=500):
    """Every row holds the number of its call."""
    for call in range(calls):
        rows.update(torch.full((size, 3), float(call)))
    return rows


def test_rows_are_a_uniform_sample_of_all_calls():
    rows = stream(Rows(limit=1024))
    assert rows.values.shape == (1024, 3)
    shares = np.bincount(rows.values[:, 0].long().numpy(), minlength=40)
    assert chisquare(shares).pvalue > 0.01
    first_come = np.bincount(np.repeat(np.arange(40), 500)[:1024], minlength=40)
    assert chisquare(first_come).pvalue < 1e-6


def test_rows_are_the_same_in_every_run():
    assert torch.equal(stream(Rows()).values, stream(Rows()).values)
    assert not torch.equal(stream(Rows()).values, stream(Rows(seed=1)).values)


def test_few_rows_are_all_kept():
    rows = Rows(limit=10)
    for start in (0, 4):
        rows.update(torch.arange(start, start + 4).float()[:, None])
    assert sorted(rows.values[:, 0].tolist()) == list(range(8))


def test_extremes_over_all_calls():
    extremes, data = Extremes(), torch.randn(6, 50, 4, generator=torch.Generator().manual_seed(0))
    for call in data:
        extremes.update(call)
    assert torch.equal(extremes.low, data.amin(dim=(0, 1)))
    assert torch.equal(extremes.high, data.amax(dim=(0, 1)))
    assert torch.equal(extremes.peak, data.abs().amax(dim=(0, 1)))
    assert not torch.equal(extremes.peak, data[-1].abs().amax(dim=0))


def test_rows_of_images_and_tokens():
    image = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert torch.equal(as_rows(image, 3)[7], image[0, :, 1, 2])
    tokens = torch.arange(2 * 3 * 4).reshape(2, 3, 4)
    assert torch.equal(as_rows(tokens, 4)[4], tokens[1, 1])


@pytest.mark.parametrize("family", ["dit", "sd"])
def test_folds_are_observed_with_their_own_rows(family, request, context, hooks_of):
    generator = request.getfixturevalue(family)
    folds = find_folds(generator.denoiser)
    seen = {fold.name: Extremes() for fold in folds}
    observe_folds(folds, {name: (value,) for name, value in seen.items()}, generator, context(generator), "")
    assert {fold.name: len(seen[fold.name].low) for fold in folds} == {fold.name: fold.channels for fold in folds}
    assert hooks_of(generator.denoiser) == 0


def test_picture_and_text_that_leave_an_attention_apart_are_both_seen():
    generator = Generator(make("flux"))
    fold = next(fold for fold in find_folds(generator.denoiser) if fold.name == "transformer_blocks.0.attn.to_out")
    plan = SamplingPlan(steps=1, guidance_scale=1.0, height=16, width=16)
    given = Context(TARGETS["onnxruntime"], ["a cat"], [0], plan, batch_size=1)
    sizes = []
    for parts in (1, 2):
        seen = Counted()
        observe_folds([replace(fold, parts=parts)], {fold.name: (seen,)}, generator, given, "")
        sizes.append(seen.rows)
    picture = 16  # tokens
    assert sizes[0] == picture < sizes[1]


class Counted:
    """Counts rows."""

    rows = 0

    def update(self, rows):
        self.rows += len(rows)
