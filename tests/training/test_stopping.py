"""A signal only sets a word; what was there before is put back; whoever cannot wait presses Ctrl-C twice."""

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

TAKEN = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    """Each test begins with handlers that do nothing, even where pytest itself runs under nohup; its own come back."""
    before = {number: signal.signal(number, lambda *_: None) for number in TAKEN}
    yield
    for number, handler in before.items():
        signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def send(number: int) -> None:
    """Send this very process a signal, and let Python take it."""
    os.kill(os.getpid(), number)
    time.sleep(0.01)


def test_nothing_is_asked_as_long_as_nothing_comes() -> None:
    with handle_stop_signals(None) as stop:
        assert stop.cause() is None


@pytest.mark.parametrize("number", TAKEN, ids=lambda number: number.name)
def test_a_signal_is_the_cause_by_its_name(number: signal.Signals) -> None:
    with handle_stop_signals(None) as stop:
        send(number)
        assert stop.cause() == number.name
        assert stop.cause() == number.name, "it stays"


def test_the_first_cause_stays() -> None:
    with handle_stop_signals(1e-9) as stop:
        send(signal.SIGUSR1)
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert stop.cause() == "SIGUSR1"


def test_one_ctrl_c_that_comes_twice_at_once_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal sends it to all processes, and a launcher passes its own on."""
    monkeypatch.setattr(stopping, "TWICE_SECONDS", 3600.0)
    with handle_stop_signals(None) as stop:
        try:
            for _ in range(3):
                send(signal.SIGINT)
        except KeyboardInterrupt:
            pytest.fail("taken for a second one")
        assert stop.cause() == "SIGINT"
        monkeypatch.setattr(stopping, "TWICE_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_launcher_passes_a_ctrl_c_on_within_a_second() -> None:
    assert 0.5 <= stopping.TWICE_SECONDS <= 2


def test_other_signals_may_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler repeats itself; only a person aborts."""
    monkeypatch.setattr(stopping, "TWICE_SECONDS", 0.0)
    with handle_stop_signals(None) as stop:
        for _ in range(3):
            send(signal.SIGTERM)
        assert stop.cause() == "SIGTERM"


@pytest.mark.parametrize("error", [None, ValueError("a bug"), KeyboardInterrupt()], ids=["end", "error", "abort"])
def test_handlers_are_put_back(error: BaseException | None) -> None:
    taken = []
    signal.signal(signal.SIGUSR1, lambda number, frame: taken.append(number))
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with contextlib.suppress(ValueError, KeyboardInterrupt), handle_stop_signals(None) as stop:
        during = {number: signal.getsignal(number) for number in SIGNALS}
        if error is not None:
            raise error
    assert all(during[number] == stop.take for number in SIGNALS)
    assert {number: signal.getsignal(number) for number in SIGNALS} == before
    send(signal.SIGUSR1)
    assert taken == [signal.SIGUSR1]
    assert stop.cause() is None


def test_outside_of_the_block_a_signal_kills_as_ever() -> None:
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


def test_a_hangup_that_nohup_wants_unheard_stays_unheard() -> None:
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


def test_the_hours_end(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_in_another_thread_only_the_hours_count() -> None:
    """Python allows handlers in the main thread alone."""
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


# --- what is shown at once


def test_the_first_signal_shows_once_what_happens(capfd: pytest.CaptureFixture[str]) -> None:
    with handle_stop_signals(None, reports=True):
        send(signal.SIGINT)
        send(signal.SIGTERM)
    assert capfd.readouterr().err == "finishing this step, then saving; press Ctrl-C again to abort\n"
    with handle_stop_signals(None, reports=True):
        send(signal.SIGTERM)
        send(signal.SIGINT)
    assert capfd.readouterr().err == "SIGTERM: finishing this step, then saving\n"


def test_other_processes_of_a_machine_show_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with handle_stop_signals(None) as stop:
        send(signal.SIGINT)
        assert stop.cause() == "SIGINT"
    assert capfd.readouterr() == ("", "")


def test_the_message_gets_out_while_the_main_thread_writes_itself() -> None:
    """Python refuses a second write to a stream from within a write to it."""
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


def test_a_ctrl_c_that_is_passed_on_does_not_disturb_the_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "TWICE_SECONDS", 0.2)
    with handle_stop_signals(None) as stop:
        send(signal.SIGINT)
        time.sleep(0.3)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        send(signal.SIGINT)  # the launcher's
        assert stop.cause() == "SIGINT"


# --- before training starts


@pytest.mark.parametrize("number", TAKEN, ids=lambda number: number.name)
def test_before_training_a_signal_ends_the_command(number: signal.Signals) -> None:

    def command() -> None:
        with abort_on_signal():
            try:
                send(number)
            except Exception:  # as libraries do
                pytest.fail("swallowed")
            finally:
                send(number)  # what follows does not disturb the end

    with pytest.raises(Aborted, match=f"stopped by {number.name} before training started") as caught:
        command()
    assert caught.value.exit_code == (130 if number == signal.SIGINT else 143)


def test_training_takes_over_and_does_not_give_back() -> None:
    with abort_on_signal():
        with handle_stop_signals(None) as stop:
            send(signal.SIGTERM)
            assert stop.cause() == "SIGTERM"
        send(signal.SIGTERM)  # training has ended; what is left is to say so
    with abort_on_signal(), pytest.raises(Aborted):
        send(signal.SIGTERM)


def test_handlers_are_put_back_after_the_command() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with abort_on_signal(), handle_stop_signals(None):
        pass
    assert {number: signal.getsignal(number) for number in SIGNALS} == before
