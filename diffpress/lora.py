"""Low-rank adapters: a student that trains a few small matrices beside every linear layer (Hu et al. 2021, LoRA)."""

from __future__ import annotations

import torch
from torch import nn

from diffpress.errors import MissingDependencyError


def add_adapters(network: nn.Module, rank: int, *, seed: int) -> None:
    """Freeze ``network`` and give each Linear layer W x the sum W x + B A x, A [rank, in] random, B [out, rank] zero.

    The output is the same as before. Raises MissingDependencyError without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingDependencyError("peft", "lora", "training.rank") from error
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), network)


@torch.no_grad()
def merge_adapters(network: nn.Module) -> None:
    """W <- W + B A in the weight's own precision, float32 in training: the stock layers are back."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            network.set_submodule(name, module.get_base_layer())
    network.requires_grad_(True)
