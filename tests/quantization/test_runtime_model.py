"""What all runtimes share, on one that is plain Python."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import transformers
from transformers import AutoConfig, pipeline

from optimum_flexcompress.errors import FlexCompressError
from optimum_flexcompress.quantization import runtime_model as rm
from optimum_flexcompress.quantization.saved import RECORD_NAME, sha256_of, write_saved
from tests.tasks.toys import word_tokenizer
from tests.tiny import build, inputs_for


class Echo(rm.RuntimeModel):
    """Its logits are the number of its file, and the sum of the tokens that the mask shows."""

    backend = "echo"

    @classmethod
    def _open(cls, saved, config, threads=1):
        return float(saved.files["number.txt"].read_text()) * threads

    def _run(self, inputs):
        shown = (inputs["input_ids"] * inputs["attention_mask"]).sum(1).float()
        return (torch.stack([torch.full_like(shown, self.model), shown, 0 * shown], dim=1),)


class EchoForSequenceClassification(rm.ForSequenceClassification, Echo): ...


class EchoForQuestionAnswering(rm.ForQuestionAnswering, Echo): ...


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "echo"
    build("bert", "BertForSequenceClassification").config.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    (folder / "number.txt").write_text("2.5")
    facts = {"task": "text-classification", "inputs": ["input_ids", "attention_mask"], "outputs": ["logits"]}
    write_saved(folder, "echo", "main", {}, ["number.txt"], **facts)
    return folder


def change(folder, **entries):
    record = json.loads((folder / RECORD_NAME).read_text())
    (folder / RECORD_NAME).write_text(json.dumps({**record, **entries}))


def test_it_is_called_like_a_model(folder):
    model = EchoForSequenceClassification.from_pretrained(folder, threads=2)
    inputs = inputs_for(build("bert", "BertForSequenceClassification"))
    output = model(**inputs, token_type_ids=inputs["input_ids"])
    assert isinstance(output, transformers.modeling_outputs.SequenceClassifierOutput)
    shown = (inputs["input_ids"] * inputs["attention_mask"]).sum(1).float()
    assert torch.equal(output.logits[:, 1], shown) and (output.logits[:, 0] == 5).all()
    # Without a mask, every token counts; arrays and tuples are as good.
    (logits,) = model(input_ids=inputs["input_ids"].numpy(), return_dict=False)
    assert torch.equal(logits[:, 1], inputs["input_ids"].sum(1).float())
    assert model.device.type == "cpu" and model.to("cpu") is model.eval() is model and not model.can_generate()
    with pytest.raises(FlexCompressError, match="cannot be moved to cuda"):
        model.to("cuda:0")
    with pytest.raises(FlexCompressError, match="reads input_ids, which is missing"):
        model(attention_mask=inputs["attention_mask"])


def test_a_pipeline_takes_it_without_complaint(folder, caplog):
    model = EchoForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING, logger="transformers"):
        answers = pipeline("text-classification", model=model, tokenizer=tokenizer)(["one", "two words"], batch_size=2)
    assert [answer["label"] for answer in answers] == ["LABEL_1", "LABEL_1"]
    assert "not supported" not in caplog.text


def test_it_is_saved_and_opened_again(folder, tmp_path):
    model = Echo.from_pretrained(folder)
    # The base class finds the class by the task.
    assert type(model) is EchoForSequenceClassification
    model.save_pretrained(tmp_path / "copy")
    model.save_pretrained(folder)
    again = EchoForSequenceClassification.from_pretrained(
        tmp_path / "copy", expected_sha256=sha256_of(folder / RECORD_NAME)
    )
    configs = [again.config, AutoConfig.from_pretrained(folder)]
    assert again.model == 2.5 and len({config.to_json_string() for config in configs}) == 1
    assert (tmp_path / "copy" / "tokenizer.json").is_file()


def test_bad_folders(folder, tmp_path):
    with pytest.raises(FlexCompressError, match="not the model that you pinned"):
        EchoForSequenceClassification.from_pretrained(folder, expected_sha256="0" * 64)
    with pytest.raises(FlexCompressError, match="open it with EchoForSequenceClassification"):
        EchoForQuestionAnswering.from_pretrained(folder)
    with pytest.raises(FlexCompressError, match="make one with `optimum-cli flexcompress quantize .* --backend echo`"):
        EchoForQuestionAnswering.from_pretrained(folder, export=True)
    with pytest.raises(FlexCompressError, match="runs no fill-mask models"):
        Echo.class_for("fill-mask")
    change(folder, inputs=[])
    with pytest.raises(FlexCompressError, match="does not name the inputs"):
        EchoForSequenceClassification.from_pretrained(folder)
    change(folder, backend="ipex")
    with pytest.raises(FlexCompressError, match="made for the backend ipex"):
        EchoForSequenceClassification.from_pretrained(folder)
    with pytest.raises(FlexCompressError, match="There is no folder .*nope: check the path"):
        EchoForSequenceClassification.from_pretrained("./nope")
    (folder / "config.json").write_text("{")
    with pytest.raises(FlexCompressError, match=r"config\.json cannot be read \(Expecting"):
        EchoForSequenceClassification.from_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(FlexCompressError, match=r"config\.json cannot be read \(The checkpoint"):
        EchoForSequenceClassification.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FlexCompressError, match=r"has no config\.json"):
        EchoForSequenceClassification.from_pretrained(folder)
    build("bert", "BertForSequenceClassification").config.save_pretrained(tmp_path / "plain")
    with pytest.raises(FlexCompressError, match="has no flexcompress_backend.json"):
        EchoForSequenceClassification.from_pretrained(tmp_path / "plain")


@pytest.mark.parametrize(("family", "limit"), [("bert", 64), ("roberta", 62)])
def test_inputs_that_the_model_cannot_take(folder, family, limit):
    build(family, f"{family.capitalize()}ForSequenceClassification").config.save_pretrained(folder)
    model = EchoForSequenceClassification.from_pretrained(folder)
    assert model(torch.full((1, limit), 5)).logits.shape == (1, 3)
    with pytest.raises(FlexCompressError, match=rf"at most {limit} tokens, not {limit + 1}: .*max_length={limit}\)"):
        model(torch.full((1, limit + 1), 5))
    for wrong in (64, -1):
        with pytest.raises(FlexCompressError, match=f"token id {wrong}, and the vocabulary .* from 0 to 63"):
            model(torch.tensor([[5, wrong, 5]]))
