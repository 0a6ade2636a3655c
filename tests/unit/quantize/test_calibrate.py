"""What is not finite, in weights or in what layers read, is named and goes no further."""

import pytest
import torch

from diffpress.errors import ConfigError
from diffpress.quantize.calibrate import check_float32
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.quantize.modules import QuantizedLayer
from diffpress.quantize.reparam import Reparam, ReparamConfig
from diffpress.quantize.smooth import Smooth, SmoothConfig
from diffpress.quantize.weight_only import WeightOnlyLinear
from diffpress.quantize.weights import Weights, WeightsConfig
from diffpress.targets import TARGETS

OBSERVING = (
    Int8(Int8Config()),
    Int8(Int8Config(activations="dynamic")),
    Smooth(SmoothConfig()),
    Reparam(ReparamConfig()),
    Weights(WeightsConfig()),
)


@pytest.mark.parametrize("stage", OBSERVING, ids=lambda stage: f"{type(stage).__name__} {stage.config}"[:30])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_end_calibration(dit, context, hooks_of, stage, bad):
    with torch.no_grad():
        dit.denoiser.transformer_blocks[0].attn1.to_v.bias[0] = bad
    message = rf"calibration: the input of transformer_blocks\.0\.attn1\.to_out\.0 has (nan|{bad}); allowed: finite"
    with pytest.raises(ConfigError, match=message):
        stage.apply(dit, context(dit))
    assert hooks_of(dit.denoiser) == 0
    assert not any(isinstance(module, QuantizedLayer | WeightOnlyLinear) for module in dit.denoiser.modules())


@pytest.mark.parametrize("stage", OBSERVING[1:], ids=lambda stage: type(stage).__name__)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(dit, stage, bad):
    stage.check(dit, TARGETS["onnxruntime"])
    with torch.no_grad():
        dit.denoiser.transformer_blocks[1].ff.net[2].weight[3, 5] = bad
    with pytest.raises(ConfigError, match=rf"transformer_blocks\.1\.ff\.net\.2\.weight of DiT\w+ has {bad}; allowed"):
        stage.check(dit, TARGETS["onnxruntime"])


def test_large_weights_are_finite():
    layer = torch.nn.Linear(4, 4)
    layer.weight.data.fill_(3e38)  # of which the sum is not
    check_float32("quantize.int8", layer)
