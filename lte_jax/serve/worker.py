"""The thread that computes: it owns the engine, and tells others what is new."""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable

from lte_jax.generation.engine import Engine, Text

log = logging.getLogger(__name__)

# Called in the worker's thread: the text's new tokens, and why it ended, if it has.
Heard = Callable[[list[int], str | None], None]


@dataclasses.dataclass
class Spent:
    """Sums since the start."""

    steps: int = 0
    seconds: float = 0.0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    dropped: int = 0


class Worker(threading.Thread):
    """Continues texts until `stop`."""

    def __init__(self, engine: Engine):
        super().__init__(name="lte-jax-worker", daemon=True)
        self.engine, self.spent = engine, Spent()
        self._heard: dict[Text, Heard] = {}
        self._told: dict[Text, int] = {}  # tokens of it that were told
        self._inbox: queue.SimpleQueue[tuple[str, Text | None, Heard | None]] = queue.SimpleQueue()

    def begin(self, text: Text, heard: Heard) -> None:
        """Lets a text of `engine.text` wait for a row. Any thread may call it."""
        self._inbox.put(("begin", text, heard))

    def drop(self, text: Text) -> None:
        """Ends a text before the next step; nothing is heard of it any more. Of any thread."""
        self._inbox.put(("drop", text, None))

    def stop(self) -> None:
        """Ends the thread after the step it is in, with all texts. Of any thread."""
        self._inbox.put(("stop", None, None))

    @property
    def waiting(self) -> int:
        """Texts without a row."""
        return len(self.engine.waiting) + self._inbox.qsize()

    def run(self) -> None:
        """Steps while there are texts, and else sleeps until there is one."""
        while self._read_inbox():
            start = time.perf_counter()
            try:
                stepped = self.engine.step()
            except Exception:  # one step's failure must not be the end of a server
                log.exception("a step failed; all texts that it was to continue are given up")
                stepped = self.engine.give_up()
            self.spent.steps += 1
            self.spent.seconds += time.perf_counter() - start
            for text in stepped:
                self._tell(text)
        for text in list(self._heard):
            text.end = text.end or "dropped"
            self._tell(text)

    def _read_inbox(self) -> bool:
        """Does what others asked for; False: to stop."""
        idle = not (self.engine.running or self.engine.waiting)
        while idle or not self._inbox.empty():
            what, text, heard = self._inbox.get()
            if text is None:
                return False
            if heard is not None:
                self._heard[text] = heard
                self.engine.waiting.append(text)
            elif self._forget(text):
                self.engine.drop(text)
                self.spent.dropped += 1
            idle = not (self.engine.running or self.engine.waiting)
        return True

    def _tell(self, text: Text) -> None:
        heard = self._heard.get(text)
        if heard is None:
            return
        told = self._told.get(text, 0)
        fresh, self._told[text] = text.new[told:], len(text.new)
        if fresh and not told:
            self.spent.prompt_tokens += len(text.prompt)
            self.spent.reused_tokens += text.reused
        self.spent.new_tokens += len(fresh)
        if text.end is not None:
            self._forget(text)
        heard(fresh, text.end)

    def _forget(self, text: Text) -> Heard | None:
        self._told.pop(text, None)
        return self._heard.pop(text, None)
