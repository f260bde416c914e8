"""The server: real requests over a socket, each answered as its text would be alone."""

import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import hf_folders
import pytest
from random_models import make

import lte_jax
from lte_jax import data
from lte_jax.cli import main
from lte_jax.data import tokenize
from lte_jax.generation import engine as rooms
from lte_jax.generation.engine import Engine

uvicorn = pytest.importorskip("uvicorn", reason="needs the extra `serve`")
pytest.importorskip("fastapi", reason="needs the extra `serve`")

from lte_jax.serve.app import Continuation, Limits, make_app  # noqa: E402

LIMITS = Limits(prompt=100, new=120, queue=6, body=4000, default_new=20)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def model():
    return make(vocab_size=259, max_length=256, eos_ids=(10,))


@pytest.fixture(scope="module")
def tokenizer():
    made = data.byte_tokenizer()
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def server(model, tokenizer):
    with serving(Engine(*model, rows=4), tokenizer) as found:
        yield found


@contextlib.contextmanager
def serving(engine, tokenizer, limits=LIMITS):
    """A server of this process, at the port of the socket; yields its state and an asker."""
    app = make_app(engine, tokenizer, "small", limits)
    how = uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5)
    bound, running = how.bind_socket(), uvicorn.Server(how)
    bound.listen()
    thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        yield Asker(bound.getsockname()[1], app.state.server)
    finally:
        running.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive() and not app.state.server.worker.is_alive()


