"""One loop for every student: warm-up, clipping, moving averages, checkpoints that resume to the same bits, processes.

Every draw of step k comes from a generator seeded by (seed, k) for the whole global batch, and each process takes its
rows. So a run that was killed and resumed, and one on another number of processes, see the batches they would have.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator, PartialState
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.training_utils import EMAModel
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffpress import processes
from diffpress.config import config
from diffpress.errors import ArtifactError, ConfigError, TrainingError
from diffpress.lora import add_adapters, merge_adapters, require_adapters
from diffpress.progress import Progress
from diffpress.targets import Compute, in_bfloat16
from diffpress.traceable import unread

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.safetensors"
FEW_TOKENS = 256
"""Up to so many, attention scores take little memory."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


@config
class TrainingSettings:
    """How a student is trained."""

    steps: Annotated[int, Field(ge=1)] = 2000
    """Updates."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Records in one update, over all processes together."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak of AdamW's learning rate; it falls along half a cosine to 2 % of this."""
    warmup: Annotated[int, Field(ge=0)] = 100
    """Updates over which the learning rate rises linearly."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decay."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Highest norm of a gradient."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the moving average that becomes the student; 0: the last weights become it. It is warmed up: after k
    updates it is at most 1 - (1 + k)^-0.75, which reaches 0.9975 after 3,000 and 0.999 after 10,000."""
    compute: Compute = "float32"
    """Precision of forward and backward passes; weights and updates are float32. auto: bfloat16 where the machine has
    instructions for it, else float32."""
    compile: bool = False
    """Whether the network is compiled for training; on a CPU torch.compile wants a C++ compiler."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """Rank of LoRA adapters that are trained instead of the weights, and merged into them at the end; null: none."""
    checkpoint_every: Annotated[float, Field(gt=0)] = 120.0
    """Seconds between checkpoints."""
    preview_every: Annotated[int, Field(ge=0)] = 0
    """Updates between grids of sampled pictures in the run's work folder; 0: none."""


