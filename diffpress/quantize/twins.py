"""From layers in float and a calibration to their 8-bit twins: ranges of the inputs, and how weights are rounded."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from diffpress.generator import Generator
from diffpress.layer_inputs import summable
from diffpress.quantize.adaround import Workshop, adaround_codes, best_rows
from diffpress.quantize.blocks import reconstruct_blocks
from diffpress.quantize.calibrate import observe_ranges, observing
from diffpress.quantize.modules import Activation, QuantizedLayer, Rounded, quantized, rounded_to_nearest, weight_codes
from diffpress.quantize.moments import Moments, collect_moments
from diffpress.quantize.observers import choose_range
from diffpress.quantize.rounding import gptq_codes, mean_error, refit_weight
from diffpress.quantize.split import takes_bias
from diffpress.recorded import record
from diffpress.stage import Context

if TYPE_CHECKING:
    from diffpress.quantize.int8 import Int8Config

logger = logging.getLogger(__name__)

BLOCK_PICTURES = 2  # of a call that a block is reconstructed on: of few pictures a block learns these by heart

_NOT_REACHED = "quantize.int8: %s saw only zeros in calibration, or was never called: left in float"

Layers = Mapping[str, nn.Module]


def static_activations(
    generator: Generator, layers: Layers, leaders: dict[str, str], context: Context, config: Int8Config
) -> dict[str, Activation]:
    """A quantizer with a fixed range for each layer's input; none for a layer that was not reached.

    ``leaders`` names for each layer the one whose input it shares. Raises ConfigError when a value is not finite.
    """
    histograms = observe_ranges({name: layers[name] for name in set(leaders.values())}, generator, context)
    activations = {}
    for name, leader in leaders.items():
        histogram = histograms[leader]
        if histogram.limit == 0:
            logger.warning(_NOT_REACHED, name)
            continue
        low, high = choose_range(
            histogram, config.observer, percentile=config.percentile, symmetric=context.target.symmetric
        )
        activations[name] = Activation(context.target)
        activations[name].set_range(low, high, context.target)
    return activations


def reached_layers(generator: Generator, layers: Layers, context: Context) -> dict[str, nn.Module]:
    """The layers that read anything but zeros while the first condition is sampled."""
    found: set[str] = set()

    def see(name: str, x: Tensor) -> None:
        if name not in found and bool(x.any()):
            found.add(name)

    first = dataclasses.replace(context, conditions=context.conditions[:1], seeds=context.seeds[:1])
    with observing(layers, see):
        first.run(generator, "Calibrating: which layers are reached")
    for name in layers.keys() - found:
        logger.warning(_NOT_REACHED, name)
    return {name: layer for name, layer in layers.items() if name in found}


def make_twins(
    generator: Generator,
    layers: Layers,
    leaders: dict[str, str],
    activations: dict[str, Activation],
    context: Context,
    config: Int8Config,
) -> dict[str, QuantizedLayer]:
    """The twins of the layers that have a quantizer of their input, with weights rounded as the config says.

    Raises ConfigError where rounding is trained and ``context`` has no folder for that.
    """
    layers = {name: layers[name] for name in activations}
    limit = context.target.weight_limit()
    rounded = {}
    if config.rounding != "nearest" or config.refit or config.bias_correction:
        rounded = _rounded(generator, layers, leaders, activations, context, config, limit)
    twins = {
        name: quantized(layer, activations[name], rounded.get(name) or rounded_to_nearest(layer, limit))
        for name, layer in layers.items()
    }
    if config.rounding != "adaround" or config.adaround.reconstruct == "layer":
        return twins
    small = dataclasses.replace(context, batch_size=BLOCK_PICTURES)
    calls = record(generator, small, config.adaround.calls, "Rounding: recording denoiser calls")
    workshop = _workshop(context, f"{_kind(activations)}-blocks")
    return reconstruct_blocks(generator.denoiser, layers, twins, calls, settings=config.adaround, workshop=workshop)


def _kind(activations: Mapping[str, Activation]) -> str:
    return "dynamic" if any(activation.dynamic for activation in activations.values()) else "static"


def _workshop(context: Context, place: str) -> Workshop:
    return Workshop(context.work_folder() / "adaround" / place, context.train_seed, context.progress)


def _rounded(
    generator: Generator,
    layers: Layers,
    leaders: dict[str, str],
    activations: dict[str, Activation],
    context: Context,
    config: Int8Config,
    limit: int,
) -> dict[str, Rounded]:
    """Weights rounded with the moments of their inputs, for the layers that are not too wide for that."""
    summed = [name for name, layer in layers.items() if summable(layer)]
    if len(summed) < len(layers):
        logger.info("quantize.int8: rounded to nearest: %s", ", ".join(layers.keys() - set(summed)))
    alike: dict[Any, str] = {}  # the first of the layers that make the same rows of the same tensor
    shared = {name: alike.setdefault((leaders[name], _geometry(layers[name])), name) for name in summed}
    first = {name: layers[name] for name in alike.values()}
    workshop = _workshop(context, _kind(activations)) if config.rounding == "adaround" else None
    rounded = {}
    for moments in collect_moments(first, activations, generator, context, cross=config.refit):
        for name, reader in shared.items():
            if reader in moments:
                codes_of = partial(_codes, config=config, workshop=workshop, name=name, limit=limit)
                corrected = config.bias_correction and takes_bias(generator.denoiser, name)
                rounded[name] = _round(
                    layers[name], moments[reader], limit, codes_of, refit=config.refit, corrected=corrected
                )
    return rounded


def _geometry(layer: nn.Module) -> tuple[Any, ...]:
    """What rows it makes of its input: all None for a Linear."""
    return tuple(getattr(layer, field, None) for field in ("kernel_size", "stride", "padding", "dilation"))


def _round(
    layer: Any,
    moments: Moments,
    limit: int,
    codes_of: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    *,
    refit: bool,
    corrected: bool,
) -> Rounded:
    """Codes, scales and bias of one layer from the moments of its quantized inputs.

    ``corrected``: the bias takes the mean error; a layer without one is given one for it.
    """
    exact = layer.weight.detach().float().flatten(1)  # [out, columns]
    weight = exact
    gram = moments.gram(centered=corrected)
    if refit:
        weight = refit_weight(weight, gram, moments.cross(centered=corrected))
    nearest, scale = weight_codes(weight, axis=0, limit=limit)
    codes = codes_of(weight, nearest, gram, scale)
    bias = layer.bias
    if corrected:
        error = mean_error(exact, codes * scale[:, None], moments.mean_x, moments.mean_q)
        bias = error if bias is None else bias + error
    return Rounded(codes.reshape(layer.weight.shape), scale, bias)


def _codes(
    weight: Tensor,
    nearest: Tensor,
    gram: Tensor,
    scale: Tensor,
    *,
    config: Int8Config,
    workshop: Workshop | None,
    name: str,
    limit: int,
) -> Tensor:
    """Codes by the rounding of the config; with ``workshop`` each output's from what keeps it best."""
    if config.rounding == "nearest":
        return nearest
    columnwise = gptq_codes(weight, gram, scale, limit=limit)
    if workshop is None:
        return columnwise
    candidates = [nearest, columnwise]
    if config.adaround.reconstruct == "layer":
        candidates.append(adaround_codes(weight, gram, scale, settings=config.adaround, workshop=workshop, name=name))
    return best_rows(weight, candidates, gram, scale)
