"""AdaRound: exact at its start and at its ends, up or down and nothing else, and better than nearest."""

import dataclasses

import pytest
import torch
from torch import nn

from diffpress.errors import ConfigError
from diffpress.generator import Generator
from diffpress.progress import SILENT
from diffpress.quantize.adaround import (
    AdaRoundSettings,
    Rounding,
    Workshop,
    adaround_codes,
    annealed,
    best_rows,
    push,
    rectified_logit,
    rectified_sigmoid,
    row_errors,
)
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.quantize.modules import weight_codes
from diffpress.quantize.rounding import gptq_codes

QUICK = AdaRoundSettings(steps=200)


@pytest.fixture
def problem():
    """``problem(seed)``: a weight, the second moments of inputs that are correlated, codes to nearest, scales."""

    def make(seed, inputs=24, outputs=12):
        random = torch.Generator().manual_seed(seed)
        weight = torch.randn(outputs, inputs, generator=random)
        rows = torch.randn(500, 8, generator=random) @ torch.randn(8, inputs, generator=random)
        rows += 0.3 * torch.randn(500, inputs, generator=random)
        return weight, rows.T @ rows / len(rows), *weight_codes(weight, axis=0)

    return make


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path, 0, SILENT)


def total(weight, codes, gram, scale):
    return float(row_errors(weight, codes, gram, scale).sum())


def test_at_first_the_soft_codes_are_the_weight(problem):
    weight, _, codes, scale = problem(0)
    rounding = Rounding(weight, scale)
    torch.testing.assert_close(rounding() * scale[:, None], weight, rtol=1e-5, atol=1e-6)
    assert torch.equal(rounding.codes(), codes)
    with torch.no_grad():  # control: of other v it is not
        rounding.v += 1
    assert not torch.allclose(rounding() * scale[:, None], weight, rtol=1e-2)


def test_whole_codes_have_no_choice():
    rounding = Rounding(torch.tensor([[-127.0, 2.5, 127.0, 0.0]]), torch.ones(1))
    with torch.no_grad():
        rounding.v.fill_(3.0)
    assert rounding.codes().tolist() == [[-127, 3, 127, 0]]
    assert rounding().tolist() == [[-127, 3, 127, 0]]


def test_where_the_soft_codes_are_whole_they_are_the_codes(problem):
    weight, _, _, scale = problem(1)
    rounding = Rounding(weight, scale)
    with torch.no_grad():
        up = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
        rounding.v.copy_(torch.where(up, 3.0, -3.0))
    assert torch.equal(rounding().to(torch.int8), rounding.codes())


def test_rectified_sigmoid_and_its_inverse():
    h = torch.linspace(0, 1, 11)
    torch.testing.assert_close(rectified_sigmoid(rectified_logit(h)), h)
    assert rectified_sigmoid(torch.tensor([-3.0, 3.0])).tolist() == [0, 1]
    assert torch.sigmoid(torch.tensor(3.0)) < 1  # control: without the stretch it is not reached


def test_push_is_one_in_the_middle_and_none_at_the_ends():
    assert push(torch.full((4,), 0.5), 2.0) == 1
    assert push(torch.tensor([0.0, 1.0]), 2.0) == 0
    assert push(torch.tensor([0.1]), 20.0) > push(torch.tensor([0.1]), 2.0)


def test_beta_falls_after_the_free_share():
    settings = AdaRoundSettings(steps=100, free=0.2)
    assert annealed(19, settings) is None
    assert annealed(20, settings) == 20
    assert annealed(60, settings) == pytest.approx(11)
    assert annealed(100, settings) == pytest.approx(2)


def test_row_errors_are_those_of_the_outputs():
    random = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(5, 7, generator=random), torch.randn(40, 7, generator=random)
    codes, scale = weight_codes(weight, axis=0)
    expected = (rows @ (weight - codes * scale[:, None]).T).double().square().mean(0)
    found = row_errors(weight, codes, rows.T @ rows / len(rows), scale)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    assert not torch.allclose(row_errors(weight, codes, torch.eye(7), scale), expected, rtol=1e-2)


