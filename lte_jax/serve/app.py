"""The routes of the server, and what becomes of a request.

POST /v1/completions, POST /v1/chat/completions, GET /v1/models, GET /health, GET /metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import prometheus_client
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.concurrency import run_in_threadpool

from lte_jax.data import tokenize
from lte_jax.errors import UserError
from lte_jax.generation.engine import Engine, Text
from lte_jax.generation.texts import asked, decode, settled_text
from lte_jax.serve import protocol, refusals
from lte_jax.serve.protocol import Answers, ChatRequest, CompletionRequest
from lte_jax.serve.refusals import Refused
from lte_jax.serve.worker import Worker


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    prompt: int  # tokens of a prompt
    new: int  # tokens of an answer
    queue: int  # texts that wait for a row
    body: int  # bytes
    default_new: int = 256  # tokens of an answer that sets no number, at most


class Continuation:
    """One text of a request: what the worker tells of it, as pieces of text."""

    def __init__(self, tokenizer: Any, text: Text, stops: Sequence[str]):
        self.text, self.new, self.end = text, 0, ""
        self._tokenizer, self._stops = tokenizer, stops
        self._ids = text.prompt.tolist()
        self._skip, self._shown = len(decode(tokenizer, self._ids)), 0

    def take(self, fresh: Sequence[int], end: str | None) -> str:
        """The text's next piece, after more tokens; sets `end` once it has one."""
        self.new += len(fresh)
        self._ids += fresh
        told = decode if end else settled_text
        whole = told(self._tokenizer, self._ids)[self._skip :]
        found = [whole.find(stop) for stop in self._stops if stop in whole]
        if found:
            whole, self.end = whole[: min(found)], "stop"
        elif end:
            self.end = end
        else:  # the beginning of a stop may follow
            whole = whole[: len(whole) - max((_begun(whole, s) for s in self._stops), default=0)]
        piece, self._shown = whole[self._shown :], max(self._shown, len(whole))
        return piece


