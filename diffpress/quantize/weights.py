"""W8 and W4: weight-only quantization of what no other stage has quantized, or of a text encoder."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from diffpress.config import config
from diffpress.errors import ConfigError
from diffpress.generator import Generator
from diffpress.layer_inputs import summable
from diffpress.quantize.awq import balance, best_clip, find_text_folds, relative_error, watching
from diffpress.quantize.calibrate import check_float32, same_function
from diffpress.quantize.folds import find_folds
from diffpress.quantize.modules import QuantizedLayer, kept_float, replace_layers
from diffpress.quantize.moments import collect_moments, shared_inputs
from diffpress.quantize.online import matches
from diffpress.quantize.rounding import gptq_codes
from diffpress.quantize.streams import Rows
from diffpress.quantize.weight_only import (
    Coded,
    Form,
    WeightOnlyEmbedding,
    WeightOnlyLinear,
    group_codes,
    weight_only,
)
from diffpress.stage import Applied, Context
from diffpress.targets import Target

logger = logging.getLogger(__name__)

Component = Literal["denoiser", "text_encoder", "text_encoder_2", "text_encoder_3"]
GROUPS: dict[str, dict[int, tuple[int, ...]]] = {  # what each run-time reads, by bits
    "onnxruntime": {8: (32, 64, 128), 4: (32, 64, 128)},
    "openvino": {8: (32, 64, 128), 4: (32, 64, 128)},
    "tensorrt": {8: (), 4: (64, 128)},
}
# Little to save, and its error goes straight to the output; of most denoisers, Lumina 2, Z-Image, and CLIP.
LAST = ("proj_out*", "norm_out.linear_2", "all_final_layer.*", "text_projection")
_CODED = (QuantizedLayer, WeightOnlyLinear, WeightOnlyEmbedding)
_NOTHING_SCALED = "quantize.weights: awq found no channels to scale in %s: no norm or projection before could take it"
TEXT_STEPS = 2  # a text encoder sees the same prompts whatever the schedule


@config
class WeightsConfig:
    """Which weights, and how many bits."""

    after_quantization: ClassVar[bool] = True
    bits: Literal[8, 4] = 8
    """Bits of a weight; embedding tables take 8 in any case."""
    group: Literal[32, 64, 128] | None = None
    """Input channels that share a scale; null: one scale for each output channel."""
    layers: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Linear and Embedding layers to quantize: names in the component, with * as wildcard; null: all but the last projection and what a budget has left in float. What another stage has quantized stays as it is."""  # noqa: E501
    skip: tuple[str, ...] = ()
    """Layers to leave in float all the same: names in the component, with * as wildcard."""
    awq: bool = False
    """Scale channels by what they carry, where a norm or a projection before can take the inverse, and clip ranges."""
    rounding: Literal["nearest", "gptq"] = "nearest"
    """nearest: each weight alone; gptq: later columns make up for the error of earlier ones, on the inputs that the
    run-time multiplies with."""
    component: Component = "denoiser"
    """Part of the pipeline whose weights are quantized."""

    @model_validator(mode="after")
    def _needs_groups(self) -> WeightsConfig:
        if self.bits == 4 and self.group is None:
            raise ValueError("bits 4 needs a group: 32, 64 or 128")
        return self

    @property
    def quantizes(self) -> str:
        return self.component


