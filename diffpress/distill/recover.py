"""Recovery: what pruning left of a denoiser learns from the original, output for output and block for block.

Output distillation on states that the original's own samples give, and beside it a term for each block that both
networks have (BK-SDM, Kim et al. 2023), relative to the size of what the original's block gives, so that no stage of
the network dominates (LAPTOP-Diff, Zhang et al. 2024). Outliers are masked, and the weight of these terms falls to
zero, as a smaller network is in the end not to be the larger one block by block (TinyFusion, Fang et al. 2024). Both
branches of guidance are learned, so that the generator is sampled as before. No real data anywhere.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffpress.config import config
from diffpress.denoise import check_solver, denoise
from diffpress.diffusion import Schedule, pseudo_huber
from diffpress.distill.pairs import Pairs, PairSettings, solver_plan
from diffpress.distill.reflow import HUBER
from diffpress.distill.student import (
    Conditions,
    accelerated,
    check_guidance,
    collect,
    held_out_error,
    noised,
    previews,
    schedule_of,
    training_key,
)
from diffpress.errors import ConfigError
from diffpress.generator import Generator, patched
from diffpress.stage import Applied, Context
from diffpress.structures import Structure, find_structures, masked
from diffpress.targets import Target
from diffpress.training import Draw, TrainingSettings, check_training, fit

logger = logging.getLogger(__name__)

_CODES = (torch.int8, torch.uint8)  # of weights that are quantized

Seen = dict[str, tuple[Tensor, ...]]
Kept = Mapping[str, Sequence[int]]
"""Units that stay in a narrower network, by structure."""


@config
class RecoverConfig:
    """What the pruned network learns, and on which states."""

    states: Literal["noised", "path"] = "noised"
    """noised: samples of the original with fresh noise, at all levels of the schedule alike; path: the states of its
    sampling runs at the starts of ``phases``."""
    phases: Annotated[int, Field(ge=1, le=64)] = 8
    """Levels at which the states of a run are kept, for states ``path``."""
    unconditional: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of an update's records that are shown without their condition, where the generator has guidance."""
    loss: Literal["l2", "huber"] = "l2"
    """Squared error of outputs, or pseudo-Huber."""
    features: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the mean relative squared error of block ends, beside the outputs' loss; 0: outputs alone."""
    mask: Annotated[float, Field(gt=0)] | None = 2.0
    """Elements so many standard deviations from a block end's mean, in either network, are left out; null: none."""
    decay: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the training over which ``features`` falls to zero, linearly; 0: it stays."""
    pairs: PairSettings = PairSettings()
    """The original's runs, whose samples are the data."""
    training: TrainingSettings = TrainingSettings()
    """The training."""

    @model_validator(mode="after")
    def _fits(self) -> RecoverConfig:
        if self.states == "path" and self.pairs.steps % self.phases:
            raise ValueError(f"phases {self.phases} must divide the original's pairs.steps {self.pairs.steps}")
        return self

    @property
    def phase_count(self) -> int:
        return self.phases if self.states == "path" else 1


@dataclasses.dataclass(frozen=True)
class Ends:
    """What the blocks of two networks gave in their last calls, at the places that are compared."""

    places: Sequence[tuple[str, str]]
    """(block of the student, block of the teacher)."""
    student: Seen
    teacher: Seen

    def distance(self, mask: float | None) -> Tensor:
        """Mean over places and records of `relative_distance`."""
        each = [
            relative_distance(found, wanted, mask).mean()
            for ours, theirs in self.places
            for found, wanted in zip(self.student[ours], self.teacher[theirs], strict=True)
        ]
        return torch.stack(each).mean()

    def forget(self) -> None:
        """Let go of what was seen, and of the graph behind it."""
        self.student.clear()
        self.teacher.clear()


def relative_distance(found: Tensor, wanted: Tensor, mask: float | None) -> Tensor:
    """sum (f_S - f_T)^2 / sum f_T^2 over the elements kept of each record, float32 [n].

    Features [n, ...] of student and teacher; the denominator is LAPTOP-Diff's weight of a term. Kept is what is nearer
    than ``mask`` standard deviations to the mean in both (TinyFusion, section 3.3); None: all. 0 beside zeros alone.
    """
    found, wanted = found.float().flatten(1), wanted.float().flatten(1)
    kept = torch.ones_like(wanted)
    if mask is not None:
        for values in (found.detach(), wanted):
            kept *= (values - values.mean(1, True)).abs() <= mask * values.std(1, keepdim=True)
    size = (kept * wanted.square()).sum(1)
    return (kept * (found - wanted).square()).sum(1) / torch.where(size > 0, size, torch.inf)


