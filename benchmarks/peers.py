"""Peers' 8-bit quantizers on a reference generator: their graph in the place of our float denoiser, judged like ours.

The settings are those of ``cpu_denoiser.py``; the calls that calibrate are all those of the recipe's calibration runs.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from denoisers import builds

import diffpress
from diffpress.artifact import Artifact
from diffpress.compress import runner
from diffpress.compress.loading import load_recipe
from diffpress.compress.methods import METHODS
from diffpress.compress.report import Report
from diffpress.export.session import OpenVinoSession, Session, open_session
from diffpress.generator import Generator
from diffpress.progress import SILENT, Progress
from diffpress.sampling import patched

BATCH = 0  # of graphs whose batch is free; names files
PEERS = {
    "NNCF": ("openvino", builds.nncf, "nncf"),
    "ONNX Runtime static": ("onnxruntime", builds.ort_static, "ort-static"),
    "ONNX Runtime dynamic": ("onnxruntime", builds.ort_dynamic, "ort-dynamic"),
}
"""Name to target, the peer's quantizer, and the folder that it writes to."""


class Recorder:
    """A session that keeps what it is given."""

    def __init__(self, session: Session) -> None:
        self.session, self.calls = session, []
        self.inputs, self.outputs, self.provider = session.inputs, session.outputs, session.provider

    def __call__(self, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        self.calls.append({name: inputs[name].to(dtype).clone().numpy() for name, dtype in self.inputs.items()})
        return self.session(inputs)


def lay_out(run: Path, folder: Path) -> None:
    """The float graph and the calls of the calibration runs, where `denoisers.builds` reads them."""
    recipe = load_recipe(run / "recipe.yaml", methods={name: stage.Config for name, stage in METHODS.items()})
    work = runner.Run(recipe, Artifact(run), SILENT)
    engine = Generator(diffpress.load(run))
    recorder = Recorder(engine.denoiser.session)
    engine.denoiser.session = recorder
    work.context(work.original).run(engine, "Calibration")
    arrays = {
        f"calibration/{index}/{name}": value
        for index, call in enumerate(recorder.calls)
        for name, value in call.items()
    }
    (folder / "onnx" / str(BATCH)).mkdir(parents=True)
    shutil.copy(graph_of(run), folder / "onnx" / str(BATCH) / "model.onnx")
    np.savez(folder / f"calls-{BATCH}.npz", **arrays)
    (folder / "pipeline" / graph_of(run).parent.name).mkdir(parents=True)  # tells a transformer


def graph_of(run: Path) -> Path:
    """The denoiser's graph in a finished run."""
    (path,) = (run / "engine").glob("[tu][rn]*/model.onnx")  # transformer, unet
    return path


@contextmanager
def openvino_files() -> Iterator[None]:
    """Inside, an engine with OpenVINO's own file beside model.onnx reads that."""

    def opened(path: Path, **settings: Any) -> Session:
        own = path.with_suffix(".xml")
        return OpenVinoSession(own, compute=settings["compute"]) if own.is_file() else open_session(path, **settings)

    with patched(import_module("diffpress.export.load"), "open_session", opened):
        yield


def measure(recipe: dict, peer: str, overrides: list[str], folder: Path, progress: Progress) -> Report:
    """The report on the recipe's float engine with ``peer``'s denoiser in it."""
    target, quantize, place = PEERS[peer]
    plain, graphs, mine = folder / "openvino", folder / "graphs", folder / peer
    for name in dict.fromkeys(["openvino", target]):  # the graph for OpenVINO has standard operators only
        settings = [*overrides, f"export.target={name}"]
        floats = recipe | {"stages": []}
        diffpress.compress(recipe["model"], floats, folder / name, overrides=settings, progress=progress)
    if not graphs.is_dir():
        lay_out(plain, graphs)
    quantize({}, graphs, BATCH)
    shutil.copytree(folder / target, mine)
    for file in (graphs / place / str(BATCH)).iterdir():
        shutil.copy(file, graph_of(mine).parent)
    with openvino_files():
        return runner.evaluate(mine, progress=progress)
