"""Engines of a denoiser alone."""

import onnx
import pytest

from diffpress.export.components import Flat, find_components
from diffpress.export.graph import export_graph
from diffpress.export.session import OnnxRuntimeSession


@pytest.fixture(scope="session")
def engine():
    """``engine(generator, context, path)``: (session, graph) of the denoiser; the batch is free, the size is not."""

    def make(generator, context, path):
        parts = find_components(generator, context.conditions[:2], context.plan, batch=None, any_size=False)
        part = next(part for part in parts if part.role == "denoiser")
        flat, inputs = Flat(generator.denoiser, part).eval(), part.flat_inputs()
        export_graph(flat, inputs, list(part.outputs), path, free=part.free, opset=20, for_onnxruntime_cpu=True)
        return OnnxRuntimeSession(path), onnx.load(path).graph

    return make
