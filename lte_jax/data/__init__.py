"""Text in, batches of token ids out: reading, tokenising, packing, shuffling, sharding.

A document starts with what the tokenizer puts in front (for most Llamas a beginning-of-text token,
for others nothing); in training it ends with an end-of-text token (`end_token`). Documents are laid
into records of L tokens and L segment ids: 1, 2, ... for a record's documents, 0 for padding.
The target of token t is token t + 1, with a loss where `segments[t] == segments[t + 1] != 0`;
attention stays within a segment. A document longer than a record ends after its last piece, or,
where records are padded, is cut and has no end. Validation is the text alone, without end tokens.

The training batches depend on records, batch size and seed alone: each epoch is shuffled before
anything is split, shards are equal slices of the same batches, and the whole state is one index. So
a run resumes exactly, on any number of hosts.

Dimension key: B batch  L length  R records
"""

from lte_jax.data.building import build, check
from lte_jax.data.ends import end_probabilities, end_token
from lte_jax.data.packing import (
    Example,
    Records,
    eval_batches,
    pack,
    pad,
    train_iterator,
)
from lte_jax.data.preparing import OtherRecords, prepare
from lte_jax.data.shards import Stored, manifest, opened, prepared
from lte_jax.data.sources import local_path, overlap, read_rows
from lte_jax.data.texts import (
    count_texts,
    read_each,
    read_texts,
    stream_texts,
    text_of,
    value_of,
)
from lte_jax.data.tokens import byte_tokenizer, digest, learned_tokenizer, tokenize

__all__ = [
    "Example",
    "OtherRecords",
    "Records",
    "Stored",
    "build",
    "byte_tokenizer",
    "check",
    "count_texts",
    "digest",
    "end_probabilities",
    "end_token",
    "eval_batches",
    "learned_tokenizer",
    "local_path",
    "manifest",
    "opened",
    "overlap",
    "pack",
    "pad",
    "prepare",
    "prepared",
    "read_each",
    "read_rows",
    "read_texts",
    "stream_texts",
    "text_of",
    "tokenize",
    "train_iterator",
    "value_of",
]
