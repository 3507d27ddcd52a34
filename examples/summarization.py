"""Distils an encoder-decoder that summarizes into one of fewer layers.

    python examples/summarization.py --model MODEL --dataset DATA --text_column document --summary_column summary \
        --decoder_layers 3 --output_dir out --predict_with_generate --num_train_epochs 3

`MODEL`, the teacher, is a folder or an id on the Hub, fine-tuned on the task; the data set a file, a folder of files
named by split, or an id on the Hub. The student starts from layers of the teacher.
The lines marked "compression" are all that makes this more than a plain script for the Trainer of Transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Seq2SeqTrainingArguments,
    set_seed,
)

# compression: instead of `Seq2SeqTrainer`
from optimum_flexcompress import DistillationConfig, FlexCompressConfig, FlexCompressSeq2SeqTrainer
from optimum_flexcompress.data import load_data, select_split, take
from optimum_flexcompress.methods.distillation import make_student
from optimum_flexcompress.tasks.text2text_generation import generation_metrics


@dataclass
class Options:
    """What is not about training itself."""

    model: str = field(metadata={"help": "folder or Hub id of the teacher"})
    dataset: str = field(metadata={"help": "file, folder or Hub id"})
    text_column: str = field(default="document", metadata={"help": "column with the text"})
    summary_column: str = field(default="summary", metadata={"help": "column with its summary"})
    prefix: str = field(default="", metadata={"help": 'put before each text, such as "summarize: " for T5'})
    max_source_length: int = field(default=512, metadata={"help": "tokens of a text at most"})
    max_target_length: int = field(default=64, metadata={"help": "tokens of a summary at most"})
    max_samples: int | None = field(default=None, metadata={"help": "rows of each split at most"})
    decoder_layers: int = field(default=3, metadata={"help": "layers of the student's decoder, which costs most"})


def main() -> None:
    options, args = HfArgumentParser((Options, Seq2SeqTrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    teacher = AutoModelForSeq2SeqLM.from_pretrained(options.model)
    # compression: the student; a plain script trains the model that it loads
    model = make_student(teacher, layers={"decoder": options.decoder_layers})
    # end of compression
    data = load_data(options.dataset)
    args.generation_max_length = args.generation_max_length or options.max_target_length

    def encode(rows: dict) -> dict:
        texts = [options.prefix + text for text in rows[options.text_column]]
        encoded = tokenizer(texts, truncation=True, max_length=options.max_source_length)
        labels = tokenizer(
            text_target=rows[options.summary_column], truncation=True, max_length=options.max_target_length
        )
        return {**encoded, "labels": labels["input_ids"]}

    def prepared(split: str):
        rows = take(data[split], options.max_samples)
        return rows.map(encode, batched=True, remove_columns=rows.column_names)

    trainer = FlexCompressSeq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=prepared("train"),
        eval_dataset=prepared(select_split(data)),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=generation_metrics(tokenizer) if args.predict_with_generate else None,
        # compression
        teacher_model=teacher,
        compression_config=FlexCompressConfig(methods=[DistillationConfig()]),
        # end of compression
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    card = {"finetuned_from": options.model, "tasks": "summarization"}
    trainer.push_to_hub(**card) if args.push_to_hub else trainer.create_model_card(**card)


if __name__ == "__main__":
    main()
