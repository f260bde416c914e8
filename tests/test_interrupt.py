"""Signals end a program at a safe point, with the code of the signal and one line."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lte_jax import interrupt


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_waits_for_the_next_check(number, code, capsys):
    before = signal.getsignal(number)
    reached = []
    with pytest.raises(SystemExit) as stopped, interrupt.handled("all is saved"):
        interrupt.check("before it came")
        os.kill(os.getpid(), number)
        reached.append("the save went on to its end")
        assert interrupt.requested()
        interrupt.check("while testing")
        reached.append("never")
    assert reached == ["the save went on to its end"]
    assert stopped.value.code == code
    assert capsys.readouterr().err == f"stopped by {number.name} while testing: all is saved\n"
    assert signal.getsignal(number) is before and not interrupt.requested()


def test_a_signal_after_the_last_check_is_not_swallowed(capsys):
    with pytest.raises(SystemExit) as stopped, interrupt.handled("all is saved"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 143
    assert capsys.readouterr().err == "stopped by SIGTERM at its end: all is saved\n"


def test_without_a_handler_check_does_nothing():
    interrupt.check("anywhere")
    with interrupt.handled("all is saved", install=False):
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        interrupt.check("anywhere")


def test_other_threads_leave_signals_alone():
    found = []

    def work():
        with interrupt.handled("all is saved"):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


def test_nested_handlers_tell_once(capsys):
    with pytest.raises(SystemExit), interrupt.handled("outer"), interrupt.handled("inner"):
        os.kill(os.getpid(), signal.SIGTERM)
        interrupt.check("within")
    assert capsys.readouterr().err.count("\n") == 1


def test_a_second_signal_ends_at_once():
    code = (
        "import sys, time\nfrom lte_jax import interrupt\n"
        "with interrupt.handled('all is saved'):\n"
        "    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # `timeout` signals the process and its group
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert err == "stopped at once by a second signal; the same command goes on\n"
