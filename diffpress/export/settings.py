"""What an engine shall accept and where it shall run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from diffpress.config import config
from diffpress.export.session import has_bfloat16, runs_on_cpu
from diffpress.targets import Compute

Pixels = Annotated[int, Field(ge=8, multiple_of=8)]


@config
class ExportConfig:
    """The engine that is built."""

    target: Literal["onnxruntime", "openvino", "tensorrt"] = "onnxruntime"
    """Run-time that executes the engine."""
    batch: Literal["dynamic"] | Annotated[int, Field(ge=1)] = "dynamic"
    """``dynamic``, or the one number of images that the engine accepts at a time."""
    size: Literal["static", "dynamic"] = "static"
    """Whether the engine accepts one image size only."""
    height: Pixels | None = None
    """Image height in pixels; null: the model's own."""
    width: Pixels | None = None
    """Image width in pixels; null: the model's own."""
    providers: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Execution providers or devices of the run-time in order of preference; null: the target's default. OpenVINO takes one, such as ``AUTO:GPU,CPU``; TensorRT too, such as ``cuda:0``."""  # noqa: E501
    compute: Compute = "float32"
    """Precision of what is not in 8 bits; bfloat16 for OpenVINO on CPUs that have it. auto: bfloat16 there, else float32."""  # noqa: E501
    dot_products: bool | None = None
    """Whether the CPU that the engine is for adds up products of 8-bit numbers in 32 bits (x86 with VNNI or AMX, Arm); null: as this one does. false: weights from -64 to 64, right on every CPU. true where this one does not: the engine computes in float32 here, as exact and not as fast; for OpenVINO."""  # noqa: E501
    timesteps: Literal["any", "plan"] = "any"
    """plan: what the denoiser computes from the timestep alone becomes a table, and the engine takes no other timesteps than those of the recipe's sampling plan."""  # noqa: E501
    largest_batch: Annotated[int, Field(ge=2)] = 32
    """TensorRT only: most images at a time that an engine with a dynamic batch takes; its memory grows with them."""
    version_compatible: bool = False
    """TensorRT only: an engine that later TensorRT versions of the same major load too; slower, and carries code."""
    opset: Annotated[int, Field(ge=19, le=24)] = 20
    """ONNX operator set; 8-bit weights with a scale for each channel need 19. 4-bit weights for TensorRT take 21."""

    @property
    def device(self) -> str:
        """OpenVINO's or TensorRT's device, where none is named OpenVINO's CPU."""
        return (self.providers or ("CPU",))[0]

    @property
    def precision(self) -> Literal["float32", "bfloat16"]:
        """``compute``, and for ``auto`` what that is on this machine."""
        if self.compute != "auto":
            return self.compute
        return "bfloat16" if self.target == "openvino" and has_bfloat16(self.device) else "float32"

    @property
    def bound(self) -> tuple[str, ...] | None:
        """Providers that an engine of these settings is for, null where it runs on any that the run-time has.

        Graphs for ONNX Runtime's CPU kernels have operators that are slow anywhere else.
        """
        alone = self.providers is None and self.target == "onnxruntime" and runs_on_cpu(None)
        return ("CPUExecutionProvider",) if alone else self.providers

    def decided(self) -> dict[str, Any]:
        """The settings, with what this machine decides."""
        return asdict(self) | {"compute": self.precision, "providers": self.bound}

    @model_validator(mode="after")
    def _both_sides(self) -> ExportConfig:
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width go together: give both, or neither")
        if self.version_compatible and self.target != "tensorrt":
            raise ValueError(f"version_compatible is for target tensorrt; target is {self.target}")
        if self.dot_products is not None and self.target == "tensorrt":
            raise ValueError("dot_products is for targets onnxruntime and openvino; target is tensorrt")
        if self.compute == "bfloat16" and self.target != "openvino":
            raise ValueError(f"compute {self.compute} is for target openvino; target is {self.target}")
        if self.target != "onnxruntime" and len(self.providers or ()) > 1:
            example = ", which may be composed, as 'AUTO:GPU,CPU'" if self.target == "openvino" else ""
            raise ValueError(f"providers {list(self.providers or ())}: target {self.target} takes one device{example}")
        return self
