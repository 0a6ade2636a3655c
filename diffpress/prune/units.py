"""What can be taken out of a denoiser whole: residual blocks, their branches, layers of a U-Net of equal width.

A unit without its residual gives back what went in, so every shape around it stays valid. Layers that read a skip
connection change the width and are no units. Where the network's own class can build it without certain blocks, they
leave its list and its config says so: it is a plain diffusers model again. Otherwise a `Skip` takes their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from accelerate import init_empty_weights
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from diffpress.errors import ConfigError
from diffpress.generator import argument_names, patched
from diffpress.traceable import unread

Granularity = Literal["block", "sublayer"]


class _Block(NamedTuple):
    """What is known of a class of residual blocks."""

    returned: tuple[str, ...]
    """What it returns, named as its arguments."""
    branches: dict[str, int]
    """Its residual branches, and how many values each returns."""
    counted: bool = False
    """Whether the network tells its blocks apart by their place: none can leave the list."""


_IMAGE, _TEXT_AND_IMAGE = ("hidden_states",), ("encoder_hidden_states", "hidden_states")
_BLOCKS = {
    "AuraFlowJointTransformerBlock": _Block(_TEXT_AND_IMAGE, {}),
    "AuraFlowSingleTransformerBlock": _Block(_IMAGE, {}),
    "BasicTransformerBlock": _Block(_IMAGE, {"attn1": 1, "attn2": 1, "ff": 1}),
    "ChromaSingleTransformerBlock": _Block(_IMAGE, {}, counted=True),
    "ChromaTransformerBlock": _Block(_TEXT_AND_IMAGE, {"attn": 2, "ff": 1, "ff_context": 1}, counted=True),
    "CogView4TransformerBlock": _Block(_TEXT_AND_IMAGE[::-1], {"attn1": 2, "ff": 1}),
    "Flux2SingleTransformerBlock": _Block(_IMAGE, {}),
    "Flux2TransformerBlock": _Block(_TEXT_AND_IMAGE, {"attn": 2, "ff": 1, "ff_context": 1}),
    "FluxSingleTransformerBlock": _Block(_TEXT_AND_IMAGE, {}),
    "FluxTransformerBlock": _Block(_TEXT_AND_IMAGE, {"attn": 2, "ff": 1, "ff_context": 1}),
    "HunyuanDiTBlock": _Block(_IMAGE, {}, counted=True),
    "JointTransformerBlock": _Block(_TEXT_AND_IMAGE, {"attn": 2, "attn2": 1, "ff": 1, "ff_context": 1}),
    "Lumina2TransformerBlock": _Block(_IMAGE, {}),
    "QwenImageTransformerBlock": _Block(_TEXT_AND_IMAGE, {}),
    "SanaTransformerBlock": _Block(_IMAGE, {"attn1": 1, "attn2": 1, "ff": 1}),
    "ZImageTransformerBlock": _Block(("x",), {}),
}
_COUNTS = {  # list: config entries
    "joint_transformer_blocks": ("num_mmdit_layers",),
    "layers": ("num_layers", "n_layers"),
    "single_transformer_blocks": ("num_single_layers", "num_single_dit_layers"),
    "transformer_blocks": ("num_layers",),
}
_OWN_NORM = {"attn1": "norm1", "attn2": "norm2", "ff": "norm3"}  # of a BasicTransformerBlock with plain layer norms
KNOWN = (*_BLOCKS, "ResnetBlock2D", "Transformer2DModel", "Attention")


@dataclass(frozen=True)
class Unit:
    """A removable part of a denoiser."""

    name: str
    """Dotted, in the denoiser."""
    kind: Literal["block", "attention", "mlp", "resnet"]
    branch: int = 0
    """Values that a residual branch returns, which become zeros; 0: not a branch, gives back what went in."""


def find_units(network: nn.Module, granularity: Granularity) -> list[Unit]:
    """Removable units of ``network``, no two of which overlap; an empty list where there are none.

    ``block``: residual blocks, and a U-Net's attention layers and resnets of equal width. ``sublayer``: each attention
    and MLP of a block instead of the block, and instead of an attention layer around it.
    """

    def wanted(unit: Unit) -> bool:
        module = network.get_submodule(unit.name)
        if unit.branch:
            return granularity == "sublayer"
        if unit.kind == "block":
            return not (_branches(module) if granularity == "sublayer" else _inside_a_unit(network, unit.name))
        return granularity == "block" or not isinstance(module, Transformer2DModel)

    return [unit for unit in _all_units(network) if wanted(unit)]


def units_named(network: nn.Module, names: Iterable[str]) -> list[Unit]:
    """The units called ``names``; ConfigError for a name that is none of ``network``."""
    known = {unit.name: unit for unit in _all_units(network)}
    missing = [name for name in names if name not in known]
    if missing:
        raise ConfigError(
            f"{type(network).__name__} has no removable {', '.join(missing)}; allowed: {', '.join(known) or 'none'}"
        )
    return [known[name] for name in names]


def _all_units(network: nn.Module) -> Iterator[Unit]:
    """Units of every granularity."""
    idle = unread(network)
    for name, module in network.named_modules():
        if not name or not isinstance(network.get_submodule(name.rpartition(".")[0]), nn.ModuleList):
            continue
        if type(module).__name__ in _BLOCKS:
            ends = _ends_text(module) or any(pattern.startswith(f"{name}.") for pattern in idle)
            if not ends and getattr(module, "skip_linear", None) is None:
                yield Unit(name, "block")
            for child, values in _branches(module).items():
                yield Unit(f"{name}.{child}", "attention" if child.startswith("attn") else "mlp", values)
        elif _is_resnet(module):
            yield Unit(name, "resnet")
        elif _is_residual_attention(module):
            yield Unit(name, "attention")


def _branches(block: nn.Module) -> dict[str, int]:
    """Residual branches that a block still has and can do without."""
    there = {name for name, child in block.named_children() if not isinstance(child, Skip)}
    known = _BLOCKS[type(block).__name__].branches.items()
    return {name: values for name, values in known if name in there and not (values > 1 and _ends_text(block))}


def _ends_text(block: nn.Module) -> bool:
    """Whether a block is the last to read the text's stream; without it the block before would compute for nobody."""
    return bool(getattr(block, "context_pre_only", False))


