"""Trains modules for a translation model, from which models of any depth are assembled (modular training).

    python examples/translation.py --model MODEL --dataset DATA --source en --target de --ratio 2 \
        --output_dir out --predict_with_generate --num_train_epochs 3

`MODEL` is a folder or an id on the Hub, fine-tuned on the task; the data set a file, a folder of files named by split,
or an id on the Hub, with a column for each language or one `translation` that holds both. `out` is the full model with
its modules, `out/ratio-2` a stock model of half its layers.
The lines marked "compression" are all that makes this more than a plain script for the Trainer of Transformers.
"""

from __future__ import annotations

import os
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
from optimum_flexcompress import FlexCompressConfig, FlexCompressSeq2SeqTrainer, ModularConfig, ModularModel
from optimum_flexcompress.data import load_data, select_split, take
from optimum_flexcompress.tasks.text2text_generation import generation_metrics


@dataclass
class Options:
    """What is not about training itself."""

    model: str = field(metadata={"help": "folder or Hub id of the model to start from"})
    dataset: str = field(metadata={"help": "file, folder or Hub id"})
    source: str = field(default="en", metadata={"help": "language, or column, to translate from"})
    target: str = field(default="de", metadata={"help": "language, or column, to translate to"})
    prefix: str = field(default="", metadata={"help": "put before each text, as T5 has it"})
    max_length: int = field(default=128, metadata={"help": "tokens of a sentence at most"})
    max_samples: int | None = field(default=None, metadata={"help": "rows of each split at most"})
    ratio: float = field(default=2.0, metadata={"help": "layers of the full model over those of the assembled one"})


def main() -> None:
    options, args = HfArgumentParser((Options, Seq2SeqTrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSeq2SeqLM.from_pretrained(options.model)
    data = load_data(options.dataset)
    args.generation_max_length = args.generation_max_length or options.max_length

    def sentences(rows: dict, language: str) -> list[str]:
        return [pair[language] for pair in rows["translation"]] if "translation" in rows else rows[language]

    def encode(rows: dict) -> dict:
        texts = [options.prefix + text for text in sentences(rows, options.source)]
        encoded = tokenizer(texts, truncation=True, max_length=options.max_length)
        targets = sentences(rows, options.target)
        labels = tokenizer(text_target=targets, truncation=True, max_length=options.max_length)
        return {**encoded, "labels": labels["input_ids"]}

    def prepared(split: str):
        rows = take(data[split], options.max_samples)
        return rows.map(encode, batched=True, remove_columns=rows.column_names)

    shared = {
        "args": args,
        "eval_dataset": prepared(select_split(data)),
        "processing_class": tokenizer,
        "data_collator": DataCollatorForSeq2Seq(tokenizer, model=model),
        "compute_metrics": generation_metrics(tokenizer) if args.predict_with_generate else None,
    }
    trainer = FlexCompressSeq2SeqTrainer(
        model=model,
        train_dataset=prepared("train"),
        # compression
        compression_config=FlexCompressConfig(methods=[ModularConfig()]),
        # end of compression
        **shared,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    # compression: a model of fewer layers, scored too
    modular = ModularModel.from_pretrained(args.output_dir)
    small = modular.assemble(modular.choose("size-first", options.ratio))
    metrics |= FlexCompressSeq2SeqTrainer(model=small, **shared).evaluate(metric_key_prefix="eval_assembled")
    folder = os.path.join(args.output_dir, f"ratio-{options.ratio:g}")
    small.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # end of compression
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    card = {"finetuned_from": options.model, "tasks": "translation", "language": [options.source, options.target]}
    trainer.push_to_hub(**card) if args.push_to_hub else trainer.create_model_card(**card)


if __name__ == "__main__":
    main()