@dataclasses.dataclass
class Asker:
    port: int
    state: object

    def ask(self, path, body=None, method=None):
        """The status and the JSON of an answer, or its text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        method = method or ("GET" if body is None else "POST")
        body = body if isinstance(body, bytes | None) else json.dumps(body)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        is_json = answer.headers["Content-Type"] == "application/json"
        return answer.status, json.loads(text) if is_json else text

    def complete(self, prompt, path="/v1/completions", **settings):
        status, answer = self.ask(path, {"prompt": prompt} | settings)
        assert status == 200, answer
        return answer

    def events(self, path, body):
        """The events of a stream."""
        status, text = self.ask(path, body | {"stream": True})
        assert status == 200 and text.endswith("data: [DONE]\n\n")
        lines = text.split("\n\n")[:-2]
        return [json.loads(line.removeprefix("data: ")) for line in lines]


def alone(model, tokenizer, prompt, chat=False, **settings):
    settings = {"max_new_tokens": 20} | settings
    return lte_jax.generate_text(*model, tokenizer, prompt, chat=chat, **settings)


def test_a_completion(server, model, tokenizer):
    answer = server.complete("Once upon", max_tokens=30, temperature=0)
    [choice] = answer["choices"]
    expected = alone(model, tokenizer, "Once upon", max_new_tokens=30)
    assert choice["text"] == expected and choice["index"] == 0
    assert len(expected) > 4 and choice["finish_reason"] == "length"
    assert answer["object"] == "text_completion" and answer["model"] == "small"
    assert answer["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 30,
        "total_tokens": 40,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    ids = tokenize(["Once upon"], tokenizer)[0].tolist()
    same = server.complete(ids, max_tokens=30, temperature=0, model="small", n=1, user="me")
    assert same["choices"] == answer["choices"]


def test_a_sampled_completion(server, model, tokenizer):
    """By the seed as `generate` has it; without one, another text each time."""
    how = {"temperature": 0.8, "top_p": 0.9}
    got = server.complete("Why", max_tokens=30, seed=5, **how)["choices"][0]["text"]
    assert got == alone(model, tokenizer, "Why", max_new_tokens=30, seed=5, **how)
    assert len({server.complete("Why")["choices"][0]["text"] for _ in range(4)}) > 1


def test_several_prompts(server, model, tokenizer):
    prompts = ["One", "Two and", "3"]
    answer = server.complete(prompts, max_tokens=9, temperature=0)
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [alone(model, tokenizer, p, max_new_tokens=9) for p in prompts]
    assert answer["usage"]["completion_tokens"] == 27
    pieces = server.events(
        "/v1/completions", {"prompt": prompts, "max_tokens": 9, "temperature": 0}
    )
    streamed = ["", "", ""]
    for event in pieces:
        streamed[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert streamed == texts


def test_a_chat(server, model, tokenizer):
    said = [{"role": "system", "content": "Be"}, {"role": "user", "content": "Hi"}]
    body = {"messages": said, "max_completion_tokens": 12, "temperature": 0}
    status, answer = server.ask("/v1/chat/completions", body)
    assert status == 200 and answer["object"] == "chat.completion"
    asked = "<system>Be<user>Hi<assistant>"
    [ids] = tokenize([asked], tokenizer, start=False)
    ends = sorted({*model[0].config.eos_ids, tokenizer.eos_token_id})
    [new] = lte_jax.generate(*model, [ids], max_new_tokens=12, eos_ids=ends)
    expected = lte_jax.generation.decode(tokenizer, ids.tolist() + new)[len(asked) :]
    message = answer["choices"][0]["message"]
    assert message == {"role": "assistant", "content": expected} and expected
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    said[1]["content"] = parts
    with_usage = {"stream_options": {"include_usage": True}}
    events = server.events("/v1/chat/completions", body | with_usage)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    *texts, last, told = events[1:]
    assert "".join(e["choices"][0]["delta"]["content"] for e in texts) == expected
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == answer["choices"][0]["finish_reason"]
    assert told["usage"] == answer["usage"] and told["choices"] == []
    assert {e["object"] for e in events} == {"chat.completion.chunk"}


def test_a_text_ends_at_its_stop(server, model, tokenizer):
    whole = alone(model, tokenizer, "Go on", max_new_tokens=60)
    stop = whole[10:13]
    cut = whole[: whole.index(stop)]
    body = {"prompt": "Go on", "max_tokens": 60, "temperature": 0, "stop": ["@@@@@@", stop]}
    answer = server.complete(**body)
    assert answer["choices"][0]["text"] == cut and answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < 60
    events = server.events("/v1/completions", body)
    assert "".join(e["choices"][0]["text"] for e in events) == cut
    wait_until(lambda: not server.state.engine.running)


def test_pieces_never_show_what_a_stop_takes_back(tokenizer):
    text = Engine(*make(vocab_size=259)).text([256, 65], max_new_tokens=50)
    one = Continuation(tokenizer, text, ["abc", "cab"])
    pieces = [one.take([ord(c)], None) for c in "xabaéca"[:4]]
    assert pieces == ["x", "", "", "ab"]  # a; ab; aba: only the last a may begin a stop
    assert [one.take([b], None) for b in "é".encode()] == ["", "aé"]
    assert one.take([ord("c")], None) == "" and one.take([ord("a")], None) == ""
    assert one.take([ord("b")], None) == "" and one.end == "stop"


def test_an_end_of_text(server, model, tokenizer):
    """The prompt is one after which the model soon writes the token that ends it."""
    ends = 0
    for i in range(8):
        ids = tokenize([f"Prompt {i}"], tokenizer)[0].tolist()
        [new] = lte_jax.generate(*model, [ids], max_new_tokens=100)
        [choice] = server.complete(ids, max_tokens=100, temperature=0)["choices"]
        assert choice["finish_reason"] == ("stop" if new[-1] == 10 else "length")
        ends += new[-1] == 10
    assert ends
    ends = 0
    for i in range(8):
        body = {"messages": [{"role": "user", "content": f"{i}"}], "max_tokens": 100}
        status, answer = server.ask("/v1/chat/completions", body | {"temperature": 0})
        [choice] = answer["choices"]
        assert status == 200
        expected = alone(model, tokenizer, f"{i}", chat=True, max_new_tokens=100)
        assert choice["message"]["content"] == expected
        ends += choice["finish_reason"] == "stop"
    assert ends


def test_many_clients_at_once(server, model, tokenizer):
    """Each gets its own text, while others come and go; some leave before the end."""
    clients = [(f"Client {i} says {'so ' * (i % 7)}", 5 + 7 * (i % 9)) for i in range(24)]

    def one(client):
        prompt, count = client
        for _ in range(200):
            status, answer = server.ask(
                "/v1/completions", {"prompt": prompt, "max_tokens": count, "temperature": 0}
            )
            if status == 200:
                return answer["choices"][0]["text"]
            assert status == 429 and answer["error"]["type"] == "rate_limit_error"
            time.sleep(0.1)

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        going = [pool.submit(one, client) for client in clients]
        for _ in range(3):
            leave(server, {"prompt": "I shall not wait", "max_tokens": 120, "stream": True})
        texts = [future.result() for future in going]
    assert texts == [alone(model, tokenizer, p, max_new_tokens=n) for p, n in clients]


def leave(server, body):
    """Asks, and goes before the answer ends."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\n"
        head += "Content-Type: application/json\r\n\r\n"
        connection.sendall(head.encode() + data)
        if body.get("stream"):
            connection.recv(1000)
        else:
            time.sleep(0.3)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(model, tokenizer, stream):
    limits = dataclasses.replace(LIMITS, new=10_000)
    engine = Engine(model[0].clone(config=dataclasses.replace(model[0].config, eos_ids=(),
        max_length=16_384)), model[1], rows=2)  # fmt: skip
    with serving(engine, tokenizer, limits) as server:
        dropped = server.state.worker.spent.dropped
        leave(server, {"prompt": "Long", "max_tokens": 10_000, "stream": stream})
        wait_until(lambda: server.state.worker.spent.dropped == dropped + 1)
        wait_until(lambda: not engine.running)
        assert engine.steps < 9_000


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


