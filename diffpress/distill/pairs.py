"""The pair store: noise, sample and the states between, of a teacher's deterministic sampling runs, on disk.

One record is one condition, one seed, and the states at the edges of M phases: with M = 1 the classical pair of noise
and sample (Liu et al. 2022, Rectified Flow), with M > 1 what phase-wise training needs (Wang et al. 2024, Rectified
Diffusion). Records are written in shards, each whole or not at all; the noise of record i comes from seed i alone, so
neither batch size nor the number of workers nor a killed run changes what is stored, but for rounding.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import filelock
import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffpress import processes
from diffpress.artifact import file_hash, fingerprint, read_json, write_json
from diffpress.config import config
from diffpress.denoise import as_told, check_solver, first_inputs, trajectory
from diffpress.diffusion import Schedule, flow_time, level_at
from diffpress.errors import ArtifactError, ConfigError, InfrastructureError
from diffpress.generator import Generator, SamplingPlan
from diffpress.progress import Progress
from diffpress.targets import Compute, in_bfloat16

logger = logging.getLogger(__name__)

MANIFEST, FORMAT = "manifest.json", 2
_NEAR = 2e-3  # share of the training grid's last timestep by which a solver's first may lie beyond it
_NOISE = 0.9  # flow time from which on a state is nearly pure noise; Stable Diffusion's schedule ends at 0.936
_HELD_OUT_SEED = 5_000_000  # distance from the seeds of the records that are trained on


@config
class PairSettings:
    """The teacher's sampling runs that a student learns from."""

    count: Annotated[int, Field(ge=8)] = 4096
    """Records to train on."""
    held_out: Annotated[int, Field(ge=2)] = 128
    """Records that are never trained on; the error that is reported is theirs."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 24
    """Steps of the teacher's solver."""
    guidance_scale: Annotated[float, Field(ge=0)] | None = None
    """Guidance of the teacher, baked into the student; null: as the calibration runs."""
    scheduler: str | None = None
    """Deterministic diffusers scheduler that calls the network once a step; null: the teacher's own."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Records sampled at once."""
    shard: Annotated[int, Field(ge=1)] = 512
    """Records in one file."""
    compute: Compute = "float32"
    """Precision in which the teacher's network runs; states are stored in float32 either way. auto: bfloat16 where the
    machine has instructions for it, else float32."""
    folder: str | None = None
    """Where the records are kept, to be used again by other students of the same teacher; null: inside the run."""


@dataclass(frozen=True)
class Edge:
    """One level at which states are stored: x = alpha x_0 + sigma eps; ``timestep`` is what `denoise` is told."""

    alpha: float
    sigma: float
    timestep: float | None
    """None at the end, where no network is called any more."""


@dataclass(frozen=True)
class Pairs:
    """Records in memory: ``states`` float32 [n, phases + 1, c, ...], noise first; ``conditions`` and seeds [n]."""

    states: Tensor
    conditions: list[Any]
    seeds: list[int]
    edges: tuple[Edge, ...]

    @property
    def phases(self) -> int:
        return len(self.edges) - 1

    def __len__(self) -> int:
        return len(self.states)


def solver_plan(settings: PairSettings, plan: SamplingPlan) -> SamplingPlan:
    """The plan of the teacher's runs: ``plan`` with what the settings say."""
    changes = {name: getattr(settings, name) for name in ("steps", "guidance_scale")}
    return replace(plan, scheduler=None, **{name: value for name, value in changes.items() if value is not None})


