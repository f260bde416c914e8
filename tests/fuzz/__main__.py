"""Hostile input, seeded: each case must end in success or in one line that a user can read.

    python tests/fuzz --seed 1 --minutes 10              # or: make fuzz
    python tests/fuzz --replay config:1:42               # one case again, with its traceback

Cases run in a process of their own (worker.py). A failure is any other exception, a warning, an end
of that process, a hang, memory beyond 2 GiB, or a file, program or connection that nobody asked
for. Prints a table by kind and each failure with the command that shows it again; exit code 1
where there is one.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
HANG = {"run": 120, "canary": 3}  # seconds of work, or asleep; a run compiles every stage
HANG_OTHERS = 20
BUSY_MACHINE = 3  # so many times longer where other programs take the cores
READY = 240  # seconds a worker may take to start: it compiles
RECYCLE = 3 << 30  # bytes: what was compiled for all cases adds up
SHARES = {  # cases a round, for each kind of files.py and calls.py
    "config": 8, "weights": 8, "lte": 6, "tokenizer": 6, "texts": 12, "settings": 12, "flags": 3,
    "run": 1, "api": 5, "canary": 1,
}  # fmt: skip


class Worker:
    """The process that runs cases; started anew when it has ended."""

    def __init__(self, root: pathlib.Path):
        self.root = root
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        for name in ("tmp", "home"):
            (self.root / name).mkdir(exist_ok=True)
        home = str(self.root / "home")
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", f"{home}/jax")
        quiet = {
            "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache, "HF_HUB_OFFLINE": "1",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "TOKENIZERS_PARALLELISM": "false",
            "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(self.root / "tmp"), "HF_HOME": home,
            "MPLCONFIGDIR": home, "HOME": home,
        }  # fmt: skip
        self.log = (self.root / "log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, HERE / "worker.py", self.root],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, bufsize=0,
            env={"LTE_JAX_CACHE": _kernels()} | os.environ | quiet,
        )  # fmt: skip
        if self.answer(READY) is None:
            raise SystemExit(f"no worker could be started:\n{self.said()}")

    def answer(self, seconds: float) -> dict | None:
        """Its next line; None where it ended, or does not come in `seconds`."""
        deadline = time.monotonic() + seconds
        line = b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                return None
            part = os.read(self.process.stdout.fileno(), 1 << 16)
            if not part:
                return None
            line += part
        return json.loads(line)

    def said(self) -> str:
        """The end of its log and of the stacks it wrote."""
        parts = [self.root / "log", self.root / "trace"]
        return "\n".join(p.read_text(errors="replace")[-1500:] for p in parts if p.exists())

    def run(self, kind: str, seed: int, number: int) -> dict:
        """What a case was and how it ended."""
        if self.process is None:
            self.start()
        self.process.stdin.write(f"{kind} {seed} {number}\n".encode())
        limit = HANG.get(kind, HANG_OTHERS)
        told = self.answer(BUSY_MACHINE * limit)
        if told is None:
            return {"what": "(making it)"} | self._ended("the case could not be made")
        self.process.stdin.write(b"go\n")
        start, work = time.monotonic(), _work(self.process.pid)
        while (result := self.answer(limit)) is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self.process.wait(0.2)
                return told | self._ended(f"the process ended: {code}")
            waited, worked = time.monotonic() - start, _work(self.process.pid) - work
            if worked < 1 or worked > limit or waited > BUSY_MACHINE * limit:
                return told | self._ended(f"hang: {waited:.0f} s, {worked:.0f} s of work")
        if result["rss"] > RECYCLE:
            self.stop()
        return told | result | {"seconds": time.monotonic() - start}

    def _ended(self, why: str) -> dict:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)  # stacks of all threads into the trace
            time.sleep(0.5)
        self.stop()
        return {
            "outcome": "failed", "signature": why.partition(":")[0], "detail": why,
            "traceback": self.said(), "seconds": 0.0,
        }  # fmt: skip

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.log.close()
        self.process = None


def _kernels() -> str:
    """Where this user's CPU kernels are kept: HOME is another for the worker."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return os.path.expanduser(f"{base}/lte_jax")


def _work(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def schedule(kinds: list[str]):
    """(kind, number) without end, each kind as often as its share."""
    counts = collections.Counter()
    while True:
        for turn in range(max(SHARES.values())):
            for kind in kinds:
                if turn < SHARES[kind]:
                    yield kind, counts[kind]
                    counts[kind] += 1


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python tests/fuzz", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--cases", type=int, help="stop after so many")
    parser.add_argument("--kinds", nargs="+", choices=list(SHARES), default=list(SHARES)[:-1])
    parser.add_argument("--replay", metavar="KIND:SEED:NUMBER")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lte_jax-fuzz-") as folder:
        worker = Worker(pathlib.Path(folder))
        try:
            if flags.replay:
                kind, seed, number = flags.replay.split(":")
                return show(worker.run(kind, int(seed), int(number)))
            return fuzz(worker, flags)
        finally:
            worker.stop()


def show(result: dict) -> int:
    for key in ("what", "outcome", "detail", "traceback"):
        print(f"{key}: {result.get(key, '')}")
    return int(result["outcome"] == "failed")


def fuzz(worker: Worker, flags: argparse.Namespace) -> int:
    tally = collections.defaultdict(collections.Counter)
    failures = collections.defaultdict(list)  # (kind, signature) -> [(replay, result)]
    start = time.monotonic()
    for tried, (kind, number) in enumerate(schedule(flags.kinds)):
        over = time.monotonic() - start > 60 * flags.minutes
        if over or (flags.cases is not None and tried >= flags.cases):
            break
        result = worker.run(kind, flags.seed, number)
        tally[kind].update({"tried": 1, result["outcome"]: 1, "seconds": result["seconds"]})
        if result["outcome"] == "failed":
            replay = f"{kind}:{flags.seed}:{number}"
            if not failures[kind, result["signature"]]:
                print(f"\n{replay}  {result['what']}\n  {result['detail']}", flush=True)
                print("  " + result["traceback"].strip().replace("\n", "\n  "))
            failures[kind, result["signature"]].append((replay, result))
    report(tally, failures)
    return int(bool(failures))


def report(tally: dict, failures: dict) -> None:
    """The table by kind, and one line a sort of failure."""
    columns = ("tried", "refused", "succeeded", "failed", "seconds")
    total = sum(tally.values(), collections.Counter())
    print("\n| kind | " + " | ".join(columns) + " |\n|---" * 1 + "|---" * len(columns) + "|")
    for kind, counts in [*tally.items(), ("all", total)]:
        print(f"| {kind} | " + " | ".join(f"{counts[c]:.0f}" for c in columns) + " |")
    for (_, signature), found in sorted(failures.items(), key=lambda item: -len(item[1])):
        replay, result = found[0]
        print(f"\n{len(found)} x {signature}: {result['what'][:160]}\n  {result['detail'][:200]}")
        print(f"  python tests/fuzz --replay {replay}   also {' '.join(r for r, _ in found[1:6])}")


if __name__ == "__main__":
    sys.exit(main())
