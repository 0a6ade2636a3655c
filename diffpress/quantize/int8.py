"""W8A8: 8-bit weights and activations for Linear and Conv2d, by post-training calibration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from diffpress.config import config
from diffpress.errors import ConfigError
from diffpress.generator import Generator
from diffpress.quantize.adaround import AdaRoundSettings
from diffpress.quantize.budgeted import decide_precisions, decided_together, decision_facts, find_candidates
from diffpress.quantize.calibrate import check_float32, layer_errors
from diffpress.quantize.choice import Decision, Kind, Precision
from diffpress.quantize.modules import Activation, QuantizedLayer, keep_float, quantized, replace_layers, zero_padded
from diffpress.quantize.moments import shared_inputs
from diffpress.quantize.observers import Observer
from diffpress.quantize.online import matches
from diffpress.quantize.sensitivity import output_error
from diffpress.quantize.split import find_splits, join_biases, split
from diffpress.quantize.twins import make_twins, reached_layers, static_activations
from diffpress.stage import Applied, Context
from diffpress.targets import REDUCED_RANGE, TARGETS, Target
from diffpress.traceable import unread

CONTEXT_CALLS = 4
# Embedders, modulation and the ends of the network: little work, much error; ModelOpt leaves them out too.
SENSITIVE = (
    "*embed*",
    "*.emb.*",
    "*time_emb_proj*",
    "time_extra_emb*",
    "time_step_proj*",
    "*norm*.linear*",
    "*adaln*",
    "*modulation*",
    "distilled_guidance_layer*",
    "*caption_projection*",
    "encoder_hid_proj*",
    "conv_in*",
    "conv_out*",
    "proj_out*",
    "all_final_layer*",
    "img_in*",
    "txt_in*",
    "*img_mod.*",
    "*txt_mod.*",
)


@config
class Int8Config:
    """What is quantized, and how activation ranges are found."""

    quantizes: ClassVar[str] = "denoiser"
    activations: Literal["static", "dynamic"] = "static"
    """static: one range a tensor, observed over the whole schedule and both guidance branches; dynamic: at run time,
    one for each tensor (ONNX Runtime) or for each 32 channels of a row (OpenVINO), Linear only."""
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
    rounding: Literal["nearest", "gptq", "adaround"] = "nearest"
    """nearest: each weight alone; gptq: later columns make up for the error of earlier ones, on quantized inputs;
    adaround: up or down is trained, and each output keeps what is best of the three."""
    adaround: AdaRoundSettings = AdaRoundSettings()
    """For rounding adaround."""
    refit: bool = False
    """Before rounding, fit the weight by least squares to what the quantized inputs have left of the inputs."""
    bias_correction: bool = False
    """Add what quantization takes from each output's mean to the bias, where the layer has one."""
    error: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Budget: largest relative L2 error of the denoiser's output that quantization may add, the layers' errors added
    as squares. Each layer becomes static, dynamic or stays in float, for the least latency."""
    latency: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Budget: share of the float engine's latency of a denoiser call that may remain, for the least error; in place of
    error."""
    context_calls: Annotated[int, Field(ge=0)] | None = None
    """Denoiser calls on which the error of the output is measured with one layer quantized at a time, layers times
    calls forward passes; null: 4 under a budget, else none."""

    @model_validator(mode="after")
    def _consistent(self) -> Int8Config:
        if self.error is not None and self.latency is not None:
            raise ValueError("budgets given: error, latency; allowed: at most one of them")
        if self.budget and self.activations == "dynamic":
            raise ValueError("activations dynamic does not go with a budget, which decides it; allowed: static")
        if self.budget and self.context_calls == 0:
            raise ValueError("context_calls 0 does not go with a budget; allowed: 1 and more, null")
        if self.convolutions and self.activations == "dynamic":
            raise ValueError("convolutions true does not go with activations dynamic; allowed: false, null")
        if self.refit and self.rounding == "adaround" and self.adaround.reconstruct == "block":
            raise ValueError("refit does not go with adaround.reconstruct block; allowed: layer")
        return self

    @property
    def budget(self) -> tuple[Kind, float] | None:
        """What is limited and by how much."""
        budgets: dict[Kind, float | None] = {"error": self.error, "latency": self.latency}
        return next(((kind, value) for kind, value in budgets.items() if value is not None), None)

    def rehearsed(self) -> Int8Config:
        """The same layers in the same precision, with the least work: for engines of which the latency alone counts.

        Under a budget all of them are static.
        """
        least: dict[str, Any] = {"observer": "minmax", "rounding": "nearest", "refit": False, "bias_correction": False}
        return replace(self, **least, error=None, latency=None, context_calls=None)

    @property
    def calls_measured(self) -> int:
        """``context_calls``, or what null stands for."""
        if self.context_calls is not None:
            return self.context_calls
        return CONTEXT_CALLS if self.budget else 0


