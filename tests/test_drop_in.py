"""What the example scripts of Transformers ask of a trainer, asked of ours."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    EvalPrediction,
    Seq2SeqTrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import PredictionOutput, get_last_checkpoint

from optimum_flexcompress import (
    DistillationConfig,
    FlexCompressConfig,
    FlexCompressSeq2SeqTrainer,
    FlexCompressTrainer,
    LengthAdaptiveConfig,
    ModularConfig,
)
from optimum_flexcompress.methods.distillation import make_student
from tests.methods.length_adaptive.runs import qa_data
from tests.methods.toys import arguments, data_of, model_of
from tests.methods.vib.helpers import config_of as vib_config


class AnsweringTrainer(FlexCompressTrainer):
    """The shape of `trainer_qa.QuestionAnsweringTrainer`: it evaluates by itself, on answers made of predictions."""

    def __init__(self, *args, examples=None, post_process=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.examples = examples
        self.post_process = post_process

    def _scored(self, loader, rows, examples, prefix, ignore_keys=None):
        compute, self.compute_metrics = self.compute_metrics, None
        try:
            output = self.evaluation_loop(
                loader, description=prefix, ignore_keys=ignore_keys, metric_key_prefix=prefix
            )
        finally:
            self.compute_metrics = compute
        predictions = self.post_process(examples, rows, output.predictions)
        metrics = {f"{prefix}_{name}": value for name, value in compute(predictions).items()}
        return predictions, {**metrics, **output.metrics}

    def evaluate(self, eval_dataset=None, eval_examples=None, ignore_keys=None, metric_key_prefix="eval"):
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        examples = self.examples if eval_examples is None else eval_examples
        loader = self.get_eval_dataloader(rows)
        _, metrics = self._scored(loader, rows, examples, metric_key_prefix, ignore_keys)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, predict_dataset, predict_examples, ignore_keys=None, metric_key_prefix="test"):
        loader = self.get_test_dataloader(predict_dataset)
        predictions, metrics = self._scored(loader, predict_dataset, predict_examples, metric_key_prefix, ignore_keys)
        return PredictionOutput(predictions.predictions, predictions.label_ids, metrics)


def spans(examples, rows, predictions):
    assert len(predictions) == 2 and len(predictions[0]) == len(rows) == len(examples)
    return EvalPrediction(predictions=np.stack([logits.argmax(-1) for logits in predictions]), label_ids=examples)


def share_of_starts(prediction):
    return {"exact_match": float(np.mean(prediction.predictions[0] == np.asarray(prediction.label_ids)))}


METHODS = {
    "distillation": [DistillationConfig()],
    "vib_pruning": [vib_config(mask_learning_rate=0.5)],
    "length_adaptive": [LengthAdaptiveConfig()],
}


@pytest.mark.parametrize("method", METHODS)
def test_a_trainer_that_evaluates_by_itself(tmp_path, method):
    """In the order of `run_qa`: train with evaluations and checkpoints, save, evaluate, predict, write the card."""
    model = model_of("bert", layers=2, hidden=32, heads=4, auto_class=AutoModelForQuestionAnswering, num_labels=2)
    model.save_pretrained(tmp_path / "model")
    data = qa_data()
    starts = [int(start) for start in data["start_positions"]]
    teacher = copy.deepcopy(model) if method == "distillation" else None
    settings = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 12, "save_steps": 12}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "exact_match"}
    trainer = AnsweringTrainer(
        model=make_student(model, layers=1) if teacher is not None else model,
        args=arguments(tmp_path / "out", max_steps=24, **settings, **best),
        train_dataset=data,
        eval_dataset=data,
        examples=starts,
        post_process=spans,
        compute_metrics=share_of_starts,
        data_collator=default_data_collator,
        teacher_model=teacher,
        compression_config=FlexCompressConfig(methods=copy.deepcopy(METHODS[method])),
    )
    result = trainer.train(resume_from_checkpoint=None)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    assert trainer.state.best_model_checkpoint is not None
    assert sum("eval_exact_match" in entry for entry in trainer.state.log_history) == 2
    metrics = trainer.evaluate()
    predicted = trainer.predict(data.remove_columns(["start_positions", "end_positions"]), starts)
    assert predicted.metrics["test_exact_match"] == metrics["eval_exact_match"]
    trainer.create_model_card(finetuned_from=str(tmp_path / "model"), tasks="question-answering")
    assert "question" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out").eval()
    batch = default_data_collator([data[index] for index in range(len(data))])
    logits = loaded(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).start_logits
    assert np.array_equal(logits.argmax(-1).numpy(), predicted.predictions[0])
    assert get_last_checkpoint(str(tmp_path / "out")).endswith("checkpoint-24")


@pytest.mark.parametrize(
    "method", [ModularConfig(granularities=[2]), DistillationConfig()], ids=lambda m: m.method_type
)
def test_generation_in_evaluation_and_prediction(tmp_path, method):
    """In the order of `run_translation`, which gives the settings of generation with each call."""
    model, data = model_of("t5", layers=4), data_of("t5")
    teacher = copy.deepcopy(model) if isinstance(method, DistillationConfig) else None
    args = {**arguments(tmp_path / "out").to_dict(), "predict_with_generate": True}

    def widths(prediction):
        """How far texts reach: the trainer pads them to what the model would generate at most."""
        used = np.flatnonzero((prediction.predictions != model.config.pad_token_id).any(axis=0))
        return {"width": int(used.max(initial=-1)) + 1}

    trainer = FlexCompressSeq2SeqTrainer(
        model=make_student(model, layers={"decoder": 2}) if teacher is not None else model,
        args=Seq2SeqTrainingArguments(**args),
        train_dataset=data,
        eval_dataset=data,
        data_collator=default_data_collator,
        compute_metrics=widths,
        teacher_model=teacher,
        compression_config=FlexCompressConfig(methods=[copy.deepcopy(method)]),
    )
    trainer.train()
    trainer.save_model()
    assert 5 < trainer.evaluate(max_length=7, num_beams=2, metric_key_prefix="eval")["eval_width"] <= 7
    predicted = trainer.predict(data, metric_key_prefix="predict", max_length=5, num_beams=1)
    assert 2 < predicted.metrics["predict_width"] <= 5
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    generated = loaded.generate(
        input_ids=data["input_ids"][:], attention_mask=data["attention_mask"][:], max_length=5, num_beams=1
    )
    assert np.array_equal(generated.numpy(), predicted.predictions[:, : generated.shape[1]])


def test_arguments_by_position(tmp_path):
    """`Trainer(model, args, data_collator, train_dataset, eval_dataset)`, as older scripts write it."""
    model, data = model_of("bert"), data_of("bert")
    trainer = FlexCompressTrainer(
        model,
        arguments(tmp_path),
        default_data_collator,
        data,
        data,
        compression_config=FlexCompressConfig(methods=[LengthAdaptiveConfig()]),
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model()
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.num_labels == 3