def edges_of(schedule: Schedule, timesteps: Tensor, phases: int) -> tuple[Edge, ...]:
    """The edges of ``phases`` equal groups of the solver's ``timesteps`` [steps], and the clean end.

    Raises ConfigError where the first of them is not nearly pure noise.
    """
    first, starts = float(timesteps[0]), timesteps[:: len(timesteps) // phases].double()
    known = as_told(schedule, first)
    levels, last = level_at(known, starts), float(known.timesteps[-1])
    if first > last * (1 + _NEAR) or flow_time(**levels._asdict())[0] < _NOISE:
        raise ConfigError(
            f"the network is told {first:g} of the solver's first state, which is not nearly pure noise; allowed: "
            f"trailing spacing, and networks that are told the training grid's last timestep "
            f"{float(schedule.timesteps[-1]):g}, or that over {len(schedule.timesteps)}"
        )
    return (*(Edge(*row) for row in torch.stack([*levels, starts], 1).tolist()), Edge(1.0, 0.0, None))


class PairStore:
    """A folder of records of one teacher, made as far as they are not there yet."""

    def __init__(self, folder: Path, teacher: Generator, settings: PairSettings, plan: SamplingPlan) -> None:
        self.folder, self.teacher, self.settings = folder, teacher, settings
        self.plan = solver_plan(settings, plan)

    def collect(
        self, conditions: Sequence[Any], phases: int, *, seed: int = 0, progress: Progress
    ) -> tuple[Pairs, Pairs]:
        """Records to train on and held-out ones, ``conditions`` in turn; what is on disk already is not made again.

        A folder of records of more phases, a multiple of ``phases``, serves: the states between are left out. Raises
        ArtifactError when the folder holds the records of another teacher, plan or list of conditions, of phases that
        do not fit, or a damaged shard, and InfrastructureError when the disk is too small.
        """
        check_solver(self.teacher)
        with self._alone():
            return self._collect(conditions, phases, seed, progress)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other run writes to the folder meanwhile; of several processes of this one the first sees to that."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.folder / ".lock", timeout=0)
        try:
            with lock if processes.first() else contextlib.nullcontext():
                yield
        except filelock.Timeout as error:
            raise ArtifactError(f"{self.folder}: another run is at work on these pairs") from error

    def _collect(self, conditions: Sequence[Any], phases: int, seed: int, progress: Progress) -> tuple[Pairs, Pairs]:
        stored = self._stored_phases(phases)
        identity = self._identity(conditions, stored, seed)
        self._claim(identity, conditions, stored)
        processes.wait_for_all()  # nothing is made anew before its old hash is gone
        parts = []
        for name, count, first in (
            ("train", self.settings.count, seed),
            ("held-out", self.settings.held_out, seed + _HELD_OUT_SEED),
        ):
            shards = []  # files are named by the records in them, so that other sizes are other files
            for start in range(0, count, self.settings.shard):
                end = min(start + self.settings.shard, count)
                shards.append((f"{name}-{start:07d}-{end:07d}.safetensors", start, end - start))
            self._make(processes.mine(shards), conditions, stored, first, progress)
            parts.append((name, shards, first))
        processes.wait_for_all()
        if processes.first():
            self._seal(identity, [file for _, shards, _ in parts for file, _, _ in shards])
        train, held_out = (self._read(shards, conditions, first, stored // phases) for _, shards, first in parts)
        return train, held_out

    def _stored_phases(self, phases: int) -> int:
        """Those of the folder's records, if there are any; ArtifactError where they are no multiple of ``phases``."""
        path = self.folder / MANIFEST
        found = read_json(path).get("phases") if path.exists() else None
        if not isinstance(found, int):
            return phases
        if found % phases:
            fitting = ", ".join(str(number) for number in range(1, found + 1) if found % number == 0)
            raise ArtifactError(
                f"{self.folder} holds records of {found} phases, {phases} are asked for; allowed: {fitting}, or a new "
                "folder"
            )
        return found

    def _identity(self, conditions: Sequence[Any], phases: int, seed: int) -> dict[str, Any]:
        """What decides every byte of the records."""
        scheduler = self.teacher.pipeline.scheduler
        return {
            "format": FORMAT,
            "teacher": teacher_hash(self.teacher),
            "scheduler": [type(scheduler).__name__, {k: v for k, v in scheduler.config.items() if k[0] != "_"}],
            "plan": asdict(self.plan),
            "phases": phases,
            "seed": seed,
            "compute": self.settings.compute,
            "conditions": fingerprint(list(conditions)),
            "calls_per_record": self.plan.steps,
        }

    def _claim(self, identity: dict[str, Any], conditions: Sequence[Any], phases: int) -> None:
        """Take the folder for these records, after looking at what is in it and at the disk."""
        path = self.folder / MANIFEST
        if path.exists():
            found = read_json(path)
            wrong = [name for name, value in _plain(identity).items() if found.get(name) != value]
            if wrong:
                raise ArtifactError(
                    f"{self.folder} holds the records of another run ({', '.join(wrong)} differ); "
                    "allowed: a new folder, or the same teacher and settings"
                )
            lost = [file for file in found.get("shards", {}) if not (self.folder / file).exists()]
            if lost and processes.first():  # another batch size or machine rounds another way: they get new hashes
                kept = {file: value for file, value in found["shards"].items() if file not in lost}
                write_json(path, found | {"shards": kept})
        self.folder.mkdir(parents=True, exist_ok=True)
        size, free = self.size(conditions[0], phases), shutil.disk_usage(self.folder).free
        need = size - sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        logger.info("pairs take %.1f MiB in %s", size / 2**20, self.folder)
        if free < need:
            raise InfrastructureError(f"{self.folder}: {free >> 20} MiB are free, the pairs take {need >> 20} MiB more")
        if processes.first() and not path.exists():
            write_json(path, identity)

    def size(self, condition: Any, phases: int) -> int:
        """Bytes that all records take, in float32."""
        state = next(iter(first_inputs(self.teacher, [condition], replace(self.plan, guidance_scale=1.0)).values()))
        return 4 * state[0].numel() * (phases + 1) * (self.settings.count + self.settings.held_out)

    def _make(
        self,
        shards: Sequence[tuple[str, int, int]],
        conditions: Sequence[Any],
        phases: int,
        first: int,
        progress: Progress,
    ) -> None:
        missing = [shard for shard in shards if not (self.folder / shard[0]).exists()]
        if not missing:
            return
        with progress.task("Sampling the teacher", total=sum(count for _, _, count in missing)) as advance:
            for file, start, count in missing:
                states: list[Tensor] = []
                edges: tuple[Edge, ...] = ()
                for begin in range(start, start + count, self.settings.batch_size):
                    rows = range(begin, min(begin + self.settings.batch_size, start + count))
                    found, edges = self._solve([conditions[row % len(conditions)] for row in rows], rows, phases, first)
                    states.append(found)
                    advance(len(rows))
                table = torch.tensor([[e.alpha, e.sigma, -1.0 if e.timestep is None else e.timestep] for e in edges])
                partial = self.folder / f".{file}.partial"
                save_file({"states": torch.cat(states), "edges": table.double()}, partial)
                os.replace(partial, self.folder / file)

    def _solve(self, conditions: list[Any], rows: range, phases: int, first: int) -> tuple[Tensor, tuple[Edge, ...]]:
        device = self.teacher.pipeline.device
        with torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(self.settings.compute, device)):
            run = trajectory(self.teacher, conditions, seeds=[first + row for row in rows], plan=self.plan)
        edges = edges_of(self.teacher.schedule, run.timesteps, phases)
        kept = run.states[:: self.plan.steps // phases].transpose(0, 1).contiguous().cpu()  # [n, phases + 1, c, ...]
        bad = [first + row for row, state in zip(rows, kept, strict=True) if not state.isfinite().all()]
        if bad:
            raise ArtifactError(f"the teacher's samples from seeds {bad} are not finite; nothing of them is kept")
        return kept, edges

    def _seal(self, identity: dict[str, Any], files: list[str]) -> None:
        """Write what the shards hash to; where that is written already, it has to hold."""
        path = self.folder / MANIFEST
        stored = read_json(path).get("shards")
        hashes = {file: file_hash(self.folder / file) for file in files}
        for file, expected in (stored or {}).items():
            if hashes.get(file, expected) != expected:
                raise ArtifactError(f"{self.folder / file} is damaged: its hash is not the manifest's; delete the file")
        write_json(path, identity | {"shards": (stored or {}) | hashes})

    def _read(self, shards: list[tuple[str, int, int]], conditions: Sequence[Any], first: int, every: int) -> Pairs:
        """The records of ``shards`` with the states at every ``every``-th edge."""
        try:
            tables = [load_file(self.folder / file) for file, _, _ in shards]
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{self.folder}: a shard cannot be read: {error}") from error
        rows = [row for _, start, count in shards for row in range(start, start + count)]
        edges = tuple(Edge(a, s, None if t < 0 else t) for a, s, t in tables[0]["edges"].tolist())[::every]
        return Pairs(
            torch.cat([table["states"][:, ::every] for table in tables]),
            [conditions[row % len(conditions)] for row in rows],
            [first + row for row in rows],
            edges,
        )


def _plain(data: Any) -> Any:
    """As it comes back from JSON."""
    import json

    return json.loads(json.dumps(data, default=str))


def teacher_hash(generator: Generator) -> str:
    """SHA-256 over all that decides the latents of a plan: weights and structure of the denoiser and text encoders."""
    pipeline = generator.pipeline
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    networks.pop("vae", None)
    return fingerprint({name: [weights_hash(part), _structure(part)] for name, part in sorted(networks.items())})


def _structure(network: torch.nn.Module) -> list[str]:
    """What a state does not say: classes, their settings, and attention processors."""
    found = []
    for name, module in network.named_modules():
        processor = getattr(module, "processor", None)
        says = type(processor).__module__.startswith("diffpress.") and type(processor).__repr__ is not object.__repr__
        what = repr(processor) if says else type(processor).__name__  # ours say how they are set, where they are
        found.append(f"{name} {type(module).__name__}({module.extra_repr()}) {what}")
    return found


def weights_hash(network: torch.nn.Module) -> str:
    """SHA-256 over names, shapes and values of a network's state."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(np.ascontiguousarray(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()).data)
    return digest.hexdigest()
