"""Models with modules, assemblies to try, and runs of the trainer."""

from __future__ import annotations

import copy

import torch

from optimum_flexcompress import Assembly, FlexCompressConfig, FlexCompressTrainer, ModularConfig, ModularModel
from optimum_flexcompress.methods.modular import Piece
from tests.methods.toys import arguments, model_of
from tests.tiny import build


LAYER_KEYS = {"distilbert": "n_layers", "gpt2": "n_layer", "t5": "num_layers", "t5-gated-untied": "num_layers"}


def deep(family: str, name: str, layers: int = 6):
    """A model of `tests.tiny` with so many layers in each stack, and biases of relative positions that matter."""
    if family == "bart":
        depth = {"encoder_layers": layers, "decoder_layers": layers}
    elif family.startswith("t5"):
        depth = {"num_layers": layers, "num_decoder_layers": layers}
    else:
        depth = {LAYER_KEYS.get(family, "num_hidden_layers"): layers}
    return build(family, name, **depth)


def with_modules(model, seed: int = 7, **settings) -> ModularModel:
    """Modules that no longer are what they started as."""
    modular = ModularModel(model, ModularConfig(**{"granularities": [2, 3], **settings}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in modular.modules.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    modular.modules.eval()
    return modular


def mixed(modular: ModularModel) -> list[Assembly]:
    """Assemblies for stacks of six layers: all modules, all coarse, and both ends original or not."""
    tilings = {
        "fine": [(2, 0), (2, 1), (2, 2)],
        "coarse": [(3, 0), (3, 1)],
        "top": [(1, 0), (1, 1), (2, 1), (1, 4), (1, 5)],
        "bottom": [(3, 0), (1, 3), (2, 2)],
        "whole": [(1, index) for index in range(6)],
    }
    names = list(modular.depths)
    pairs = [("fine", "coarse"), ("bottom", "bottom"), ("coarse", "coarse"), ("whole", "top"), ("top", "fine")]
    return [
        Assembly({name: tuple(Piece(*piece) for piece in tilings[kind]) for name, kind in zip(names, pair)})
        for pair in pairs
    ]


def toy(family: str, layers: int = 4, **kwargs):
    """A model for training, with attention far from uniform."""
    return model_of(family, layers=layers, **kwargs)


def train(
    folder, model, data, config, *others, resume=None, callbacks=(), trainer_class=FlexCompressTrainer, **kwargs
):
    """Trains; keyword arguments are those of the training arguments or of the trainer."""
    extra = {name: kwargs.pop(name) for name in ("eval_dataset", "teacher_model") if name in kwargs}
    trainer = trainer_class(
        model=model,
        args=kwargs.pop("args", None) or arguments(folder, **kwargs),
        train_dataset=data,
        compression_config=FlexCompressConfig(methods=copy.deepcopy([config, *others])),
        callbacks=list(callbacks),
        **extra,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def method_of(trainer):
    return trainer._runner.methods[0]


def modules_of(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in method_of(trainer).modules.state_dict().items()}
