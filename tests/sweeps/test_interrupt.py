"""Ctrl-C and SIGTERM: the first ends, the second waits, the third leaves."""

from __future__ import annotations

import signal
import threading

import pytest

from servelab.core.interrupt import Interruptions, Terminated, taking

BOTH = pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)


@BOTH
def test_the_first_raises_the_second_is_answered_the_third_raises(
    number: int, error: type[BaseException], capfd: pytest.CaptureFixture[str]
) -> None:
    interruptions = Interruptions()
    written = []
    with taking(interruptions):
        with pytest.raises(error) as raised:
            try:
                signal.raise_signal(number)
            finally:
                signal.raise_signal(number)  # while files are written
                written.append("all of it")
        assert raised.type is error
        assert written == ["all of it"]
        assert "files are being written; once more to leave" in capfd.readouterr().err
        with pytest.raises(error):
            signal.raise_signal(number)
    assert interruptions.first == number


@BOTH
def test_it_may_only_take_note_of_the_first(number: int, error: type[BaseException]) -> None:
    interruptions = Interruptions(raises=False)
    with taking(interruptions):
        signal.raise_signal(number)
        assert interruptions.first == number
        signal.raise_signal(signal.SIGTERM)
        assert interruptions.first == number
        with pytest.raises(error):
            signal.raise_signal(number)


def test_signals_are_given_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with taking(Interruptions()):
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_signals_of_others_are_left_to_them() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with taking(Interruptions()):
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_take_nothing() -> None:
    seen = []

    def other() -> None:
        with taking(Interruptions()):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]