def _is_resnet(module: nn.Module) -> bool:
    """A U-Net resnet without which the shapes stay as they are."""
    if not isinstance(module, ResnetBlock2D) or module.up or module.down or module.output_scale_factor != 1:
        return False
    return module.in_channels == module.out_channels and module.conv_shortcut is None


def _is_residual_attention(module: nn.Module) -> bool:
    """A layer of a U-Net around one transformer block, or around attention alone."""
    if isinstance(module, Transformer2DModel):
        return len(module.transformer_blocks) == 1
    return isinstance(module, Attention) and module.residual_connection and module.rescale_output_factor == 1


def _inside_a_unit(network: nn.Module, block: str) -> bool:
    """Whether a block is the only one of a layer that is a unit itself."""
    return _is_residual_attention(network.get_submodule(".".join(block.split(".")[:-2])))


class Skip(nn.Module):
    """Stands where a unit was, takes the same arguments, and adds nothing. It has no parameters of its own.

    The first block of a DiT holds the embedding that the network's last layer reads too; that stays.
    """

    def __init__(self, module: nn.Module, unit: Unit) -> None:
        super().__init__()
        known = _BLOCKS.get(type(module).__name__)
        self.arguments = argument_names(module)
        self.returned = known.returned if known else (self.arguments[0],)
        self.zeros = unit.branch
        self.named = isinstance(module, Transformer2DModel)
        embedding = _kept(module, unit)
        if embedding is not None:
            self.norm1 = nn.Module()
            self.norm1.emb = embedding

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        if self.zeros:
            x: Tensor = given[self.arguments[0]]
            zero = x.new_zeros((1,) * x.ndim)  # broadcast where it is added
            return zero if self.zeros == 1 else (zero,) * self.zeros
        values = tuple(given[name] for name in self.returned)
        if self.named:
            return Transformer2DModelOutput(sample=values[0]) if given.get("return_dict", True) else values
        return values if len(values) > 1 else values[0]


def read_outside(block: nn.Module) -> nn.Module | None:
    """What a network reads of its first block from outside: a DiT's embedding, for its last layer."""
    return getattr(getattr(block, "norm1", None), "emb", None)


def _kept(module: nn.Module, unit: Unit) -> nn.Module | None:
    """What stays of a unit that is gone."""
    coarse = unit.name.replace(".blocks.0", "")  # the first of blocks that run on fewer tokens
    return read_outside(module) if coarse == "transformer_blocks.0" else None


def saved(network: nn.Module, unit: Unit, weigh: Callable[[str], float]) -> float:
    """What goes with ``unit``: the sum of ``weigh(submodule)`` over what goes, less what stays of it.

    ``weigh`` counts a submodule, by its dotted name, with all that is below it.
    """
    norm, stays = _own_norm(network, unit), _kept(network.get_submodule(unit.name), unit)
    kept = 0.0 if stays is None else weigh(f"{unit.name}.norm1.emb")
    return weigh(unit.name) + (0.0 if norm is None else weigh(norm)) - kept


