"""Does `diffpress check` see a planted degradation, and let an unchanged engine pass?

    python benchmarks/planted.py out/dit-int8 benchmarks/results/planted.json

DIR is a finished run. Copies of it are measured again: as it is; with the weight scales of one layer doubled; and with
engines that take a quarter longer for every call (about a fifth of a whole image). Each is checked against DIR.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import onnx
from onnx import numpy_helper

from diffpress.compress import runner
from diffpress.compress.check import check
from diffpress.eval.machine import describe_machine
from diffpress.export.session import OnnxRuntimeSession, OpenVinoSession


def double_one_scale(engine: Path) -> None:
    """Twice the weight scales of the first quantized layer of the denoiser."""
    path = engine / json.loads((engine / "diffpress.json").read_text())["denoiser"] / "model.onnx"
    model = onnx.load(str(path))
    weights = {item.name: item for item in model.graph.initializer}
    node = next(node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights)
    scale = weights[node.input[1]]
    scale.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(scale), scale.name))
    onnx.save(model, str(path))


class Slower:
    """While entered, every engine takes ``share`` longer."""

    def __init__(self, share: float) -> None:
        self.share, self.originals = share, {kind: kind.__call__ for kind in (OnnxRuntimeSession, OpenVinoSession)}

    def __enter__(self) -> None:
        for kind, original in self.originals.items():

            def slow(session, inputs, original=original):
                began = time.perf_counter()
                outputs = original(session, inputs)
                until = began + (time.perf_counter() - began) * (1 + self.share)
                while time.perf_counter() < until:
                    pass
                return outputs

            kind.__call__ = slow

    def __exit__(self, *problem: object) -> None:
        for kind, original in self.originals.items():
            kind.__call__ = original


def measured(directory: Path, case: str) -> dict:
    """Copy, degrade, evaluate again, check against the original."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(directory, copy)
        if case == "one layer's scale doubled":
            double_one_scale(copy / "engine")
        if case == "engine calls 25 % longer":
            with Slower(0.25):
                runner.evaluate(copy)
        else:
            runner.evaluate(copy)
        result = check(copy, directory)
        return {"outcome": result.outcome, "findings": [finding.sentence for finding in result.findings]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    cases = ("unchanged", "one layer's scale doubled", "engine calls 25 % longer")
    found = {case: measured(args.directory, case) for case in cases}
    args.output.write_text(json.dumps({"machine": describe_machine(), "cases": found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
