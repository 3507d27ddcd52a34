"""Runs of the trainer, and for every kind of head a model, data, and what its sub-models learn."""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification, TrainerCallback

from optimum_flexcompress import FlexCompressConfig, FlexCompressTrainer
from tests.methods.length_adaptive.families import wide
from tests.methods.toys import arguments, data_of


class Grab(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def train(folder, model, data, *methods, teacher=None, resume=None, callbacks=(), eval_dataset=None, **kwargs):
    trainer = FlexCompressTrainer(
        model=model,
        teacher_model=teacher,
        args=arguments(folder, **kwargs),
        train_dataset=data,
        eval_dataset=eval_dataset,
        compression_config=FlexCompressConfig(methods=copy.deepcopy(list(methods))),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def qa_data(rows=16):
    data = data_of("bert", rows=rows)
    starts = [label % 3 for label in data["labels"][:].tolist()]
    data = data.remove_columns("labels").add_column("start_positions", starts)
    return data.add_column("end_positions", starts).with_format("torch")


def token_data(rows=16):
    data = data_of("bert", rows=rows)
    labels = torch.randint(3, data["input_ids"][:].shape, generator=torch.Generator().manual_seed(5))
    labels = labels.masked_fill(data["attention_mask"][:] == 0, -100)
    return data.remove_columns("labels").add_column("labels", labels.tolist()).with_format("torch")


def multi_label_data(rows=16):
    data = data_of("bert", rows=rows)
    labels = F.one_hot(data["labels"][:], 3).float()
    return data.remove_columns("labels").add_column("labels", labels.tolist()).with_format("torch")


def regression_data(rows=16):
    data = data_of("bert", rows=rows)
    labels = data["labels"][:].float()
    return data.remove_columns("labels").add_column("labels", labels.tolist()).with_format("torch")


def kl(full, sub, reverse):
    """KL of softmaxes, summed over rows."""
    p, q = full.softmax(-1), sub.softmax(-1)
    return (q * (q.log() - p.log())).sum() if reverse else (p * (p.log() - q.log())).sum()


def classes(full, sub, batch, reverse):
    return kl(full.logits, sub.logits, reverse) / len(full.logits)


def spans(full, sub, batch, reverse):
    mask = batch["attention_mask"] == 0
    parts = [
        (full[key].masked_fill(mask, -1e9), sub[key].masked_fill(mask, -1e9)) for key in ("start_logits", "end_logits")
    ]
    total = 0
    for one, other in parts:
        p, q = one.log_softmax(-1), other.log_softmax(-1)
        if reverse:
            p, q = q, p
        total = total + (p.exp() * (p - q)).sum()
    return total / 2 / len(mask)


def labelled(full, sub, batch, reverse):
    mask = batch["labels"] != -100
    return kl(full.logits[mask], sub.logits[mask], reverse) / mask.sum()


def squares(full, sub, batch, reverse):
    return (full.logits - sub.logits).pow(2).mean()


def crossings(full, sub, batch, reverse):
    return F.binary_cross_entropy_with_logits(sub.logits, full.logits.sigmoid())


CASES = {
    "bert": (functools.partial(wide, "bert"), functools.partial(data_of, "bert"), classes),
    "roberta": (functools.partial(wide, "roberta"), functools.partial(data_of, "roberta"), classes),
    "distilbert": (functools.partial(wide, "distilbert"), functools.partial(data_of, "distilbert"), classes),
    "vit": (functools.partial(wide, "vit"), functools.partial(data_of, "vit"), classes),
    "t5": (functools.partial(wide, "t5"), functools.partial(data_of, "t5"), labelled),
    "bart": (functools.partial(wide, "bart"), functools.partial(data_of, "bart"), labelled),
    "spans": (
        functools.partial(wide, "bert", auto_class=AutoModelForQuestionAnswering, num_labels=2),
        qa_data,
        spans,
    ),
    "tokens": (functools.partial(wide, "bert", auto_class=AutoModelForTokenClassification), token_data, labelled),
    "several labels": (functools.partial(wide, "bert"), multi_label_data, crossings),
    "regression": (functools.partial(wide, "bert", num_labels=1), regression_data, squares),
}
