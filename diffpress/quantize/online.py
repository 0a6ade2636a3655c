"""Channel factors where no operation before a layer can take them: its input is multiplied at run time.

W x = (W diag(r)) (x / r), as in a fold, but x / r is computed. OpenVINO does it in the operator that quantizes.
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffpress.generator import Generator
from diffpress.quantize.folds import Fold
from diffpress.quantize.modules import replace_layers
from diffpress.quantize.moments import shared_inputs
from diffpress.quantize.scaled import LAYER, Scaled
from diffpress.stage import Context


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a layer's name, or the one it had before it was put behind a factor, is like one of ``patterns``."""
    return any(fnmatch.fnmatchcase(name.removesuffix(f".{LAYER}"), pattern) for pattern in patterns)


def scaled_layers(denoiser: nn.Module) -> list[str]:
    """Names of the layers behind a factor."""
    return [name for name, module in denoiser.named_modules() if isinstance(module, Scaled)]


def put_behind(denoiser: nn.Module, names: Sequence[str], factor: Tensor | None = None) -> None:
    """Replace each named layer by itself behind ``factor`` [channels], ones where it is None; weights stay."""
    scaled: dict[nn.Module, nn.Module] = {}
    for name in names:
        layer: Any = denoiser.get_submodule(name)
        scaled[layer] = Scaled(layer, torch.ones(layer.weight.shape[1]) if factor is None else factor)
    replace_layers(denoiser, scaled)


def find_online(
    generator: Generator, layers: Mapping[str, nn.Module], folds: Sequence[Fold], context: Context
) -> list[Fold]:
    """A place for each tensor that some of ``layers`` read and none of ``folds`` covers, named by the first of them.

    Layers that read the same tensor have the same factors, so that it is still quantized once. Left out are grouped
    convolutions and layers that are behind a factor already.
    """
    denoiser = generator.denoiser
    covered = {id(consumer) for fold in folds for consumer in fold.consumers}
    covered |= {id(denoiser.get_submodule(f"{name}.{LAYER}")) for name in scaled_layers(denoiser)}
    open_to = {
        name: layer for name, layer in layers.items() if id(layer) not in covered and getattr(layer, "groups", 1) == 1
    }
    readers: dict[tuple[str, torch.Size], list[str]] = defaultdict(list)
    for name, leader in shared_inputs(generator, open_to, context).items():
        readers[leader, open_to[name].weight.shape[2:]].append(name)  # type: ignore[union-attr, index]
    return [_place(denoiser, names) for names in readers.values()]


def _place(denoiser: nn.Module, names: Sequence[str]) -> Fold:
    return Fold(
        names[0],
        tuple(denoiser.get_submodule(name) for name in names),
        lambda r: put_behind(denoiser, names, 1 / r),
    )
