"""diffpress: turn a pretrained diffusion generator into a small, fast engine, and prove what it cost."""

__version__ = "0.1.0"