class Weights:
    """``quantize.weights``: replaces Linear and Embedding layers by twins that keep codes and scales."""

    Config: ClassVar[type] = WeightsConfig

    def __init__(self, config: WeightsConfig) -> None:
        self.config = config

    def layers(self, component: nn.Module) -> dict[str, nn.Linear | nn.Embedding]:
        """The layers this config quantizes, by name; one that is used in several places has its first name."""
        wanted, unwanted = self.config.layers or ("*",), self.config.skip
        unwanted = unwanted if self.config.layers else (*unwanted, *LAST)
        return {
            name: module
            for name, module in component.named_modules()
            if _quantizable(module)
            and matches(name, wanted)
            and not matches(name, unwanted)
            and (self.config.layers is not None or not kept_float(module))
        }

    def check(self, generator: Generator, target: Target) -> None:
        """Raises ConfigError for what the target cannot run, patterns that match nothing, and groups that don't fit.

        And for a component that is not in float32.
        """
        component = generator.part(self.config.component)
        check_float32("quantize.weights", component)
        bits, group = self.config.bits, self.config.group
        if group is not None and group not in GROUPS[target.name][bits]:
            able = ", ".join(name for name, groups in GROUPS.items() if group in groups[bits])
            allowed = "; ".join(
                f"bits {count}, group {', '.join(map(str, groups)) or 'null'}"
                for count, groups in GROUPS[target.name].items()
            )
            raise ConfigError(
                f"quantize.weights: bits {bits} with group {group} does not run on target {target.name}; "
                f"targets that can: {able}; allowed here: {allowed}"
            )
        modules = dict(component.named_modules())
        known = [name for name, module in modules.items() if _quantizable(module)]
        coded = [name for name, module in modules.items() if isinstance(module, _CODED)]
        for field, names in (("layers", known), ("skip", known + coded)):
            for pattern in getattr(self.config, field) or ():
                if not any(matches(name, (pattern,)) for name in names):
                    raise ConfigError(
                        f"quantize.weights: {field} {pattern!r} matches no Linear or Embedding in float of "
                        f"{type(component).__name__}"
                    )
        chosen = self.layers(component)
        if not chosen:
            raise ConfigError(f"quantize.weights: no layer of {type(component).__name__} is left to quantize")
        _check_groups(chosen, self.config.group)

    def apply(self, generator: Generator, context: Context) -> Applied:
        """Layers that no calibration run reaches are quantized too, to the nearest code."""
        component = generator.part(self.config.component)
        form, chosen = Form(context.target.name, self.config.bits, self.config.group), self.layers(component)
        before = _bytes(component)
        context = self._calibrated_by(context)
        with watching(chosen) as seen:
            context.run(generator, "Calibrating: observing inputs")
        scaled = ""
        if self.config.awq:
            with same_function("quantize.weights", generator, context):
                count = balance([*find_folds(component), *find_text_folds(component)], chosen, seen, form)
            scaled = f", channels of {count} tensors scaled before"
            if not count:
                logger.warning(_NOTHING_SCALED, type(component).__name__)
        errors: dict[str, float] = {}
        for name, twin in self._twins(generator, chosen, form, seen, context):
            if name in seen:
                errors[name] = relative_error(twin, chosen[name], seen[name])
            replace_layers(component, {chosen[name]: twin})
        metadata = {
            "target": context.target.name,
            "component": self.config.component,
            "bits": self.config.bits,
            "group": self.config.group,
            "layers": {name: list(layer.weight.shape) for name, layer in chosen.items()},
            "sensitivity": {name: errors[name] for name in chosen if name in errors},
        }
        saved = f"{before / 2**20:.1f} to {_bytes(component) / 2**20:.1f} MiB"
        summary = (
            f"weights of {len(chosen)} layers in {self.config.bits} bits{scaled}, {self.config.component} from {saved}"
        )
        return Applied(generator, metadata, summary, self.config.component)

    def _calibrated_by(self, context: Context) -> Context:
        """The runs of ``context``, of fewer steps for what the schedule does not reach."""
        if self.config.component == "denoiser":
            return context
        return dataclasses.replace(
            context, plan=dataclasses.replace(context.plan, steps=min(context.plan.steps, TEXT_STEPS))
        )

    def _twins(
        self,
        generator: Generator,
        chosen: Mapping[str, nn.Linear | nn.Embedding],
        form: Form,
        seen: Mapping[str, Rows],
        context: Context,
    ) -> Iterator[tuple[str, nn.Module]]:
        """The twin of each layer by name, as soon as it is made."""
        left = dict(chosen)
        if self.config.rounding == "gptq":
            linear = [name for name, layer in left.items() if isinstance(layer, nn.Linear) and name in seen]
            reached = {name: left[name] for name in linear if summable(left[name])}
            if len(reached) < len(linear):
                logger.info("quantize.weights: rounded to nearest: %s", ", ".join(set(linear) - set(reached)))
            for name, gram in _grams(generator, reached, form, context):
                layer = left.pop(name)
                yield name, weight_only(layer, form, self._coded(name, layer, form, seen, gram))
        for name, layer in left.items():
            yield name, weight_only(layer, form, self._coded(name, layer, form, seen))

    def _coded(
        self,
        name: str,
        layer: nn.Linear | nn.Embedding,
        form: Form,
        seen: Mapping[str, Rows],
        gram: Tensor | None = None,
    ) -> Coded | None:
        """Codes and scales of a Linear: with moments of its inputs by GPTQ, else the nearest."""
        if isinstance(layer, nn.Embedding):
            return None
        weight = layer.weight.detach()
        clip = best_clip(name, layer, seen[name].values, form) if self.config.awq and name in seen else 1.0
        codes, scale = group_codes(weight, bits=form.bits, group=form.group, clip=clip)
        if gram is not None:
            columns = scale.repeat_interleave(codes.shape[-1], dim=1)  # [out, in]
            codes = gptq_codes(weight, gram, columns, limit=form.limit).view_as(codes)
        return codes, scale

    @staticmethod
    def restore(generator: Generator, metadata: dict[str, Any]) -> None:
        """Put empty twins where they were."""
        component = generator.part(metadata["component"])
        form = Form(metadata["target"], metadata["bits"], metadata["group"])
        for name, shape in metadata["layers"].items():
            layer: Any = component.get_submodule(name)
            if list(layer.weight.shape) != shape:
                raise ConfigError(
                    f"quantize.weights: layer {name} is {list(layer.weight.shape)}, but the artifact has {shape}"
                )
            replace_layers(component, {layer: weight_only(layer, form)})


def _grams(
    generator: Generator, layers: Mapping[str, nn.Module], form: Form, context: Context
) -> Iterator[tuple[str, Tensor]]:
    """E[q q^T], q what a layer's weight is multiplied with, by the layer's name; measured in as few runs as fit."""
    leaders = shared_inputs(generator, layers, context)
    first = {leader: layers[leader] for leader in leaders.values()}
    for moments in collect_moments(first, dict.fromkeys(first, form.rounded), generator, context, cross=False):
        names = [name for name, leader in leaders.items() if leader in moments]
        with context.progress.task("Rounding weights", total=len(names)) as advance:
            for name in names:
                yield name, moments[leaders[name]].gram(centered=False)
                advance(1)


def _quantizable(module: nn.Module) -> bool:
    """Whether it is a Linear or an Embedding that reads its table as it is, or times one factor."""
    if isinstance(module, nn.Embedding):
        return type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    return isinstance(module, nn.Linear)


def _check_groups(chosen: dict[str, nn.Linear | nn.Embedding], group: int | None) -> None:
    linears = {name: layer for name, layer in chosen.items() if isinstance(layer, nn.Linear)}
    wrong = [name for name, layer in linears.items() if group is not None and layer.in_features % group]
    if wrong:
        first = linears[wrong[0]]
        raise ConfigError(
            f"quantize.weights: group {group} does not divide the {first.in_features} input channels of {wrong[0]}"
            f"{f' (and {len(wrong) - 1} more)' if len(wrong) > 1 else ''}; allowed: a divisor, null, or skip the layer"
        )


def _bytes(module: nn.Module) -> int:
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensors.values())
