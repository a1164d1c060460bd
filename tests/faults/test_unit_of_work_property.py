"""Any interleaving of requests keeps the promises of the unit of work.

Hypothesis makes up programs of steps over several requests at once; each step is played by the
handler of a real server, and a simple model says what must have come of it. A failure is shrunk to
the shortest program that still fails, and printed.

``HYPOTHESIS_PROFILE=long`` runs for ``PROPERTY_MINUTES`` (10) on each database, with new programs
each time. Without it the same few programs run each time.

A rule-based machine, and no list of scripts that is made beforehand: which steps make sense depends
on who waits for whom, and every step is checked by itself, so that a failure names its step.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test
from sanic import HTTPResponse, empty
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from sanic_db_bp import on_commit
from tests.faults.model import Frame, Unit
from tests.faults.player import Player, Servers
from tests.faults.scripted import BrokenHandler, Client, Script, Stage
from tests.shop import Item, doom

MOST_REQUESTS = 3

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
MINUTES = float(os.environ.get("PROPERTY_MINUTES", "10"))

COMMON = settings(
    deadline=None,
    database=None,
    stateful_step_count=40,
    suppress_health_check=list(HealthCheck),
)
LENGTH = settings(COMMON, max_examples=100 if LONG else 20, derandomize=not LONG)

ON_EACH = pytest.mark.parametrize(
    "database_url", ["sqlite", "postgresql-asyncpg", "mariadb-asyncmy"], indirect=True
)

which = st.integers(0, MOST_REQUESTS - 1)


class Requests(Player):
    """What requests do."""

    @precondition(lambda self: len(self.model.units) < MOST_REQUESTS)
    @rule(
        form=st.sampled_from(["plain", "async", "context", "dependency", "respond", "stream"]),
    )
    def open(self, form: str) -> None:
        """A client sends a request, and its handler (or dependency) is reached."""
        unit = Unit(self._next(), form, in_dependency=form == "dependency")
        script = self.server.scripts[unit.number] = Script()

        async def send() -> Client:
            client = self.idle.pop() if self.idle else await self.server.connect()
            client.post(f"/{form}/{unit.number}")
            await script.reached.wait()
            return client

        self.clients[unit.number] = self.server.run(send())
        self.model.units.append(unit)

    @precondition(lambda self: self._working())
    @rule(which=which)
    def insert(self, which: int) -> None:
        """A row is written."""
        unit = self._pick(which, self._working())
        name = self._row(self._next())

        async def insert(stage: Stage) -> None:
            stage.session.add(Item(name=name))
            await stage.call(stage.session.flush)

        self._statement(unit, insert, lambda: unit.frames[-1].rows.append(name))

    @precondition(lambda self: self._working())
    @rule(which=which)
    def fail_to_flush(self, which: int) -> None:
        """The handler catches the error of a flush."""
        unit = self._pick(which, self._working())

        async def flush(stage: Stage) -> None:
            # Of all violations the one that leaves no lock behind, which others would wait for.
            stage.session.add(Item(name=None))
            with suppress(DBAPIError):
                await stage.call(stage.session.flush)

        self._statement(unit, flush, lambda: unit.frames[-1].fail())

    @precondition(lambda self: self._working())
    @rule(which=which)
    def fail_to_execute(self, which: int) -> None:
        """The handler catches the error of a statement, which ends a transaction of PostgreSQL."""
        unit = self._pick(which, self._working())

        async def execute(stage: Stage) -> None:
            with suppress(DBAPIError):
                await stage.call(stage.session.execute, text("SELECT nonsense"))

        def effect() -> None:
            unit.frames[-1].failed = self.kind == "postgresql"

        self._statement(unit, execute, effect)

    @precondition(lambda self: self._working())
    @rule(which=which)
    def commit(self, which: int) -> None:
        """The handler commits by itself."""
        unit = self._pick(which, self._working())
        self.model.commit(unit)

        async def commit(stage: Stage) -> None:
            await stage.call(stage.session.commit)
            stage.savepoints.clear()

        self._play(unit, commit)

    @precondition(lambda self: self._ready())
    @rule(which=which)
    def roll_back(self, which: int) -> None:
        """The handler rolls back by itself."""
        unit = self._pick(which, self._ready())
        self.model.rollback(unit)

        async def roll_back(stage: Stage) -> None:
            await stage.call(stage.session.rollback)
            stage.savepoints.clear()

        self._play(unit, roll_back)

    @precondition(lambda self: self._working())
    @rule(which=which, keep=st.booleans())
    def use_savepoint(self, which: int, keep: bool) -> None:
        """A row and a callback in a savepoint, which is released or rolled back at once."""
        unit = self._pick(which, self._working())
        number = self._next()
        name = self._row(number)

        async def use(stage: Stage) -> None:
            savepoint = await stage.call(stage.session.begin_nested)
            on_commit(lambda: self.server.called.append(number))
            stage.session.add(Item(name=name))
            await stage.call(stage.session.flush)
            await stage.call(savepoint.commit if keep else savepoint.rollback)

        def effect() -> None:
            if keep:
                unit.frames[-1].rows.append(name)
                unit.frames[-1].callbacks.append(number)

        self._statement(unit, use, effect)

    @precondition(lambda self: self._working())
    @rule(which=which)
    def begin_savepoint(self, which: int) -> None:
        """The handler, or a dependency of it, opens a savepoint, with a callback of its own."""
        unit = self._pick(which, self._working())
        number = self._next()
        unit.frames.append(Frame(callbacks=[number]))

        async def begin(stage: Stage) -> None:
            stage.savepoints.append(await stage.call(stage.session.begin_nested))
            on_commit(lambda: self.server.called.append(number))

        self._play(unit, begin)

    @precondition(lambda self: self._in_savepoint(whole=True))
    @rule(which=which)
    def release_savepoint(self, which: int) -> None:
        """The innermost savepoint becomes a part of what is around it."""
        unit = self._pick(which, self._in_savepoint(whole=True))
        self.model.release(unit)

        async def release(stage: Stage) -> None:
            await stage.call(stage.savepoints.pop().commit)

        self._play(unit, release)

    @precondition(lambda self: self._in_savepoint())
    @rule(which=which)
    def roll_back_to_savepoint(self, which: int) -> None:
        """What was done since is gone, and a failure in it is mended."""
        unit = self._pick(which, self._in_savepoint())
        unit.frames.pop()

        async def roll_back(stage: Stage) -> None:
            await stage.call(stage.savepoints.pop().rollback)

        self._play(unit, roll_back)

    @precondition(lambda self: self._without_callback())
    @rule(which=which)
    def on_commit(self, which: int) -> None:
        """Something is to be called after the COMMIT."""
        unit = self._pick(which, self._without_callback())
        number = self._next()
        unit.frames[-1].callbacks.append(number)

        async def register(_: Stage) -> None:
            on_commit(lambda: self.server.called.append(number))

        self._play(unit, register)

    @precondition(lambda self: self._could_wait())
    @rule(which=which)
    def begin_long_query(self, which: int) -> None:
        """A query begins that lasts."""
        unit = self._pick(which, self._could_wait())
        self.server.gate.close()
        unit.waits_for_gate = True
        self._statement(unit, self.server.gate.pass_through, lambda: None)
        self.server.run(self.server.gate.reached())

    @precondition(lambda self: self._at_gate())
    @rule()
    def end_long_query(self) -> None:
        """The query ends."""
        unit = self._pick(0, self._at_gate())
        unit.waits_for_gate = False
        self.server.gate.open()
        self._catch_up()

    @precondition(lambda self: self._ready())
    @rule(which=which, how=st.sampled_from(["good", "refusal", "error"]))
    def end(self, which: int, how: str) -> None:
        """The handler returns or raises; a dependency hands over to its handler."""
        unit = self._pick(which, self._ready())

        async def end(_: Stage) -> HTTPResponse:
            if how == "error":
                raise BrokenHandler
            return empty(409 if how == "refusal" else 200)

        if unit.in_dependency and how != "error":
            unit.in_dependency = False
            self._play(unit, end)
        else:
            # The status of a stream was sent when it began.
            self._end(unit, end, good=how == "good" or (unit.streams and how == "refusal"))

    @precondition(lambda self: self._about_to_end())
    @rule(which=which)
    def end_with_failing_commit(self, which: int) -> None:
        """The database refuses the COMMIT."""
        unit = self._pick(which, self._about_to_end())
        self.model.statement(unit, unit.frames[0].fail)

        async def end(stage: Stage) -> HTTPResponse:
            await doom(stage.async_session, self.server.observer)
            return empty(200)

        self._end(unit, end, good=True)

    @precondition(lambda self: self._about_to_end())
    @rule(which=which, leaves=st.booleans())
    def end_with_slow_commit(self, which: int, leaves: bool) -> None:
        """Before the COMMIT is done the client hears nothing; if it has left, it is done too."""
        unit = self._pick(which, self._about_to_end())
        client, proxy = self.clients[unit.number], self.server.proxy

        async def end(stage: Stage) -> HTTPResponse:
            await stage.call(stage.session.execute, text("SELECT 1"))
            await proxy.watch(stage.async_session)
            return empty(200)

        async def commit() -> None:
            proxy.hold_commits()
            self.server.scripts[unit.number].do(end)
            await proxy.held()
            assert client.answer is not None
            assert not client.answer.done(), "told before the COMMIT was done"
            if leaves:
                client.leave()
            proxy.release()

        self.model.statement(unit, lambda: None)
        self.model.end(unit, good=True)
        self.server.run(commit())
        if not leaves:
            assert self._answer(client).is_success
        self._catch_up()

    @precondition(lambda self: self.model.units)
    @rule(which=which)
    def leave(self, which: int) -> None:
        """The client leaves, whatever its request does or waits for."""
        self._leave(self._pick(which, self.model.units))


@pytest.fixture
def servers(database_url: str) -> Iterator[Servers]:
    """The server under test, quiet: most of what is done to it is an error."""
    logging.disable()
    servers = Servers(database_url)
    yield servers
    servers.close()
    logging.disable(logging.NOTSET)


@ON_EACH
def test_any_interleaving_keeps_the_promises(servers: Servers) -> None:
    """What clients were told and what the database holds never disagree."""

    class OnServers(Requests):
        def __init__(self) -> None:
            super().__init__(servers)

    deadline = time.monotonic() + 60 * MINUTES
    while True:
        run_state_machine_as_test(OnServers, settings=LENGTH)
        if not LONG or time.monotonic() > deadline:
            return
