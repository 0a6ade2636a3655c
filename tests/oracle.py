"""The Gaussian oracle: data N(mean, deviation^2), for which every ideal network is known in closed form, in float64."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from diffpress.diffusion import Level, Schedule, chord, flow_time, level, target

Ideal = Literal["teacher", "consistent", "straight"]
Pair = tuple[Tensor, Tensor]  # (x_0, eps) with alpha x_0 + sigma eps = x_t


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, deviation^2) for each element; both broadcast against x_t."""

    mean: Tensor
    deviation: Tensor

    def spread(self, at: Level) -> Tensor:
        """sqrt(alpha^2 s^2 + sigma^2), the standard deviation of x_t."""
        return ((at.alpha * self.deviation) ** 2 + at.sigma**2).sqrt()

    def state(self, noise: Tensor, at: Level) -> Tensor:
        """alpha mu + sqrt(alpha^2 s^2 + sigma^2) z: the state on the ODE's path that pure noise z lies on."""
        return at.alpha * self.mean + self.spread(at) * noise

    def noise(self, x_t: Tensor, at: Level) -> Tensor:
        """Inverse of `state`."""
        return (x_t - at.alpha * self.mean) / self.spread(at)

    def transport(self, x_t: Tensor, source: Level, to: Level) -> Tensor:
        """The probability-flow ODE solved between two levels; to (1, 0) it is the consistency map."""
        return self.state(self.noise(x_t, source), to)

    def teacher(self, x_t: Tensor, at: Level) -> Pair:
        """E[x_0 | x_t] and E[eps | x_t]: what ordinary training converges to."""
        pull = self.noise(x_t, at) / self.spread(at)
        return self.mean + at.alpha * self.deviation**2 * pull, at.sigma * pull

    def straight(self, x_t: Tensor, at: Level) -> Pair:
        """The pair (mu + s z, z) on whose chord x_t lies: what training on the ODE's pairs converges to."""
        noise = (x_t - at.alpha * self.mean) / (at.alpha * self.deviation + at.sigma)
        return self.mean + self.deviation * noise, noise

    def consistent(self, x_t: Tensor, at: Level, edge: Level) -> Pair:
        """The chord from x_t to the ODE's state at a less noisy ``edge``: one DDIM step to it is exact."""
        there = self.transport(x_t, at, edge)
        return chord(x_t, there, alpha_s=at.alpha, sigma_s=at.sigma, alpha_e=edge.alpha, sigma_e=edge.sigma)


class Oracle(nn.Module):
    """A denoiser that is ideal for data N(mean, deviation^2), with both as its float64 parameters.

    ``ideal``: "teacher" gives conditional means, "consistent" jumps to the edge of its phase, "straight" is what
    training on pairs gives. ``schedule`` says what the output means and what the timesteps are; states lie on its
    path. ``mean`` is a number for all data or, with ``class_labels``, one for each class, the last for no class (and
    for every number beyond). ``edges`` are flow times; a phase reaches from above one of them to the next, included.
    """

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(
        self,
        schedule: Schedule,
        mean: float | list[float],
        deviation: float,
        ideal: Ideal = "teacher",
        edges: tuple[float, ...] = (0.0,),
    ):
        super().__init__()
        self.schedule, self.ideal, self.edges = schedule, ideal, edges
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.deviation = nn.Parameter(torch.tensor(deviation, dtype=torch.float64))
        self.config = SimpleNamespace(sample_size=8, in_channels=4, out_channels=4, num_embeds_ada_norm=1000)

    def at(self, timestep: Tensor | float) -> Level:
        """(alpha, sigma) [n] of timesteps [n]: the tables', linear between and beyond their entries."""
        told, grid = torch.as_tensor(timestep).double().reshape(-1), self.schedule.timesteps
        above = torch.searchsorted(grid, told).clamp(1, len(grid) - 1)
        share = (told - grid[above - 1]) / (grid[above] - grid[above - 1])
        tables = (self.schedule.alphas, self.schedule.sigmas)
        return Level(*(torch.lerp(table[above - 1], table[above], share) for table in tables))

    def edge(self, at: Level) -> Level:
        """The next edge below each level; a level on an edge belongs to the phase below it.

        At the lowest edge, below which there is no phase, a level so near that the chord is the path's tangent.
        """
        times, edges = flow_time(alpha=at.alpha, sigma=at.sigma), torch.tensor(sorted(self.edges), dtype=torch.float64)
        path = "flow" if ((self.schedule.alphas + self.schedule.sigmas - 1).abs() < 1e-9).all() else "vp"
        below = edges[(torch.searchsorted(edges, times - 1e-9) - 1).clamp(min=0)]
        return level(torch.where(below < times - 1e-9, below, times + 1e-6), path)

    def pair(self, x_t: Tensor, at: Level, data: Gaussian) -> Pair:
        if self.ideal == "teacher":
            return data.teacher(x_t, at)
        if self.ideal == "straight":
            return data.straight(x_t, at)
        return data.consistent(x_t, at, self.edge(at))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        **_: object,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        shape = [-1] + [1] * (sample.dim() - 1)
        flat = self.at(timestep)
        at = Level(flat.alpha.reshape(shape), flat.sigma.reshape(shape))
        mean = self.mean if class_labels is None else self.mean[class_labels.clamp(max=len(self.mean) - 1)]
        x_0, eps = self.pair(sample.double(), at, Gaussian(mean.reshape(shape), self.deviation))
        output = target(x_0, eps, **at._asdict(), kind=self.schedule.parameterization).to(sample.dtype)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)
