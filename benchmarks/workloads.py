"""The workloads: what is asked of which contenders, and how their answers are compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from .contenders import PARTS, PEERS, WITH_PART
from .models import TWENTY, WORLDS

Where = Literal["postgresql", "far", "sqlite"]
"""The database: on this machine, the same behind the delay proxy, or a SQLite file."""

WRITERS = ("session", "async_session")
READERS = ("read_session", "async_read_session")
FORMS = (*WRITERS, *READERS)


@dataclass(frozen=True)
class Call:
    """A request that is sent over and over."""

    path: str
    method: str = "GET"
    body: str = ""


@dataclass(frozen=True)
class Workload:
    """What is measured.

    Args:
        name: as the command line has it.
        title: as reports have it.
        call: the request.
        contenders: who has to answer it.
        where: the database.
        connections: requests in flight.
        more_routes: routes of the app that nobody asks for.
        workers: processes of the server.
        meaning: makes of an answer's body what has to be the same for all contenders.
        series: what it is a part of; the rounds of a whole series are interleaved.
    """

    name: str
    title: str
    call: Call
    contenders: tuple[str, ...]
    where: Where = "postgresql"
    connections: int = 16
    more_routes: int = 0
    workers: int = 1
    meaning: Callable[[bytes], object] = json.loads
    series: str = ""

    @property
    def group(self) -> str:
        """Whose rounds are run together."""
        return self.series or self.name


def kind_of_worlds(body: bytes) -> object:
    """The keys and numbers are random: compare how many there are, of what form."""
    answer = json.loads(body)
    worlds = answer if isinstance(answer, list) else [answer]
    good = all(
        list(world) == ["id", "randomNumber"]
        and world["id"] in WORLDS
        and isinstance(world["randomNumber"], int)
        for world in worlds
    )
    return type(answer).__name__, len(worlds), len({world["id"] for world in worlds}), good


PLAIN = Call("/plain")
READ = Call(f"/items/{TWENTY[0]}")
WRITE = Call("/notes", "POST", json.dumps({"text": "A line of text"}))

ON_SANIC = ("usual", "best", *FORMS)
ON_ASYNCPG = ("raw_asyncpg", *PEERS)

TARGETS = [
    Workload(
        "read-by-key",
        "Read one row by key",
        READ,
        (*ON_SANIC, "best_async", *ON_ASYNCPG),
    ),
    Workload(
        "write",
        "Write one row",
        WRITE,
        ("usual", "best", *WRITERS, *ON_ASYNCPG),
    ),
    Workload(
        "twenty-reads",
        "Twenty reads by key in one request",
        Call("/twenty"),
        (*ON_SANIC, "best_async", *ON_ASYNCPG),
    ),
    Workload(
        "far-read",
        "Read one row by key, 1 ms away",
        READ,
        (*ON_SANIC, *ON_ASYNCPG),
        where="far",
        connections=1,
    ),
    Workload(
        "plain",
        "A route without a session",
        PLAIN,
        ("plain", "plain_with_blueprint"),
    ),
    Workload(
        "unused",
        "A session is injected and not used",
        Call("/unused"),
        ("injected_trivial", *FORMS),
    ),
]

OPTIONAL_PARTS = Workload(
    "parts",
    "Read one row by key",
    READ,
    ("session", *(f"{WITH_PART}{part}" for part in PARTS)),
)

TECHEMPOWER = [
    Workload(
        "te-single",
        "TechEmpower: single query",
        Call("/db"),
        ("usual", "best", *READERS, *ON_ASYNCPG),
        meaning=kind_of_worlds,
    ),
    Workload(
        "te-queries",
        "TechEmpower: 20 queries",
        Call("/queries"),
        ("usual", "best", *READERS, *ON_ASYNCPG),
        meaning=kind_of_worlds,
    ),
    Workload(
        "te-fortunes",
        "TechEmpower: fortunes",
        Call("/fortunes"),
        ("usual", "best", *READERS, *ON_ASYNCPG),
        meaning=bytes.decode,
    ),
    Workload(
        "te-updates",
        "TechEmpower: 20 updates",
        Call("/updates"),
        ("usual", "best", *WRITERS, *ON_ASYNCPG),
        meaning=kind_of_worlds,
    ),
]

SQLITE = [
    Workload("sqlite-read", "SQLite: read one row by key", READ, ("usual", *FORMS), where="sqlite"),
    Workload("sqlite-write", "SQLite: write one row", WRITE, ("usual", *WRITERS), where="sqlite"),
]

READ_GROWS = Workload("", "", READ, ("usual", "session", "read_session"))
PLAIN_GROWS = Workload("", "", PLAIN, ("plain", "usual", "session"))


GROWTH = [
    *(
        replace(
            READ_GROWS,
            name=f"in-flight-{number}",
            title=f"{number} requests in flight",
            series="in-flight",
            connections=number,
        )
        for number in (1, 16, 64, 256)
    ),
    *(
        replace(
            PLAIN_GROWS,
            name=f"routes-{number}",
            title=f"{number} more routes",
            series="routes",
            more_routes=number,
        )
        for number in (10, 1000)
    ),
    *(
        replace(
            READ_GROWS,
            name=f"workers-{number}",
            title=f"{number} worker{'s' * (number > 1)}",
            series="workers",
            workers=number,
        )
        for number in (1, 2)
    ),
]

WORKLOADS = {each.name: each for each in (*TARGETS, OPTIONAL_PARTS, *TECHEMPOWER, *SQLITE, *GROWTH)}
