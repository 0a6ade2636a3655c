"""What every student shares: its teacher and records, a first-order solver, its sampling plan, its held-out error."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffpress.artifact import fingerprint
from diffpress.denoise import Conditioning, as_told, denoise, encode, equally_long, first_inputs, trajectory
from diffpress.diffusion import Level, Schedule, ddim, flow_time, guide, level, rescale, straightness
from diffpress.distill.pairs import Edge, Pairs, PairSettings, PairStore, edges_of, weights_hash
from diffpress.errors import ConfigError
from diffpress.generator import Generator, SamplingPlan, switch_scheduler
from diffpress.sampling import is_flow
from diffpress.stage import Applied, Context
from diffpress.training import Fitted, training_device

Apply = Callable[[Any, Generator, Context], Applied]

_WHOLE_RANGE = {"timestep_spacing": "trailing", "final_sigmas_type": "zero", "set_alpha_to_one": True}
_FIRST_ORDER = {"solver_order": 1, "algorithm_type": "dpmsolver++", "lower_order_final": True}
_RENORMALIZED = ("Lumina2Pipeline", "QwenImagePipeline")
_ENCODED = 64  # conditions that are encoded at once
_OWN_GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def trailing(scheduler: Any, name: str | None = None, **changes: Any) -> Any:
    """A scheduler of the diffusers class ``name`` (None: its own) from pure noise to no noise, evenly spaced in time.

    So the grid of k steps is part of the grid of any multiple of k steps.
    """
    chosen = type(scheduler) if name is None else getattr(diffusers, name)
    return switch_scheduler(scheduler, chosen, **_WHOLE_RANGE | dict.fromkeys(_OWN_GRIDS, False) | changes)


def first_order(scheduler: Any) -> Any:
    """The solver of a student: x_0 and eps of one call, and straight to the next level (DDIM; Euler on a flow)."""
    if "FlowMatch" in type(scheduler).__name__:
        return trailing(scheduler, "FlowMatchEulerDiscreteScheduler", stochastic_sampling=False)
    return trailing(scheduler, "DPMSolverMultistepScheduler", **_FIRST_ORDER)


def adopt(
    generator: Generator,
    steps: int,
    *,
    guidance_scale: float = 1.0,
    timesteps: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Make ``generator`` a student: first-order solver, ``steps`` calls; returns what `restore` needs.

    ``guidance_scale`` is what the pipeline is called with: 1 where guidance is baked in. ``timesteps``: those of the
    calls, where the solver's own are others.
    """
    generator.pipeline.scheduler = first_order(generator.pipeline.scheduler)
    grid = None if timesteps is None else tuple(timesteps)
    generator.plan = SamplingPlan(steps=steps, guidance_scale=guidance_scale, timesteps=grid)
    return {"plan": dataclasses.asdict(generator.plan)}


def restore(generator: Generator, metadata: dict[str, Any]) -> None:
    """Sample ``generator`` again as the student it was made."""
    plan = metadata["plan"]
    adopt(generator, plan["steps"], guidance_scale=plan["guidance_scale"], timesteps=plan["timesteps"])


def adopt_on(generator: Generator, edges: Sequence[Edge], condition: Any, plan: SamplingPlan) -> dict[str, Any]:
    """`adopt` with a call at each of ``edges`` but the last, the clean end.

    Where that is not the solver's own spacing of so few steps, as with flows whose last step is one of the training
    grid, the plan has the timesteps. ``plan`` is that of a run otherwise. Raises ConfigError where the student is
    called elsewhere all the same.
    """
    wanted = [float(edge.timestep or 0) for edge in edges[:-1]]
    whole = generator.pipeline.scheduler.config.num_train_timesteps
    flow = is_flow(generator.pipeline.scheduler)
    given = tuple(edge.sigma * whole for edge in edges[:-1]) if flow else tuple(wanted)
    found: list[float] = []
    for timesteps in (None, given):
        facts = adopt(generator, len(wanted), timesteps=timesteps)
        found = trajectory(generator, [condition], seeds=[0], plan=generator.plan_for(plan)).timesteps.tolist()
        if len(found) == len(wanted) and np.allclose(found, wanted, rtol=1e-5, atol=1e-3):
            return facts
    raise ConfigError(
        f"conflicting grids: the student is called at timesteps {found}, but learns at {wanted}; allowed: a pipeline "
        "that takes its timesteps from the scheduler"
    )