def _begun(text: str, stop: str) -> int:
    """The most characters at the end of `text` with which `stop` begins."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)


class Server:
    """A model with its worker, and what requests are asked of."""

    def __init__(self, engine: Engine, tokenizer: Any, name: str, limits: Limits):
        self.engine, self.tokenizer, self.name, self.limits = engine, tokenizer, name, limits
        self.worker, self.began = Worker(engine), int(time.time())
        config = engine.decoder.model.config
        own = getattr(tokenizer, "eos_token_id", None)
        self.chat_ends = sorted({*config.eos_ids, own} - {None})
        self.requests: dict[str, int] = {}  # answered so far, by status

    async def answer(self, request: Request, body: CompletionRequest | ChatRequest) -> Response:
        """The answer to a completion or a chat."""
        chat = isinstance(body, ChatRequest)
        if body.model not in (None, self.name):
            raise Refused(
                404, f"model={body.model!r}: expected {self.name!r}", "model", "model_not_found"
            )
        prompts = await run_in_threadpool(self._prompts, body)
        texts = [self._text(prompt, body, chat, i) for i, prompt in enumerate(prompts)]
        if self.worker.waiting + len(texts) > self.limits.queue + max(0, self._free()):
            raise Refused(429, f"{self.worker.waiting} texts wait already: ask again later")
        if not self.worker.is_alive():
            raise Refused(503, "the server is ending")
        going = [Continuation(self.tokenizer, text, body.stops) for text in texts]
        answers = Answers(self.name, chat)
        if body.stream:
            asked_usage = body.stream_options is not None and body.stream_options.include_usage
            stream = self._stream(going, answers, asked_usage)
            return StreamingResponse(stream, media_type="text/event-stream")
        return await _unless_gone(request, self._whole(going, answers))

    def _free(self) -> int:
        return self.engine.rows - len(self.engine.running)

    def _prompts(self, body: CompletionRequest | ChatRequest) -> list[list[int]]:
        """Token ids of each prompt."""
        try:
            if isinstance(body, ChatRequest):
                said = asked(self.tokenizer, [message.said for message in body.messages])
                ids = tokenize([said], self.tokenizer, start=False, quiet=True)
            elif isinstance(body.prompts[0], str):
                ids = tokenize(body.prompts, self.tokenizer, quiet=True)
            else:
                ids = body.prompts
        except UserError as error:
            raise Refused(400, str(error), self._about(body)) from None
        return [list(map(int, row)) for row in ids]

    def _text(self, ids: list[int], body, chat: bool, index: int) -> Text:
        about, limits = self._about(body), self.limits
        if len(ids) > limits.prompt:
            raise Refused(
                400,
                f"prompt {index} has {len(ids)} tokens: expected at most {limits.prompt}",
                about,
                "context_length_exceeded",
            )
        wanted, key = body.max_tokens, "max_tokens"
        if chat and body.max_completion_tokens is not None:
            wanted, key = body.max_completion_tokens, "max_completion_tokens"
        if wanted is not None and wanted > limits.new:
            raise Refused(400, f"{key}={wanted}: expected at most {limits.new}", key)
        if wanted is None:
            room = min(self.engine.decoder.model.config.max_length, self.engine.places) - len(ids)
            wanted = max(1, min(limits.default_new, limits.new, room))
        settings = {
            "max_new_tokens": wanted,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": body.top_p,
            "seed": secrets.randbits(32) if body.seed is None else body.seed,
            "eos_ids": self.chat_ends if chat else None,
        }
        try:
            return self.engine.text(ids, **settings)
        except UserError as error:
            raise Refused(400, str(error), about, "context_length_exceeded") from None

    @staticmethod
    def _about(body: CompletionRequest | ChatRequest) -> str:
        return "messages" if isinstance(body, ChatRequest) else "prompt"

    async def _pieces(self, going: list[Continuation]) -> AsyncIterator[tuple[int, str]]:
        """The texts' pieces with the index of each, as they come; drops what is left at the end."""
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue()

        def tell(*message: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(inbox.put_nowait, message)

        for i, one in enumerate(going):
            self.worker.begin(one.text, lambda fresh, end, i=i: tell(i, fresh, end))
        try:
            left = len(going)
            while left:
                i, fresh, end = await inbox.get()
                one = going[i]
                if one.end:  # told after a stop was found
                    continue
                if end not in (None, "stop", "length"):
                    raise _failed(end)
                piece = one.take(fresh, end)
                if one.end:
                    left -= 1
                    self.worker.drop(one.text)
                if piece or one.end:
                    yield i, piece
        finally:
            for one in going:
                self.worker.drop(one.text)

    async def _whole(self, going: list[Continuation], answers: Answers) -> Response:
        texts = [""] * len(going)
        async with contextlib.aclosing(self._pieces(going)) as pieces:
            async for i, piece in pieces:
                texts[i] += piece
        return JSONResponse(answers.whole(texts, [one.end for one in going], _usage(going)))

    async def _stream(
        self, going: list[Continuation], answers: Answers, with_usage: bool
    ) -> AsyncIterator[str]:
        if answers.chat:
            yield _event(answers.piece(0, "", first=True))
        try:
            async with contextlib.aclosing(self._pieces(going)) as pieces:
                async for i, piece in pieces:
                    if piece:
                        yield _event(answers.piece(i, piece))
                    if going[i].end:
                        yield _event(answers.piece(i, "", going[i].end))
        except Refused as error:  # the status has been sent
            yield _event(error.detail)
            return
        if with_usage:
            yield _event(answers.usage(_usage(going)))
        yield "data: [DONE]\n\n"

    def collect(self):
        """What Prometheus is told."""
        spent, engine = self.worker.spent, self.engine
        rows, places = engine.shape
        told = {
            "prompt_tokens": (spent.prompt_tokens, "Tokens of prompts."),
            "reused_tokens": (spent.reused_tokens, "Of those, tokens that an earlier text had."),
            "new_tokens": (spent.new_tokens, "Tokens written."),
            "steps": (spent.steps, "Steps, each a token of all texts that are continued."),
            "step_seconds": (spent.seconds, "Seconds of these steps, prompts included."),
            "dropped_texts": (spent.dropped, "Texts whose client left or that met a stop."),
            "experts_read": (engine.read, "Share of experts read, summed over decoding steps."),
            "decoding_steps": (engine.steps, "Decoding steps."),
        }
        for name, (value, words) in told.items():
            yield CounterMetricFamily(f"lte_jax_{name}", words, value)
        now = {
            "texts_running": (len(engine.running), "Texts that are continued."),
            "texts_waiting": (self.worker.waiting, "Texts that wait for a row."),
            "cache_rows": (rows, "Rows of the cache."),
            "cache_places": (places, "Tokens that a row has place for."),
        }
        for name, (value, words) in now.items():
            yield GaugeMetricFamily(f"lte_jax_{name}", words, value)
        answered = CounterMetricFamily("lte_jax_requests", "Requests answered.", labels=["status"])
        for status, count in sorted(self.requests.items()):
            answered.add_metric([status], count)
        yield answered


def _usage(going: list[Continuation]) -> dict[str, Any]:
    texts = [one.text for one in going]
    prompts, reused = sum(len(text.prompt) for text in texts), sum(text.reused for text in texts)
    return protocol.usage(prompts, reused, sum(one.new for one in going))


def _failed(end: str) -> Refused:
    reasons = {
        "not finite": "the model's logits are not finite: its weights are not those of a working "
        "model, or overflow",
        "dropped": "the server is ending",
    }
    return Refused(
        503 if end == "dropped" else 500, reasons.get(end, "the step failed, see the log")
    )


def _event(message: Any) -> str:
    return f"data: {json.dumps(message)}\n\n"


async def _unless_gone(request: Request, answer: Any) -> Response:
    """The answer, which is given up as soon as the client leaves."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, left = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else Response(status_code=499)  # nobody reads it
    finally:
        for task in (work, left):
            task.cancel()
        await asyncio.gather(work, left, return_exceptions=True)


def make_app(engine: Engine, tokenizer: Any, name: str, limits: Limits) -> FastAPI:
    """The server as an ASGI application; its worker runs as long as the application does."""
    server = Server(engine, tokenizer, name, limits)

    @contextlib.asynccontextmanager
    async def running(app: FastAPI):
        server.worker.start()
        yield
        server.worker.stop()
        await run_in_threadpool(server.worker.join)

    app = FastAPI(title="lte-jax", lifespan=running)
    app.state.server = server
    registry = prometheus_client.CollectorRegistry()
    registry.register(server)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await server.answer(request, body)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await server.answer(request, body)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        one = {"id": name, "object": "model", "created": server.began, "owned_by": "lte-jax"}
        return {"object": "list", "data": [one]}

    @app.get("/health")
    async def health() -> Response:
        alive = server.worker.is_alive()
        return JSONResponse({"status": "ok" if alive else "ending"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        text = prometheus_client.generate_latest(registry)
        return PlainTextResponse(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    refusals.tell(app)
    app.add_middleware(refusals.Bounded, most=limits.body)
    app.add_middleware(_Counted, server=server)  # around all others: what they refuse counts
    return app


class _Counted:
    """Counts answers by their status."""

    def __init__(self, app, server: Server):
        self.app, self.requests = app, server.requests

    async def __call__(self, scope, receive, send) -> None:
        async def counted(message) -> None:
            if message["type"] == "http.response.start":
                status = str(message["status"])
                self.requests[status] = self.requests.get(status, 0) + 1
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)
