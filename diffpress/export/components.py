"""The parts of a pipeline that become engines, found by watching one real run.

A part is a torch module, one of its methods, and the tensors that went in and out, by name. Running the pipeline once
with one picture and once with two tells which axes are the batch; other prompts tell which follow the number of their
tokens (in families that do not pad to a fixed length); a run at another size tells which follow the size, and what an
engine of any size has to give there.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from diffpress.checkpoint import first_lines, quiet_loading
from diffpress.denoise import first_inputs
from diffpress.errors import ConfigError, EngineError
from diffpress.generator import Generator, SamplingPlan, patched

Role = Literal["denoiser", "decoder", "encoder", "text"]
Free = dict[str, dict[int, str]]  # input name -> axis -> what it follows ("text", "batch", "size")
FlatCall = tuple[dict[str, Tensor], dict[str, Tensor]]  # inputs and outputs by name
TIMES = 8  # that a prompt is repeated to be longer, also where lengths are padded to a multiple
LEAST_EPSILON = 2e-8  # onnxscript removes a sum with less than 1e-8
_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
COARSEST = 64  # pixels that a stock network halves and patches into one: 8 in the autoencoder, 8 in the denoiser


@dataclass(frozen=True)
class Component:
    """One engine to be: ``folder`` in the diffusers / optimum layout, ``attribute`` of the pipeline."""

    role: Role
    folder: str
    attribute: str
    method: str
    inputs: dict[str, Any]
    """Recorded inputs by argument name; nested ones are pytrees of tensors."""
    constants: dict[str, Any]
    """Other arguments of the recorded call."""
    outputs: dict[str, Tensor]
    free: Free
    """Axes that differ between recordings, by flattened input name."""
    resized: FlatCall | None
    """A recorded call at another picture size, where the size is free."""

    def flat_inputs(self) -> dict[str, Tensor]:
        """Recorded tensors by the name they have in the graph."""
        return flatten_inputs(self.inputs)


def flatten_inputs(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of nested arguments by their own key (optimum's convention), or argument.index in a list.

    Timesteps become float32 [1] or [batch]: schedulers give integers or fractions, with or without an axis.
    """
    flat: dict[str, Tensor] = {}
    for argument, value in inputs.items():
        if isinstance(value, Tensor):  # nearly always, and engines do this in every step, where trees are slow
            flat[argument] = value
            continue
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            if isinstance(leaf, Tensor):
                last: Any = path[-1]
                flat[last.key if isinstance(last, pytree.MappingKey) else f"{argument}.{last.idx}"] = leaf
    if "timestep" in flat:
        flat["timestep"] = flat["timestep"].float().reshape(-1)
    return flat


def flatten_outputs(role: Role, output: Any) -> dict[str, Tensor]:
    """Output tensors by the names that optimum gives them."""
    if role == "text":
        named: dict[str, Tensor] = {}
        for key, value in output.items():
            if isinstance(value, tuple):
                named |= {f"{key}.{index}": item for index, item in enumerate(value)}
            elif isinstance(value, Tensor):
                named[key] = value
        return named
    if role == "encoder":
        for name in ("latent", "latents"):  # of an autoencoder that is not variational
            if hasattr(output, name):
                return {name: getattr(output, name)}
        return {"latent_parameters": output.latent_dist.parameters}
    tensor = output[0] if isinstance(output, tuple) else output.sample
    return {"out_sample" if role == "denoiser" else "sample": tensor}