def collect(generator: Generator, context: Context, settings: PairSettings, phases: int) -> tuple[Pairs, Pairs]:
    """Records to train on and held-out ones of ``generator``, the teacher; its scheduler becomes `trailing`.

    Raises what `PairStore.collect` does.
    """
    folder = Path(settings.folder).expanduser() if settings.folder else context.work_folder() / "pairs"
    conditions = generator.conditions(settings.count, context.pool)
    generator.pipeline.scheduler = trailing(generator.pipeline.scheduler, settings.scheduler)
    store = PairStore(folder, generator, settings, context.plan)
    _not_twice(generator, store.plan.guidance_scale)
    first = Pairs(torch.empty(0), conditions[:2], [], ())
    Conditions.of(generator, first, store.plan)  # what cannot be learned from is refused before hours of sampling
    return store.collect(conditions, phases, seed=context.train_seed, progress=context.progress)


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What the denoiser is given for the conditions of all records."""

    unique: list[Any]
    index: Tensor
    """int64 [n]: which row of the two below each record has."""
    conditional: Conditioning
    unconditional: Conditioning | None
    """None where the generator has no unconditional branch."""

    @classmethod
    def of(cls, generator: Generator, pairs: Pairs, plan: SamplingPlan, *, told: bool = False) -> Conditions:
        """Those of ``pairs``; ``plan`` says the size and, if ``told``, the scale that a network with an input for its
        guidance is told, which is 1 otherwise.
        """
        place = {condition: index for index, condition in enumerate(dict.fromkeys(pairs.conditions))}
        unique, plan = list(place), dataclasses.replace(plan, scheduler=None)
        parts = [unique[start : start + _ENCODED] for start in range(0, len(unique), _ENCODED)]
        branches = [_encoded(generator, part, plan, told=told) for part in parts]
        conditional, unconditional = _joined(generator, branches)
        if unconditional is not None and _shapes(unconditional) != _shapes(conditional):
            raise ConfigError(
                f"{type(generator.pipeline).__name__} gives its two guidance branches texts of different lengths "
                f"({_shapes(conditional)} and {_shapes(unconditional)}); allowed: a pipeline that pads them to "
                "one, or a network that takes a mask"
            )
        index = torch.tensor([place[condition] for condition in pairs.conditions])
        return cls(list(place), index, conditional, unconditional)

    def mixed(self, rows: Tensor, free: Tensor) -> Conditioning:
        """Of records ``rows`` [n], the unconditional branch where ``free`` [n] is true, if there is one."""
        given = self.conditional.rows(self.index[rows])
        if self.unconditional is None:
            return given

        def pick(conditional: Any, unconditional: Any) -> Any:
            if not isinstance(conditional, Tensor):
                return conditional
            return torch.where(free.view(-1, *[1] * (conditional.dim() - 1)), unconditional, conditional)

        other = self.unconditional.rows(self.index[rows])
        return dataclasses.replace(given, tensors=pytree.tree_map(pick, given.tensors, other.tensors))


def _encoded(
    generator: Generator, conditions: list[Any], plan: SamplingPlan, *, told: bool
) -> tuple[Conditioning, Conditioning | None]:
    """Both guidance branches of a few conditions; the first with the scale of ``plan``, if it is to be ``told``."""
    conditional, unconditional = encode(generator, conditions, plan)
    if told and unconditional is None:
        inputs = first_inputs(generator, conditions, plan)
        tensors = {name: inputs[name] for name in conditional.tensors}
        conditional = dataclasses.replace(conditional, tensors=tensors)
    return conditional.to("cpu"), None if unconditional is None else unconditional.to("cpu")


def _joined(
    generator: Generator, branches: Sequence[tuple[Conditioning, Conditioning | None]]
) -> tuple[Conditioning, Conditioning | None]:
    """The rows of several conditionings, texts as long as the longest; prompts that are all empty guide nothing."""
    two = any(free is not None for _, free in branches)
    parts = [part for part, _ in branches] + [free or part for part, free in branches if two]
    parts = equally_long(generator.denoiser, parts)

    def join(*leaves: Any) -> Any:
        return torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0]

    def rows(some: Sequence[Conditioning]) -> Conditioning:
        return dataclasses.replace(some[0], tensors=pytree.tree_map(join, *(part.tensors for part in some)))

    return rows(parts[: len(branches)]), rows(parts[len(branches) :]) if two else None


def _shapes(conditioning: Conditioning) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in pytree.tree_leaves(conditioning.tensors) if isinstance(leaf, Tensor)]


def schedule_of(generator: Generator, pairs: Pairs) -> Schedule:
    """The generator's schedule, its timesteps in the unit in which its network was told them in ``pairs``."""
    first = pairs.edges[0].timestep
    assert first is not None
    return as_told(generator.schedule, first)


