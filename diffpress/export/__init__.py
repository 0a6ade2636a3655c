"""ONNX graphs, the engines built from them, and the pipelines that run them."""

from diffpress.export.build import Built, check_export, export
from diffpress.export.load import load
from diffpress.export.settings import ExportConfig

__all__ = ["Built", "ExportConfig", "check_export", "export", "load"]