WRONG = [
    ({}, 400, "prompt", "Field required"),
    ({"prompt": "a", "temprature": 1}, 400, "temprature", "unknown, or not supported"),
    ({"prompt": "a", "temperature": "hot"}, 400, "temperature", "number"),
    ({"prompt": "a", "temperature": -1}, 400, "temperature", "greater than or equal to 0"),
    ({"prompt": "a", "top_p": 0}, 400, "top_p", "greater than 0"),
    ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    ({"prompt": "a", "max_tokens": 121}, 400, "max_tokens", "expected at most 120"),
    ({"prompt": "a" * 101}, 400, "prompt", "has 102 tokens: expected at most 100"),
    ({"prompt": ""}, 200, None, ""),  # <s> alone
    ({"prompt": []}, 400, "prompt", ""),
    ({"prompt": [1, 999]}, 400, "prompt", "token id 999"),
    ({"prompt": [1, "a"]}, 400, "prompt", ""),
    ({"prompt": "a", "n": 2}, 400, "n", "1"),
    ({"prompt": "a", "logprobs": 5}, 400, "logprobs", "None"),
    ({"prompt": "a", "frequency_penalty": 0.5}, 400, "frequency_penalty", ""),
    ({"prompt": "a", "frequency_penalty": 0, "presence_penalty": 0.0}, 200, None, ""),
    ({"prompt": "a", "stop": ""}, 400, "stop", "a character or more"),
    ({"prompt": "a", "seed": -1}, 400, "seed", ""),
    ({"prompt": "a", "model": "large"}, 404, "model", "expected 'small'"),
    (b"{", 400, None, "JSON"),
    (b"[1]", 400, None, ""),
    (b'{"prompt": "a", "temperature": NaN}', 400, "temperature", "finite"),
    (b'{"prompt": "\\ud800"}', 200, None, ""),  # half a character, read as U+FFFD
    ({"prompt": "a" * 5000}, 413, None, "at most 4000 bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "param", "words"), WRONG)
def test_bad_requests(server, body, status, param, words):
    if isinstance(body, dict) and status == 200:
        body = body | {"max_tokens": 2}
    got, answer = server.ask("/v1/completions", body)
    assert got == status, answer
    if status != 200:
        error = answer["error"]
        assert error["type"] == "invalid_request_error" and words in error["message"]
        assert param is None or error["param"] == param
        assert "\n" not in error["message"] and len(error["message"]) < 500


def test_bad_chats(server):
    for messages, words in (
        ([], "at least 1"),
        ([{"role": "robot", "content": "a"}], "role"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "'text'"),
        ([{"role": "user", "content": "a" * 200}], "expected at most 100"),
    ):
        status, answer = server.ask("/v1/chat/completions", {"messages": messages})
        assert status == 400 and words in answer["error"]["message"], answer
    said = [{"role": "user", "content": "a"}]
    status, answer = server.ask("/v1/chat/completions", {"messages": said, "tools": [{"a": 1}]})
    assert status == 400 and answer["error"]["param"] == "tools"


def test_a_tokenizer_without_a_chat_template(model):
    with serving(Engine(*model, rows=1), data.byte_tokenizer()) as server:
        said = [{"role": "user", "content": "a"}]
        status, answer = server.ask("/v1/chat/completions", {"messages": said})
    assert status == 400 and "has no chat template" in answer["error"]["message"]


def test_a_body_of_unknown_length_is_bounded(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    pieces = (b'{"prompt": "', *[b"a" * 1000] * 9, b'"}')
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", iter(pieces), headers, encode_chunked=True)
    answer = connection.getresponse()
    assert answer.status == 413 and b"at most 4000 bytes" in answer.read()
    connection.close()


def test_other_paths(server):
    assert server.ask("/health") == (200, {"status": "ok"})
    status, answer = server.ask("/v1/models")
    assert status == 200 and [m["id"] for m in answer["data"]] == ["small"]
    status, answer = server.ask("/v1/nothing")
    assert status == 404 and answer["error"]["message"] == "Not Found"
    assert server.ask("/v1/completions")[0] == 405


def test_metrics(server):
    def read():
        status, text = server.ask("/metrics")
        assert status == 200
        pairs = re.findall(r"^lte_jax_(\S+) ([\d.e+]+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in pairs}

    before = read()
    server.complete("Counted", max_tokens=11, temperature=0)
    after = read()
    gained = {name: after[name] - before[name] for name in after if name in before}
    long = {"prompt": "a" * 5000}
    assert server.ask("/v1/completions", long)[0] == 413
    assert read()['requests_total{status="413"}'] >= 1
    assert gained["new_tokens_total"] == 11 and gained["prompt_tokens_total"] == 8
    assert gained["decoding_steps_total"] == 10 and gained['requests_total{status="200"}'] == 2
    assert 0 < gained["experts_read_total"] < 10 and after["texts_running"] == 0


@pytest.mark.parametrize("where", ["_read", "_step", "joined"])
def test_a_failed_step_ends_its_texts_alone(where, model, tokenizer, monkeypatch):
    """Whether it reads a prompt, lets a text join, or continues some."""

    def broken(*args, **how):
        raise MemoryError

    engine = Engine(*model, rows=2)
    with serving(engine, tokenizer) as server:
        with monkeypatch.context() as patch:
            patch.setattr(rooms, where, broken)
            status, answer = server.ask("/v1/completions", {"prompt": "a", "max_tokens": 5})
        assert status == 500 and answer["error"]["type"] == "server_error"
        assert len(server.complete("a", max_tokens=5)["choices"][0]["text"]) >= 1
        assert server.ask("/health")[0] == 200


def test_what_a_text_leaves_cannot_be_kept(model, tokenizer, monkeypatch):
    """It has its answer, and the next one, too."""

    def broken(*args, **how):
        raise MemoryError

    with serving(Engine(*model, rows=2), tokenizer) as server, monkeypatch.context() as patch:
        patch.setattr(rooms, "Prefix", broken)
        for _ in range(2):
            answer = server.complete("a" * 20, max_tokens=5)
            assert answer["choices"][0]["finish_reason"] == "length"
        assert server.ask("/health")[0] == 200


def test_too_many_texts(model, tokenizer):
    """Beyond the rows and the queue: 429, and nothing of it is computed."""
    limits = dataclasses.replace(LIMITS, queue=2)
    with serving(Engine(*model, rows=1), tokenizer, limits) as server:
        status, answer = server.ask("/v1/completions", {"prompt": ["a"] * 4, "max_tokens": 2})
        assert status == 429 and "ask again later" in answer["error"]["message"]
        assert server.ask("/v1/completions", {"prompt": ["a"] * 3, "max_tokens": 2})[0] == 200


def test_the_command(tmp_path):
    """It says where it serves, serves, and ends at a signal."""
    folder = hf_folders.of_bytes(tmp_path / "model")
    words = [sys.executable, "-m", "lte_jax.serve", str(folder), "--port=0", "--rows=2"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        port = int(re.fullmatch(r"serving model at http://127.0.0.1:(\d+)\n", line)[1])
        asker = Asker(port, None)
        answer = asker.complete("Hello", max_tokens=5, temperature=0)
        model, params = lte_jax.load(folder)
        expected = alone((model, params), data.byte_tokenizer(), "Hello", max_new_tokens=5)
        assert answer["choices"][0]["text"] == expected
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) in (0, -signal.SIGTERM)


def test_bad_words(tmp_path, capsys):
    folder = hf_folders.of_bytes(tmp_path / "model")
    for words, said in ((["--rows=0"], "--rows"), (["--places=3"], "places=3"),
                        (["--sparsity=0.5"], "sparsity")):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            main(["serve", str(folder), *words])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err.splitlines()[-1]
