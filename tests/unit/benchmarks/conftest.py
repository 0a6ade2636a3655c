"""The benchmarks are scripts beside the package; their parts are imported from where they lie."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))
