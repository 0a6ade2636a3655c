"""W8A8: 8-bit weights and activations for Linear and Conv2d, by post-training calibration."""

from __future__ import annotations

import fnmatch
import logging
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from diffpress.config import config
from diffpress.errors import ConfigError
from diffpress.generator import Generator
from diffpress.layer_inputs import summable
from diffpress.quantize.calibrate import layer_errors, observe_ranges
from diffpress.quantize.modules import Activation, QuantizedLayer, Rounded, quantized, weight_codes
from diffpress.quantize.moments import Moments, collect_moments, shared_inputs
from diffpress.quantize.observers import Observer, choose_range
from diffpress.quantize.rounding import gptq_codes, mean_error, refit_weight
from diffpress.quantize.split import find_splits, split
from diffpress.stage import Applied, Context
from diffpress.targets import TARGETS, Target

logger = logging.getLogger(__name__)

# Embedders, modulation and the ends of the network: little work, much error; ModelOpt leaves them out too.
SENSITIVE = (
    "*time_embed*",
    "*time_emb_proj*",
    "*time_text_embed*",
    "*timestep_embedder*",
    "*class_embed*",
    "*add_embed*",
    "*.emb.*",
    "*norm*.linear*",
    "*adaln*",
    "pos_embed*",
    "*context_embedder*",
    "*caption_projection*",
    "x_embedder*",
    "conv_in*",
    "conv_out*",
    "proj_out*",
)


@config
class Int8Config:
    """What is quantized, and how activation ranges are found."""

    quantizes: ClassVar[str] = "denoiser"
    activations: Literal["static", "dynamic"] = "static"
    """static: one range a tensor, observed over the whole schedule and both guidance branches; dynamic: at run time."""
    observer: Observer = "mse"
    """How a static range is chosen from what was seen."""
    percentile: Annotated[float, Field(gt=90, le=100)] = 99.99
    """Share of values, in percent, inside the range on either side; for the percentile observer."""
    convolutions: bool | None = None
    """Quantize Conv2d too; null: where the target's run-time is faster for it."""
    skip: tuple[str, ...] = ()
    """Layers to leave in float besides the sensitive ones: names in the denoiser, with * as wildcard."""
    split_skips: bool = True
    """Give each half of a U-Net's skip concatenation its own range where a convolution reads it; exact."""
    rounding: Literal["nearest", "gptq"] = "nearest"
    """nearest: each weight alone; gptq: later columns make up for the error of earlier ones, on quantized inputs."""
    refit: bool = False
    """Before rounding, fit the weight by least squares to what the quantized inputs have left of the inputs."""
    bias_correction: bool = False
    """Add what quantization takes from each output's mean to the bias, where the layer has one."""