def with_masks(given: dict[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """``given`` in the order of ``wanted``, and of these the masks that are not in it: ones, so that everything counts.

    ``x_mask`` is that of ``x`` [batch, tokens, ...]. Pipelines leave it out where no prompt is shorter than another.
    """
    full = dict(given)
    for name in wanted:
        base = given.get(name.removesuffix("_mask"))
        if name not in given and base is not None:
            full[name] = base.new_ones(base.shape[:2])
    return {name: full[name] for name in (*wanted, *given) if name in full}


def _named(role: Role, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments by optimum's names: the decoder's first is ``latent_sample``, whatever its class calls it."""
    if role != "decoder":
        return arguments
    first, *others = arguments.items()
    return {"latent_sample": first[1], **dict(others)}


def _spy(
    module: Any, method: str, seen: list[tuple[dict[str, Any], Any]], *, every: bool = False
) -> AbstractContextManager[None]:
    """Record (arguments by name, output) of the first, or every, call of module.method inside the block."""
    original = getattr(module, method)
    signature = inspect.signature(original)

    def spying(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if every or not seen:
            bound = dict(signature.bind(*args, **kwargs).arguments)
            for name, parameter in signature.parameters.items():
                if parameter.kind is parameter.VAR_KEYWORD:
                    bound |= bound.pop(name, {})
            seen.append((pytree.tree_map_only(Tensor, Tensor.clone, bound), output))
        return output

    return patched(module, method, spying)


@dataclass(frozen=True)
class Part:
    role: Role
    folder: str
    attribute: str
    method: str


def parts_of(generator: Generator) -> list[Part]:
    """What becomes an engine, in the order of a run, but for the autoencoder's encoder."""
    pipeline = generator.pipeline
    parts = [
        Part("text", name, name, "forward")
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3")
        if isinstance(getattr(pipeline, name, None), nn.Module)
    ]
    parts.append(Part("denoiser", generator.denoiser_name, generator.denoiser_name, "forward"))
    if getattr(pipeline, "vae", None) is not None:
        parts.append(Part("decoder", "vae_decoder", "vae", "decode"))
    return parts


@contextmanager
def _spied(generator: Generator, parts: Iterable[Part], *, every: bool = False) -> Iterator[dict[str, list]]:
    """What `_spy` records of each part inside the block, by folder."""
    seen: dict[str, list] = {part.folder: [] for part in parts}
    with torch.no_grad(), ExitStack() as stack:
        for part in parts:
            module = getattr(generator.pipeline, part.attribute)
            stack.enter_context(_spy(module, part.method, seen[part.folder], every=every))
        yield seen


def _watch_once(
    generator: Generator, parts: list[Part], conditions: Sequence[Any], plan: SamplingPlan
) -> dict[str, tuple]:
    with _spied(generator, parts) as seen:
        try:
            generator.sample(conditions, seeds=range(len(conditions)), plan=plan, batch_size=len(conditions))
        except (IndexError, RuntimeError, ValueError) as error:
            raise EngineError(
                f"{type(generator.pipeline).__name__} cannot draw {len(conditions)} pictures of "
                f"{plan.height or 'default'} x {plan.width or 'default'} pixels: {first_lines(error)}"
            ) from error
    missing = [name for name, calls in seen.items() if not calls]
    if missing:
        raise EngineError(f"{', '.join(missing)}: not called in a sampling run, so there is nothing to export from")
    return {name: calls[0] for name, calls in seen.items()}


def _watch_inputs(
    generator: Generator, parts: list[Part], conditions: Sequence[Any], plan: SamplingPlan
) -> list[dict[str, tuple]]:
    """The same of what comes before the denoiser, and its inputs; it does not run itself.

    Twice: with the first call of each text encoder, and with its last, for some give a negative prompt other lengths.
    """
    texts = [part for part in parts if part.role == "text"]
    with _spied(generator, texts, every=True) as seen, quiet_loading():  # a long prompt is cut off, and they say so
        inputs = {generator.denoiser_name: (first_inputs(generator, conditions, plan), None)}
    return [{name: calls[which] for name, calls in seen.items()} | inputs for which in (0, -1)]


def in_turn(conditions: Sequence[Any], count: int) -> list[Any]:
    """``count`` of the conditions, from the first again after the last. Raises ConfigError where there is none."""
    if not conditions:
        raise ConfigError("the list of conditions is empty; allowed: one and more")
    return [conditions[index % len(conditions)] for index in range(count)]


def _repeated(conditions: Sequence[str], times: int) -> list[str]:
    return [", ".join([condition] * times) for condition in conditions]


def find_components(
    generator: Generator, conditions: Sequence[Any], plan: SamplingPlan, *, batch: int | None, any_size: bool
) -> list[Component]:
    """Record the pipeline's parts. ``batch`` None leaves the batch free; ``any_size`` leaves height and width free.

    Text encoders take any number of prompts, also where ``batch`` is more than one. Raises ConfigError for an empty
    list, EngineError when a part is never called, or the generator has a fixed size but ``any_size`` is asked for.
    """
    parts, short = parts_of(generator), replace(plan, steps=min(plan.steps, 2))
    pool = in_turn(conditions, batch or 2)
    others: list[tuple[str, dict[str, tuple]]] = []  # what explains an axis that differs is the first of them
    text = generator.conditioning_kind == "text"
    if text:
        pool = [*pool[:1], *_repeated(pool[1:], 2)]  # of several lengths, so that masks are there
    main = _watch_once(generator, parts, pool, short)
    if text:
        others += [("text", run) for run in _watch_inputs(generator, parts, _repeated(pool, TIMES), short)]
    if batch is None:
        others.append(("batch", _watch_once(generator, parts, pool[:1], short)))
    elif text and batch > 1:  # pictures may also be of one prompt
        run = _watch_inputs(generator, parts, pool[:1], short)[0]
        others.append(("batch", {part.folder: run[part.folder] for part in parts if part.role == "text"}))
    if any_size:
        others.append(("size", _watch_once(generator, parts, pool, _another_size(generator, short))))
    found = [
        _component(part, main[part.folder], [(what, run[part.folder]) for what, run in others if part.folder in run])
        for part in parts
    ]
    decoder = next((component for component in found if component.role == "decoder"), None)
    if decoder is not None and hasattr(generator.pipeline.vae, "encode"):
        found.append(_encoder(generator, decoder))
    return found


def _another_size(generator: Generator, plan: SamplingPlan) -> SamplingPlan:
    if not generator.can_resize:
        raise EngineError(
            f"size 'dynamic' is asked for, but {type(generator.pipeline).__name__} has a fixed size; allowed: static"
        )
    height, width = generator.default_size if plan.height is None or plan.width is None else (plan.height, plan.width)
    step = math.gcd(height, width, COARSEST)
    return replace(plan, height=height + step, width=width + 2 * step)


def _component(part: Part, main: tuple, others: list[tuple[str, tuple]]) -> Component:
    arguments, output = _named(part.role, main[0]), main[1]
    inputs = {
        name: value
        for name, value in arguments.items()
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
    }
    constants = {
        name: value
        for name, value in arguments.items()
        if name not in inputs and value is not None and name != "generator"
    }
    flat, outputs = flatten_inputs(inputs), flatten_outputs(part.role, output)
    free: Free = {name: {} for name in flat}
    resized = None
    for what, (other_arguments, other_output) in others:
        named = _named(part.role, other_arguments)
        other = with_masks(flatten_inputs({key: named[key] for key in inputs if named.get(key) is not None}), flat)
        differ = {name: [a for a, n in enumerate(other[name].shape) if n != flat[name].shape[a]] for name in flat}
        for name, axes in differ.items():
            free[name] = dict.fromkeys(axes, what) | free[name]
        if what == "size" and any(differ.values()):
            resized = other, flatten_outputs(part.role, other_output)
    return Component(part.role, part.folder, part.attribute, part.method, inputs, constants, outputs, free, resized)


def _encoder(generator: Generator, decoder: Component) -> Component:
    """The autoencoder's encoder, on the pictures that the decoder gave: no text-to-image run calls it."""

    def encoded(outputs: dict[str, Tensor]) -> FlatCall:
        picture = outputs["sample"].detach().clamp(-1, 1)
        with torch.no_grad():
            return {"sample": picture}, flatten_outputs("encoder", generator.pipeline.vae.encode(picture))

    inputs, outputs = encoded(decoder.outputs)
    resized = None if decoder.resized is None else encoded(decoder.resized[1])
    free = {"sample": next(iter(decoder.free.values()))}
    return Component("encoder", "vae_encoder", "vae", "encode", dict(inputs), {}, outputs, free, resized)


@contextmanager
def plain_attention(module: nn.Module) -> Iterator[None]:
    """Attention of transformers models written out, undone on exit: the exporter cannot trace T5's fused one."""
    if not isinstance(module, PreTrainedModel):
        yield
        return
    before = module.config._attn_implementation
    module.set_attn_implementation("eager")
    try:
        yield
    finally:
        module.set_attn_implementation(before)


class _VisibleEpsilons(TorchFunctionMode):
    """Adds `LEAST_EPSILON` where a network adds less, which the exporter takes for zero: Sana divides by x + 1e-15."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _SUMS and len(args) == 2 and isinstance(args[1], float) and 0 < args[1] < LEAST_EPSILON:
            args = (args[0], LEAST_EPSILON)
        return func(*args, **(kwargs or {}))


class Flat(nn.Module):
    """A component as a function of flat tensors to a tuple of tensors: what the exporter traces."""

    def __init__(self, module: nn.Module, component: Component, caught: dict[str, Tensor] | None = None) -> None:
        """``caught`` is filled by hooks while the module runs; what is in it afterwards becomes outputs too."""
        super().__init__()
        self.module = module
        self.caught = {} if caught is None else caught
        self.role, self.constants = component.role, {**component.constants, "return_dict": True}
        self.call: Callable[..., Any] = getattr(module, component.method)
        leaves, self.tree = pytree.tree_flatten(component.inputs)
        self.positions = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.names = [*component.inputs]
        self.equal: defaultdict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
        """Axes of one length, as (input, axis)."""
        for index, (name, tensor) in enumerate(component.flat_inputs().items()):
            for axis, what in component.free[name].items():
                if what != "size":
                    self.equal[what, tensor.shape[axis]].append((index, axis))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        for axes in self.equal.values():
            first, *others = (tensors[index].shape[axis] for index, axis in axes)
            for size in others:
                torch._check(size == first)  # the exporter takes free axes of two inputs for independent
        leaves = list(self.rest)
        for position, tensor in zip(self.positions, tensors, strict=True):
            leaves[position] = tensor
        arguments = pytree.tree_unflatten(leaves, self.tree)
        with _VisibleEpsilons():
            if self.role in ("decoder", "encoder"):  # their tensor argument is z in one class, x in another
                output = self.call(next(iter(arguments.values())), **self.constants)
            else:
                output = self.call(**arguments, **self.constants)
        return *flatten_outputs(self.role, output).values(), *self.caught.values()