def noised(schedule: Schedule, samples: Tensor, noise: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha x_0 + sigma eps, what the network is told) at levels ``place`` [n] of the training grid.

    ``samples`` and ``noise`` are [n, c, ...] on one device, where the result is.
    """
    shape, tables = (-1, *[1] * (noise.dim() - 1)), (schedule.alphas, schedule.sigmas, schedule.timesteps)
    alpha, sigma, told = (table[place].float().to(noise.device) for table in tables)
    return ddim(samples, noise, alpha=alpha.view(shape), sigma=sigma.view(shape)), told


def told_scale(network: nn.Module) -> str | None:
    """The setting by which a network has an input for the guidance scale; None: it has none."""
    known = ("time_cond_proj_dim", "guidance_embeds")
    return next((name for name in known if getattr(network.config, name, None)), None)


def check_guidance(generator: Generator, settings: PairSettings) -> None:
    """Raises ConfigError where the pairs should be guided and the pipeline has no guidance, or the network has it."""
    guided = "guidance_scale" in inspect.signature(type(generator.pipeline).__call__).parameters
    if (settings.guidance_scale or 1) > 1 and not guided:
        raise ConfigError(
            f"pairs.guidance_scale is {settings.guidance_scale}, but {type(generator.pipeline).__name__} has no "
            "guidance; allowed: null"
        )
    _not_twice(generator, settings.guidance_scale)


def _not_twice(generator: Generator, guidance_scale: float | None) -> None:
    """Raises ConfigError for guidance of a student that was taught it already."""
    if generator.plan is not None and generator.plan.guidance_scale <= 1 and (guidance_scale or 1) > 1:
        raise ConfigError(
            f"the generator was made for {generator.plan.steps} steps with guidance_scale "
            f"{generator.plan.guidance_scale:g}, so guidance is in its network already, and {guidance_scale:g} would "
            "count it twice; allowed: pairs.guidance_scale null or 1, and calibration.guidance_scale null or 1"
        )


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The denoiser as it was before the training, with guidance."""

    network: nn.Module
    conditions: Conditions
    renormalized: bool = False
    """Whether guided outputs get the norm of the conditional branch back along their last axis, as in the pipeline."""

    @classmethod
    def of(cls, generator: Generator, conditions: Conditions, pairs: Pairs, plan: SamplingPlan) -> Teacher:
        """A frozen copy of the generator's denoiser; one that is told a scale is told that of ``plan``."""
        if told_scale(generator.denoiser):
            conditions = Conditions.of(generator, pairs, plan, told=True)
        network = copy.deepcopy(generator.denoiser).eval().requires_grad_(False)
        return cls(network, conditions, type(generator.pipeline).__name__ in _RENORMALIZED)

    @torch.no_grad()
    def __call__(self, x_t: Tensor, told: Tensor, rows: Tensor, scale: float | Tensor) -> Tensor:
        """U + scale (c - u), float32 [n, c, ...] in the network's own parameterization, for records ``rows`` [n].

        A number of 1 or less means the conditional branch alone, as in the pipelines. Any parameterization is linear
        in x_0 at a given x_t, so guidance of one is guidance of all.
        """
        network, index = self.network.to(x_t.device), self.conditions.index[rows]
        conditional = denoise(network, x_t, told, self.conditions.conditional.rows(index).to(x_t.device)).float()
        free = self.conditions.unconditional
        if free is None or (not isinstance(scale, Tensor) and scale <= 1):
            return conditional
        guided = guide(conditional, denoise(network, x_t, told, free.rows(index).to(x_t.device)).float(), scale)
        if not self.renormalized:
            return guided
        return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def held_out_error(generator: Generator, pairs: Pairs, plan: SamplingPlan, *, batch_size: int) -> Tensor:
    """||x - x_teacher|| / ||x_teacher|| for each held-out record, [n]: the generator drawn from the same noise."""
    finished = []
    for start in range(0, len(pairs), batch_size):
        part = slice(start, start + batch_size)
        finished.append(trajectory(generator, pairs.conditions[part], seeds=pairs.seeds[part], plan=plan).states[-1])
    found, wanted = torch.cat(finished).flatten(1), pairs.states[:, -1].flatten(1)
    return (found - wanted).norm(dim=1) / wanted.norm(dim=1)