class Int8:
    """``quantize.int8``: replaces layers of the denoiser by their 8-bit twins."""

    Config: ClassVar[type] = Int8Config

    def __init__(self, config: Int8Config) -> None:
        self.config = config

    def layers(self, denoiser: nn.Module, target: Target) -> dict[str, nn.Module]:
        """The layers this config quantizes, by name."""
        wanted: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d) if self._convolutions(target) else (nn.Linear,)
        patterns = (*SENSITIVE, *self.config.skip)
        return {
            name: module
            for name, module in denoiser.named_modules()
            if isinstance(module, wanted) and not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        }

    def _convolutions(self, target: Target) -> bool:
        if self.config.activations == "dynamic":
            return False
        chosen = self.config.convolutions
        return target.quantizes_convolutions if chosen is None else chosen

    def check(self, generator: Generator, target: Target) -> None:
        """Raises ConfigError for what the target cannot run, a skip that matches nothing, a second quantization."""
        names = [name for name, _ in generator.denoiser.named_modules()]
        for pattern in self.config.skip:
            if not fnmatch.filter(names, pattern):
                raise ConfigError(
                    f"quantize.int8: skip {pattern!r} matches no layer of {type(generator.denoiser).__name__}"
                )
        if self.config.activations == "dynamic" and not target.dynamic:
            able = ", ".join(name for name, other in TARGETS.items() if other.dynamic)
            raise ConfigError(
                f"quantize.int8: activations 'dynamic' do not run on target {target.name}; targets that can: {able}"
            )
        if self.config.convolutions and not target.quantizes_convolutions:
            able = ", ".join(name for name, other in TARGETS.items() if other.quantizes_convolutions)
            raise ConfigError(
                f"quantize.int8: target {target.name} runs no 8-bit convolutions; targets that do: {able}"
            )
        if any(isinstance(module, QuantizedLayer) for module in generator.denoiser.modules()):
            raise ConfigError("quantize.int8: the denoiser is quantized already")
        if not self.layers(generator.denoiser, target):
            raise ConfigError(f"quantize.int8: no layer of {type(generator.denoiser).__name__} is left to quantize")

    def apply(self, generator: Generator, context: Context) -> Applied:
        """Raises ConfigError when calibration meets values that are not finite; layers never reached stay in float."""
        denoiser = generator.denoiser
        layers = self.layers(denoiser, context.target)
        splits = find_splits(generator, layers, context) if self.config.split_skips else {}
        if splits:
            split(denoiser, splits)
            layers = self.layers(denoiser, context.target)
        try:
            twins = self._twins(generator, layers, context)
        except FloatingPointError as error:
            raise ConfigError(
                f"quantize.int8: {error}: the generator cannot be calibrated in {denoiser.dtype}"
            ) from error
        layers = {name: layers[name] for name in twins}
        errors = layer_errors(generator, layers, twins, context)
        for name, twin in twins.items():
            denoiser.set_submodule(name, twin)
        metadata = {
            "target": context.target.name,
            "dynamic": self.config.activations == "dynamic",
            "splits": splits,
            "layers": {name: _describe(layer) for name, layer in layers.items()},
            "sensitivity": errors,
        }
        total = sum(isinstance(module, nn.Linear | nn.Conv2d) for module in denoiser.modules())
        summary = f"{len(layers)} of {len(layers) + total} layers in 8 bits, {self.config.activations} activations"
        return Applied(generator, metadata, summary)

    def _twins(self, generator: Generator, layers: dict[str, nn.Module], context: Context) -> dict[str, QuantizedLayer]:
        leaders = shared_inputs(generator, layers, context)
        activations = self._activations(generator, layers, leaders, context)
        layers = {name: layers[name] for name in activations}
        rounded = {}
        if self.config.rounding == "gptq" or self.config.refit or self.config.bias_correction:
            rounded = self._rounded(generator, layers, leaders, activations, context)
        return {name: quantized(layer, activations[name], rounded.get(name)) for name, layer in layers.items()}

    def _rounded(
        self,
        generator: Generator,
        layers: dict[str, nn.Module],
        leaders: dict[str, str],
        activations: dict[str, Activation],
        context: Context,
    ) -> dict[str, Rounded]:
        """Weights rounded with the moments of their inputs, for the layers that are not too wide for that."""
        summed = {name: leaders[name] for name, layer in layers.items() if summable(layer)}
        if len(summed) < len(layers):
            logger.info("quantize.int8: rounded to nearest: %s", ", ".join(layers.keys() - summed))
        first = {leader: layers[leader] for leader in summed.values()}
        rounded = {}
        for moments in collect_moments(first, activations, generator, context, cross=self.config.refit):
            for name, leader in summed.items():
                if leader in moments:
                    rounded[name] = self._round(layers[name], moments[leader])
        return rounded

    def _activations(
        self, generator: Generator, layers: dict[str, nn.Module], leaders: dict[str, str], context: Context
    ) -> dict[str, Activation]:
        """A quantizer for each layer's input; none for a layer that was not reached."""
        if self.config.activations == "dynamic":
            return {name: Activation(context.target, dynamic=True) for name in layers}
        histograms = observe_ranges({name: layers[name] for name in set(leaders.values())}, generator, context)
        activations = {}
        for name, leader in leaders.items():
            histogram = histograms[leader]
            if histogram.limit == 0:
                logger.warning(
                    "quantize.int8: %s saw only zeros in calibration, or was never called: left in float", name
                )
                continue
            low, high = choose_range(
                histogram, self.config.observer, percentile=self.config.percentile, symmetric=context.target.symmetric
            )
            activations[name] = Activation(context.target)
            activations[name].set_range(low, high, context.target)
        return activations

    def _round(self, layer: Any, moments: Moments) -> Rounded:
        """Codes, scales and bias of one layer from the moments of its quantized inputs."""
        corrected = self.config.bias_correction and layer.bias is not None
        exact = layer.weight.detach().float().flatten(1)  # [out, columns]
        weight = exact
        gram = moments.gram(centered=corrected)
        if self.config.refit:
            weight = refit_weight(weight, gram, moments.cross(centered=corrected))
        codes, scale = weight_codes(weight, axis=0)
        if self.config.rounding == "gptq":
            codes = gptq_codes(weight, gram, scale)
        bias = layer.bias
        if corrected:
            bias = bias + mean_error(exact, codes * scale[:, None], moments.mean_x, moments.mean_q)
        return Rounded(codes.reshape(layer.weight.shape), scale, bias)

    @staticmethod
    def restore(generator: Generator, metadata: dict[str, Any]) -> None:
        """Put empty 8-bit layers where they were."""
        target = TARGETS[metadata["target"]]
        split(generator.denoiser, metadata["splits"])
        for name, kind in metadata["layers"].items():
            layer = generator.denoiser.get_submodule(name)
            activation = Activation(target, dynamic=metadata["dynamic"])
            if _describe(layer) != kind:
                raise ConfigError(f"quantize.int8: layer {name} is {_describe(layer)}, but the artifact has {kind}")
            generator.denoiser.set_submodule(name, quantized(layer, activation))


def _describe(layer: nn.Module) -> str:
    return f"{type(layer).__name__}{list(layer.weight.shape)}"  # type: ignore[union-attr, arg-type]
