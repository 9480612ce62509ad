"""The end of a runner: closed while it works, forgotten, forked, or failing in the middle of a call."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from sigmab_plugin.deploy import Runner
from sigmab_plugin.errors import SigmaBError


class _Held:
    """A node whose computation waits until it is let go, and then computes or raises."""

    def __init__(self, bound: Callable[[Any], Any], fault: Exception | None = None) -> None:
        self._bound, self._fault = bound, fault
        self.entered, self.go_on = threading.Event(), threading.Event()

    def __call__(self, inputs: Any) -> Any:
        self.entered.set()
        assert self.go_on.wait(10)
        if self._fault is not None:
            raise self._fault
        return self._bound(inputs)


def _call(runner: Runner, x: Tensor) -> tuple[threading.Thread, list[Any]]:
    ended: list[Any] = []

    def work() -> None:
        try:
            ended.append(runner(x))
        except SigmaBError as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, ended


def test_closing_while_a_node_computes_keeps_no_weights(bundle: Path, images: Tensor) -> None:
    with Runner(bundle) as runner:
        runner(images[:1])
        slot = runner._residency._slots[""]
        held = slot.bound = _Held(slot.bound)
        thread, ended = _call(runner, images[:1])
        assert held.entered.wait(10)
        runner.close()
        assert runner.resident() == ("",)
        held.go_on.set()
        thread.join(10)
    assert [type(value) for value in ended] == [SigmaBError]
    assert runner.resident() == ()
    assert runner.statistics().resident_bytes == 0


def test_closing_while_a_call_waits_for_its_read_keeps_no_weights(bundle: Path, images: Tensor) -> None:
    with Runner(bundle, bandwidth=2e3) as runner:  # 2 s a page
        thread, ended = _call(runner, images[:1])
        while not runner.statistics().misses:
            time.sleep(0.001)
        begin = time.perf_counter()
        runner.close()
        assert time.perf_counter() - begin < 1
        thread.join(10)
    assert [str(value) for value in ended] == ["the runner is closed"]
    assert runner.statistics().resident_bytes == 0


@pytest.mark.parametrize("used", [False, True])
def test_asynchronous_calls_of_a_closed_runner(bundle: Path, images: Tensor, used: bool) -> None:
    async def call() -> None:
        with Runner(bundle) as runner:
            if used:
                await runner.arun(images[:1])
        with pytest.raises(SigmaBError, match="the runner is closed"):
            await runner.arun(images[:1])
        assert used or runner._executor is None

    asyncio.run(call())


def test_a_forgotten_runner_leaves_nothing(bundle: Path, images: Tensor) -> None:
    runner = Runner(bundle, prefetch="both")
    runner(images[:1])
    thread = runner._residency.reader._thread
    node = weakref.ref(runner._residency._slots[""].bound)
    gc.disable()  # at once: weights do not wait for the garbage collector
    try:
        del runner
        assert node() is None
    finally:
        gc.enable()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_is_told_to_open_its_own(bundle: Path, images: Tensor) -> None:
    with Runner(bundle) as runner:
        child = os.fork()
        if child == 0:  # no assertion may leave this branch
            code = 1
            try:
                runner(images[:1])
            except SigmaBError as error:
                code = 0 if "open it after forking" in str(error) else 2
            finally:
                os._exit(code)
        deadline = time.monotonic() + 5
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        if ended[0] == 0:
            os.kill(child, 9)
            os.waitpid(child, 0)
        assert ended == (child, 0)
        assert runner(images[:1]).shape == (1, 10)


def test_a_relative_directory_stays_where_it_was(
    bundle: Path, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle.parent)
    with Runner(bundle.name) as runner:
        monkeypatch.chdir(tmp_path)
        assert runner(images[:1]).shape == (1, 10)


def _settled(runner: Runner) -> int:
    """Bytes in memory when the reading thread has let go of what was cancelled."""
    deadline = time.monotonic() + 5
    while (left := runner.statistics().resident_bytes) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


def test_a_node_that_fails_leaves_no_guess_behind(
    bundle: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Runner(bundle, prefetch="both", retain=False) as runner:
        bind = runner._backend.bind

        def failing(node: Any, *rest: Any) -> Any:
            bound = _Held(bind(node, *rest), RuntimeError("no more") if node.path == "" else None)
            bound.go_on.set()
            return bound

        monkeypatch.setattr(runner._backend, "bind", failing)
        with pytest.raises(RuntimeError, match="no more"):
            runner(images[:1])
        assert runner.statistics().prefetches == 2
        assert _settled(runner) == 0
