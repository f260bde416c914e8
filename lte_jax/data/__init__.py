"""Text in, batches of token ids out: reading, tokenising, packing, shuffling, sharding.

Every document gets the tokenizer's beginning-of-text token in front (where it has one) and is laid
into rows of L tokens beside an equally long row of segment ids: 1, 2, ... for the documents of the
row, 0 for padding. The target of token t is token t + 1 of the same segment, so a row has a loss
where `segments[t] == segments[t + 1] != 0`, and attention stays within equal ids.

The stream of training batches is a function of rows, batch size and seed alone: every epoch is
shuffled anew before anything is split, shards cut equal slices out of the same batches, and its
whole state is one index. So a run resumes exactly, on as many hosts as it likes.

Dimension key: B batch  L length  R rows
"""

from lte_jax.data.rows import (
    Rows,
    build,
    byte_tokenizer,
    digest,
    eval_batches,
    pack_rows,
    pad_rows,
    tokenize,
    train_iterator,
)
from lte_jax.data.texts import read_texts

__all__ = [
    "Rows",
    "build",
    "byte_tokenizer",
    "digest",
    "eval_batches",
    "pack_rows",
    "pad_rows",
    "read_texts",
    "tokenize",
    "train_iterator",
]