def held_out_straightness(generator: Generator, pairs: Pairs, plan: SamplingPlan, *, batch_size: int) -> Tensor:
    """`straightness` [n] of the generator's paths by ``plan``, on the path flow, from the noise of each record."""
    found = []
    for start in range(0, len(pairs), batch_size):
        part = slice(start, start + batch_size)
        run = trajectory(generator, pairs.conditions[part], seeds=pairs.seeds[part], plan=plan)
        edges = edges_of(generator.schedule, run.timesteps, plan.steps)
        at = Level(*torch.tensor([(edge.alpha, edge.sigma) for edge in edges], dtype=torch.float64).unbind(1))
        times = flow_time(**at._asdict())
        shape = (-1, *[1] * (run.states.dim() - 1))
        source, to = (Level(*(part.view(shape) for part in each)) for each in (at, level(times, "flow")))
        found.append(straightness(rescale(run.states.cpu().double(), source=source, to=to), times))
    return torch.cat(found)


def previews(
    student: Generator, conditions: Sequence[Any], folder: Path, plan: SamplingPlan, *, count: int = 16
) -> Callable[[int], None]:
    """A function of the update's number that writes a grid of ``count`` pictures, always from the same noise.

    They are drawn in the size of ``plan``, and otherwise as the student is sampled.
    """
    from PIL import Image

    shown = [conditions[index] for index in np.linspace(0, len(conditions) - 1, count).astype(int)]

    def write(step: int) -> None:
        images = student.sample(shown, seeds=range(count), plan=student.plan_for(plan)).images  # [n, h, w, 3]
        rows = [np.concatenate(list(row), axis=1) for row in np.array_split(images, max(1, count // 8))]
        Image.fromarray(np.concatenate(rows)).save(folder / f"preview-{step:06d}.png")

    return write


def accelerated(apply: Apply) -> Apply:
    """A stage's ``apply`` with the whole pipeline where trainings compute; it is back on the CPU afterwards."""

    @functools.wraps(apply)
    def moved(self: Any, generator: Generator, context: Context) -> Applied:
        device = training_device()
        if device.type == "cpu":
            return apply(self, generator, context)
        generator.pipeline.to(device)
        try:
            return apply(self, generator, context)
        finally:
            generator.pipeline.to("cpu")

    return moved


def training_key(generator: Generator, settings: Any, context: Context) -> str:
    """What a training is of: its settings, its draws, and the network before it."""
    return fingerprint(dataclasses.asdict(settings), context.train_seed, weights_hash(generator.denoiser))


def outcome(fitted: Fitted, student: Tensor, teacher: Tensor, steps: int) -> tuple[dict[str, Any], str]:
    """Facts for the metadata; half a sentence: held-out errors, [n], of the student and of the teacher in ``steps``."""
    found, before = float(student.mean()), float(teacher.mean())
    facts = {"losses": fitted.losses, "held_out_error": found, "teacher_error": before}
    said = "one step" if steps == 1 else f"{steps} steps"
    return facts, f"{len(fitted.losses)} updates: held-out error {found:.3f}; the teacher in {said} {before:.3f}"
