r"""Serves a model: completions and chats, in the requests and answers of OpenAI's interface.

    lte-jax serve runs/demo/lte
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \
        -d '{"prompt": "Once upon a time", "max_tokens": 50, "temperature": 0}'

Requests that run at the same time are continued together, each exactly as it would be alone. See
docs/serving.md. There are no passwords: whoever reaches the port may ask. Needs the extra `serve`:
pip install 'lte-jax[serve]'. `python -m lte_jax.serve` is the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import lte_jax
from lte_jax import config, hf
from lte_jax.errors import Parser, UserError, cli_errors
from lte_jax.files import Mirror
from lte_jax.generation.engine import Engine
from lte_jax.kernels import IMPLEMENTATIONS
from lte_jax.kernels.quantized import BITS


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Loads the model, and serves until a signal."""
    with cli_errors():
        flags = _parser(prog).parse_args(argv)
        try:
            import uvicorn

            from lte_jax.serve.app import Limits, make_app
        except ImportError as error:
            raise UserError(
                f"{error.name} is not installed: pip install 'lte-jax[serve]'"
            ) from None
        engine, tokenizer = _loaded(flags)
        most = engine.decoder.model.config.max_length
        limits = Limits(
            prompt=min(flags.max_prompt or most, most),
            new=min(flags.max_tokens or most, most),
            queue=flags.queue,
            body=flags.max_body,
        )
        name = flags.name or hf.resolve(flags.model).resolve().name
        app = make_app(engine, tokenizer, name, limits)
        how = uvicorn.Config(
            app,
            host=flags.host,
            port=flags.port,
            log_level="warning",
            timeout_graceful_shutdown=flags.grace,
            # Each text that may run or wait, and as many to be refused politely.
            limit_concurrency=2 * (flags.rows + flags.queue) + 16,
        )
        socket = how.bind_socket()  # or it says why not, and exits
        socket.listen()  # who asks from now on waits for a moment
        print(f"serving {name} at http://{flags.host}:{socket.getsockname()[1]}", flush=True)
        uvicorn.Server(how).run(sockets=[socket])


def _loaded(flags: argparse.Namespace) -> tuple[Engine, Any]:
    model, params = lte_jax.load(flags.model, flags.dtype)
    if flags.quantize:
        params = lte_jax.quantize(model, params, flags.quantize)
    tokenizer = lte_jax.load_tokenizer(flags.model)
    names = ("rows", "places", "kept", "routing", "threshold", "sparsity", "implementation")
    return Engine(model, params, **{name: getattr(flags, name) for name in names}), tokenizer


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__)
    add, flag = parser.add_argument, config.flag
    add("model", help="HF or LTE folder, or hub id")
    add("--host", default="127.0.0.1", help="0.0.0.0: other machines may ask, too")
    add("--port", type=flag(config.Whole), default=8000)
    add("--name", help="of the model in requests; default: that of its folder")
    add("--rows", type=flag(config.Count), default=8, help="texts continued together, at most")
    places = "tokens that the cache has place for, over all rows (default: 1,024 a row)"
    add("--places", type=flag(config.Count), help=places)
    kept = (
        "tokens of ended texts that are kept for prompts that begin alike (default: half of those)"
    )
    add("--kept", type=flag(config.Whole), help=kept)
    add("--queue", type=flag(config.Whole), default=64, help="texts that may wait for a row")
    most = "default: what the model reads"
    add("--max-prompt", type=flag(config.Count), help=f"tokens of a prompt; {most}")
    add("--max-tokens", type=flag(config.Count), help=f"tokens of an answer; {most}")
    add("--max-body", type=flag(config.Count), default=1 << 20, help="bytes of a request")
    grace = "seconds that running requests have once the server is to end"
    add("--grace", type=flag(config.Whole), default=30, help=grace)
    add("--routing", choices=["dense", "soft", "hard"], help="default: the model's own")
    add("--threshold", type=flag(config.Inside), help="default: the model's own")
    add("--sparsity", type=flag(config.Share), help="share of experts to skip (docs/sparsity.md)")
    add("--dtype", choices=["float32", "bfloat16"], help="default: as stored")
    add("--quantize", choices=list(BITS), help="round the large matrices to so many bits a weight")
    kernels = f"auto (default), {', '.join(IMPLEMENTATIONS)}"
    add("--implementation", default="auto", help=kernels)
    return Mirror.add_to(parser)
