"""Prunes a causal language model on text that is streamed, while the dense model teaches it.

    python examples/language_modeling.py --model MODEL --dataset DATA --streaming --output_dir out --max_steps 10000

`MODEL` is a folder or an id on the Hub; the data set text files (`--train_file`, `--validation_file`) or an id on the
Hub with a column of texts. With `--streaming` nothing is stored: rows are read, tokenised and cut into blocks while
training takes them, and the length of the run is `--max_steps`.
The lines marked "compression" are all that makes this more than a plain script for the Trainer of Transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

# compression: instead of `Trainer`
from optimum_flexcompress import DistillationConfig, FlexCompressConfig, FlexCompressTrainer, VIBPruningConfig


@dataclass
class Options:
    """What is not about training itself."""

    model: str = field(metadata={"help": "folder or Hub id of the model to prune"})
    dataset: str | None = field(default=None, metadata={"help": "Hub id with the splits train and validation"})
    dataset_config: str | None = field(default=None, metadata={"help": "its configuration"})
    train_file: str | None = field(default=None, metadata={"help": "text file, instead of a data set of the Hub"})
    validation_file: str | None = field(default=None, metadata={"help": "text file"})
    text_column: str = field(default="text", metadata={"help": "column with the texts"})
    streaming: bool = field(default=False, metadata={"help": "read the data while training, for max_steps"})
    block_size: int = field(default=512, metadata={"help": "tokens of a row"})
    eval_blocks: int = field(default=200, metadata={"help": "rows to evaluate on at most"})
    target_sparsity: float = field(default=0.3, metadata={"help": "share of the layers' parameters that goes"})
    mask_learning_rate: float = field(default=0.05, metadata={"help": "of the masks; higher for short runs"})


def main() -> None:
    options, args = HfArgumentParser((Options, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    if options.dataset is not None:
        data = load_dataset(options.dataset, options.dataset_config, streaming=options.streaming)
    else:
        files = {"train": options.train_file, "validation": options.validation_file}
        data = load_dataset("text", data_files=files, streaming=options.streaming)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)

    def blocks(rows: dict) -> dict:
        tokens = [token for text in tokenizer(rows[options.text_column])["input_ids"] for token in text]
        starts = range(0, len(tokens) - options.block_size + 1, options.block_size)
        rows = [tokens[start : start + options.block_size] for start in starts]
        return {"input_ids": rows, "labels": [list(row) for row in rows]}

    # A stream may learn its columns only from its first row.
    columns = data["train"].column_names or list(next(iter(data["train"])))
    data = data.map(blocks, batched=True, remove_columns=columns)
    validation = data["validation"]
    # A stream has no length to compare with.
    count = options.eval_blocks if options.streaming else min(options.eval_blocks, len(validation))
    train = data["train"].shuffle(seed=args.seed, buffer_size=1000) if options.streaming else data["train"]

    trainer = FlexCompressTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation.take(count),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        # compression
        teacher_model=AutoModelForCausalLM.from_pretrained(options.model),
        compression_config=FlexCompressConfig(
            methods=[
                VIBPruningConfig(
                    target_sparsity=options.target_sparsity, mask_learning_rate=options.mask_learning_rate
                ),
                DistillationConfig(),
            ]
        ),
        # end of compression
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    metrics["perplexity"] = math.exp(min(metrics["eval_loss"], 700.0))
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    card = {"finetuned_from": options.model, "tasks": "text-generation"}
    trainer.push_to_hub(**card) if args.push_to_hub else trainer.create_model_card(**card)


if __name__ == "__main__":
    main()
