"""A model of the unit of work, simple enough to be right: lists of rows, and a queue."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Frame:
    """A transaction or savepoint: what is lost if it is rolled back."""

    rows: list[str] = field(default_factory=list)
    callbacks: list[int] = field(default_factory=list)
    failed: bool = False
    """Whether a statement of it has failed: nothing is possible then but its rollback."""

    def fail(self) -> None:
        """A statement fails."""
        self.failed = True


@dataclass(eq=False)
class Unit:
    """The unit of work of one request."""

    number: int
    form: str
    frames: list[Frame] = field(default_factory=lambda: [Frame()])
    in_dependency: bool = False
    connected: bool = False
    waits_for_connection: bool = False
    waits_for_gate: bool = False

    @property
    def streams(self) -> bool:
        """Whether the first byte of its answer was sent before its end."""
        return self.form in ("respond", "stream")

    @property
    def ready(self) -> bool:
        """Whether its handler waits for the next step."""
        return not (self.waits_for_connection or self.waits_for_gate)

    @property
    def failed(self) -> bool:
        """Whether a COMMIT is bound to fail."""
        return any(frame.failed for frame in self.frames)


class Model:
    """What the database holds, who has a connection and who waits for one.

    Args:
        connections: how many there are.
    """

    def __init__(self, connections: int) -> None:
        self._free = connections
        self._queue: deque[tuple[Unit, Callable[[], None]]] = deque()
        self.units: list[Unit] = []
        self.stored: list[str] = []
        self.called: list[int] = []

    @property
    def checked_out(self) -> int:
        """How many connections are out of the pool."""
        return sum(unit.connected for unit in self.units)

    @property
    def waiting(self) -> int:
        """How many requests wait for a connection."""
        return len(self._queue)

    def can_connect(self, unit: Unit) -> bool:
        """Whether a statement would not have to wait for a connection."""
        return unit.connected or self._free > 0

    def statement(self, unit: Unit, effect: Callable[[], None]) -> None:
        """Do something that needs a connection, now or when one is free."""
        if unit.connected:
            effect()
        elif self._free:
            self._connect(unit, effect)
        else:
            unit.waits_for_connection = True
            self._queue.append((unit, effect))

    def _connect(self, unit: Unit, effect: Callable[[], None]) -> None:
        self._free -= 1
        unit.connected, unit.waits_for_connection = True, False
        effect()

    def commit(self, unit: Unit) -> None:
        """Make everything durable, call what waits for it, and give the connection back."""
        for frame in unit.frames:
            self.stored += frame.rows
            self.called += frame.callbacks
        self.rollback(unit)

    def rollback(self, unit: Unit) -> None:
        """Forget everything, and give the connection to whoever has waited longest."""
        unit.frames = [Frame()]
        if unit.connected:
            unit.connected = False
            self._free += 1
            if self._queue:
                self._connect(*self._queue.popleft())

    def release(self, unit: Unit) -> None:
        """Make the innermost savepoint a part of what is around it."""
        inner = unit.frames.pop()
        unit.frames[-1].rows += inner.rows
        unit.frames[-1].callbacks += inner.callbacks

    def end(self, unit: Unit, *, good: bool) -> bool:
        """End a request; returns whether the client is told of a success."""
        good = good and not unit.failed
        if good:
            self.commit(unit)
        self.leave(unit)
        return good

    def leave(self, unit: Unit) -> None:
        """The request is over, and what is not durable is gone."""
        self._queue = deque(entry for entry in self._queue if entry[0] is not unit)
        self.units.remove(unit)
        self.rollback(unit)
