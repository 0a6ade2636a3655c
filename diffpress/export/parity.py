"""Does the reloaded engine compute what torch computes? NaN and constant outputs have names of their own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffpress.errors import EngineError, ParityError, PrecisionError
from diffpress.export.session import Session

FLOAT_TOLERANCE = 1e-3
ROUNDED_TOLERANCE = (
    5e-2  # in 8 bits a rounding that falls the other way moves a value by a step; bfloat16 has 8 bits too
)


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


def tolerance_of(module: nn.Module, compute: str) -> float:
    """Highest relative error of an engine of ``module``, whose float products are in the precision ``compute``."""
    return FLOAT_TOLERANCE if compute == "float32" and not has_codes(module) else ROUNDED_TOLERANCE


def compare(
    name: str, session: Session, calls: Iterable[tuple[dict[str, Tensor], dict[str, Tensor]]], *, tolerance: float
) -> Parity:
    """Run every (inputs, expected outputs) through the engine.

    Raises ParityError for NaN or infinity, an output that is constant where torch's is not, and an error above
    ``tolerance``.
    """
    worst, count = 0.0, 0
    for inputs, expected in calls:
        for output_name, output in zip(session.outputs, session(inputs), strict=True):
            worst = max(worst, _difference(f"{name}: output {output_name}", output, expected[output_name].detach()))
        count += 1
    if worst > tolerance:
        raise ParityError(
            f"{name}: the engine differs from torch by {worst:.2e} (relative L2); allowed: {tolerance:.0e}"
        )
    return Parity(name, worst, tolerance, count)


def compare_resized(session: Session, at_size: Parity, call: tuple[dict[str, Tensor], dict[str, Tensor]]) -> Parity:
    """``at_size``, the parity at the traced size, extended by a call at another one.

    Raises ParityError when the engine is right at the first alone.
    """
    try:
        other = compare(at_size.component, session, [call], tolerance=at_size.tolerance)
    except EngineError as error:
        raise ParityError(
            f"export.size 'dynamic': {at_size.component} has the size it was traced at baked in, for the engine agrees "
            f"with torch there but not at another size; allowed for this model: static. What happened: {error}"
        ) from error
    return replace(at_size, error=max(at_size.error, other.error), calls=at_size.calls + other.calls)


def _difference(what: str, actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().cpu().double(), expected.cpu().double()
    if actual.shape != expected.shape:
        raise ParityError(f"{what} has shape {list(actual.shape)}, torch gives {list(expected.shape)}")
    if not torch.isfinite(actual).all():
        share = 1 - torch.isfinite(actual).double().mean().item()
        raise ParityError(f"{what} is not finite ({share:.1%} of the values are NaN or infinite)")
    if actual.numel() > 1 and actual.std() == 0 and expected.std() > 0:
        raise ParityError(f"{what} is constant ({actual.flatten()[0].item():g}), torch's is not")
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-12))


def check_precision(name: str, session: Session, wanted: int) -> int:
    """Count the 8-bit products of the built graph. Raises PrecisionError when fewer than ``wanted`` layers."""
    found = session.quantized_ops()
    if found < wanted:
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
