"""Plays the steps of several requests on a real server and on the model, and compares the two."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

from hypothesis import note
from hypothesis.stateful import RuleBasedStateMachine, invariant
from sqlalchemy import make_url

from tests.faults.model import Model, Unit
from tests.faults.scripted import PATIENCE, Answer, Client, ScriptedServer, Step
from tests.shop import eventually, settled

POOL_SIZE = 2


class Servers:
    """One server for many programs; after a failed one a new server."""

    def __init__(self, database_url: str) -> None:
        self._database_url = database_url
        self._server: ScriptedServer | None = None
        self._in_use = False
        self._started = 0

    def take(self) -> ScriptedServer:
        """Give a server that is as good as new."""
        if self._in_use:
            self.close()
        if self._server is None:
            self._server = ScriptedServer(self._fresh_url(), pool_size=POOL_SIZE)
        self._in_use = True
        return self._server

    def _fresh_url(self) -> str:
        url = make_url(self._database_url)
        if url.get_backend_name() == "sqlite":
            # A connection that was lost may lock the file of the server before.
            self._started += 1
            url = url.set(database=f"{url.database}-{self._started}")
        return url.render_as_string(hide_password=False)

    def give_back(self) -> None:
        """Nothing was wrong."""
        self._in_use = False

    def close(self) -> None:
        """Stop the server."""
        if self._server is not None:
            self._server.close()
        self._server = None
        self._in_use = False


class Player(RuleBasedStateMachine):
    """Several requests at once, on a pool of two connections (one for SQLite)."""

    def __init__(self, servers: Servers) -> None:
        super().__init__()
        self.servers = servers
        self.server = servers.take()
        self.kind = self.server.observer.kind
        self.model = Model(1 if self.kind == "sqlite" else POOL_SIZE)
        self.clients: dict[int, Client] = {}
        self.idle: list[Client] = []
        self.pending: dict[int, asyncio.Future[None]] = {}
        self._numbers = 0
        self.server.observer.run("DELETE FROM item")
        self.server.called.clear()
        self.server.programs += 1

    # --- What has come of it

    @invariant()
    def as_promised(self) -> None:
        """The pool, the database, the callbacks and the event loop are as the model says."""
        self._settle()
        assert self.server.pool_events.wrong == []
        assert sorted(self.server.observer.names()) == sorted(self.model.stored)
        assert self.server.wrong == []

    def _settle(self) -> None:
        """Wait until the work of those who have left is put away."""
        server, model = self.server, self.model

        def seen() -> tuple[int, int, list[int]]:
            # Nobody has a connection before its first statement, or after its end.
            return server.checked_out, server.waiting, server.called

        def expected() -> tuple[int, int, list[int]]:
            return model.checked_out, model.waiting, model.called

        with suppress(AssertionError):
            server.run(eventually(lambda: seen() == expected(), within=PATIENCE / 2))
        assert seen() == expected(), "connections out, requests that wait for one, callbacks"

    def teardown(self) -> None:
        """Everybody leaves."""
        for unit in list(self.model.units):
            self._leave(unit)
        for client in self.idle:
            client.leave()
        self.as_promised()
        self.server.run(settled(self.server.app, self.server.observer, within=PATIENCE / 2))
        assert self.server.pool_events.all_are_back
        self.server.scripts.clear()
        self.servers.give_back()

    # --- How a step is played

    def _next(self) -> int:
        self._numbers += 1
        return self._numbers

    def _row(self, number: int) -> str:
        # Never a name again: MariaDB would lock what is around a deleted one.
        return f"row {number} of program {self.server.programs}"

    def _pick(self, which: int, units: list[Unit]) -> Unit:
        unit = units[which % len(units)]
        note(f"# request {unit.number} ({unit.form}):")
        return unit

    def _ready(self) -> list[Unit]:
        return [unit for unit in self.model.units if unit.ready]

    def _working(self) -> list[Unit]:
        return [unit for unit in self._ready() if not unit.failed]

    def _without_callback(self) -> list[Unit]:
        return [unit for unit in self._ready() if not unit.frames[-1].callbacks]

    def _in_savepoint(self, *, whole: bool = False) -> list[Unit]:
        return [
            unit
            for unit in self._ready()
            if len(unit.frames) > 1 and not (whole and unit.frames[-1].failed)
        ]

    def _about_to_end(self) -> list[Unit]:
        return [
            unit
            for unit in self._working()
            if self.model.can_connect(unit) and not unit.in_dependency
        ]

    def _at_gate(self) -> list[Unit]:
        return [unit for unit in self.model.units if unit.waits_for_gate]

    def _could_wait(self) -> list[Unit]:
        if self._at_gate():
            return []
        return [unit for unit in self._working() if self.model.can_connect(unit)]

    def _statement(self, unit: Unit, step: Step, effect: Callable[[], None]) -> None:
        self.model.statement(unit, effect)
        self._play(unit, step)

    def _play(self, unit: Unit, step: Step) -> None:
        """Give a request its next step, and wait until it is done, unless it has to wait."""

        async def give() -> None:
            self.pending[unit.number] = self.server.scripts[unit.number].do(step)

        self.server.run(give())
        self._catch_up()

    def _catch_up(self) -> None:
        """Wait for each step that the model says is done by now."""
        numbers = [unit.number for unit in self._ready() if unit.number in self.pending]
        self.server.run(_all([self.pending.pop(number) for number in numbers]))

    def _answer(self, client: Client) -> Answer:
        assert client.answer is not None
        answer = self.server.run(_result(client.answer))
        if answer.complete:
            self.idle.append(client)
        return answer

    def _end(self, unit: Unit, step: Step, *, good: bool) -> None:
        good = self.model.end(unit, good=good)
        self._play(unit, step)
        assert self._answer(self.clients[unit.number]).is_success == good
        self._catch_up()

    def _leave(self, unit: Unit) -> None:
        self.clients[unit.number].leave()
        if pending := self.pending.pop(unit.number, None):
            pending.cancel()
        self.model.leave(unit)
        self._settle()
        if unit.waits_for_gate:
            self.server.gate.open()
        self._catch_up()


async def _all(futures: list[asyncio.Future[None]]) -> None:
    await asyncio.gather(*futures)


async def _result(task: asyncio.Task[Answer]) -> Answer:
    return await task