@dataclass(frozen=True)
class Draw:
    """One update's random numbers and rows: drawn for the whole batch by ``generator``, alike in every process."""

    step: int
    seed: int
    batch_size: int
    generator: torch.Generator
    device: torch.device | str = "cpu"
    rank: int = 0
    processes: int = 1

    def mine(self, values: Tensor) -> Tensor:
        """Rows of this process, of what was drawn for the batch, on its device."""
        return values[self.rank :: self.processes].to(self.device)

    def rows(self, count: int) -> Tensor:
        """int64 [batch size]: records of this update out of ``count``; an epoch is a permutation of its own."""
        places = range(self.step * self.batch_size, (self.step + 1) * self.batch_size)
        return torch.stack([_permutation(count, self.seed, place // count)[place % count] for place in places])

    def uniform(self) -> Tensor:
        """float32 [batch size] in [0, 1)."""
        return torch.rand(self.batch_size, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        """float32 [batch size, *shape]."""
        return torch.randn(self.batch_size, *shape, generator=self.generator)


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(_mix(seed, epoch, 1)))


def _mix(*numbers: int) -> int:
    """One 62-bit seed from several numbers."""
    value = 0
    for number in numbers:
        value = (value * 6364136223846793005 + number + 1442695040888963407) % 2**62
    return value


def draw_of(step: int, *, seed: int, batch_size: int, **where: Any) -> Draw:
    """The draw of update ``step``; ``where`` says on which device and in which process."""
    return Draw(step, seed, batch_size, torch.Generator().manual_seed(_mix(seed, step, 2)), **where)


Loss = Callable[[nn.Module, Draw], Tensor]


@dataclass
class Fitted:
    """A finished training: the loss of every update, and the seconds they took."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


def rate_of(step: int, settings: TrainingSettings) -> float:
    """Learning rate of update ``step``: linear warm-up, then half a cosine to 2 % of the peak."""
    peak = settings.learning_rate
    if step < settings.warmup:
        return peak * (step + 1) / (settings.warmup + 1)
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def training_device() -> torch.device:
    """Where `fit` trains: this process's GPU, or the CPU."""
    return PartialState(cpu=processes.without_gpu()).device


def check_training(settings: TrainingSettings) -> None:
    """Raises MissingDependencyError for adapters without peft, ConfigError for a batch that processes cannot share."""
    if settings.rank is not None:
        require_adapters("training.rank")
    if settings.batch_size % processes.count():
        raise ConfigError(
            f"training.batch_size {settings.batch_size} is not a multiple of the {processes.count()} processes"
        )


class _ByTokens:
    """Attention processor: for few tokens the scores in full, whose backward pass takes a CPU less time in bfloat16."""

    def __init__(self, fused: AttnProcessor2_0) -> None:
        self.fused, self.full = fused, AttnProcessor()

    def __call__(self, attn: Attention, hidden_states: Tensor, *args: Any, **named: Any) -> Tensor:
        tokens = math.prod(hidden_states.shape[2:]) if hidden_states.ndim == 4 else hidden_states.shape[1]
        return (self.full if tokens <= FEW_TOKENS else self.fused)(attn, hidden_states, *args, **named)


@contextmanager
def _quick_attention(network: nn.Module, device: torch.device, *, bfloat16: bool) -> Iterator[None]:
    """Inside the block stock attention is what trains fastest there."""
    swapped = device.type == "cpu" and bfloat16
    layers = [module for module in network.modules() if type(getattr(module, "processor", None)) is AttnProcessor2_0]
    before: list[tuple[Any, Any]] = [(layer, layer.processor) for layer in layers] if swapped else []
    for layer, processor in before:
        layer.set_processor(_ByTokens(processor))
    try:
        yield
    finally:
        for layer, processor in before:
            layer.set_processor(processor)


class _Run:
    """The network with its optimizer and averages, and how far it is."""

    def __init__(self, network: nn.Module, target: nn.Module | None, settings: TrainingSettings, key: str) -> None:
        self.settings, self.key = settings, key
        self.accelerator = Accelerator(mixed_precision="no", cpu=processes.without_gpu())
        assert self.accelerator.num_processes == processes.count()
        self.network = network.to(self.accelerator.device)
        self.bfloat16 = in_bfloat16(settings.compute, self.accelerator.device)
        self.target = None if target is None else target.to(self.accelerator.device)
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.99)
        )
        self.ema = EMAModel(self.parameters, decay=settings.ema, use_ema_warmup=True, power=0.75)
        self.called = self.accelerator.prepare_model(network) if self.accelerator.num_processes > 1 else network
        if settings.compile:
            self.called = torch.compile(self.called)
        self.step, self.fitted = 0, Fitted()

    def update(self, loss_of: Loss, draw: Draw) -> float:
        """One step of the optimizer; the mean loss over all processes."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate_of(draw.step, self.settings)
        with torch.autocast(torch.device(draw.device).type, torch.bfloat16, enabled=self.bfloat16):
            loss = loss_of(self.called, draw)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        value = float(self.accelerator.reduce(loss.detach(), "mean"))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        if math.isfinite(value) and torch.isfinite(norm):
            self.optimizer.step()
            self.ema.step(self.parameters)
            return value
        return math.nan

    def save(self, path: Path) -> None:
        """Write the checkpoint, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for index, parameter in enumerate(self.parameters):
            tensors |= {f"weights.{index}": parameter.detach(), f"ema.{index}": self.ema.shadow_params[index]}
            state = self.optimizer.state.get(parameter, {})  # none of what never had a gradient
            tensors |= {f"{name}.{index}": tensor for name, tensor in state.items()}
        if self.target is not None:
            tensors |= {f"target.{index}": tensor.detach() for index, tensor in enumerate(self.target.parameters())}
        facts = {"step": self.step, "key": self.key, "losses": self.fitted.losses, "seconds": self.fitted.seconds}
        partial = path.with_name(f".{path.name}.partial")
        whole = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(whole, partial, metadata={"state": json.dumps(facts)})
        os.replace(partial, path)

    @torch.no_grad()
    def resume(self, path: Path) -> None:
        """Go on from the checkpoint; ArtifactError when it is damaged or of another training."""
        try:
            with safe_open(path, framework="pt") as stored:
                facts, names = json.loads(stored.metadata()["state"]), set(stored.keys())
                if facts["key"] != self.key:
                    raise ArtifactError(f"{path} belongs to another training; delete it to begin anew")
                for index, parameter in enumerate(self.parameters):
                    parameter.copy_(stored.get_tensor(f"weights.{index}"))
                    self.ema.shadow_params[index].copy_(stored.get_tensor(f"ema.{index}"))
                    if f"{_MOMENTS[0]}.{index}" not in names:
                        continue
                    moments = {n: stored.get_tensor(f"{n}.{index}").to(parameter.device) for n in _MOMENTS}
                    self.optimizer.state[parameter] = {"step": stored.get_tensor(f"step.{index}"), **moments}
                for index, tensor in enumerate(() if self.target is None else self.target.parameters()):
                    tensor.copy_(stored.get_tensor(f"target.{index}"))
        except (SafetensorError, KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}; delete it to begin anew") from error
        self.step = self.ema.optimization_step = facts["step"]
        self.fitted = Fitted(facts["losses"], facts["seconds"])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The block sees the moving average's weights in the network."""
        if self.settings.ema == 0:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)


