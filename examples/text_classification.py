"""Fine-tunes a text classifier, and prunes it while it trains (VIB pruning).

    python examples/text_classification.py --model MODEL --dataset examples/data/banking77 \
        --text_column text --label_column category --output_dir out --num_train_epochs 4

`MODEL` is a folder or an id on the Hub; the data set a folder of files named by split, one file, or an id on the Hub.
The lines marked "compression" are all that makes this more than a plain script for the Trainer of Transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

# compression: instead of `Trainer`
from optimum_flexcompress import FlexCompressConfig, FlexCompressTrainer, VIBPruningConfig
from optimum_flexcompress.data import load_data, select_split, take


@dataclass
class Options:
    """What is not about training itself."""

    model: str = field(metadata={"help": "folder or Hub id of the model to start from, fine-tuned or not"})
    dataset: str = field(metadata={"help": "file, folder or Hub id"})
    text_column: str = field(default="text", metadata={"help": "column with the text"})
    label_column: str = field(default="label", metadata={"help": "column with the class, as a name or a number"})
    max_length: int = field(default=128, metadata={"help": "tokens of a text at most"})
    max_samples: int | None = field(default=None, metadata={"help": "rows of each split at most"})
    target_sparsity: float = field(default=0.5, metadata={"help": "share of the layers' parameters that goes"})
    mask_learning_rate: float = field(default=0.05, metadata={"help": "of the masks; higher for short runs"})


def main() -> None:
    options, args = HfArgumentParser((Options, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    data = load_data(options.dataset)
    evaluated = select_split(data)
    names = sorted({str(label) for label in data["train"][options.label_column]})
    ids = {name: index for index, name in enumerate(names)}
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        options.model, num_labels=len(names), id2label=dict(enumerate(names)), label2id=ids
    )

    def encode(rows: dict) -> dict:
        encoded = tokenizer(rows[options.text_column], truncation=True, max_length=options.max_length)
        return {**encoded, "labels": [ids[str(label)] for label in rows[options.label_column]]}

    def prepared(split: str):
        rows = take(data[split], options.max_samples)
        return rows.map(encode, batched=True, remove_columns=rows.column_names)

    def accuracy(prediction) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = FlexCompressTrainer(
        model=model,
        args=args,
        train_dataset=prepared("train"),
        eval_dataset=prepared(evaluated),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        # compression
        compression_config=FlexCompressConfig(
            methods=[
                VIBPruningConfig(
                    target_sparsity=options.target_sparsity, mask_learning_rate=options.mask_learning_rate
                )
            ]
        ),
        # end of compression
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    card = {"finetuned_from": options.model, "tasks": "text-classification"}
    trainer.push_to_hub(**card) if args.push_to_hub else trainer.create_model_card(**card)


if __name__ == "__main__":
    main()
