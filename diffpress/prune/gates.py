"""Learned gates: which blocks go is trained together with a simulated recovery (TinyFusion, Fang et al. 2024).

Consecutive units form groups, and a group's options are all masks that keep a given number of its units. Each row of
each update draws one mask for each group by a hard Gumbel-softmax; the logits, and low-rank adapters of a copy of the
network, learn together to give the outputs of the whole network. The most probable masks decide; copy and adapters are
discarded. So the choice is of what can be recovered well, not of what hurts least before any recovery. The loss
is on recorded outputs, without data; the paper's is on pictures.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import floor
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from diffpress.artifact import fingerprint
from diffpress.config import config
from diffpress.generator import Call
from diffpress.lora import add_adapters
from diffpress.prune.units import Skip, Unit
from diffpress.recorded import arguments, moved, relative_error
from diffpress.stage import Context
from diffpress.training import Draw, TrainingSettings, fit

_SPEED = 1000.0  # logits per trained parameter: Adam moves the one by a learning rate, the other by 0.1 at 1e-4


@config
class GateSettings:
    """How gates are learned."""

    group: Annotated[int, Field(ge=2, le=14)] = 4
    """Consecutive units of which a fixed number stays; the last group of a list may be smaller."""
    hot: Annotated[float, Field(gt=0)] = 4.0
    """Temperature of the Gumbel-softmax at the first update."""
    cold: Annotated[float, Field(gt=0)] = 0.1
    """Temperature at the last; it falls linearly."""
    steps: Annotated[int, Field(ge=1)] = 400
    """Updates of the joint training."""
    batch_size: Annotated[int, Field(ge=1)] = 1
    """Recorded calls in one update, over all processes together; each holds a whole batch."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak of AdamW's learning rate; it falls along half a cosine to 2 % of this."""
    rank: Annotated[int, Field(ge=1)] | None = 8
    """Of the adapters that learn beside the gates; null: the gates learn alone, without a recovery."""

    @property
    def training(self) -> TrainingSettings:
        """For the loop that all trainings share; the last weights count, not an average."""
        return TrainingSettings(
            steps=self.steps, batch_size=self.batch_size, learning_rate=self.learning_rate, warmup=0, ema=0.0
        )


@dataclass(frozen=True)
class Group:
    """Consecutive units, and the masks [options, units] that may be drawn for them: 1 stays, 0 goes."""

    units: tuple[Unit, ...]
    masks: Tensor


def masks_of(count: int, gone: int) -> Tensor:
    """All masks of ``count`` units with ``gone`` zeros, float32 [binomial(count, gone), count]."""
    masks = torch.ones(0, count)
    for zeros in itertools.combinations(range(count), gone):
        mask = torch.ones(1, count)
        mask[0, list(zeros)] = 0
        masks = torch.cat([masks, mask])
    return masks


def grouped(units: Sequence[Unit], gone: int, size: int) -> list[Group]:
    """``units``, in the order in which they run, in groups of ``size`` that lose ``gone`` of them evenly.

    Blocks of different lists, as those of one stream and of two, are in different groups.
    """
    parts: list[tuple[Unit, ...]] = []
    for _, same in itertools.groupby(units, key=_list_of):
        run = list(same)
        parts += [tuple(run[start : start + size]) for start in range(0, len(run), size)]
    groups, before = [], 0
    for part in parts:
        after = before + len(part)
        first, last = (floor(gone * place / len(units) + 0.5) for place in (before, after))
        groups.append(Group(part, masks_of(len(part), last - first)))
        before = after
    return groups


def _list_of(unit: Unit) -> str:
    """The list of a block of the network itself; empty for what is deeper."""
    name = unit.name.rpartition(".")[0]
    return "" if "." in name else name


def draw_masks(logits: Tensor, noise: Tensor, tau: float) -> Tensor:
    """One-hot argmax_k (l_k + g_k) with the gradient of softmax((l + g) / tau), g = -log(-log u) (Jang et al. 2017).

    logits [options], noise u in [0, 1) [n, options]; returns [n, options].
    """
    gumbel = -torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))
    soft = F.softmax((logits + gumbel) / tau, dim=-1)
    hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft)
    return hard - soft.detach() + soft


