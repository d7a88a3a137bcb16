"""Graceful stop: signals set a cause, handlers are restored, and a second Ctrl-C aborts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from lora_accel.errors import Aborted
from lora_accel.training import stopping
from lora_accel.training.stopping import SIGNALS, Stop, abort_on_signal, handle_stop_signals
from tests.conftest import ROOT

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    """Install handlers that do nothing, since pytest may run under nohup, and restore its own after the test."""
    before = {number: signal.signal(number, lambda *_: None) for number in HANDLED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def send(number: int) -> None:
    """Send a signal to this process, and wait until Python has handled it."""
    os.kill(os.getpid(), number)
    time.sleep(0.01)


def test_no_signal_gives_no_cause() -> None:
    with handle_stop_signals(None) as stop:
        assert stop.cause() is None


@pytest.mark.parametrize("number", HANDLED, ids=lambda number: number.name)
def test_cause_is_the_name_of_the_signal(number: signal.Signals) -> None:
    with handle_stop_signals(None) as stop:
        send(number)
        assert stop.cause() == number.name
        assert stop.cause() == number.name, "the cause is kept"


def test_first_cause_is_kept() -> None:
    with handle_stop_signals(1e-9) as stop:
        send(signal.SIGUSR1)
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert stop.cause() == "SIGUSR1"


def test_repeated_sigint_within_the_debounce_time_is_one_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal sends it to all processes, and the launcher forwards its own."""
    monkeypatch.setattr(stopping, "DEBOUNCE_SECONDS", 3600.0)
    with handle_stop_signals(None) as stop:
        try:
            for _ in range(3):
                send(signal.SIGINT)
        except KeyboardInterrupt:
            pytest.fail("aborted")
        assert stop.cause() == "SIGINT"
        monkeypatch.setattr(stopping, "DEBOUNCE_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_debounce_time_is_about_a_second() -> None:
    assert 0.5 <= stopping.DEBOUNCE_SECONDS <= 2


def test_other_signals_may_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedulers repeat their signals; only Ctrl-C aborts."""
    monkeypatch.setattr(stopping, "DEBOUNCE_SECONDS", 0.0)
    with handle_stop_signals(None) as stop:
        for _ in range(3):
            send(signal.SIGTERM)
        assert stop.cause() == "SIGTERM"


def test_second_ctrl_backslash_aborts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "DEBOUNCE_SECONDS", 0.0)
    with handle_stop_signals(None) as stop:
        send(signal.SIGQUIT)
        assert stop.cause() == "SIGQUIT"
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGQUIT)


@pytest.mark.parametrize("error", [None, ValueError("a bug"), KeyboardInterrupt()], ids=["end", "error", "abort"])
def test_handlers_are_restored(error: BaseException | None) -> None:
    received = []
    signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with contextlib.suppress(ValueError, KeyboardInterrupt), handle_stop_signals(None) as stop:
        during = {number: signal.getsignal(number) for number in SIGNALS}
        if error is not None:
            raise error
    assert all(during[number] == stop.handle for number in SIGNALS)
    assert {number: signal.getsignal(number) for number in SIGNALS} == before
    send(signal.SIGUSR1)
    assert received == [signal.SIGUSR1]
    assert stop.cause() is None


def test_signal_after_the_block_kills() -> None:
    code = (
        "import os, signal\n"
        "from lora_accel.training.stopping import handle_stop_signals\n"
        "with handle_stop_signals(None) as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(stop.cause(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('not dead')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (ran.returncode, ran.stdout) == (-signal.SIGTERM, "SIGTERM\n"), ran.stderr


def test_sighup_stays_ignored_under_nohup() -> None:
    code = (
        "import os, signal\n"
        "from lora_accel.training.stopping import handle_stop_signals\n"
        "with handle_stop_signals(None) as stop:\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    print(stop.cause())\n"
        "os.kill(os.getpid(), signal.SIGHUP)\n"
        "print('alive')\n"
    )
    command = ["nohup", sys.executable, "-c", code]
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (ran.returncode, ran.stdout) == (0, "None\nalive\n"), ran.stderr


def test_max_hours_sets_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    with monkeypatch.context() as patched:
        patched.setattr(stopping.time, "monotonic", lambda: clock[0])
        stop = Stop(max_hours=2.0)
        clock[0] = 7199.0
        assert stop.cause() is None
        clock[0] = 7200.0
        assert stop.cause() == "training.max_hours"
    assert Stop(max_hours=None).cause() is None
    assert Stop(max_hours=1.0).cause() is None


def test_only_max_hours_works_outside_the_main_thread() -> None:
    """Python allows signal handlers only in the main thread."""
    causes: list[object] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def work() -> None:
        try:
            with handle_stop_signals(1e-12) as stop:
                causes.append(stop.cause())
                causes.append({number: signal.getsignal(number) for number in SIGNALS} == before)
        except BaseException as error:
            causes.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert causes == ["training.max_hours", True]


# --- printed messages


def test_first_signal_prints_its_effect_once(capfd: pytest.CaptureFixture[str]) -> None:
    with handle_stop_signals(None, reports=True):
        send(signal.SIGINT)
        send(signal.SIGTERM)
    assert capfd.readouterr().err == "finishing this step, then saving; press Ctrl-C again to abort\n"
    with handle_stop_signals(None, reports=True):
        send(signal.SIGTERM)
        send(signal.SIGINT)
    assert capfd.readouterr().err == "SIGTERM: finishing this step, then saving\n"


def test_nothing_is_printed_without_reports(capfd: pytest.CaptureFixture[str]) -> None:
    with handle_stop_signals(None) as stop:
        send(signal.SIGINT)
        assert stop.cause() == "SIGINT"
    assert capfd.readouterr() == ("", "")


def test_message_is_printed_during_a_write_of_the_main_thread() -> None:
    """Python raises an error for a write to a stream within another write to it."""
    code = (
        "import io, os, signal, sys\n"
        "from lora_accel.training.stopping import handle_stop_signals\n"
        "class Raw(io.FileIO):\n"
        "    def write(self, data):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        return super().write(data)\n"
        "sys.stderr = io.TextIOWrapper(io.BufferedWriter(Raw(2, 'w')), write_through=True)\n"
        "with handle_stop_signals(None, reports=True):\n"
        "    print('a line', file=sys.stderr, flush=True)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert sorted(ran.stderr.splitlines()) == [
        "a line",
        "finishing this step, then saving; press Ctrl-C again to abort",
    ]
    assert ran.returncode == 0


def test_forwarded_sigint_does_not_interrupt_the_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "DEBOUNCE_SECONDS", 0.2)
    with handle_stop_signals(None) as stop:
        send(signal.SIGINT)
        time.sleep(0.3)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        send(signal.SIGINT)  # forwarded by the launcher
        assert stop.cause() == "SIGINT"


# --- before training starts


@pytest.mark.parametrize("number", HANDLED, ids=lambda number: number.name)
def test_signal_before_training_aborts_the_command(number: signal.Signals) -> None:

    def command() -> None:
        with abort_on_signal():
            try:
                send(number)
            except Exception:  # libraries catch these
                pytest.fail("caught")
            finally:
                send(number)  # ignored during the cleanup

    with pytest.raises(Aborted, match=f"stopped by {number.name} before training started") as caught:
        command()
    assert caught.value.exit_code == {signal.SIGINT: 130, signal.SIGQUIT: 131}.get(number, 143)


@pytest.mark.parametrize(("second", "code"), [(signal.SIGINT, 130), (signal.SIGQUIT, 131), (signal.SIGTERM, None)])
def test_second_ctrl_c_before_training_ends_the_process_at_once(
    monkeypatch: pytest.MonkeyPatch, second: signal.Signals, code: int | None
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(stopping, "DEBOUNCE_SECONDS", 0.1)
    monkeypatch.setattr(stopping.os, "_exit", codes.append)
    with abort_on_signal():
        with pytest.raises(Aborted):
            send(signal.SIGINT)
        send(second)  # the launcher sends what the terminal sends
        assert codes == []
        time.sleep(0.2)
        send(second)
    assert codes == ([] if code is None else [code])


def test_signal_before_training_ends_a_main_thread_that_waits_in_a_library() -> None:
    """A rank used to wait for another one that stood still, for half an hour, and no signal ended it."""
    program = """
import ctypes, os, signal, threading
from lora_accel.training import stopping
stopping.ABORT_SECONDS = 0.1
mutex = ctypes.create_string_buffer(64)
with stopping.abort_on_signal():
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGTERM]).start()
    ctypes.CDLL(None).pthread_mutex_lock(mutex)  # as a collective does: it returns to its wait after the signal
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 143
    assert ended.stderr == "stopped by SIGTERM before training started; run the same command to start again\n"


def test_time_limit_of_an_abort_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "ABORT_SECONDS", 0.05)
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    for _ in range(3):
        with pytest.raises(Aborted), abort_on_signal():
            send(signal.SIGTERM)
    time.sleep(0.2)
    assert exits == []


def test_signals_after_training_are_ignored() -> None:
    with abort_on_signal():
        with handle_stop_signals(None) as stop:
            send(signal.SIGTERM)
            assert stop.cause() == "SIGTERM"
        send(signal.SIGTERM)  # ignored after training
    with abort_on_signal(), pytest.raises(Aborted):
        send(signal.SIGTERM)


def test_handlers_are_restored_after_the_command() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with abort_on_signal(), handle_stop_signals(None):
        pass
    assert {number: signal.getsignal(number) for number in SIGNALS} == before
