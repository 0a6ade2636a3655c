"""Where a denoiser is cut for feature caching: a range of a transformer's blocks, or all but a U-Net's last layers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diffpress.caching import Cut
from diffpress.errors import ConfigError
from diffpress.generator import Generator, SamplingPlan
from diffpress.prune.units import Skip


@dataclass(frozen=True)
class _Passed:
    """One call of a block: its name, tensors that it took, what it returned."""

    name: str
    arguments: dict[str, Tensor]
    output: tuple[Any, ...]


def is_unet(network: nn.Module) -> bool:
    """Whether its layers are those of a U-Net."""
    return hasattr(network, "up_blocks") and hasattr(network, "down_blocks")


def check_cut(network: Any, *, keep_first: int | None, keep_last: int | None, branch: int | None) -> None:
    """Raises ConfigError where as much as that cannot be kept; see `find_cut`."""
    kind = type(network).__name__
    if is_unet(network):
        if keep_first is not None or keep_last is not None:
            raise ConfigError(
                f"prune.steps: keep_first and keep_last are for blocks, but {kind} is a U-Net; use branch"
            )
        layers = len(_up_layers(network)) - (network.mid_block is None)  # something has to be left out
        if (branch or 0) >= layers:
            raise ConfigError(f"prune.steps: branch {branch} of {kind}, which has {layers} up layers; allowed: below")
        block, layer = _up_layers(network)[-(branch or 0) - 1]
        attentions = getattr(network.up_blocks[block], "attentions", None)
        if layer and attentions is not None and len(attentions) != len(network.up_blocks[block].resnets):
            raise ConfigError(
                f"prune.steps: branch {branch or 0} cuts up_blocks.{block} of {kind}, whose layers have not got an "
                f"attention each; allowed: a branch that begins with a block, such as {(branch or 0) + layer}"
            )
        return
    if branch is not None:
        raise ConfigError(f"prune.steps: branch is for U-Nets; {kind} has blocks: use keep_first and keep_last")
    count = sum(not isinstance(block, Skip) for _, blocks in _lists(network) for block in blocks)
    kept = _or(keep_first, 1) + _or(keep_last, 0)
    if kept >= count:
        raise ConfigError(f"prune.steps: keep_first and keep_last keep {kept} blocks; {kind} has {count} in all")


def find_cut(
    generator: Generator,
    conditions: Sequence[Any],
    plan: SamplingPlan,
    *,
    keep_first: int | None,
    keep_last: int | None,
    branch: int | None,
) -> Cut:
    """Let a step of reuse run ``keep_first`` (null: 1) and ``keep_last`` (0) blocks, or ``branch`` (0) + 1 up layers.

    Raises ConfigError where there is not as much to keep, or no blocks that hand tensors from one to the next.
    """
    network = generator.denoiser
    check_cut(network, keep_first=keep_first, keep_last=keep_last, branch=branch)
    if is_unet(network):
        return _unet_cut(network, branch or 0)
    blocks, arguments = _chain(generator, conditions, plan)
    first, last = _or(keep_first, 1), len(blocks) - _or(keep_last, 0)
    if first >= last:
        raise ConfigError(
            f"prune.steps: keep_first {first} and keep_last {len(blocks) - last} leave nothing to reuse of the "
            f"{len(blocks)} blocks {blocks[0]} to {blocks[-1]}; allowed: fewer"
        )
    return Cut(
        start=blocks[first],
        end=blocks[last - 1],
        arguments=arguments,
        origin=blocks[0] if first else None,
        skipped=tuple(blocks[first:last]),
    )


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _lists(network: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    return [(name, child) for name, child in network.named_children() if isinstance(child, nn.ModuleList)]


def _chain(generator: Generator, conditions: Sequence[Any], plan: SamplingPlan) -> tuple[list[str], tuple[str, ...]]:
    """The longest chain of blocks of which each takes the very tensors that the one before returned, seen in one call.

    The names of those blocks, and what they call the tensors.
    """
    passed: list[_Passed] = []
    with ExitStack() as stack:
        for list_name, blocks in _lists(generator.denoiser):
            for index, block in enumerate(blocks):
                if not isinstance(block, Skip):  # hands on the very tensors that it takes
                    stack.callback(_watch(f"{list_name}.{index}", block, passed))
        generator.record(conditions[:1], seeds=[0], plan=plan, limit=1)
    best: tuple[list[str], tuple[str, ...]] = ([], ())
    for start in range(len(passed)):
        names, arguments = [passed[start].name], None
        for before, after in zip(passed[start:], passed[start + 1 :], strict=False):
            link = _link(before, after)
            if link is None or link != (arguments or link):
                break
            arguments = link
            names.append(after.name)
        if arguments is not None and len(names) > len(best[0]):
            best = names, arguments
    if not best[0]:
        raise ConfigError(
            f"prune.steps: {type(generator.denoiser).__name__} has no blocks that hand tensors from one to the next; "
            "allowed: transformers made of such blocks, and U-Nets"
        )
    return best


def _watch(name: str, block: nn.Module, passed: list[_Passed]) -> Any:
    """Note every call of ``block``; the value undoes it."""
    names = list(inspect.signature(block.forward).parameters)

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        passed.append(_Passed(name, tensors, output if isinstance(output, tuple) else (output,)))

    return block.register_forward_hook(hook, with_kwargs=True).remove


def _link(before: _Passed, after: _Passed) -> tuple[str, ...] | None:
    """What ``after`` calls each tensor that ``before`` returned; None where it does not take them all."""
    found = [next((name for name, x in after.arguments.items() if x is value), None) for value in before.output]
    return None if None in found else tuple(name for name in found if name is not None)


def _up_layers(network: Any) -> list[tuple[int, int]]:
    """(block, layer) of the up path, as they run."""
    return [(j, i) for j, block in enumerate(network.up_blocks) for i in range(len(block.resnets))]


def _unet_cut(network: Any, branch: int) -> Cut:
    """Keep what enters the last ``branch`` + 1 up layers (DeepCache's branch, 0 the shallowest)."""
    block, layer = _up_layers(network)[-branch - 1]
    deepest = len(network.down_blocks) - 1 - block  # the last down block whose skips the kept layers read
    if layer and layer == len(network.up_blocks[block].resnets) - 1:
        deepest -= 1  # the last layer of an up block reads what entered that down block
    skipped = [f"down_blocks.{index}" for index in range(deepest + 1, len(network.down_blocks))]
    skipped += ["mid_block"] if network.mid_block is not None else []
    skipped += [f"up_blocks.{index}" for index in range(block)]
    for index in range(layer):
        skipped.append(f"up_blocks.{block}.resnets.{index}")
        attentions = getattr(network.up_blocks[block], "attentions", None)
        if attentions is not None and attentions[index] is not None:
            skipped.append(f"up_blocks.{block}.attentions.{index}")
    return Cut(end=skipped[-1], skipped=tuple(skipped))