@contextmanager
def watched(network: nn.Module, names: Sequence[str]) -> Iterator[Seen]:
    """The tensors that the modules ``names`` of a network returned in its last call; hooks are gone afterwards.

    Those that are handed on as they were given are left out: nothing is there that could learn.
    """
    seen: Seen = {}

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            given, values = (*args, *kwargs.values()), output if isinstance(output, tuple) else (output,)
            changed = [value for value in values if not any(value is each for each in given)]
            seen[name] = tuple(value for value in changed if isinstance(value, Tensor))

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(network.get_submodule(name).register_forward_hook(hook_of(name), with_kwargs=True).remove)
        yield seen


def shared_blocks(student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    """(block of the student, block of the teacher after which both should have the same).

    Of lists of blocks, such as a DiT's or the stages of a U-Net, and the middle of a U-Net. The last block before a gap
    that pruning has left is compared with the last of the gap, so that the block after it is given what it was given.
    """
    places = []
    for name, child in student.named_children():
        other = getattr(teacher, name, None)
        if isinstance(child, nn.ModuleList) and isinstance(other, nn.ModuleList):
            starts = _starts(child, other)
            ends = [*(start - 1 for start in [*starts.values()][1:]), len(other) - 1]
            places += [(f"{name}.{a}", f"{name}.{b}") for a, b in zip(starts, ends, strict=False)]
        elif name == "mid_block" and other is not None:
            places.append((name, name))
    return places


def _starts(blocks: nn.ModuleList, teacher: nn.ModuleList) -> dict[int, int]:
    """Which of the teacher's blocks each of ``blocks`` that can learn was, or the first of several that it runs."""
    kinds = tuple({type(block) for block in teacher})
    inner = [(index, block) for index, each in enumerate(blocks) for block in _inner(each, kinds)]
    own = [place for place, (_, block) in enumerate(inner) if next(block.parameters(), None) is not None]
    found = own if len(inner) == len(teacher) else origins([inner[place][1] for place in own], list(teacher))
    starts: dict[int, int] = {}
    for place, start in zip(own, found, strict=True):
        starts.setdefault(inner[place][0], start)
    return starts


def _inner(block: nn.Module, kinds: tuple[type, ...]) -> list[nn.Module]:
    """Blocks of ``kinds`` that ``block`` runs (coarse blocks run several), or itself."""
    inside = [] if isinstance(block, kinds) else [module for module in block.modules() if isinstance(module, kinds)]
    return inside or [block]


@torch.no_grad()
def origins(blocks: Sequence[nn.Module], teacher: Sequence[nn.Module]) -> list[int]:
    """Which of the teacher's blocks each block was before the others went: the nearest in weights, order kept."""
    found: list[int] = []
    for place, block in enumerate(blocks):
        first, last = (found[-1] + 1 if found else 0), len(teacher) - (len(blocks) - place)
        found.append(min(range(first, last + 1), key=lambda index: _apart(block, teacher[index])))
    return found


def _apart(block: nn.Module, other: nn.Module) -> float:
    """Squared distance of the parameters that agree in name and shape, relative to those of ``other``."""
    theirs = dict(other.named_parameters())
    pairs = [(a, theirs[name]) for name, a in block.named_parameters() if name in theirs]
    same = [(a.to(b.device), b) for a, b in pairs if a.shape == b.shape]
    size = sum(float(b.double().square().sum()) for _, b in same)
    return sum(float((a - b).double().square().sum()) for a, b in same) / size if size else float("inf")


@contextmanager
def compared(
    student: nn.Module,
    teacher: nn.Module,
    call: Callable[[nn.Module], Tensor],
    places: Sequence[tuple[str, str]],
    *,
    nested: bool = False,
) -> Iterator[Ends]:
    """`Ends` of those of ``places`` that give tensors of one shape in both networks, seen by ``call(network)``.

    Raises ConfigError where the two networks are alike in structure and output, unless narrower ones are ``nested``.
    """
    with watched(student, [a for a, _ in places]) as ours, watched(teacher, [b for _, b in places]) as theirs:
        with torch.no_grad():
            outputs = [call(network) for network in (student, teacher)]
        same = _shapes(student.state_dict().values()) == _shapes(teacher.state_dict().values())
        if same and not nested and torch.equal(*outputs):
            raise ConfigError("the denoiser is the original's: there is nothing to recover; allowed: after pruning")
        kept = [(a, b) for a, b in places if ours.get(a) and _shapes(ours[a]) == _shapes(theirs.get(b, ()))]
        say = logger.warning if places and not kept else logger.info
        say("prune.recover: %d of %d blocks' ends are compared", len(kept), len(places))
        yield Ends(kept, ours, theirs)


def _shapes(tensors: Iterable[Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]


def sandwich(widths: Sequence[Kept], step: int) -> list[Kept]:
    """The first of ``widths``, the last, and one of those between in turn (the sandwich rule, Yu & Huang 2019)."""
    between = widths[1:-1]
    return [*widths[:1], *([between[step % len(between)]] if between else []), *widths[1:][-1:]]


@dataclasses.dataclass(frozen=True)
class RecoverLoss:
    """Mean over a batch of d(student(x_t, t, c), teacher(x_t, t, c)), and what `Ends` says beside it.

    Of nested networks the mean over those of `sandwich`.
    """

    pairs: Pairs
    teacher: nn.Module
    conditions: Conditions
    schedule: Schedule
    config: RecoverConfig
    ends: Ends | None = None
    """None: outputs alone."""
    structures: Mapping[str, Structure] = dataclasses.field(default_factory=dict)
    """Of the student, where networks are nested in it."""
    widths: Sequence[Kept] = ({},)
    """Of the nested networks, the whole first."""

    def __call__(self, network: nn.Module, draw: Draw) -> Tensor:
        rows = draw.mine(draw.rows(len(self.pairs))).cpu()  # records stay in main memory, a batch moves
        uniform, noise = draw.mine(draw.uniform()).cpu(), draw.mine(draw.normal(*self.pairs.states.shape[2:]))
        free = draw.mine(draw.uniform()).cpu() < self.config.unconditional
        x_t, told = self.state(rows, uniform, noise)
        given = self.conditions.mixed(rows, free).to(draw.device)
        with torch.no_grad():
            wanted = denoise(self.teacher.to(draw.device), x_t, told, given).float()
        losses = []
        for kept in sandwich(self.widths, draw.step):
            with masked(self.structures, kept):
                losses.append(self.distance(denoise(network, x_t, told, given).float() - wanted, draw.step))
        if self.ends is not None:
            self.ends.forget()
        return torch.stack(losses).mean()

    def distance(self, error: Tensor, step: int) -> Tensor:
        """The loss of outputs that are off by ``error`` [n, c, ...], and of the features that `Ends` has just seen."""
        each = pseudo_huber(error, HUBER) if self.config.loss == "huber" else error.flatten(1).square().mean(1)
        weight = self.weight(step)
        if self.ends is None or not weight:
            return each.mean()
        return each.mean() + weight * self.ends.distance(self.config.mask)

    def weight(self, step: int) -> float:
        """Of the features in update ``step``: falls linearly over the first `decay` of the training."""
        updates = self.config.decay * self.config.training.steps
        return self.config.features * (max(0.0, 1 - step / updates) if updates else 1.0)

    def state(self, rows: Tensor, uniform: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t [n, c, ...], what the network is told of t [n]) of records ``rows`` [n], at levels by ``uniform`` [n].

        ``noise`` [n, c, ...] is that of noised samples; a path has its own.
        """
        if self.config.states == "noised":
            place = (uniform * len(self.schedule.timesteps)).long()
            return noised(self.schedule, self.pairs.states[rows, -1].to(noise.device), noise, place)
        place = (uniform * self.pairs.phases).long()
        told = torch.tensor([edge.timestep for edge in self.pairs.edges[:-1]])
        return self.pairs.states[rows, place].to(noise.device), told[place].to(noise.device)


class Recover:
    """``prune.recover``: trains the pruned denoiser in place to do what the original does."""

    Config: ClassVar[type] = RecoverConfig

    def __init__(self, config: RecoverConfig) -> None:
        self.config = config

    def check(self, generator: Generator, target: Target) -> None:
        """Raises ConfigError for a solver that is not deterministic, and for a quantized network."""
        generator.schedule  # noqa: B018 - an unknown forward process is refused here
        check_solver(generator, self.config.pairs.scheduler)
        check_guidance(generator, self.config.pairs)
        check_training(self.config.training)
        if coded := [name for name, value in generator.denoiser.state_dict().items() if value.dtype in _CODES]:
            raise ConfigError(f"{coded[0]} is quantized and cannot be trained; allowed: before quantizing")

    @accelerated
    def apply(self, generator: Generator, context: Context) -> Applied:
        """Raises ConfigError, ArtifactError, InfrastructureError or TrainingError; the run's folder keeps the work."""
        settings, work = self.config, context.work_folder()
        original = _original(generator, context)
        structures, widths = _nested(generator, settings.training)
        plan, batch_size = solver_plan(settings.pairs, context.plan), settings.pairs.batch_size
        original.use_scheduler(context.plan.scheduler)
        train, held_out = collect(original, context, settings.pairs, settings.phase_count)
        conditions, schedule = Conditions.of(original, train, plan, told=True), schedule_of(original, train)
        teacher = original.denoiser.eval().requires_grad_(False)
        places = shared_blocks(generator.denoiser, teacher) if settings.features else []
        call = _probe(generator, train, conditions)

        def errors() -> dict[str, float]:
            found = {}
            for share, kept in widths.items():
                with masked(structures, kept):
                    found[share] = float(held_out_error(generator, held_out, plan, batch_size=batch_size).mean())
            return found

        with patched(generator.pipeline, "scheduler", original.pipeline.scheduler):
            before = errors()
            with compared(generator.denoiser, teacher, call, places, nested=len(widths) > 1) as ends:
                loss = RecoverLoss(train, teacher, conditions, schedule, settings, ends if ends.places else None)
                fitted = fit(
                    generator.denoiser,
                    dataclasses.replace(loss, structures=structures, widths=list(widths.values())),
                    settings.training,
                    seed=context.train_seed,
                    key=training_key(generator, settings, context),
                    folder=work,
                    progress=context.progress,
                    preview=previews(generator, conditions.unique, work, plan),
                )
            after = errors()
        error: dict[str, Any] = {"held_out_error": after["1"], "pruned_error": before["1"]}
        told = f"held-out error {after['1']:.3f}, {before['1']:.3f} before"
        summary = f"{len(fitted.losses)} updates towards the original: {told}"
        if len(widths) > 1:
            error["nested"] = [{"share": share, "error": after[share], "before": before[share]} for share in widths]
            summary += "".join(f"; width {share}: {after[share]:.3f}, {before[share]:.3f} before" for share in widths)
        return Applied(generator, {"losses": fitted.losses} | error, summary)

    @staticmethod
    def restore(generator: Generator, metadata: dict[str, Any]) -> None:
        """Nothing to do: structure and plan are those before."""


def _original(generator: Generator, context: Context) -> Generator:
    """The generator before the first stage; ConfigError where there is none, or its plan is another by now."""
    if context.original is None:
        raise ConfigError("prune.recover learns from the generator before the first stage: give Context(original=...)")
    original = context.original()
    if generator.plan != original.plan:
        raise ConfigError(
            f"the generator is sampled by {generator.plan}, the original by {original.plan}: another function; "
            "allowed: prune.recover before a stage that fixes how pictures are drawn"
        )
    original.pipeline.to(next(generator.denoiser.parameters()).device)
    return original


def _nested(generator: Generator, training: TrainingSettings) -> tuple[dict[str, Structure], dict[str, Kept]]:
    """(structures, units that stay in each network nested in the denoiser, by its share, the whole first).

    ConfigError for a training that these cannot have.
    """
    made, network = generator.nested, generator.denoiser
    if made is None:
        return {}, {"1": {}}
    for name, value, allowed in (("rank", training.rank, "null"), ("compile", training.compile, "false")):
        if value:
            raise ConfigError(f"prune.recover: training.{name} does not go with nested widths; allowed: {allowed}")
    return find_structures(network, made.kinds), {f"{share:g}": made.kept(network, share) for share in made.shares}


def _probe(generator: Generator, pairs: Pairs, conditions: Conditions) -> Callable[[nn.Module], Tensor]:
    """A call of a network on the noise and condition of the first record, where the generator's denoiser is."""
    device = next(generator.denoiser.parameters()).device
    given = conditions.conditional.rows(conditions.index[:1]).to(device)
    x_t, told = pairs.states[:1, 0].to(device), torch.tensor([pairs.edges[0].timestep], device=device)
    return lambda network: denoise(network.to(device), x_t, told, given)
