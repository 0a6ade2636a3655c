"""Step distillation: students that need one, two or four denoiser calls."""
