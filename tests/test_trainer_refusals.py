"""What FlexCompressTrainer refuses, with one clear sentence."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from optimum_flexcompress import (
    DistillationConfig,
    FlexCompressConfig,
    FlexCompressError,
    FlexCompressTrainer,
    MiniLMConfig,
)
from optimum_flexcompress.methods.distillation import make_student
from tests.methods.toys import (
    arguments,
    assert_same,
    data_of,
    model_of,
    train,
    twin,
    weights,
)


class TestRefused:
    """One clear sentence, before anything is trained."""

    def build(self, tmp_path, student, teacher, method=None, **kwargs):
        return FlexCompressTrainer(
            model=student,
            teacher_model=teacher,
            args=arguments(tmp_path, **kwargs.pop("args", {})),
            train_dataset=data_of("bert"),
            compression_config=FlexCompressConfig(methods=[method or DistillationConfig()]),
            **kwargs,
        )

    @pytest.mark.parametrize("method", [DistillationConfig(), MiniLMConfig()])
    def test_no_teacher(self, tmp_path, method):
        with pytest.raises(FlexCompressError, match="pass teacher_model"):
            self.build(tmp_path, model_of("bert"), None, method)

    def test_a_teacher_without_a_method(self, tmp_path):
        with pytest.raises(FlexCompressError, match="no method uses it"):
            FlexCompressTrainer(model=model_of("bert"), teacher_model=model_of("bert"), args=arguments(tmp_path))

    def test_the_student_as_its_own_teacher(self, tmp_path):
        model = model_of("bert")
        with pytest.raises(FlexCompressError, match="pass a copy"):
            self.build(tmp_path, model, model)

    def test_a_student_bigger_than_its_teacher(self, tmp_path):
        with pytest.raises(FlexCompressError, match="bigger than its teacher"):
            self.build(tmp_path, model_of("bert", layers=3), model_of("bert", layers=2))

    def test_other_labels(self, tmp_path):
        with pytest.raises(FlexCompressError, match="2 labels, the teacher 3"):
            self.build(tmp_path, model_of("bert", num_labels=2), model_of("bert"))
        student, teacher = model_of("bert"), model_of("bert")
        student.config.id2label = {0: "a", 1: "b", 2: "c"}
        teacher.config.id2label = {0: "a", 1: "c", 2: "b"}
        with pytest.raises(FlexCompressError, match='Label 1 is "b" in the student and "c"'):
            self.build(tmp_path, student, teacher)

    def test_another_vocabulary(self, tmp_path):
        student = model_of("bert")
        student.resize_token_embeddings(60, mean_resizing=False)
        with pytest.raises(FlexCompressError, match="vocabularies differ"):
            self.build(tmp_path, student, model_of("bert"))

    def test_another_head(self, tmp_path):
        teacher = model_of("bert", auto_class=AutoModelForTokenClassification)
        with pytest.raises(FlexCompressError, match="sequence head and the teacher a token classification head"):
            self.build(tmp_path, model_of("bert"), teacher)

    def test_other_labels_where_no_head_reads_them(self, tmp_path):
        student, teacher = model_of("gpt2", num_labels=2), model_of("gpt2", num_labels=3)
        self.build(tmp_path, student, teacher)

    @pytest.mark.parametrize("asked_by", ["arguments", "launcher"])
    def test_compiled_training(self, tmp_path, monkeypatch, asked_by):
        # Both ways end in this variable; monkeypatch makes sure that it is gone afterwards.
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor" if asked_by == "launcher" else "no")
        monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "default")
        with pytest.raises(FlexCompressError, match="torch_compile"):
            self.build(tmp_path, model_of("bert"), model_of("bert"), args={"torch_compile": asked_by == "arguments"})

    def test_no_head(self, tmp_path):
        models = [model_of("bert", auto_class=AutoModel) for _ in range(2)]
        with pytest.raises(FlexCompressError, match="no head"):
            self.build(tmp_path, *models)

    def test_another_tokenizer(self, tmp_path):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        def tokenizer(words):
            core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
            core.pre_tokenizer = pre_tokenizers.Whitespace()
            return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="?")

        ours, theirs = tokenizer(["?", "here", "tokenizers"]), tokenizer(["?", "tokenizers", "here"])
        teacher = model_of("bert")
        with pytest.raises(FlexCompressError, match="tokenizers of student and teacher differ"):
            self.build(tmp_path, twin(teacher), teacher, processing_class=ours, teacher_processing_class=theirs)
        # The same, found in the folder that the teacher was loaded from.
        folder = tmp_path / "teacher"
        teacher.save_pretrained(folder)
        theirs.save_pretrained(folder)
        loaded = AutoModelForSequenceClassification.from_pretrained(folder)
        with pytest.raises(FlexCompressError, match="tokenizers of student and teacher differ"):
            self.build(tmp_path, twin(teacher), loaded, processing_class=ours)
        self.build(tmp_path, twin(teacher), loaded, processing_class=theirs)


def test_reentrant_checkpointing_is_refused_or_replaced(tmp_path):
    teacher = model_of("bert", layers=4)
    student = make_student(teacher, layers=2)
    with pytest.raises(FlexCompressError, match="use_reentrant"):
        train(
            tmp_path,
            student,
            teacher,
            data_of("bert"),
            [MiniLMConfig()],
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )
    by_hand = twin(student)
    by_hand.gradient_checkpointing_enable()
    settings = {"optim": "sgd", "learning_rate": 0.1}
    methods = [MiniLMConfig(task_loss_weight=0)]
    runs = [
        train(tmp_path, model, teacher, data_of("bert"), methods, **settings) for model in (twin(student), by_hand)
    ]
    before = weights(student)
    assert any(not torch.equal(before[name], value) for name, value in weights(by_hand).items())
    assert_same(*(weights(run.model) for run in runs), rtol=1e-5, atol=1e-7)
