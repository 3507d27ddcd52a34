"""Masks and runs for the tests of VIB pruning."""

from __future__ import annotations

import torch

from optimum_flexcompress import FlexCompressConfig, FlexCompressTrainer, VIBPruningConfig
from optimum_flexcompress.architectures import describe
from optimum_flexcompress.methods.vib.layout import MaskLayout
from optimum_flexcompress.methods.vib.masks import VIBMasks
from optimum_flexcompress.vib_config import KINDS
from tests.methods.toys import arguments, data_of, model_of, twin


def layout_of(model, kinds=KINDS) -> MaskLayout:
    return MaskLayout.of(describe(model), kinds)


def random_masks(model, seed: int = 0, kinds=KINDS) -> VIBMasks:
    """Masks of which a third is off, with means around 1; something of each kind is left in every first layer."""
    layout = layout_of(model, kinds)
    masks = VIBMasks(layout)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        off = torch.rand(layout.size, generator=generator) < 0.35
        masks.mu.copy_(torch.where(off, 1e-4, 0.5 + torch.rand(layout.size, generator=generator)))
        masks.mu[0] = 1.1
        for part in layout.sublayers:
            if part.layer == 0:
                masks.mu[part.gate], masks.mu[part.start] = 0.9, 1.2
        masks.mu.copy_(torch.where(masks.active, masks.mu, 1.0))
    return masks


def config_of(**settings) -> VIBPruningConfig:
    """Settings under which masks of toys move in a few steps."""
    return VIBPruningConfig(
        **{
            "target_sparsity": 0.5,
            "prune": list(KINDS),
            "align": 1,
            "mask_learning_rate": 0.2,
            "warmup_fraction": 0.0,
            "ramp_fraction": 0.5,
            "hold_fraction": 0.25,
            **settings,
        }
    )


def trainer_of(
    folder, family="bert", settings=None, others=(), steps=80, teacher=None, data=None, model=None, **kwargs
) -> FlexCompressTrainer:
    """A trainer of a toy with VIB pruning."""
    model = model if model is not None else model_of(family, layers=2, hidden=32, heads=4)
    data = data if data is not None else data_of(family, 32)
    config = FlexCompressConfig(methods=[config_of(**(settings or {})), *others])
    extra = {name: kwargs.pop(name) for name in ("callbacks", "compute_metrics") if name in kwargs}
    return FlexCompressTrainer(
        model=model,
        teacher_model=twin(model) if teacher == "self" else teacher,
        args=arguments(folder, max_steps=steps, **kwargs),
        train_dataset=data,
        eval_dataset=data,
        compression_config=config,
        **extra,
    )