@pytest.mark.parametrize("seed", range(4))
def test_goes_up_or_down_and_beats_nearest(problem, workshop, seed):
    weight, gram, nearest, scale = problem(seed)
    codes = adaround_codes(weight, gram, scale, settings=QUICK, workshop=workshop, name="layer")
    steps = weight / scale[:, None]
    assert ((codes == steps.floor()) | (codes == steps.ceil())).all()
    assert not torch.equal(codes, nearest)
    assert total(weight, codes, gram, scale) < 0.6 * total(weight, nearest, gram, scale)


def test_on_inputs_without_correlation_nearest_is_the_best(problem, workshop):
    """The negative control: there is nothing to gain, and nothing is gained."""
    weight, _, nearest, scale = problem(0)
    gram = torch.eye(weight.shape[1])
    codes = adaround_codes(weight, gram, scale, settings=QUICK, workshop=workshop, name="layer")
    assert total(weight, codes, gram, scale) >= total(weight, nearest, gram, scale)
    assert torch.equal(best_rows(weight, [nearest, codes], gram, scale), nearest)


@pytest.mark.parametrize("settings", [QUICK, AdaRoundSettings(steps=30, regularization=0)])
def test_what_is_kept_is_never_worse(problem, workshop, settings):
    """Without the push the soft codes stop between the ends, and their rounding may be worse: then it is not kept."""
    for seed in range(3):
        weight, gram, nearest, scale = problem(seed)
        columnwise = gptq_codes(weight, gram, scale)
        codes = adaround_codes(weight, gram, scale, settings=settings, workshop=workshop, name=f"layer{seed}")
        candidates = [nearest, columnwise, codes]
        kept = row_errors(weight, best_rows(weight, candidates, gram, scale), gram, scale)
        for other in candidates:
            assert (kept <= row_errors(weight, other, gram, scale)).all()


def test_a_weight_that_is_whole_already_stays(workshop):
    weight = torch.tensor([[127.0, -3.0, 0.0], [4.0, 127.0, 1.0]])
    codes, scale = weight_codes(weight, axis=0)
    found = adaround_codes(weight, torch.eye(3), scale, settings=QUICK, workshop=workshop, name="layer")
    assert torch.equal(found, codes)


def test_finished_layers_are_not_trained_again(problem, workshop, monkeypatch):
    weight, gram, _, scale = problem(2)
    args = {"settings": QUICK, "workshop": workshop, "name": "layer"}
    first = adaround_codes(weight, gram, scale, **args)
    monkeypatch.setattr("diffpress.quantize.adaround.push", None)
    assert torch.equal(adaround_codes(weight, gram, scale, **args), first)


@pytest.mark.parametrize(("family", "target"), [("dit", "onnxruntime"), ("sd", "openvino")])
def test_layers_of_a_network_keep_their_outputs_better(family, target, request, context, tmp_path):
    folder = request.getfixturevalue(f"{family}_folder")
    errors = {}
    for rounding in ("nearest", "gptq", "adaround"):
        generator = Generator.load(folder)
        given = dataclasses.replace(context(generator, target), work=tmp_path / rounding)
        few = ("transformer_blocks.0.*", "down*", "up*")  # what is left is enough
        names = [name for name, _ in generator.denoiser.named_modules()]
        skip = tuple(pattern for pattern in few if any(name.startswith(pattern[:-1]) for name in names))
        settings = Int8Config(rounding=rounding, adaround=AdaRoundSettings(steps=60), skip=skip, observer="minmax")
        errors[rounding] = Int8(settings).apply(generator, given).metadata["sensitivity"]
    assert sum(errors["adaround"].values()) < sum(errors["nearest"].values())
    assert sum(errors["adaround"].values()) <= 1.01 * sum(errors["gptq"].values())


def test_training_needs_a_folder(dit, context):
    with pytest.raises(ConfigError, match="needs a folder for its checkpoints"):
        Int8(Int8Config(rounding="adaround")).apply(dit, context(dit))
    assert not any(module._forward_pre_hooks for module in dit.denoiser.modules() if isinstance(module, nn.Linear))