def going_whole(network: nn.Module, units: Iterable[Unit]) -> dict[Unit, tuple[str, ...]]:
    """Blocks of which all branches are among ``units``, with the names of those: once they go, the block does."""
    names = {unit.name for unit in units}
    found = {}
    for unit in _all_units(network):
        if unit.kind == "block":
            branches = tuple(f"{unit.name}.{child}" for child in _branches(network.get_submodule(unit.name)))
            if branches and names.issuperset(branches):
                found[unit] = branches
    return found


def _own_norm(network: nn.Module, unit: Unit) -> str | None:
    """Name of the norm that nothing but the branch ``unit`` reads, where it has weights."""
    parent, _, child = unit.name.rpartition(".")
    plain = unit.branch and getattr(network.get_submodule(parent), "norm_type", None) == "layer_norm"
    return f"{parent}.{_OWN_NORM[child]}" if plain else None


def parameter_count(module: nn.Module) -> int:
    """How many numbers are trained in ``module``."""
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def bypassed(network: nn.Module, units: Iterable[Unit]) -> Iterator[None]:
    """Inside the block ``network`` computes as without ``units``; undone on exit."""
    with ExitStack() as stack:
        for unit in units:
            module = network.get_submodule(unit.name)
            stack.enter_context(patched(module, "forward", Skip(module, unit).forward))
        yield


def remove(network: Any, units: Sequence[Unit]) -> dict[str, Any]:
    """Take ``units`` out of ``network`` for good; returns what `restore` needs, as JSON.

    ``plain`` in it says whether the network's own class can now build it from its config.
    """
    units = _merged(network, units)
    metadata = {"removed": [unit.name for unit in units], "plain": _buildable(network, units)}
    restore(network, metadata)
    return metadata


def restore(network: Any, metadata: dict[str, Any]) -> None:
    """Give ``network`` the structure that `remove` left; ConfigError where it has no such units."""
    units = units_named(network, metadata["removed"])
    if metadata["plain"]:
        for name, blocks in _survivors(network, units).items():
            network.set_submodule(name, blocks)
            network.register_to_config(**{_count_of(network, name): len(blocks)})
        return
    for unit in units:
        network.set_submodule(unit.name, Skip(network.get_submodule(unit.name), unit))
        norm = _own_norm(network, unit)
        if norm is not None:
            network.set_submodule(norm, nn.Identity())


def _merged(network: nn.Module, units: Iterable[Unit]) -> list[Unit]:
    """Blocks in place of all of their branches; in the network's order."""
    names = {unit.name for unit in units}
    for block, branches in going_whole(network, units).items():
        names = names.difference(branches) | {block.name}
    return [unit for unit in _all_units(network) if unit.name in names]


def _count_of(network: Any, blocks: str) -> str:
    """What the config calls the number of blocks in a list."""
    return next((name for name in _COUNTS[blocks] if name in network.config), _COUNTS[blocks][0])


def _survivors(network: nn.Module, units: Iterable[Unit]) -> dict[str, nn.ModuleList]:
    """The lists that ``units`` are in, without them."""
    gone = {unit.name for unit in units}
    return {
        name: nn.ModuleList(block for index, block in enumerate(_list(network, name)) if f"{name}.{index}" not in gone)
        for name in sorted({name.rpartition(".")[0] for name in gone})
    }


def _list(network: nn.Module, name: str) -> nn.ModuleList:
    blocks = network.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def _buildable(network: Any, units: Sequence[Unit]) -> bool:
    """Whether the class of ``network`` itself builds it without ``units`` when its config says so."""
    if not units or any(unit.name.rpartition(".")[0] not in _COUNTS for unit in units):
        return False
    lists, counts = _survivors(network, units), {}
    for name, blocks in lists.items():
        before, count = _list(network, name), _count_of(network, name)
        known = _BLOCKS.get(type(before[0]).__name__)
        if network.config.get(count) != len(before) or not _same_end(before[0], blocks) or (known and known.counted):
            return False
        counts[count] = len(blocks)
    state = {key: value.shape for key, value in network.state_dict().items() if key.split(".")[0] not in lists}
    for name, blocks in lists.items():
        state |= {f"{name}.{key}": value.shape for key, value in blocks.state_dict().items()}
    with init_empty_weights():
        twin = type(network).from_config({**network.config, **counts})
    return {key: value.shape for key, value in twin.state_dict().items()} == state


def _same_end(first: nn.Module, blocks: nn.ModuleList) -> bool:
    """Whether the network's end, which may read its first block's embedding, reads the same of ``blocks``."""
    kept = read_outside(first)
    if kept is None:
        return True
    other = read_outside(blocks[0]) if len(blocks) else None
    if other is None:
        return False
    ours, theirs = kept.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
