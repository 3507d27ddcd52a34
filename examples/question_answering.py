"""Trains a model for extractive question answering so that it works at any length (length-adaptive training).

    python examples/question_answering.py --model MODEL --dataset squad.json --output_dir out --num_train_epochs 2 \
        --lengths 0.9 0.8 0.7 0.6 0.5 0.4

`MODEL` is a folder or an id on the Hub, fine-tuned on the task; the data set a file in the SQuAD schema, nested or
flat, a folder of such files named by split, or an id on the Hub. `--lengths` says which share of the tokens is left
after each layer when the model is scored a second time; the same weights serve any other choice.
The lines marked "compression" are all that makes this more than a plain script for the Trainer of Transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import AutoModelForQuestionAnswering, AutoTokenizer, HfArgumentParser, TrainingArguments, set_seed

# compression: instead of `Trainer`
from optimum_flexcompress import FlexCompressConfig, FlexCompressTrainer, LengthAdaptiveConfig, using_lengths
from optimum_flexcompress.data import load_data, select_split, take
from optimum_flexcompress.tasks import get_task


@dataclass
class Options:
    """What is not about training itself."""

    model: str = field(metadata={"help": "folder or Hub id of the model to start from"})
    dataset: str = field(metadata={"help": "file, folder or Hub id"})
    max_length: int = field(default=384, metadata={"help": "tokens of a window, question included"})
    max_samples: int | None = field(default=None, metadata={"help": "questions of each split at most"})
    lengths: list[float] | None = field(
        default=None, metadata={"help": "share of the tokens left after each layer, for a second evaluation"}
    )


def main() -> None:
    options, args = HfArgumentParser((Options, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForQuestionAnswering.from_pretrained(options.model)
    data = load_data(options.dataset)
    data = type(data)({name: take(split, options.max_samples) for name, split in data.items()})
    # Windows over long contexts, labels, and the scorer of SQuAD, which puts answers together from the windows.
    prepared = get_task("question-answering").prepare(data, tokenizer, max_length=options.max_length)

    trainer = FlexCompressTrainer(
        model=model,
        args=args,
        train_dataset=prepared.dataset["train"],
        eval_dataset=prepared.dataset[select_split(data)],
        processing_class=tokenizer,
        data_collator=prepared.collator,
        compute_metrics=prepared.compute_metrics,
        # compression
        compression_config=FlexCompressConfig(methods=[LengthAdaptiveConfig(unit="fractions")]),
        # end of compression
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    # compression
    if options.lengths:
        with using_lengths(trainer.model, options.lengths):
            metrics |= trainer.evaluate(metric_key_prefix="eval_shorter")
    # end of compression
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    card = {"finetuned_from": options.model, "tasks": "question-answering"}
    trainer.push_to_hub(**card) if args.push_to_hub else trainer.create_model_card(**card)


if __name__ == "__main__":
    main()
