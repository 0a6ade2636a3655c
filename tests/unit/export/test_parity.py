"""Each way an engine can be wrong has its own message."""

import pytest
import torch

from diffpress.errors import EngineError, ParityError, PrecisionError
from diffpress.export.parity import Parity, check_precision, compare, compare_resized, moved_by_rounding

EXPECTED = torch.linspace(-1, 1, 24).reshape(2, 3, 4)


class Fake:
    """A session that gives what it is told to."""

    provider, outputs, inputs = "a fake", ["y"], {"x": torch.float32}

    def __init__(self, output=EXPECTED, ops=0, simulated=False):
        self.output, self.ops, self.simulated = output, ops, simulated

    def __call__(self, inputs):
        return [self.output]

    def quantized_ops(self):
        return self.ops


def check(output, expected=EXPECTED, tolerance=1e-3):
    return compare("unet", Fake(output), [({}, {"y": expected})], tolerance=tolerance)


def test_error_is_relative_to_torch():
    error = 5e-4
    noise = torch.randn(EXPECTED.shape, generator=torch.Generator().manual_seed(0))
    output = EXPECTED + noise / noise.norm() * EXPECTED.norm() * error
    parity = check(output)
    assert (parity.component, parity.calls, parity.tolerance) == ("unet", 1, 1e-3)
    assert parity.error == pytest.approx(error, rel=1e-3)
    with pytest.raises(ParityError, match=r"unet: the engine differs from torch by 5\.00e-04 .*allowed: 1\.0e-04"):
        check(output, tolerance=1e-4)


def test_the_worst_call_counts():
    calls = [({}, {"y": EXPECTED}), ({}, {"y": 1.1 * EXPECTED})]
    with pytest.raises(ParityError, match="differs"):
        compare("unet", Fake(), calls, tolerance=1e-2)
    assert compare("unet", Fake(), calls, tolerance=0.1).calls == 2


def test_where_rounding_moves_torch_itself_more_is_allowed():
    calls = [({}, {"y": EXPECTED}), ({}, {"y": EXPECTED / 1.08})]
    allowed = compare("unet", Fake(), calls, tolerance=5e-2, noise=lambda inputs, outputs: 0.05)
    assert (allowed.error, allowed.tolerance) == (pytest.approx(0.08), 0.1)
    with pytest.raises(ParityError, match=r"differs from torch by 8\.00e-02 .*allowed: 6\.0e-02"):
        compare("unet", Fake(), calls, tolerance=5e-2, noise=lambda inputs, outputs: 0.03)


class Deep(torch.nn.Module):
    """Many layers, each rounded to codes; behind a table of vectors, which an error in the input can't get through."""

    def __init__(self, levels):
        super().__init__()
        random, self.levels = torch.Generator().manual_seed(1), levels
        self.table = torch.nn.Embedding.from_pretrained(torch.randn(256, 128, generator=random))
        self.layers = torch.nn.ModuleList(torch.nn.Linear(128, 128, bias=False) for _ in range(24))
        for layer in self.layers:
            layer.weight.data = 1.5 * torch.randn(128, 128, generator=random) / 128**0.5
        self.requires_grad_(False)

    def forward(self, x, step):
        x = x if x.is_floating_point() else self.table(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
            x = x if self.levels is None else (x * self.levels).round() / self.levels
        return (x,)


@pytest.mark.parametrize(("levels", "least", "most"), [(None, 1e-7, 1e-4), (128, 1e-3, 1)])
@pytest.mark.parametrize(
    "x", [torch.randn(256, 128, generator=torch.Generator().manual_seed(0)), torch.arange(256)], ids=["float", "index"]
)
def test_rounding_moves_a_deep_network_of_codes(x, levels, least, most):
    network, inputs = Deep(levels), {"x": x, "step": torch.tensor([3])}
    outputs = network(**inputs)
    assert least <= moved_by_rounding(network, inputs, outputs, "float32") < most
    assert torch.equal(network(**inputs)[0], outputs[0])  # nothing stays behind


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite(bad):
    output = EXPECTED.clone()
    output[0, 0, :3] = bad
    with pytest.raises(ParityError, match=r"output y is not finite \(12\.5% of the values"):
        check(output)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_agrees_with_values_that_are_not_finite(bad):
    expected = EXPECTED.clone()
    expected[0, 0, :3] = bad
    for output in (EXPECTED, 3 * EXPECTED, expected):
        with pytest.raises(ParityError, match=r"output y.* not finite"):
            check(output, expected)


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_constant_output(value):
    with pytest.raises(ParityError, match=rf"output y is constant \({value:g}\), torch's is not"):
        check(torch.full_like(EXPECTED, value), tolerance=10)
    assert check(torch.full_like(EXPECTED, value), torch.full_like(EXPECTED, value)).error == 0  # torch's is too


def test_wrong_shape():
    with pytest.raises(ParityError, match=r"output y has shape \[3, 2, 4\], torch gives \[2, 3, 4\]"):
        check(EXPECTED.transpose(0, 1))


def test_precision_that_is_not_in_the_graph():
    assert check_precision("unet", Fake(ops=3), 3) == 3
    with pytest.raises(PrecisionError, match=r"4 layers were quantized, but only 3 products .*\(a fake\)"):
        check_precision("unet", Fake(ops=3), 4)
    assert check_precision("unet", Fake(simulated=True), 4) == 0


class OfOneSize(Fake):
    """Refuses what is not as large as it was traced."""

    def __call__(self, inputs):
        if inputs["x"].shape != EXPECTED.shape:
            raise EngineError("refuses x")
        return super().__call__(inputs)


def test_parity_at_another_size_counts():
    at_size = Parity("unet", 1e-4, 1e-3, 3)
    assert compare_resized(Fake(), at_size, ({}, {"y": EXPECTED})) == Parity("unet", 1e-4, 1e-3, 4)
    larger = compare_resized(Fake(), at_size, ({}, {"y": 1.0005 * EXPECTED}))
    assert larger.error == pytest.approx(5e-4, rel=1e-2)


def test_where_rounding_moves_torch_more_at_another_size_that_is_allowed():
    at_size, other = Parity("unet", 0.02, 0.05, 3), ({}, {"y": EXPECTED / 1.08})
    assert compare_resized(Fake(), at_size, other, lambda inputs, outputs: 0.05).error == pytest.approx(0.08)
    for noise in (None, lambda inputs, outputs: 0.03):
        with pytest.raises(ParityError, match="differs"):
            compare_resized(Fake(), at_size, other, noise)


@pytest.mark.parametrize(
    ("session", "reason"), [(OfOneSize(), "refuses x"), (Fake(2 * EXPECTED), "differs"), (Fake(EXPECTED[:1]), "shape")]
)
def test_a_size_that_is_baked_in_is_named(session, reason):
    given = {"x": torch.zeros(2, 3, 5)}
    with pytest.raises(ParityError, match=rf"'dynamic': unet has the size it was traced at.*allowed.*static.*{reason}"):
        compare_resized(session, Parity("unet", 1e-4, 1e-3, 3), (given, {"y": EXPECTED}))
