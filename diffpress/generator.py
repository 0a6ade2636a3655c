"""A pretrained generator: load, condition, sample, watch its denoiser, save.

Works for every diffusers pipeline whose denoiser is called ``transformer`` or ``unet``. What differs between families
is read from the pipeline itself: its call signature says how it is conditioned, and recorded denoiser calls of real
sampling runs say which inputs the network takes. So calibration and export need no code for each family.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

from diffpress.checkpoint import fetch, first_lines, quiet_loading, verify
from diffpress.diffusion import Schedule, read_schedule
from diffpress.errors import CheckpointError, ConfigError
from diffpress.progress import SILENT, Progress
from diffpress.sampling import SamplingPlan, guidance_arguments, on_grid, patched, switch_scheduler, to_uint8
from diffpress.traceable import make_traceable, refuse_lists

if TYPE_CHECKING:
    from diffpress.caching import CachePolicy
    from diffpress.structures import Nested

logger = logging.getLogger(__name__)

Conditioning = Literal["class", "text", "unconditional"]
_CONDITION_ARGUMENT = {"class": "class_labels", "text": "prompt"}


@dataclass(frozen=True)
class Call:
    """One recorded call of the denoiser: tensor inputs by name (nested ones as pytrees), other inputs, the output."""

    inputs: dict[str, Any]
    constants: dict[str, Any]
    output: Tensor


@dataclass(frozen=True)
class Samples:
    """Pictures uint8 [n, h, w, 3] and the final latents float32 [n, c, h', w'] (None without an autoencoder)."""

    images: np.ndarray
    latents: np.ndarray | None


class _Enough(Exception):  # noqa: N818 - a signal, not an error
    """Ends a sampling run from within a hook."""


class Generator:
    """A diffusers pipeline with a denoiser, and the folder its weights came from."""

    def __init__(self, pipeline: Any, source: Path | None = None) -> None:
        """Raises CheckpointError for a pipeline without a known denoiser or way of conditioning."""
        self.pipeline: Any = pipeline
        self.source = source
        names = [name for name in ("transformer", "unet") if getattr(pipeline, name, None) is not None]
        if not names:
            have = ", ".join(sorted(pipeline.components))
            raise CheckpointError(f"{type(pipeline).__name__} has no 'transformer' or 'unet'; its parts are {have}")
        self.denoiser_name = names[0]
        self.plan: SamplingPlan | None = getattr(pipeline, "sampling_plan", None)
        """How a generator that was made for it (a student, a searched schedule) is sampled; None: in any way."""
        self.cache: CachePolicy | None = None
        """How its engine reuses features from step to step; torch does so only inside `caching.cached`."""
        self.nested: Nested | None = None
        """Narrower networks that the denoiser's weights hold as prefixes; None: it is one network."""
        self._arguments = inspect.signature(type(pipeline).__call__).parameters
        self.conditioning_kind  # noqa: B018 - an unknown family is refused here
        make_traceable(self.denoiser)
        refuse_lists(self.denoiser)
        pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        variant: str | None = None,
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> Generator:
        """Load a folder or hub id in the diffusers layout, safetensors only; ``variant`` as in diffusers, as fp16.

        Raises CheckpointError when it is missing, truncated, holds pickles, asks for remote code that
        ``trust_remote_code`` does not allow, or is of an unknown family.
        """
        folder = fetch(str(source), revision=revision, variant=variant)
        verify(folder, variant=variant, trust_remote_code=trust_remote_code)
        try:
            with quiet_loading():
                pipeline = diffusers.DiffusionPipeline.from_pretrained(
                    str(folder),
                    dtype=dtype,
                    variant=variant,
                    use_safetensors=True,
                    local_files_only=True,
                    trust_remote_code=trust_remote_code,
                    low_cpu_mem_usage=False,
                )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
            raise CheckpointError(f"{folder}: diffusers cannot load it: {first_lines(error)}") from error
        return cls(pipeline, folder)

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self.pipeline, self.denoiser_name)

    def part(self, name: str) -> nn.Module:
        """A network of the pipeline by its attribute, or the ``denoiser``; ConfigError names those that are there."""
        found = self.denoiser if name == "denoiser" else getattr(self.pipeline, name, None)
        if not isinstance(found, nn.Module):
            known = [key for key, value in sorted(self.pipeline.components.items()) if isinstance(value, nn.Module)]
            raise ConfigError(f"{type(self.pipeline).__name__} has no {name}; allowed: denoiser, {', '.join(known)}")
        return found

    @property
    def conditioning_kind(self) -> Conditioning:
        """Whether pictures are asked for by class, by text, or not at all."""
        for kind, argument in _CONDITION_ARGUMENT.items():
            if argument in self._arguments:
                return kind  # type: ignore[return-value]
        if "batch_size" in self._arguments:
            return "unconditional"
        raise CheckpointError(
            f"{type(self.pipeline).__name__} is called with ({', '.join(self._arguments)}); "
            "a generator takes class_labels, prompt or batch_size"
        )

    @property
    def schedule(self) -> Schedule:
        """Parameterization, alphas and sigmas of the training schedule; CheckpointError where they are not known."""
        return read_schedule(self.pipeline.scheduler)

    def conditions(self, count: int, given: Sequence[Any] | None = None) -> list[Any]:
        """``count`` conditions, cycling through ``given`` or, without it, all classes or a list of general prompts.

        Raises ConfigError for an empty list, prompts that are not text, or classes that do not exist.
        """
        if count < 1:
            raise ConfigError(f"count of conditions is {count}; allowed: 1 and more")
        pool = list(given) if given is not None else self._own_conditions()
        if not pool:
            raise ConfigError("the list of prompts or classes is empty")
        return [self._check_condition(pool[index % len(pool)]) for index in range(count)]

    def _own_conditions(self) -> list[Any]:
        if self.conditioning_kind == "class":
            return sorted(set(self._labels().values())) or list(range(self._class_count()))
        if self.conditioning_kind == "text":
            return resources.files("diffpress").joinpath("prompts.txt").read_text("utf8").splitlines()
        return [None]

    def _labels(self) -> dict[str, int]:
        return getattr(self.pipeline, "labels", {})

    def _class_count(self) -> int:
        return int(getattr(self.denoiser.config, "num_embeds_ada_norm", None) or 1000)

    def _check_condition(self, condition: Any) -> Any:
        if self.conditioning_kind == "text" and not isinstance(condition, str):
            raise ConfigError(f"prompt {condition!r} is {type(condition).__name__}; allowed: text")
        if self.conditioning_kind == "class":
            labels, numbers = self._labels(), f"a number from 0 to {self._class_count() - 1}"
            if isinstance(condition, str) and condition not in labels:
                if not condition.isdecimal():  # lines of a file are text
                    allowed = f"one of {', '.join(labels)}" if labels else numbers
                    raise ConfigError(f"class {condition!r} is not {allowed}")
                condition = int(condition)
            if isinstance(condition, str):
                return labels[condition]
            if type(condition) is not int or not 0 <= condition < self._class_count():
                raise ConfigError(f"class {condition!r} is not a name or {numbers}")
        return condition

    def use_scheduler(self, name: str | None) -> None:
        """Replace the scheduler by the diffusers class ``name``, from the same config; None keeps it."""
        self.pipeline.scheduler = self.scheduler_of(name)

    def scheduler_of(self, name: str | None) -> Any:
        """A scheduler of the diffusers class ``name`` from the config of the generator's own; None: its own."""
        if name is None or type(self.pipeline.scheduler).__name__ == name:
            return self.pipeline.scheduler
        found = getattr(diffusers, name, None)
        if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
            known = ", ".join(type_.__name__ for type_ in self.pipeline.scheduler.compatibles)
            raise ConfigError(f"scheduler {name!r} is not in diffusers; this generator can use {known}")
        return switch_scheduler(self.pipeline.scheduler, found)

    def plan_for(self, plan: SamplingPlan) -> SamplingPlan:
        """``plan`` with the steps, guidance, scheduler and timesteps that this generator was made for, if it was."""
        if self.plan is None:
            return plan
        kept = {name: getattr(self.plan, name) for name in ("steps", "guidance_scale", "timesteps")}
        return replace(plan, scheduler=None, **kept)

    @property
    def can_resize(self) -> bool:
        """Whether pictures of other sizes than `default_size` can be asked for."""
        return "height" in self._arguments

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of a picture, in pixels, when nothing is said; CheckpointError where it is not known."""
        pipeline, settings = self.pipeline, self.denoiser.config
        size: Any = getattr(pipeline, "default_sample_size", None) or getattr(settings, "sample_size", None)
        if size is None:
            raise CheckpointError(f"{type(pipeline).__name__} does not say what size it draws: give height and width")
        height, width = size if isinstance(size, list | tuple) else (size, size)
        vae, factor = getattr(pipeline, "vae", None), getattr(pipeline, "vae_scale_factor", None)
        if factor is None:
            factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        return int(height) * factor, int(width) * factor

    def check_size(self, plan: SamplingPlan) -> None:
        """Raise ConfigError where the plan asks a generator of fixed size for another one."""
        for name in ("height", "width"):
            value = getattr(plan, name)
            if value is not None and not self.can_resize:
                raise ConfigError(
                    f"{name} is {value}, but {type(self.pipeline).__name__} has a fixed size; allowed: null"
                )

    def _call_arguments(self, conditions: Sequence[Any], seeds: Sequence[int], plan: SamplingPlan) -> dict[str, Any]:
        kind = self.conditioning_kind
        arguments: dict[str, Any] = {
            "num_inference_steps": plan.steps,
            "generator": [torch.Generator().manual_seed(int(seed)) for seed in seeds],
            "output_type": "np",
        }
        self.check_size(plan)
        arguments |= (
            {"batch_size": len(conditions)}
            if kind == "unconditional"
            else {_CONDITION_ARGUMENT[kind]: list(conditions)}
        )
        if "use_resolution_binning" in self._arguments:  # would draw at the nearest usual size, then resize the picture
            arguments["use_resolution_binning"] = False
        arguments |= guidance_arguments(self.pipeline, plan.guidance_scale, len(conditions))
        size = {"height": plan.height, "width": plan.width}
        return arguments | {name: value for name, value in size.items() if value is not None}

    @torch.no_grad()
    def draw(self, conditions: Sequence[Any], *, seeds: Sequence[int], plan: SamplingPlan) -> Any:
        """What the pipeline itself returns for one batch, its noise from the seeds.

        Raises ConfigError for a size that the pipeline refuses, or replaces by another.
        """
        arguments = self._call_arguments(conditions, seeds, plan)
        asked = f"{plan.height} x {plan.width} pixels: {type(self.pipeline).__name__}"
        with self.drawn_by(plan.scheduler), on_grid(self.pipeline.scheduler, plan.grid):
            try:
                output = self.pipeline(**arguments)
            except ValueError as error:
                if plan.height is None and plan.width is None:
                    raise
                raise ConfigError(f"{asked} refuses it: {error}") from error
        sides = output.images.shape[1:3]
        if sides != (plan.height or sides[0], plan.width or sides[1]):
            raise ConfigError(f"{asked} draws {sides[0]} x {sides[1]}; allowed: a size that it can draw, or null")
        return output

    @contextmanager
    def drawn_by(self, scheduler: str | None) -> Iterator[None]:
        """Inside the block the generator draws with the diffusers class ``scheduler``; None: its own."""
        with patched(self.pipeline, "scheduler", self.scheduler_of(scheduler)):
            yield

    def sample(
        self,
        conditions: Sequence[Any],
        *,
        seeds: Sequence[int],
        plan: SamplingPlan,
        batch_size: int = 16,
        progress: Progress = SILENT,
        label: str = "Sampling",
    ) -> Samples:
        """One picture for each condition, its noise from the seed beside it, whatever the batch size.

        Of a network in float pictures then differ by rounding alone; engines whose 8-bit ranges or feature caches look
        at the whole batch give others. Raises ConfigError when the two lists differ in length, EngineError for pictures
        that are not finite.
        """
        if len(conditions) != len(seeds):
            raise ConfigError(f"{len(conditions)} conditions but {len(seeds)} seeds; allowed: one seed for each")
        images, latents = [], []
        with progress.task(label, total=len(conditions)) as advance:
            for start in range(0, len(conditions), batch_size):
                part = slice(start, start + batch_size)
                with self._decoded() as caught:
                    output = self.draw(conditions[part], seeds=seeds[part], plan=plan)
                images.append(to_uint8(output.images))
                latents += [latent.float().cpu().numpy() for latent in caught]
                advance(len(images[-1]))
        return Samples(np.concatenate(images), np.concatenate(latents) if latents else None)

    @contextmanager
    def _decoded(self) -> Iterator[list[Tensor]]:
        """Collect what the autoencoder is given to decode; undone on exit."""
        caught: list[Tensor] = []
        vae = getattr(self.pipeline, "vae", None)
        if vae is None:
            yield caught
            return
        decode = vae.decode

        def catching(z: Tensor, *args: Any, **kwargs: Any) -> Any:
            caught.append(z)
            return decode(z, *args, **kwargs)

        with patched(vae, "decode", catching):
            yield caught

    @contextmanager
    def watch(self, see: Callable[[Call], None]) -> Iterator[None]:
        """Show every denoiser call made inside the block to ``see``; nothing is kept, so any length streams."""
        parameters = argument_names(self.denoiser)

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            bound = dict(zip(parameters, args, strict=False)) | kwargs
            inputs = {name: value for name, value in bound.items() if has_tensor(value)}
            constants = {name: value for name, value in bound.items() if name not in inputs and value is not None}
            see(Call(inputs, constants, output[0] if isinstance(output, tuple) else output.sample))

        handle = self.denoiser.register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def record(
        self, conditions: Sequence[Any], *, seeds: Sequence[int], plan: SamplingPlan, limit: int | None = None
    ) -> list[Call]:
        """The first ``limit`` denoiser calls (all without it) of one sampling run of the whole batch, copied."""
        calls: list[Call] = []

        def see(call: Call) -> None:
            copied = torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, call.inputs)
            calls.append(replace(call, inputs=copied, output=call.output.clone()))
            if limit is not None and len(calls) >= limit:
                raise _Enough

        with self.watch(see), suppress(_Enough):
            self.draw(conditions, seeds=seeds, plan=plan)
        return calls

    def index(self) -> dict[str, Any]:
        """What ``model_index.json`` says of the pipeline, its class names included (DiTPipeline itself drops them)."""
        named = {"_class_name": type(self.pipeline).__name__, "_diffusers_version": diffusers.__version__}
        names: dict[str, list[str]] = {}
        for name, number in self._labels().items():
            names.setdefault(str(number), []).append(name)
        labels = {"id2label": {number: ", ".join(group) for number, group in names.items()}} if names else {}
        return named | {key: value for key, value in self.pipeline.config.items() if not key.startswith("_")} | labels

    def save(self, folder: Path) -> None:
        """Write the pipeline in the stock diffusers layout, safetensors only."""
        self.pipeline.save_pretrained(str(folder), safe_serialization=True)
        (folder / "model_index.json").write_text(json.dumps(self.index(), indent=2, sort_keys=True) + "\n", "utf8")


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside what `torch.compile` or several processes wrap it in."""
    for wrapper in ("_orig_mod", "module"):
        network = getattr(network, wrapper, network)  # type: ignore[assignment]
    return network


def argument_names(network: nn.Module) -> list[str]:
    """Names of what a denoiser's forward takes, in order; an engine knows those of the network it replaces."""
    network = unwrapped(network)
    known: Any = getattr(network, "argument_names", None)
    return list(known or inspect.signature(network.forward).parameters)


def has_tensor(value: Any) -> bool:
    """Whether a tensor is in a pytree."""
    return any(isinstance(leaf, Tensor) for leaf in torch.utils._pytree.tree_leaves(value))
