"""W8A8: 8-bit weights and activations for Linear and Conv2d, by post-training calibration."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diffpress.config import config
from diffpress.errors import ConfigError
from diffpress.generator import Generator
from diffpress.quantize.modules import Activation, QuantizedLayer, quantized
from diffpress.quantize.observers import Histogram, Observer, choose_range
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


SENSITIVITY_SAMPLES = 2


@config
class Int8Config:
    """What is quantized, and how activation ranges are found."""

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
        dynamic = self.config.activations == "dynamic"
        activations = {name: Activation(context.target, dynamic=dynamic) for name in layers}
        if not dynamic:
            seen = self._observe(generator, layers, context)
            layers = {name: layers[name] for name in seen}
            for name, histogram in seen.items():
                low, high = choose_range(
                    histogram,
                    self.config.observer,
                    percentile=self.config.percentile,
                    symmetric=context.target.symmetric,
                )
                activations[name].set_range(low, high, context.target)
        twins = {name: quantized(layer, activations[name]) for name, layer in layers.items()}
        errors = _layer_errors(generator, layers, twins, context)
        for name, twin in twins.items():
            denoiser.set_submodule(name, twin)
        kinds = {name: _describe(layer) for name, layer in layers.items()}
        metadata = {"target": context.target.name, "dynamic": dynamic, "layers": kinds, "sensitivity": errors}
        total = sum(isinstance(module, nn.Linear | nn.Conv2d) for module in denoiser.modules())
        summary = f"{len(layers)} of {len(layers) + total} layers in 8 bits, {self.config.activations} activations"
        return Applied(generator, metadata, summary)

    def _observe(self, generator: Generator, layers: dict[str, nn.Module], context: Context) -> dict[str, Histogram]:
        histograms = {name: Histogram() for name in layers}
        hooks = {name: (lambda module, args, h=histograms[name]: h.update(args[0])) for name in layers}
        try:
            with _pre_hooks(layers, hooks):
                context.run(generator, "Calibrating: observing activations")
        except FloatingPointError as error:
            raise ConfigError(
                f"quantize.int8: {error}: the generator cannot be calibrated in {generator.denoiser.dtype}"
            ) from error
        for name, histogram in histograms.items():
            if histogram.limit == 0:
                logger.warning(
                    "quantize.int8: %s saw only zeros in calibration, or was never called: left in float", name
                )
        return {name: histogram for name, histogram in histograms.items() if histogram.limit > 0}

    @staticmethod
    def restore(generator: Generator, metadata: dict[str, Any]) -> None:
        """Put empty 8-bit layers where they were."""
        target = TARGETS[metadata["target"]]
        for name, kind in metadata["layers"].items():
            layer = generator.denoiser.get_submodule(name)
            activation = Activation(target, dynamic=metadata["dynamic"])
            if _describe(layer) != kind:
                raise ConfigError(f"quantize.int8: layer {name} is {_describe(layer)}, but the artifact has {kind}")
            generator.denoiser.set_submodule(name, quantized(layer, activation))


def _describe(layer: nn.Module) -> str:
    return f"{type(layer).__name__}{list(layer.weight.shape)}"  # type: ignore[union-attr, arg-type]


@contextmanager
def _pre_hooks(layers: dict[str, nn.Module], hooks: dict[str, Any]) -> Iterator[None]:
    handles = [layer.register_forward_pre_hook(hooks[name]) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _layer_errors(
    generator: Generator, layers: dict[str, nn.Module], twins: dict[str, QuantizedLayer], context: Context
) -> dict[str, float]:
    """||Q(layer)(x) - layer(x)|| / ||layer(x)||, each layer alone, over one small sampling run."""
    totals = {name: [0.0, 0.0] for name in layers}

    def compare(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            totals[name][0] += float((twins[name](args[0]) - output).square().sum())
            totals[name][1] += float(output.square().sum())

        return hook

    handles = [layer.register_forward_hook(compare(name)) for name, layer in layers.items()]
    few = min(SENSITIVITY_SAMPLES, len(context.conditions))
    try:
        generator.sample(
            context.conditions[:few],
            seeds=context.seeds[:few],
            plan=context.plan,
            batch_size=few,
            progress=context.progress,
            label="Measuring each layer's error",
        )
    finally:
        for handle in handles:
            handle.remove()
    return {name: (error / power) ** 0.5 if power else 0.0 for name, (error, power) in totals.items()}
