"""AdaRound: each weight goes up or down, whichever together change the layer's outputs least (Nagel et al. 2020).

The choice is relaxed to a number between 0 and 1 for each weight, trained by gradient descent, and pushed to one end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diffpress import processes
from diffpress.config import config
from diffpress.progress import Progress
from diffpress.training import Draw, TrainingSettings, fit

STRETCH = 0.1  # how far the sigmoid reaches beyond 0 and 1
LIMIT = 127


@config
class AdaRoundSettings:
    """How the choice between up and down is trained."""

    reconstruct: Literal["layer", "block"] = "layer"
    """layer: each layer's own outputs are kept; block: those of the transformer or residual block that it is in."""
    calls: Annotated[int, Field(ge=1)] = 64
    """Denoiser calls of two pictures, spread over the calibration runs of all, for blocks: three quarters to train on, one to judge by; one block's inputs and outputs of all of them are in memory."""  # noqa: E501
    steps: Annotated[int, Field(ge=1)] = 500
    """Updates for each layer, or each block."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    """Peak of the learning rate."""
    regularization: Annotated[float, Field(ge=0)] = 30.0
    """Weight of the push to 0 or 1 beside the error, which is relative to that of rounding to nearest."""
    free: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the updates without that push."""


@dataclass(frozen=True)
class Workshop:
    """Where a training keeps its checkpoints, what it draws from, and who is told how far it is."""

    folder: Path
    seed: int
    progress: Progress


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1) (eq. 23): 0 and 1 are reached by finite v. Any shape."""
    return (torch.sigmoid(v) * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)


def rectified_logit(h: Tensor) -> Tensor:
    """v with `rectified_sigmoid` (v) = h, for h in [0, 1]. Any shape."""
    return torch.logit((h + STRETCH) / (1 + 2 * STRETCH))


def push(h: Tensor, beta: float) -> Tensor:
    """f(h) = mean(1 - |2 h - 1|^beta) (eq. 24): 1 where all h are 1/2, 0 where each is 0 or 1."""
    return (1 - (2 * h - 1).abs().pow(beta)).mean()


def annealed(step: int, settings: AdaRoundSettings) -> float | None:
    """Beta of update ``step``, from 20 down to 2 linearly; None in the first, free share of the updates."""
    first = settings.free * settings.steps
    if step < first:
        return None
    return 20 - 18 * (step - first) / max(1.0, settings.steps - first)


class Rounding(nn.Module):
    """Codes floor(W / s) + h(v) in [-127, 127]: at first W / s itself; whole ones stay. W: [out, ...], s: [out]."""

    floor: Tensor
    whole: Tensor

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        exact = weight.detach().float() / scale.float().reshape(-1, *[1] * (weight.ndim - 1))
        self.register_buffer("floor", exact.floor())
        self.register_buffer("whole", exact == exact.floor())
        self.v = nn.Parameter(rectified_logit(exact - exact.floor()))

    def forward(self) -> Tensor:
        """The soft codes, float32, in the shape of W."""
        return (self.floor + rectified_sigmoid(self.v).masked_fill(self.whole, 0)).clamp(-LIMIT, LIMIT)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The codes with each h at its nearer end, int8."""
        return (self.floor + ((self.v >= 0) & ~self.whole)).clamp(-LIMIT, LIMIT).to(torch.int8)


def row_errors(weight: Tensor, codes: Tensor, gram: Tensor, scale: Tensor) -> Tensor:
    """E[((W - s q) Q)^2] of each output, float64 [out]. W, q: [out, in]; G = E[Q Q^T]: [in, in]; s: [out]."""
    difference = weight.double() - codes.double() * scale.double()[:, None]
    return (difference @ gram.double() * difference).sum(1)


def best_rows(weight: Tensor, candidates: Sequence[Tensor], gram: Tensor, scale: Tensor) -> Tensor:
    """For each output the codes of least `row_errors`; of equal ones the earlier. Candidates: int8 [out, in]."""
    errors = torch.stack([row_errors(weight, codes, gram, scale) for codes in candidates])  # [candidates, out]
    chosen = errors.argmin(0)
    return torch.stack(list(candidates))[chosen, torch.arange(len(chosen))]


def adaround_codes(
    weight: Tensor, gram: Tensor, scale: Tensor, *, settings: AdaRoundSettings, workshop: Workshop, name: str
) -> Tensor:
    """Codes q in {floor(W / s), ceil(W / s)} that keep ||(W - s q) Q||^2 small, by gradient descent on the relaxation.

    Minimizes tr(D G D^T) / tr(D_0 G D_0^T) + l f(h), D = W - s (floor + h(v)), D_0 that of rounding to nearest
    (AdaRound, Nagel et al. 2020, eq. 21 with the moments in place of samples). W: [out, in]; G = E[Q Q^T]: [in, in],
    Q the layer's quantized inputs; s: [out]. Returns int8 [out, in]. ``name`` says which layer it is.
    """
    rounding = Rounding(weight, scale)
    nearest = (weight / scale[:, None]).round().clamp(-LIMIT, LIMIT)
    unit = float(row_errors(weight, nearest, gram, scale).sum())
    if not unit > 0:
        return nearest.to(torch.int8)

    def loss_of(network: nn.Module, draw: Draw) -> Tensor:
        soft, exact, moments = network(), weight.to(draw.device), gram.to(draw.device)
        difference = exact - soft * scale.to(draw.device)[:, None]
        error = (difference @ moments * difference).sum() / unit
        beta = annealed(draw.step, settings)
        return error if beta is None else error + settings.regularization * push(rectified_sigmoid(rounding.v), beta)

    fit(
        rounding,
        loss_of,
        training_settings(settings),
        seed=workshop.seed,
        key=f"adaround {name}",
        folder=workshop.folder / name,
        progress=workshop.progress,
        label=f"Rounding {name}",
    )
    return rounding.to("cpu").codes()


def training_settings(settings: AdaRoundSettings, batch_size: int | None = None) -> TrainingSettings:
    """What `fit` is to do: no warm-up, no clipping, no average; by default a batch of one for each process."""
    return TrainingSettings(
        steps=settings.steps,
        batch_size=batch_size or processes.count(),
        learning_rate=settings.learning_rate,
        warmup=0,
        clip=1e6,
        ema=0,
    )
