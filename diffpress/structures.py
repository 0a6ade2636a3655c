"""Widths that a denoiser can lose: heads of an attention, hidden channels of an MLP, inner channels of a U-Net resnet.

A structure is a tensor inside one module whose channels come in units: the layers that make it lose rows, the layers
that read it lose columns, and nothing else in the network sees a change. A removed unit does what a unit of zeros did:
heads are whole, and of a resnet's inner channels whole groups of its second norm go, so that the other groups stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.models.activations import GEGLU, SwiGLU
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from diffpress.config import config
from diffpress.errors import ConfigError

WIDTHS = 64  # that one structure can choose from under a budget

Kind = Literal["heads", "mlp", "resnet"]
_GATED = (("linear_1", "linear_3", "linear_2"), ("w1", "w3", "w2"))  # two whose product the third reads
_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


@dataclass(frozen=True)
class Structure:
    """A tensor of ``units`` x ``size`` channels, who makes it and who reads it."""

    name: str
    """Of the module it is in, dotted."""
    kind: Kind
    module: Any
    units: int
    """Heads, channels, or groups of channels."""
    size: int
    """Channels of a unit."""
    producers: tuple[tuple[Any, int], ...]
    """Layers whose rows make the channels, each so many times over (2 for a gated MLP)."""
    consumers: Mapping[str, Any]
    """Linear layers or convolutions that read the channels, by name."""
    timed: tuple[str, ...]
    """Submodules whose work is in proportion to the width."""

    @property
    def unit_parameters(self) -> int:
        """Parameters that go with one unit."""
        made = sum(times * (layer.weight[0].numel() + (layer.bias is not None)) for layer, times in self.producers)
        read = sum(layer.weight[:, 0].numel() for layer in self.consumers.values())
        return self.size * (made + read)

    def channels(self, kept: Sequence[int]) -> Tensor:
        """int64 [len(kept) x size]: channels of the units ``kept``."""
        return (torch.tensor(kept)[:, None] * self.size + torch.arange(self.size)).flatten()

    def step(self, align: int) -> int:
        """The fewest units that make up a multiple of ``align`` channels."""
        return align // math.gcd(align, self.size)

    @torch.no_grad()
    def narrow(self, kept: Sequence[int]) -> None:
        """Take every unit but ``kept`` out of the layers, in place."""
        index = self.channels(kept)
        for layer, times in self.producers:
            keep_rows(layer, torch.cat([index + part * self.units * self.size for part in range(times)]))
        for layer in self.consumers.values():
            keep_columns(layer, index)
        if self.kind == "resnet":
            self.module.norm2.num_groups = len(kept)
        elif self.kind == "heads":
            self.module.heads = len(kept)
            for width in ("inner_dim", "inner_kv_dim"):
                if hasattr(self.module, width):
                    setattr(self.module, width, len(index))
            if hasattr(self.module, "sliceable_head_dim"):
                self.module.sliceable_head_dim = len(kept)


def keep_rows(layer: Any, index: Tensor) -> None:
    """Leave the output channels ``index`` of a Linear, a convolution, or a norm with a weight for each channel."""
    index = index.to(layer.weight.device)
    layer.weight = nn.Parameter(layer.weight[index], requires_grad=layer.weight.requires_grad)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[index], requires_grad=layer.bias.requires_grad)
    for count in ("out_features", "out_channels", "num_channels"):
        if hasattr(layer, count):
            setattr(layer, count, len(index))


def keep_columns(layer: Any, index: Tensor) -> None:
    """Leave the input channels ``index`` of a Linear or a convolution."""
    weight = layer.weight
    layer.weight = nn.Parameter(weight[:, index.to(weight.device)], requires_grad=weight.requires_grad)
    for count in ("in_features", "in_channels"):
        if hasattr(layer, count):
            setattr(layer, count, len(index))


def find_structures(network: nn.Module, kinds: Sequence[Kind]) -> dict[str, Structure]:
    """Every structure of these kinds by its name, in the order of the network.

    Left out are attentions whose norm spans all heads, whose keys have other heads than their queries, or whose output
    is not projected by themselves. ConfigError where a layer is not a plain one, as after quantization.
    """
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, Attention | AttentionModuleMixin):
            structure = _heads(name, module)
        elif isinstance(module, FeedForward):
            structure = _mlp(name, module)
        elif isinstance(module, ResnetBlock2D):
            structure = _resnet(name, module)
        else:
            structure = _gated_mlp(name, module)
        if structure is not None and structure.kind in kinds:
            found[name] = structure
    return found


def _heads(name: str, module: Any) -> Structure | None:
    if getattr(module, "fused_projections", False):
        raise ConfigError(f"{name} has fused projections; allowed: call unfuse_qkv_projections first")
    if isinstance(getattr(module, "processor", None), nn.Module):
        raise ConfigError(f"{name} has an adapter, a {type(module.processor).__name__}; allowed: none")
    projections = getattr(module, "to_out", None)
    outputs = {f"{name}.to_out.0": projections[0] if isinstance(projections, nn.ModuleList) else None}
    outputs[f"{name}.to_add_out"] = getattr(module, "to_add_out", None)
    consumers = {key: layer for key, layer in outputs.items() if layer is not None}
    made = {key: getattr(module, key, None) for key in _PROJECTIONS}
    if any(made[key] is None for key in ("to_q", "to_k", "to_v")) or f"{name}.to_out.0" not in consumers:
        return None
    _check_plain(name, *made.values(), *consumers.values())
    widths = {layer.out_features for layer in made.values() if layer is not None}
    heads = module.heads
    if len(widths) > 1 or _spans_heads(module, next(iter(widths)) // heads):
        return None
    producers = tuple((layer, 1) for layer in made.values() if layer is not None)
    return Structure(name, "heads", module, heads, next(iter(widths)) // heads, producers, consumers, (name,))


def _spans_heads(module: Any, head_dim: int) -> bool:
    """Whether a norm of queries or keys has a weight for more than one head, or sees them all."""
    norms = [getattr(module, key, None) for key in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")]
    weights = [getattr(norm, "weight", None) for norm in norms if norm is not None]
    return any(weight is not None and weight.numel() != head_dim for weight in weights)


def _mlp(name: str, module: FeedForward) -> Structure:
    first: Any = module.net[0]
    last: Any = module.net[2]
    _check_plain(name, first.proj, last)
    times = 2 if isinstance(first, GEGLU | SwiGLU) else 1
    units = last.in_features
    return Structure(name, "mlp", module, units, 1, ((first.proj, times),), {f"{name}.net.2": last}, (name,))


def _gated_mlp(name: str, module: nn.Module) -> Structure | None:
    """An MLP written as three layers, two of them multiplied, as in language models."""
    layers = gated_layers(module)
    if layers is None:
        return None
    _check_plain(name, *layers.values())
    first, gate, last = layers.values()
    consumers = {f"{name}.{list(layers)[2]}": last}
    return Structure(name, "mlp", module, last.in_features, 1, ((first, 1), (gate, 1)), consumers, (name,))


def gated_layers(module: nn.Module) -> dict[str, Any] | None:
    """Of such an MLP by their names: what is activated, what it is multiplied by, and what reads the product."""
    children = dict(module.named_children())
    names = next((names for names in _GATED if children.keys() >= set(names)), None)
    return None if names is None else {name: children[name] for name in names}


def _resnet(name: str, module: ResnetBlock2D) -> Structure:
    _check_plain(name, module.conv1, module.time_emb_proj, module.norm2, module.conv2)
    groups, channels = module.norm2.num_groups, module.norm2.num_channels
    producers: list[tuple[Any, int]] = [(module.conv1, 1), (module.norm2, 1)]
    if module.time_emb_proj is not None:
        producers.append((module.time_emb_proj, 2 if module.time_embedding_norm == "scale_shift" else 1))
    timed = tuple(f"{name}.{part}" for part in ("conv1", "norm2", "conv2"))
    consumers = {f"{name}.conv2": module.conv2}
    return Structure(name, "resnet", module, groups, channels // groups, tuple(producers), consumers, timed)


def _check_plain(name: str, *layers: Any) -> None:
    for layer in layers:
        if layer is not None and type(layer) not in (nn.Linear, nn.Conv2d, nn.GroupNorm):
            raise ConfigError(
                f"{name} has a {type(layer).__name__}; allowed: layers in float, neither quantized nor with adapters"
            )


def widths(structure: Structure, align: int) -> list[int]:
    """Units that ``structure`` can keep, fewest first: whole multiples of ``align`` channels, and all of them."""
    step = structure.step(align)
    step *= math.ceil(structure.units / step / WIDTHS) or 1
    return [*range(step, structure.units, step), structure.units]


def uniform_counts(structures: Mapping[str, Structure], keep: float, align: int) -> dict[str, int]:
    """For each structure the allowed width nearest to ``keep`` of its units, of equals the wider one."""
    return {
        name: min(reversed(widths(structure, align)), key=lambda count: abs(count - keep * structure.units))
        for name, structure in structures.items()
    }


@config
class Nested:
    """Widths that one set of weights holds: units are in the order of their importance, each width is a prefix."""

    shares: tuple[float, ...]
    """Of the units that a structure has; 1, and then each less than the one before."""
    kinds: tuple[Kind, ...]
    """Structures that become narrower."""
    align: int
    """Widths are multiples of this many channels, or left as they are."""

    def kept(self, network: nn.Module, share: float) -> dict[str, list[int]]:
        """The units of the network of width ``share``, by structure; what stays whole is not in it."""
        structures = find_structures(network, self.kinds)
        counts = uniform_counts(structures, share, self.align)
        return {name: list(range(count)) for name, count in counts.items() if count < structures[name].units}


def gated(x: Tensor, gate: Tensor, structure: Structure) -> Tensor:
    """x_c g_(c / size): the channels of x [n, ..., c] or [n, c, h, w] by their unit's gate, [units] or [n, units]."""
    spread = gate.repeat_interleave(structure.size, dim=-1)
    if structure.kind == "resnet":
        return x * spread[..., None, None]
    return x * (spread if gate.ndim == 1 else spread.reshape(len(spread), *[1] * (x.ndim - 2), -1))


@contextmanager
def masked(structures: Mapping[str, Structure], kept: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Inside the block, units that are not in ``kept`` are zero where they are read; nothing changes its shape."""
    handles = []

    def mask(structure: Structure, gate: Tensor) -> Any:
        return lambda layer, args: (gated(args[0], gate.to(args[0]), structure), *args[1:])

    for name, units in kept.items():
        structure = structures[name]
        gate = torch.zeros(structure.units).index_fill(0, torch.tensor(units), 1.0)
        handles += [layer.register_forward_pre_hook(mask(structure, gate)) for layer in structure.consumers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
