"""Text generation: prompts in, continuations out; only active experts' weights are read.

Prompts are padded on the left to one length. Prefill computes all experts and masks them; then one
compiled loop decodes token by token with the sparse kernels (decoding.py). A row's text depends on
its prompt, its place in the batch and the seed, not on other rows, nor on streaming.
"""

from lte_jax.generation.texts import complete as complete
from lte_jax.generation.texts import decode as decode
from lte_jax.generation.texts import generate_text as generate_text
from lte_jax.generation.texts import settled_text as settled_text
from lte_jax.generation.tokens import STREAM_CHUNK as STREAM_CHUNK
from lte_jax.generation.tokens import Measured as Measured
from lte_jax.generation.tokens import Settings as Settings
from lte_jax.generation.tokens import generate as generate