class Int8:
    """``quantize.int8``: replaces layers of the denoiser by their 8-bit twins."""

    Config: ClassVar[type] = Int8Config

    def __init__(self, config: Int8Config) -> None:
        self.config = config

    def layers(self, denoiser: nn.Module, target: Target) -> dict[str, nn.Module]:
        """The layers this config quantizes, by name."""
        wanted: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d) if self._convolutions(target) else (nn.Linear,)
        patterns = (*SENSITIVE, *self.config.skip, *unread(denoiser))
        return {
            name: module
            for name, module in denoiser.named_modules()
            if isinstance(module, wanted) and not matches(name, patterns) and zero_padded(module)
        }

    def _convolutions(self, target: Target) -> bool:
        if self.config.activations == "dynamic":
            return False
        chosen = self.config.convolutions
        return target.quantizes_convolutions if chosen is None else chosen

    def check(self, generator: Generator, target: Target) -> None:
        """Raises ConfigError for what the target cannot run, a skip that matches nothing, a second quantization.

        And for a denoiser that is not in float32.
        """
        check_float32("quantize.int8", generator.denoiser)
        if any(isinstance(module, QuantizedLayer) for module in generator.denoiser.modules()):
            raise ConfigError("quantize.int8: the denoiser is quantized already")
        modules = generator.denoiser.named_modules()
        names = [name for name, module in modules if isinstance(module, nn.Linear | nn.Conv2d)]
        for pattern in self.config.skip:
            if not any(matches(name, (pattern,)) for name in names):
                raise ConfigError(
                    f"quantize.int8: skip {pattern!r} matches no Linear or Conv2d of "
                    f"{type(generator.denoiser).__name__}"
                )
        if self.config.activations == "dynamic" and not target.dynamic:
            able = ", ".join(name for name, other in TARGETS.items() if other.dynamic)
            raise ConfigError(
                f"quantize.int8: activations 'dynamic' do not run on target {target.name}; targets that can: {able}"
            )
        if self.config.activations == "dynamic" and not target.dynamic_here:
            raise ConfigError(
                f"quantize.int8: activations 'dynamic' run in float32 on target {target.name} here, for this CPU has "
                "no 8-bit dot products (VNNI or AMX); allowed: static"
            )
        if self.config.convolutions and not target.quantizes_convolutions:
            able = ", ".join(name for name, other in TARGETS.items() if other.quantizes_convolutions)
            raise ConfigError(
                f"quantize.int8: target {target.name} runs no 8-bit convolutions; targets that do: {able}"
            )
        if self.config.budget and target.overflows_here:
            raise ConfigError(
                "quantize.int8: a budget needs latencies of the CPU that the engine is for, and by export.dot_products "
                "that is not this one; allowed: no budget, or dot_products false or null"
            )
        if not self.layers(generator.denoiser, target):
            raise ConfigError(f"quantize.int8: no layer of {type(generator.denoiser).__name__} is left to quantize")

    def apply(self, generator: Generator, context: Context) -> Applied:
        """Raises ConfigError when calibration meets values that are not finite, and for a budget that cannot be met.

        Layers never reached stay in float.
        """
        denoiser, budget = generator.denoiser, self.config.budget
        if budget and context.latency is None:
            raise ConfigError(
                f"quantize.int8: {budget[0]} {budget[1]:g} needs latencies measured on the engine, and none are there; "
                "allowed: no budget"
            )
        if self.config.rounding == "adaround":
            context.work_folder()
        layers = self.layers(denoiser, context.target)
        splits = find_splits(generator, layers, context) if self.config.split_skips else {}
        if splits:
            split(denoiser, splits)
            layers = self.layers(denoiser, context.target)
        leaders = shared_inputs(generator, layers, context)
        twins = self._twins(generator, layers, leaders, context)
        candidates = find_candidates(generator, twins, context, self.config.calls_measured)
        in_context = candidates.errors(generator, context.progress)
        names, decision = list(twins[self.config.activations]), None
        precisions: dict[str, Precision] = dict.fromkeys(names, self.config.activations)
        if budget:
            groups = decided_together(leaders, names)
            decision, precisions = decide_precisions(generator, candidates, in_context, groups, context, budget)
        shown = candidates.shown(precisions)
        alone = layer_errors(generator, {name: layers[name] for name in names}, candidates.picked(shown), context)
        replace_layers(denoiser, {layers[name]: twin for name, twin in candidates.picked(precisions).items()})
        join_biases(denoiser)
        _keep_float(denoiser, precisions)
        metadata = {
            "target": context.target.name,
            "splits": splits,
            "weight_limit": context.target.weight_limit(),
            "layers": {name: _describe(layers[name]) for name in names if precisions[name] != "float"},
            "precision": precisions,
            "sensitivity": alone,
            "in_context": {name: in_context[shown[name]][name] for name in names if candidates.calls},
            "output_error": output_error(denoiser, candidates.calls) if candidates.calls else None,
            "decision": None if decision is None else decision_facts(decision),
        }
        return Applied(generator, metadata, _summary(denoiser, metadata, decision))

    def _twins(
        self, generator: Generator, layers: dict[str, nn.Module], leaders: dict[str, str], context: Context
    ) -> dict[Precision, dict[str, QuantizedLayer]]:
        """The twins in the precision that the config wants; under a budget in each that the target can run."""
        target = context.target
        found: dict[Precision, dict[str, QuantizedLayer]] = {}
        if self.config.activations == "static":
            activations = static_activations(generator, layers, leaders, context, self.config)
            layers = {name: layers[name] for name in activations}
            found["static"] = make_twins(generator, layers, leaders, activations, context, self.config)
        else:
            layers = reached_layers(generator, layers, context)
        if self.config.activations == "dynamic" or (self.config.budget and target.dynamic_here):
            linear = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
            activations = {name: Activation(target, dynamic=True) for name in linear}
            found["dynamic"] = make_twins(generator, linear, leaders, activations, context, self.config)
        return found

    @staticmethod
    def restore(generator: Generator, metadata: dict[str, Any]) -> None:
        """Put empty 8-bit layers where they were."""
        target = TARGETS[metadata["target"]]
        split(generator.denoiser, metadata["splits"])
        twins: dict[nn.Module, nn.Module] = {}
        for name, kind in metadata["layers"].items():
            layer = generator.denoiser.get_submodule(name)
            if _describe(layer) != kind:
                raise ConfigError(f"quantize.int8: layer {name} is {_describe(layer)}, but the artifact has {kind}")
            activation = Activation(target, dynamic=metadata["precision"][name] == "dynamic")
            twins[layer] = quantized(layer, activation)
        replace_layers(generator.denoiser, twins)
        _keep_float(generator.denoiser, metadata["precision"])


def _keep_float(denoiser: nn.Module, precisions: Mapping[str, Precision]) -> None:
    for name, precision in precisions.items():
        if precision == "float":
            keep_float(denoiser.get_submodule(name))


def _describe(layer: nn.Module) -> str:
    return f"{type(layer).__name__}{list(layer.weight.shape)}"  # type: ignore[union-attr, arg-type]


def _summary(denoiser: nn.Module, metadata: dict[str, Any], decision: Decision | None) -> str:
    counts = Counter(metadata["precision"].values())
    quantized = counts["static"] + counts["dynamic"]
    reduced = ", weights from -64 to 64" if metadata["weight_limit"] == REDUCED_RANGE else ""
    total = quantized + sum(isinstance(module, nn.Linear | nn.Conv2d) for module in denoiser.modules())
    kinds = ", ".join(f"{counts[name]} {name}" for name in ("static", "dynamic") if counts[name])
    error = metadata["output_error"]
    said = "" if error is None else f"; the output has moved by {error:.2g} of its norm"
    if decision is None:
        return f"{quantized} of {total} layers in 8 bits, {' and '.join(counts)} activations{reduced}{said}"
    return f"{quantized} of {total} layers in 8 bits ({kinds}){reduced}{said}; {decision.sentence()}"
