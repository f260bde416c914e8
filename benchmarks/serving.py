"""Many clients at one server: that each gets its own text, and how many tokens a second come out.

    python benchmarks/serving.py --model=owner/name
    python benchmarks/serving.py --model=FOLDER --clients=32 --rows=32 --seconds=60

The server is `lte-jax serve` in a process of its own. First one client asks, one request after the
other; then --clients of them, each with its own prompt and length, for as long, beside some that
send nonsense and some that leave before their answer ends. Every answer is compared with
`lte_jax.generate_text` of its prompt alone, greedy. Prints a line; ends with 1 if an answer differs
or is missing, or a row is not free at the end.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import jax

import lte_jax
from lte_jax import config
from lte_jax.errors import cli_errors
from lte_jax.files import Mirror, atomic_write

SUBJECTS = ("The sea", "In 1969", "A good recipe", "My neighbour", "The theorem", "Once", "Trains")


class Client:
    """Asks the server at a port, and keeps what it is told."""

    def __init__(self, port: int, prompt: str, tokens: int):
        self.port, self.prompt, self.tokens = port, prompt, tokens
        self.answers: list[tuple[str, int]] = []  # text, new tokens

    def ask(self, body: dict) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        with contextlib.closing(connection):
            head = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), head)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def run(self, until: float) -> None:
        """Asks until then, one request after the other."""
        while time.monotonic() < until:
            body = {"prompt": self.prompt, "max_tokens": self.tokens, "temperature": 0}
            status, answer = self.ask(body)
            if status != 200:
                raise SystemExit(f"{self.prompt!r}: status {status}: {answer}")
            text = answer["choices"][0]["text"]
            self.answers.append((text, answer["usage"]["completion_tokens"]))

    def refused(self, until: float) -> int:
        """Sends nonsense until then; how often it was refused as it should be."""
        count = 0
        while time.monotonic() < until:
            for body in ({"prompt": 5}, {"prompt": "a", "max_tokens": -1}, {"promt": "a"}):
                assert self.ask(body)[0] == 400
                count += 1
            time.sleep(0.5)
        return count

    def leave(self, until: float) -> int:
        """Asks for a long text and leaves after its first piece, until then; how often."""
        count = 0
        while time.monotonic() < until:
            with socket.create_connection(("127.0.0.1", self.port)) as connection:
                body = {"prompt": self.prompt, "max_tokens": 400, "stream": True}
                data = json.dumps(body).encode()
                head = (
                    "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                )
                connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
                connection.recv(100)
            count += 1
            time.sleep(1)
        return count


@contextlib.contextmanager
def server(flags: argparse.Namespace) -> Iterator[int]:
    """A server in a process of its own; yields its port."""
    words = [sys.executable, "-m", "lte_jax.serve", flags.model, "--port=0"]
    words += [f"--rows={flags.rows}", f"--queue={flags.clients}"]
    words += [f"--{name}={value}" for name in ("dtype", "quantize") if (value := vars(flags)[name])]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        found = re.search(r":(\d+)\n", line)
        if found is None:
            raise SystemExit(f"the server did not start: {line}")
        try:
            yield int(found[1])
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


def metrics(port: int) -> dict[str, float]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    return {k: float(v) for k, v in re.findall(r"^lte_jax_(\w+) (\S+)$", text, re.MULTILINE)}


def measured(port: int, clients: list[Client], seconds: float) -> dict:
    """Tokens a second of one client, then of all; and how the others fared."""
    for client in clients[:2]:  # compiles
        client.run(time.monotonic() + 0.1)
        client.answers.clear()
    start = time.monotonic()
    clients[0].run(start + seconds)
    alone = sum(n for _, n in clients[0].answers) / (time.monotonic() - start)
    with concurrent.futures.ThreadPoolExecutor(len(clients) + 2) as pool:
        warm = [pool.submit(client.run, time.monotonic() + 1) for client in clients]
        [future.result() for future in warm]
        before, start = metrics(port), time.monotonic()
        going = [pool.submit(client.run, start + seconds) for client in clients]
        refused = pool.submit(clients[0].refused, start + seconds)
        left = pool.submit(clients[0].leave, start + seconds)
        [future.result() for future in going]
        taken = time.monotonic() - start
        after = metrics(port)
    gained = {name: after[name] - before.get(name, 0) for name in after}
    ended = time.monotonic() + 10
    while metrics(port)["texts_running"] and time.monotonic() < ended:
        time.sleep(0.05)
    return {
        "tokens_per_second_alone": alone,
        "tokens_per_second": gained["new_tokens_total"] / taken,
        "read": gained["experts_read_total"] / max(1, gained["decoding_steps_total"]),
        "rows_at_once": gained["new_tokens_total"] / max(1, gained["decoding_steps_total"]),
        "refused": refused.result(),
        "left": left.result(),
        "still_running": metrics(port)["texts_running"],
    }


def differing(flags: argparse.Namespace, clients: list[Client]) -> list[str]:
    """Answers that are not what `generate_text` says."""
    model, params = lte_jax.load(flags.model, flags.dtype)
    if flags.quantize:
        params = lte_jax.quantize(model, params, flags.quantize)
    tokenizer, wrong = lte_jax.load_tokenizer(flags.model), []
    for client in clients:
        how = {"max_new_tokens": client.tokens}
        expected = lte_jax.generate_text(model, params, tokenizer, client.prompt, **how)
        wrong += [text for text, _ in client.answers if text != expected]
    return wrong


@cli_errors()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count = parser.add_argument, config.flag(config.Count)
    add("--model", required=True, help="folder or hub id")
    add("--clients", type=count, default=32)
    add("--rows", type=count, default=32, help="texts that the server continues together")
    add("--seconds", type=count, default=60, help="of each of the two parts")
    add("--dtype", choices=["float32", "bfloat16"], help="default: as stored")
    add("--quantize", choices=["int8", "int4"])
    add("--json", help="file for the figures")
    flags = Mirror.add_to(parser).parse_args()
    with server(flags) as port:
        clients = []
        for i in range(flags.clients):
            prompt = f"{SUBJECTS[i % len(SUBJECTS)]} {'and then ' * (i % 5)}number {i}"
            clients.append(Client(port, prompt, 8 + 11 * i % 56))
        row = measured(port, clients, flags.seconds)
    wrong = differing(flags, clients)
    row |= {"answers": sum(len(c.answers) for c in clients), "differing": len(wrong)}
    row |= {"clients": flags.clients, "rows": flags.rows, "model": flags.model}
    fewest = min(len(client.answers) for client in clients)
    print(
        f"{row['answers']} answers to {flags.clients} clients, {fewest} or more each, "
        f"{len(wrong)} of them not those of the prompt alone; {row['refused']} bad requests "
        f"refused, {row['left']} clients left, {row['still_running']:.0f} texts still running; "
        f"{row['tokens_per_second']:.4g} tokens/s, {row['rows_at_once']:.3g} texts a step, one at "
        f"a time {row['tokens_per_second_alone']:.4g}; {row['read']:.1%} of the experts read"
    )
    if flags.json:
        record = {"benchmark": "serving", "row": row, "device": jax.devices()[0].device_kind}
        atomic_write(flags.json, json.dumps(record, indent=1) + "\n")
    raise SystemExit(bool(wrong or not fewest or row["still_running"]))


if __name__ == "__main__":
    main()
