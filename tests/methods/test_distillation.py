"""The terms of distillation against plain references, by head and by layer."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartForConditionalGeneration,
    BertForSequenceClassification,
)

from optimum_flexcompress import DistillationConfig, FlexCompressConfig, FlexCompressError, FlexCompressTrainer
from optimum_flexcompress.methods.distillation.hidden_states import attention_loss, hidden_state_loss, valid_positions
from optimum_flexcompress.methods.distillation.layer_map import layer_pairs
from optimum_flexcompress.methods.distillation.logits import (
    Head,
    count_items,
    head_of,
    logits_loss,
    problem_type_of,
)
from tests.methods.toys import arguments, data_of, model_of, twin


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def kl(student, teacher, temperature):
    """tau^2 * KL(softmax(z_T / tau) || softmax(z_S / tau)) of one row, summed entry by entry."""
    p = (teacher / temperature).softmax(-1)
    q = (student / temperature).softmax(-1)
    return temperature**2 * sum(a * (math.log(a) - math.log(b)) for a, b in zip(p.tolist(), q.tolist()) if a > 0)


class TestLogits:
    def test_single_label(self):
        student, teacher = torch.randn(5, 4), torch.randn(5, 4)
        value = logits_loss(
            Head.SEQUENCE, {"logits": student}, {"logits": teacher}, {}, "single_label_classification", 3.0
        )
        assert value.item() == pytest.approx(sum(kl(s, t, 3.0) for s, t in zip(student, teacher)), rel=1e-5)

    def test_regression(self):
        student, teacher = torch.randn(5, 1), torch.randn(5, 1)
        value = logits_loss(Head.SEQUENCE, {"logits": student}, {"logits": teacher}, {}, "regression", 3.0)
        assert value.item() == pytest.approx(((student - teacher) ** 2).sum().item(), rel=1e-5)

    def test_multi_label(self):
        student, teacher = torch.randn(5, 4), torch.randn(5, 4)
        value = logits_loss(
            Head.SEQUENCE, {"logits": student}, {"logits": teacher}, {}, "multi_label_classification", 3.0
        )
        p, q = teacher.sigmoid(), student.sigmoid()
        expected = -(p * q.log() + (1 - p) * (1 - q).log()).mean(-1).sum()
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)

    def test_question_answering_ignores_pads(self):
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
        student = {name: torch.randn(2, 5) for name in ("start_logits", "end_logits")}
        teacher = {name: torch.randn(2, 5) for name in ("start_logits", "end_logits")}
        value = logits_loss(Head.QUESTION_ANSWERING, student, teacher, {"attention_mask": mask}, None, 2.0)
        expected = sum(
            kl(student[name][row][mask[row].bool()], teacher[name][row][mask[row].bool()], 2.0) / 2
            for name in student
            for row in range(2)
        )
        assert value.item() == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("head", [Head.TOKEN, Head.LM, Head.CAUSAL_LM])
    def test_tokens_without_a_label_do_not_count(self, head):
        labels = torch.tensor([[3, -100, 1, 2], [-100, 2, -100, -100]])
        student, teacher = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
        inputs = {"input_ids": torch.zeros(2, 4), "labels": labels}
        value = logits_loss(head, {"logits": student}, {"logits": teacher}, inputs, None, 2.0)
        # The logits of a causal model at one position are about the label at the next.
        shift = int(head is Head.CAUSAL_LM)
        places = [(row, place) for row in range(2) for place in range(4 - shift) if labels[row, place + shift] != -100]
        expected = sum(kl(student[row, place], teacher[row, place], 2.0) for row, place in places)
        assert value.item() == pytest.approx(expected, rel=1e-5)
        assert count_items(head, inputs).item() == len(places)

    @pytest.mark.parametrize("masked", [False, True])
    def test_language_models_without_labels(self, masked):
        inputs = {"input_ids": torch.zeros(2, 4, dtype=torch.long)}
        if masked:
            inputs["attention_mask"] = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
        student, teacher = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
        value = logits_loss(Head.CAUSAL_LM, {"logits": student}, {"logits": teacher}, inputs, None, 1.0)
        places = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
        if masked:
            places.remove((0, 2))
        expected = sum(kl(student[row, place], teacher[row, place], 1.0) for row, place in places)
        assert value.item() == pytest.approx(expected, rel=1e-5)
        assert count_items(Head.CAUSAL_LM, inputs).item() == len(places)

    def test_zero_when_teacher_is_student(self):
        logits = torch.randn(5, 4, requires_grad=True)
        value = logits_loss(
            Head.SEQUENCE, {"logits": logits}, {"logits": logits.detach()}, {}, "single_label_classification", 2.0
        )
        value.backward()
        assert abs(value.item()) < 1e-6
        assert logits.grad.abs().max() < 1e-6

    def test_shapes_have_to_agree(self):
        with pytest.raises(FlexCompressError, match="same labels"):
            logits_loss(Head.SEQUENCE, {"logits": torch.ones(2, 3)}, {"logits": torch.ones(2, 4)}, {}, None, 1.0)

    @pytest.mark.parametrize(
        ("family", "auto_class", "head"),
        [
            ("bert", AutoModelForSequenceClassification, Head.SEQUENCE),
            ("bert", AutoModelForMultipleChoice, Head.SEQUENCE),
            ("vit", None, Head.SEQUENCE),
            ("bert", AutoModelForQuestionAnswering, Head.QUESTION_ANSWERING),
            ("bart", AutoModelForQuestionAnswering, Head.QUESTION_ANSWERING),
            ("roberta", AutoModelForTokenClassification, Head.TOKEN),
            ("distilbert", AutoModelForMaskedLM, Head.LM),
            ("t5", None, Head.LM),
            ("bart", None, Head.LM),
            ("gpt2", None, Head.CAUSAL_LM),
            ("bart", AutoModelForCausalLM, Head.CAUSAL_LM),
        ],
    )
    def test_heads(self, family, auto_class, head):
        assert head_of(model_of(family, auto_class=auto_class)) is head

    def test_head_of_a_subclass_and_of_a_headless_model(self):
        class Own(BertForSequenceClassification):
            pass

        assert head_of(Own(model_of("bert").config)) is Head.SEQUENCE
        assert head_of(BartForConditionalGeneration(model_of("bart").config)) is Head.LM
        with pytest.raises(FlexCompressError, match="no head"):
            head_of(model_of("bert", auto_class=AutoModel))

    def test_problem_types(self):
        model = model_of("bert", num_labels=1)
        assert problem_type_of(model, None) == "regression"
        model = model_of("bert", num_labels=3)
        assert problem_type_of(model, torch.tensor([1, 2])) == "single_label_classification"
        assert problem_type_of(model, torch.ones(2, 3)) == "multi_label_classification"


class TestTrainedHeads:
    """Through the trainer: what is logged for the first step is the reference of the untrained student."""

    @pytest.mark.parametrize(
        ("auto_class", "num_labels"),
        [
            (AutoModelForQuestionAnswering, 2),
            (AutoModelForMaskedLM, 3),
            (AutoModelForTokenClassification, 3),
            (AutoModelForSequenceClassification, 1),
        ],
    )
    def test_first_logged_value(self, tmp_path, auto_class, num_labels):
        teacher = model_of("bert", auto_class=auto_class, num_labels=num_labels)
        student = model_of("bert", auto_class=auto_class, num_labels=num_labels, seed=1)
        data = data_of("bert", rows=4)
        batch = {name: data[:][name] for name in ("input_ids", "attention_mask")}
        mask = batch["attention_mask"].bool()
        if auto_class is AutoModelForQuestionAnswering:
            data = data.remove_columns("labels")
            data = data.add_column("start_positions", [0, 1, 1, 0]).add_column("end_positions", [1, 2, 1, 1])
        elif num_labels == 1:
            data = data.remove_columns("labels").add_column("labels", [0.5, 1.0, 0.0, 2.0])
        elif auto_class is not AutoModelForSequenceClassification:
            labels = torch.randint(num_labels, mask.shape).masked_fill(~mask, -100)
            data = data.remove_columns("labels").add_column("labels", labels.tolist())
        with torch.no_grad():
            ours, theirs = student(**batch), teacher(**batch)
        if auto_class is AutoModelForQuestionAnswering:
            expected = sum(
                kl(ours[name][row][mask[row]], theirs[name][row][mask[row]], 2.0) / 8
                for name in ("start_logits", "end_logits")
                for row in range(4)
            )
        elif num_labels == 1:
            expected = ((ours.logits - theirs.logits) ** 2).mean().item()
        else:
            rows = zip(ours.logits[mask], theirs.logits[mask])
            expected = sum(kl(s, t, 2.0) for s, t in rows) / int(mask.sum())
        trainer = FlexCompressTrainer(
            model=student,
            teacher_model=teacher,
            args=arguments(tmp_path, max_steps=1),
            train_dataset=data.with_format("torch"),
            compression_config=FlexCompressConfig(methods=[DistillationConfig()]),
        )
        trainer.train()
        assert trainer.state.log_history[0]["loss_logits"] == pytest.approx(expected, rel=1e-3, abs=2e-6)


class TestLayers:
    def test_hidden_states_ignore_pads(self):
        valid = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
        student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
        expected = sum(
            ((student[row, place] - teacher[row, place]) ** 2).mean()
            for row in range(2)
            for place in range(3)
            if valid[row, place]
        )
        torch.testing.assert_close(hidden_state_loss(student, teacher, valid), expected)
        student[0, 2] = 1e6
        torch.testing.assert_close(hidden_state_loss(student, teacher, valid), expected)

    def test_attention_maps(self):
        valid = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
        scores = [torch.randn(2, 2, 3, 3).masked_fill(~valid[:, None, None], -math.inf) for _ in range(2)]
        student, teacher = (score.softmax(-1) for score in scores)
        expected = 0.0
        for row in range(2):
            length = int(valid[row].sum())
            for head in range(2):
                for query in range(length):
                    p, q = teacher[row, head, query, :length], student[row, head, query, :length]
                    expected += (p * (p.log() - q.log())).sum() / (2 * length)
        torch.testing.assert_close(attention_loss(student, teacher, valid), expected)
        assert attention_loss(teacher, teacher, valid).abs() < 1e-6

    def test_valid_positions_of_a_decoder(self):
        labels = torch.tensor([[1, 2, -100]])
        mask = torch.tensor([[1, 0]])
        inputs = {"attention_mask": mask, "labels": labels}
        assert valid_positions(inputs, "encoder", single=False).tolist() == [[True, False]]
        assert valid_positions(inputs, "decoder", single=False).tolist() == [[True, True, False]]
        inputs["decoder_attention_mask"] = torch.tensor([[1, 0, 0]])
        assert valid_positions(inputs, "decoder", single=False).tolist() == [[True, False, False]]
        assert valid_positions({}, "encoder", single=True) is None
        with pytest.raises(FlexCompressError, match="2|dimensions"):
            valid_positions({"attention_mask": torch.ones(1, 1, 3, 3)}, "encoder", single=True)

    def test_layer_maps(self):
        assert layer_pairs("uniform", {"encoder": 3}, {"encoder": 6}) == {"encoder": [[0, 0], [1, 2], [2, 4], [3, 6]]}
        assert layer_pairs([[1, 5]], {"decoder": 2}, {"decoder": 6}) == {"decoder": [[1, 5]]}
        both = {"encoder": 2, "decoder": 2}
        assert layer_pairs({"decoder": [[2, 2]]}, both, both) == {"decoder": [[2, 2]]}
        with pytest.raises(FlexCompressError, match="teacher layer 7 of the encoder"):
            layer_pairs([[1, 7]], {"encoder": 3}, {"encoder": 6})
        with pytest.raises(FlexCompressError, match="by stack"):
            layer_pairs([[1, 1]], both, both)
        with pytest.raises(FlexCompressError, match='"decoder", which the models do not have'):
            layer_pairs({"decoder": [[1, 1]]}, {"encoder": 3}, {"encoder": 6})
        with pytest.raises(FlexCompressError, match="same kind"):
            layer_pairs("uniform", {"encoder": 3}, {"decoder": 6})

    def test_attention_dropout_is_off_where_maps_are_compared(self, tmp_path):
        """A student that is its teacher, dropout on: other terms see noise, the maps of the first layer do not."""
        teacher = model_of("bert", dropout=0.0)
        student = twin(teacher)
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        student.bert.embeddings.dropout.p = 0.0
        for family_student, layer_map in ((student, [[1, 1]]),):
            trainer = FlexCompressTrainer(
                model=family_student,
                teacher_model=teacher,
                args=arguments(tmp_path, max_steps=1),
                train_dataset=data_of("bert"),
                compression_config=FlexCompressConfig(
                    methods=[DistillationConfig(attention_weight=1.0, layer_map=layer_map)]
                ),
            )
            trainer.train()
            log = trainer.state.log_history[0]
            assert log["loss_attention"] == pytest.approx(0.0, abs=1e-6)
            assert log["loss_logits"] > 1e-4

    def test_attention_maps_need_equal_head_counts(self, tmp_path):
        with pytest.raises(FlexCompressError, match="equal head counts"):
            FlexCompressTrainer(
                model=model_of("bert", heads=2),
                teacher_model=model_of("bert", heads=4),
                args=arguments(tmp_path),
                compression_config=FlexCompressConfig(methods=[DistillationConfig(attention_weight=1.0)]),
            )