def fit(
    network: nn.Module,
    loss_of: Loss,
    settings: TrainingSettings,
    *,
    seed: int,
    key: str,
    folder: Path,
    progress: Progress,
    label: str = "Training the student",
    preview: Callable[[int], None] | None = None,
    target: tuple[nn.Module, float] | None = None,
) -> Fitted:
    """Train ``network`` in place and leave its moving average in it; checkpoints are in ``folder``.

    ``loss_of(network, draw)`` gives the mean loss of this process's rows of one batch. ``key`` says what the training
    is of: a checkpoint with another key is refused. ``preview(step)`` is called every ``preview_every`` updates, with
    the average in the network. ``target``, a copy of the network and a decay, follows it as its own moving average.
    Raises TrainingError when the loss or a gradient is not finite; the last good checkpoint stays.
    """
    check_training(settings)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CHECKPOINT
    if settings.rank is not None:
        add_adapters(network, settings.rank, seed=seed)
    for name, parameter in network.named_parameters():
        if any(fnmatch(name, pattern) for pattern in unread(network)):
            parameter.requires_grad_(False)  # it would get no gradient, which several processes do not forgive
    network.eval()  # no dropout, of labels either: the student learns a function, not a distribution
    run = _Run(network, target[0] if target else None, settings, key)
    if path.exists():
        run.resume(path)
    with _quick_attention(network, run.accelerator.device, bfloat16=run.bfloat16):
        _train(run, loss_of, seed=seed, path=path, progress=progress, label=label, preview=preview, target=target)
    if settings.ema:
        run.ema.copy_to(run.parameters)
    if settings.rank is not None:
        merge_adapters(network)
    return run.fitted


def _train(
    run: _Run,
    loss_of: Loss,
    *,
    seed: int,
    path: Path,
    progress: Progress,
    label: str,
    preview: Callable[[int], None] | None,
    target: tuple[nn.Module, float] | None,
) -> None:
    """The updates that are left, with checkpoints at ``path``; see `fit`."""
    settings, accelerator = run.settings, run.accelerator
    where = {"device": accelerator.device, "rank": accelerator.process_index, "processes": accelerator.num_processes}
    began, saved = time.monotonic() - run.fitted.seconds, time.monotonic()
    with progress.task(label, total=settings.steps) as advance:
        advance(run.step)
        while run.step < settings.steps:
            loss = run.update(loss_of, draw_of(run.step, seed=seed, batch_size=settings.batch_size, **where))
            if math.isnan(loss):
                last = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint was written yet"
                raise TrainingError(f"{label}: the loss or its gradient is not finite at update {run.step}; {last}")
            run.fitted.losses.append(loss)
            run.step += 1
            run.fitted.seconds = time.monotonic() - began
            if target:
                follow(target[0], run.network, target[1])
            shown = settings.preview_every and run.step % settings.preview_every == 0
            if preview and shown and accelerator.is_main_process:
                with run.averaged():
                    preview(run.step)
            if accelerator.is_main_process and time.monotonic() - saved > settings.checkpoint_every:
                run.save(path)
                saved = time.monotonic()
            advance(1)
    if accelerator.is_main_process:
        run.save(path)


@torch.no_grad()
def follow(target: nn.Module, network: nn.Module, decay: float) -> None:
    """Target <- decay * target + (1 - decay) * network."""
    for slow, fast in zip(target.parameters(), network.parameters(), strict=True):
        slow.lerp_(fast.detach(), 1 - decay)