class Gated(nn.Module):
    """A network, changed in place, whose units each row has or has not, by masks drawn from trained logits."""

    def __init__(self, network: nn.Module, groups: Sequence[Group]) -> None:
        super().__init__()
        self.network = network
        self.groups = groups
        self.scores = nn.ParameterList(torch.zeros(len(group.masks)) for group in groups)
        self.gates: dict[str, Tensor] = {}
        for unit in (unit for group in groups for unit in group.units):
            module = network.get_submodule(unit.name)
            object.__setattr__(module, "forward", self._mixing(module.forward, Skip(module, unit), unit.name))

    def _mixing(self, whole: Callable[..., Any], without: Skip, name: str) -> Callable[..., Any]:
        """m f(x) + (1 - m) x with the row's gate m; f(x) and x as the unit and its `Skip` return them."""

        def mix(one: Tensor, other: Tensor) -> Tensor:
            m = self.gates[name].to(one.dtype).view(-1, *[1] * (one.ndim - 1))
            return m * one + (1 - m) * other

        def forward(*args: Any, **kwargs: Any) -> Any:
            with_unit, skipped = whole(*args, **kwargs), without(*args, **kwargs)
            if isinstance(with_unit, tuple):
                return tuple(mix(one, other) for one, other in zip(with_unit, skipped, strict=True))
            return mix(with_unit, skipped)

        return forward

    @property
    def options(self) -> int:
        """Masks of all groups together."""
        return sum(len(group.masks) for group in self.groups)

    def forward(self, inputs: dict[str, Any], noise: Tensor, tau: float) -> Tensor:
        """The network's output for ``inputs`` under masks drawn with ``noise`` [n, options]."""
        parts = noise.split([len(group.masks) for group in self.groups], dim=1)
        for group, scores, part in zip(self.groups, self.scores, parts, strict=True):
            gates = draw_masks(_SPEED * scores, part, tau) @ group.masks.to(part)  # [n, units]
            self.gates |= {unit.name: gates[:, place] for place, unit in enumerate(group.units)}
        return self.network(**inputs)[0]

    @torch.no_grad()
    def kept(self) -> dict[str, float]:
        """Probability that each unit stays, by name."""
        found: dict[str, float] = {}
        for group, scores in zip(self.groups, self.scores, strict=True):
            shares = F.softmax(_SPEED * scores, dim=-1).cpu() @ group.masks
            found |= {unit.name: float(share) for unit, share in zip(group.units, shares, strict=True)}
        return found

    @torch.no_grad()
    def removed(self) -> list[Unit]:
        """What the most probable masks leave out."""
        gone: list[Unit] = []
        for group, scores in zip(self.groups, self.scores, strict=True):
            mask = group.masks[int(scores.argmax())]
            gone += [unit for unit, stays in zip(group.units, mask, strict=True) if not stays]
        return gone


@dataclass(frozen=True)
class GateLoss:
    """Mean `relative_error` of the gated network on recorded calls; outputs of the whole network are the targets."""

    calls: Sequence[Call]
    options: int
    settings: GateSettings

    def __call__(self, network: nn.Module, draw: Draw) -> Tensor:
        places = draw.rows(len(self.calls))
        rows = max(len(call.output) for call in self.calls)
        noise = torch.rand(len(places), rows, self.options, generator=draw.generator)
        losses = []
        for place, each in zip(draw.mine(places).tolist(), draw.mine(noise), strict=True):
            call = moved(self.calls[place], draw.device)
            found = network(arguments(call), each[: len(call.output)], self.tau(draw.step))
            losses.append(relative_error(found, call).mean())
        return torch.stack(losses).mean()

    def tau(self, step: int) -> float:
        """Temperature of update ``step``."""
        done = step / max(1, self.settings.steps - 1)
        return self.settings.hot + (self.settings.cold - self.settings.hot) * done


def learn_gates(
    network: nn.Module,
    calls: Sequence[Call],
    units: Sequence[Unit],
    gone: int,
    settings: GateSettings,
    context: Context,
) -> tuple[list[Unit], dict[str, float]]:
    """(``gone`` units to remove, probability that each stays); ``network`` is left as it is.

    Raises ConfigError without a work folder, MissingDependencyError without peft, and what `fit` does.
    """
    if not gone:
        return [], {}
    copied = copy.deepcopy(network).requires_grad_(False)
    if settings.rank is not None:
        add_adapters(copied, settings.rank, seed=context.train_seed)
    gated = Gated(copied, grouped(units, gone, settings.group))
    fit(
        gated,
        GateLoss(calls, gated.options, settings),
        settings.training,
        seed=context.train_seed,
        key=fingerprint(asdict(settings), [unit.name for unit in units], gone),
        folder=context.work_folder(),
        progress=context.progress,
        label="Pruning: learning which units go",
    )
    return gated.removed(), gated.kept()
