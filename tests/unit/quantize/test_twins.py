"""What layers that read one tensor share on their way to 8 bits, and what not."""

import pytest
import torch

from diffpress.generator import Generator
from diffpress.quantize.int8 import Int8, Int8Config


class Several(torch.nn.Module):
    """Convolutions that read one tensor, each in its own way."""

    def __init__(self, layer):
        super().__init__()
        channels = layer.in_channels, layer.out_channels
        self.plain, self.small = layer, torch.nn.Conv2d(*channels, 1)
        self.dilated = torch.nn.Conv2d(*channels, 3, padding=2, dilation=2)

    def forward(self, x):
        return self.plain(x) + self.small(x) + self.dilated(x)


@pytest.mark.parametrize("order", [("plain", "small", "dilated"), ("small", "dilated", "plain")])
def test_moments_are_shared_by_layers_of_one_geometry(sd_folder, context, order):
    """What a layer becomes does not hang on who reads the tensor beside it."""
    name, codes = "mid_block.resnets.0.conv1", {}
    for alone in (None, *order):
        torch.manual_seed(0)
        generator = Generator.load(sd_folder)
        resnet = generator.denoiser.mid_block.resnets[0]
        resnet.conv1 = Several(resnet.conv1)
        resnet.conv1._modules = {part: resnet.conv1._modules[part] for part in order}
        skip = tuple(f"{name}.{part}" for part in order if alone not in (None, part))
        Int8(Int8Config(rounding="gptq", skip=skip)).apply(generator, context(generator, "openvino"))
        codes[alone] = {part: generator.denoiser.get_submodule(f"{name}.{part}") for part in order}
    for part in order:
        assert torch.equal(codes[None][part].weight, codes[part][part].weight)
    scales = {float(twin.activation.scale) for twin in codes[None].values()}
    assert len(scales) == 1  # one tensor, one range
