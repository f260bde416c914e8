"""Runs the cases that stdin names, one a line, and answers on stdout; __main__.py supervises it.

A case must end in success or in a `UserError` of one line. While it runs, warnings are errors, the
memory it may take is limited, and what Python opens for writing, renames or removes outside the
folders given to it, starts or connects to is noted.
"""

import contextlib
import faulthandler
import io
import json
import os
import pathlib
import random
import resource
import shutil
import sys
import traceback
import warnings

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]  # tiny.py and hf_models.py; the project

MEMORY = 2 << 30  # bytes more than before the case
MESSAGE = 500  # characters
PROGRAMS = ("git",)  # the report says which commit ran
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PATHS_OF = {  # audit event -> where in its arguments each path and its folder's descriptor are
    "os.mkdir": [(0, 2)],
    "os.rmdir": [(0, 1)],
    "os.remove": [(0, 1)],
    "os.chmod": [(0, 2)],
    "os.chown": [(0, 3)],
    "os.truncate": [(0, None)],
    "os.rename": [(0, 2), (1, 3)],
    "os.link": [(1, 3)],
    "os.symlink": [(1, 2)],
}


class Guard:
    """Notes what Python does outside the folders it may write; for ever, as an audit hook is."""

    def __init__(self, always: list[pathlib.Path]):
        self.always = [str(path) for path in always]
        self.allowed: list[str] = []
        self.noted: list[str] = []
        self.on = False
        sys.addaudithook(self._hear)

    @contextlib.contextmanager
    def watching(self, writes):
        """Within it, only below `writes` may be written (and hidden files beside them)."""
        self.allowed = []
        for path in writes:
            with contextlib.suppress(ValueError):  # lone surrogates are no path anywhere
                self.allowed.append(os.path.realpath(path))
        self.noted, self.on = [], True
        try:
            yield
        finally:
            self.on = False

    def _hear(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = args
            writes = any(letter in mode for letter in "wax+") if mode else (flags or 0) & WRITING
            if writes and not isinstance(path, int):
                self._check(event, path, None)
        elif event in PATHS_OF:
            for at, descriptor in PATHS_OF[event]:
                self._check(event, args[at], None if descriptor is None else args[descriptor])
        elif event in ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.system"):
            if os.path.basename(str(args[0])) not in PROGRAMS:
                self.noted.append(f"{event} {args[0]}")
        elif event in ("socket.connect", "socket.getaddrinfo"):
            self.noted.append(f"{event} {args[1:]}")

    def _check(self, event: str, path, descriptor) -> None:
        with contextlib.suppress(OSError, ValueError, TypeError):
            base = os.getcwd()
            if isinstance(descriptor, int) and descriptor >= 0:
                base = os.readlink(f"/proc/self/fd/{descriptor}")
            place = os.path.realpath(os.path.join(base, os.fsdecode(path)))
            if event == "os.mkdir" and os.path.isdir(place):  # mkdir(exist_ok=True)
                return
            if any(place == root or place.startswith(root + "/") for root in self.always):
                return
            for root in self.allowed:
                folder, name = os.path.split(root)
                beside = os.path.join(folder, f".{name}")  # where it is made whole, then renamed
                if place == root or place.startswith((root + "/", beside)):
                    return
                if event in ("os.mkdir", "os.rmdir") and root.startswith(place + "/"):
                    return  # its parents; one that was made and stays is in the box afterwards
            self.noted.append(f"{event} {place}")


def snapshot(box: pathlib.Path, writes) -> dict[str, tuple]:
    """Size, time and kind of all that lies in a folder, `writes` left out."""
    found = {}
    for folder, folders, files in os.walk(box):
        folders[:] = [name for name in folders if pathlib.Path(folder, name) not in writes]
        for path in (pathlib.Path(folder, name) for name in (*folders, *files)):
            if path not in writes:
                status = path.lstat()
                # The time of a folder changes with what is made and removed in it.
                when = 0 if path.is_dir() else status.st_mtime_ns
                found[str(path.relative_to(box))] = status.st_mode, status.st_size, when
    return found


def objection(message: str) -> str | None:
    """Why a refusal is none that a user can read, if so."""
    if not message.strip():
        return "the message is empty"
    if not message.isprintable():
        return "the message has line breaks or control characters"
    return f"the message has {len(message)} characters" if len(message) > MESSAGE else None


def memory(key: str) -> int:
    """A line of /proc/self/status, such as VmHWM, in bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    raise KeyError(key)


def blame(error: BaseException) -> tuple[str, str]:
    """Type of an error with the last line of the project it came through, and a traceback's end."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/lte_jax/" in f.filename or "/kernels/" in f.filename] or frames
    where = "/".join(pathlib.Path(ours[-1].filename).parts[-2:]) + f":{ours[-1].lineno}"
    tail = "".join(traceback.format_exception(error, limit=-6))
    lines = [line[:200] for line in tail.splitlines()]
    return f"{type(error).__name__} at {where}", "\n".join(lines[-20:])


def run(case, box: pathlib.Path, guard: Guard, user_error: type) -> dict:
    """Outcome, signature (what equal failures share), detail and traceback of one case."""
    before = snapshot(box, case.writes)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    held = memory("VmRSS")
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (memory("VmData") + MEMORY + (1 << 29), hard))
    unraisable: list = []
    sys.unraisablehook = lambda hook: unraisable.append(repr(hook.exc_value))
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")),
            contextlib.redirect_stderr(io.StringIO()),
            guard.watching(case.writes),
        ):
            warnings.simplefilter("error")
            told = case.run()
        outcome = "succeeded", "", str(told)[:300], ""
    except user_error as error:
        wrong = objection(str(error))
        signature, tail = blame(error)
        outcome = "refused", "", str(error), tail
        if wrong:
            outcome = "failed", f"message of {signature}", f"{wrong}: {str(error)[:300]!r}", tail
    except BaseException as error:  # whatever it is, it is a finding
        signature, tail = blame(error)
        outcome = "failed", signature, f"{type(error).__name__}: {str(error)[:300]!r}", tail
    peak = memory("VmHWM") - held
    after = snapshot(box, case.writes)
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    for wrong, detail in (
        ("wrote outside", ", ".join(guard.noted)),
        ("changed files", ", ".join(changed)),
        ("memory", f"{peak >> 20} MiB more" if peak > MEMORY else ""),
        ("ignored exception", ", ".join(unraisable)),
    ):
        if detail and outcome[0] != "failed":
            signature = f"{wrong}: {detail[:40]}"
            outcome = "failed", signature, f"{wrong}: {detail[:300]}", outcome[3]
    return dict(zip(("outcome", "signature", "detail", "traceback"), outcome, strict=True))


def main(root: pathlib.Path) -> None:
    """Answers each "kind seed number" of stdin with what the case is, then with its outcome."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print goes to the log
    trace = (root / "trace").open("w")
    faulthandler.enable(trace)
    faulthandler.register(10, trace)  # SIGUSR1, before the supervisor ends a case that hangs
    import calls
    import files

    import lte_jax

    kinds = {kind.__name__: kind for kind in (*files.KINDS, *calls.KINDS)}
    files.prepare(root / "templates")
    guard = Guard(
        [root / "tmp", pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]), "/dev/null"]
    )

    def answer(**fields):
        print(json.dumps(fields), file=answers, flush=True)

    answer(ready=True)
    for line in sys.stdin:
        kind, seed, number = line.split()
        box = root / "box"
        os.chdir(root)
        shutil.rmtree(box, ignore_errors=True)
        box.mkdir()
        os.chdir(box)
        case = kinds[kind](random.Random(f"{kind}:{seed}:{number}"), box)
        answer(what=case.what.encode("ascii", "backslashreplace").decode()[:400])
        sys.stdin.readline()
        answer(**run(case, box, guard, lte_jax.UserError), rss=memory("VmRSS"))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
