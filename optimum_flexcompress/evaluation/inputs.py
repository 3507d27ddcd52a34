"""Made-up batches of a given shape, for timing and counting."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from ..architectures import position_limit
from ..errors import FlexCompressError
from ..tasks.base import Task


def example_batch(
    config: PretrainedConfig, task: Task, batch_size: int, length: int, seed: int = 0
) -> dict[str, torch.Tensor]:
    """A batch without padding whose values do not matter.

    Args:
        config: The model's configuration, for vocabulary and image size.
        task: What the model is for.
        batch_size: Rows.
        length: Tokens in each row; without meaning for images.
        seed: Of the random ids.

    Returns:
        `input_ids`, `attention_mask` and `token_type_ids` where the model has them, `(B, N)`; or `pixel_values`.

    Raises:
        FlexCompressError: The model takes shorter inputs only.
    """
    generator = torch.Generator().manual_seed(seed)
    if task.name == "image-classification":
        size = config.image_size if isinstance(config.image_size, list | tuple) else [config.image_size] * 2
        return {"pixel_values": torch.rand(batch_size, config.num_channels, *size, generator=generator)}
    limit = position_limit(config)
    if limit is not None and length > limit:
        raise FlexCompressError(f"The model takes at most {limit} tokens: {length} is too long to be measured.")
    # The lowest ids are where vocabularies keep their special tokens; one of them could end a generation or be
    # taken for padding.
    lowest = min(10, config.vocab_size - 1)
    ids = torch.randint(lowest, config.vocab_size, (batch_size, length), generator=generator)
    for special in (config.pad_token_id, config.eos_token_id):
        if isinstance(special, int):
            ids[ids == special] = lowest if special != lowest else config.vocab_size - 1
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "type_vocab_size", 0) and config.type_vocab_size > 1:
        batch["token_type_ids"] = torch.zeros_like(ids)
    return batch
