"""Does the reloaded engine compute what torch computes? NaN and constant outputs have names of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffpress.errors import EngineError, ParityError, PrecisionError
from diffpress.export.session import Session, open_session
from diffpress.export.settings import ExportConfig

FLOAT_TOLERANCE = 1e-3
ROUNDED_TOLERANCE = (
    5e-2  # in 8 bits a rounding that falls the other way moves a value by a step; bfloat16 has 8 bits too
)
# Relative, of what a run-time adds up in another order, and of bfloat16's 8 bits.
ROUNDING = {"float32": 1e-6, "bfloat16": 2.0**-9}
HEADROOM = 2.0


@dataclass(frozen=True)
class Parity:
    """Largest relative L2 error over recorded calls: ||engine - torch|| / ||torch||."""

    component: str
    error: float
    tolerance: float
    calls: int


def has_codes(module: nn.Module) -> bool:
    """Whether some of its weights are integers."""
    return any(buffer.dtype in (torch.int8, torch.uint8) for buffer in module.buffers())


def quantized_layers(module: nn.Module) -> int:
    """How many layers have inputs that the graph itself rounds to 8 bits."""
    return len(_codes(module))


def largest_code(module: nn.Module) -> int:
    """The largest code of a weight in a product of two 8-bit tensors, without its sign; 0 where there is none."""
    return max((int(codes.to(torch.int16).abs().max()) for codes in _codes(module)), default=0)


def _codes(module: nn.Module) -> list[Tensor]:
    """The weights of those layers."""
    weights = ((layer, getattr(layer, "weight", None)) for layer in module.modules())
    coded = [(layer, weight) for layer, weight in weights if weight is not None and weight.dtype == torch.int8]
    return [weight for layer, weight in coded if not layer.activation.rows]  # type: ignore[union-attr]


def open_built(path: Path, module: nn.Module, settings: ExportConfig) -> Session:
    """The engine of ``module``, or of a piece of it, that ``settings`` have just built."""
    return open_session(
        path,
        target=settings.target,
        providers=settings.providers,
        compute=settings.precision,
        largest_code=largest_code(module),
        trusted=True,
    )


def tolerance_of(module: nn.Module, compute: str) -> float:
    """Highest relative error of an engine of ``module``, whose float products are in the precision ``compute``."""
    return FLOAT_TOLERANCE if compute == "float32" and not has_codes(module) else ROUNDED_TOLERANCE


@contextmanager
def shaken(module: nn.Module, compute: str) -> Iterator[Callable[[Any], Any]]:
    """Inside, what layers with weights return has rounding errors of ``compute``; the value does so to a tensor.

    In a deep network in 8 bits values near the middle of two codes fall the other way, and move others: with random
    weights 1e-6 become percents. No two run-times agree better than that.
    """
    random = torch.Generator().manual_seed(0)

    def shake(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value * (1 + ROUNDING[compute] * torch.randn(value.shape, generator=random).to(value))

    with ExitStack() as stack, torch.no_grad():
        for layer in module.modules():
            if getattr(layer, "weight", None) is not None:
                hook = layer.register_forward_hook(lambda layer, args, output: shake(output))
                stack.callback(hook.remove)
        yield shake


def moved_by_rounding(module: nn.Module, inputs: dict[str, Tensor], outputs: Sequence[Tensor], compute: str) -> float:
    """Relative L2 distance that rounding errors in ``inputs`` and in each layer move the ``outputs`` of ``module``."""
    with shaken(module, compute) as shake:
        found = module(*map(shake, inputs.values()))
    return max(map(relative_difference, found, outputs))


def compare(
    name: str,
    session: Session,
    calls: Iterable[tuple[dict[str, Tensor], dict[str, Tensor]]],
    *,
    tolerance: float,
    noise: Callable[[dict[str, Tensor], list[Tensor]], float] | None = None,
) -> Parity:
    """Run every (inputs, expected outputs) through the engine.

    ``noise`` says of inputs and outputs how far rounding alone moves torch; twice that is allowed where it is more than
    ``tolerance``. Raises ParityError for NaN or infinity, an output that is constant where torch's is not, and an error
    above what is allowed.
    """
    worst, highest, count = 0.0, tolerance, 0
    for inputs, expected in calls:
        wanted = [expected[output].detach() for output in session.outputs]
        error = max(
            _difference(f"{name}: output {output}", found, tensor)
            for output, found, tensor in zip(session.outputs, session(inputs), wanted, strict=True)
        )
        allowed = tolerance
        if error > tolerance and noise is not None:
            allowed = max(tolerance, HEADROOM * noise(inputs, wanted))
        if error > allowed:
            raise ParityError(
                f"{name}: the engine differs from torch by {error:.2e} (relative L2); allowed: {allowed:.1e}"
            )
        worst, highest, count = max(worst, error), max(highest, allowed), count + 1
    return Parity(name, worst, highest, count)


def compare_resized(
    session: Session,
    at_size: Parity,
    call: tuple[dict[str, Tensor], dict[str, Tensor]],
    noise: Callable[[dict[str, Tensor], list[Tensor]], float] | None = None,
) -> Parity:
    """``at_size``, the parity at the traced size, extended by a call at another one; ``noise`` as `compare` has it.

    Raises ParityError when the engine is right at the first alone.
    """
    try:
        other = compare(at_size.component, session, [call], tolerance=at_size.tolerance, noise=noise)
    except EngineError as error:
        raise ParityError(
            f"export.size 'dynamic': {at_size.component} has the size it was traced at baked in, for the engine agrees "
            f"with torch there but not at another size; allowed for this model: static. What happened: {error}"
        ) from error
    return replace(at_size, error=max(at_size.error, other.error), calls=at_size.calls + other.calls)


def _difference(what: str, actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().cpu(), expected.cpu()
    if actual.shape != expected.shape:
        raise ParityError(f"{what} has shape {list(actual.shape)}, torch gives {list(expected.shape)}")
    if not torch.isfinite(expected).all():
        raise ParityError(f"{what}: what torch gives is not finite, so nothing can be compared with it")
    if not torch.isfinite(actual).all():
        share = 1 - torch.isfinite(actual).double().mean().item()
        raise ParityError(f"{what} is not finite ({share:.1%} of the values are NaN or infinite)")
    if actual.numel() > 1 and actual.std() == 0 and expected.std() > 0:
        raise ParityError(f"{what} is constant ({actual.flatten()[0].item():g}), torch's is not")
    return relative_difference(actual, expected)


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-12))


def check_precision(name: str, session: Session, wanted: int) -> int:
    """Count the 8-bit products of the built graph. Raises PrecisionError when fewer than ``wanted`` layers.

    Where they are simulated there are none.
    """
    found = session.quantized_ops()
    if found < wanted and not session.simulated:
        raise PrecisionError(
            f"{name}: {wanted} layers were quantized, but only {found} products of the built graph run in 8 bits "
            f"({session.provider})"
        )
    return found


def check_compute(name: str, session: Session, wanted: str) -> None:
    """Raises PrecisionError when bfloat16 is wanted and the run-time computes in something else."""
    if wanted == "bfloat16" and "bf16" not in session.provider:
        raise PrecisionError(
            f"{name}: compute bfloat16 is asked for, but this machine runs {session.provider}; allowed here: float32"
        )
