"""Adapters of random numbers, in peft's layout."""

import torch

from rorqual.adapters.lora import add_lora, lora_parameters
from rorqual.adapters.peft_files import save_adapter
from rorqual.checkpoint.huggingface import load_model
from rorqual.sections import LoRASection


def save_random_adapter(base, path, seed, targets="all"):
    """An adapter of the model in `base` that changes its answers."""
    model = load_model(base)
    known = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if targets != "all":
        targets = [name for name in targets if name in known]
    section = LoRASection(rank=3, alpha=6.0, targets=targets)
    add_lora(model, section, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, p in lora_parameters(model).items():
        if name.endswith("lora_B"):
            p.data = 0.2 * torch.randn(p.shape, generator=generator)
    save_adapter(model, path, section, str(base))
    return path
