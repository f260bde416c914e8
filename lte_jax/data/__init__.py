"""Text in, batches of token ids out: reading, tokenising, packing, shuffling, sharding.

Every document gets in front what the tokenizer itself puts there (for most Llamas a token that
begins a text, for others nothing) and, in training, a token that ends the text (`end_token`). It is
laid into records of L tokens beside as many segment ids: 1, 2, ... for the documents of the record,
0 for padding. The target of token t is token t + 1 of the same segment: a record has a loss where
`segments[t] == segments[t + 1] != 0`, and attention stays within equal ids. Of a document longer
than a record, the end stands after the last piece, or nowhere where records are padded and it is
cut. Validation is the text alone: its perplexity says nothing of ends.

The stream of training batches is a function of records, batch size and seed alone: every epoch is
shuffled anew before anything is split, shards cut equal slices out of the same batches, and its
whole state is one index. So a run resumes exactly, on as many hosts as it likes.

Dimension key: B batch  L length  R records
"""

from lte_jax.data.ends import end_probabilities, end_token
from lte_jax.data.packing import (
    Records,
    build,
    digest,
    eval_batches,
    pack,
    pad,
    train_iterator,
)
from lte_jax.data.texts import read_texts
from lte_jax.data.tokens import byte_tokenizer, tokenize

__all__ = [
    "Records",
    "build",
    "byte_tokenizer",
    "digest",
    "end_probabilities",
    "end_token",
    "eval_batches",
    "pack",
    "pad",
    "read_texts",
    "tokenize",
    "train_iterator",
]
