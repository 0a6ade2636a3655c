"""The parts of `cpu_denoiser.py`: nets, graphs built from them, routes that run them, and the processes of those."""
