"""Passwords that rotate: the next connection has the new one, on servers that ask for it."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url, text

from sanic_db_bp import Database, DatabaseSettings, DatabaseUnavailable, InvalidSettings
from tests.conftest import or_skip
from tests.databases import SCHEMES
from tests.servers import HOST, MariaDBServer, PostgreSQLServer, Server, create_database
from tests.serving import serving
from tests.shop import Observer, make_app

DRIVERS = [name for name in SCHEMES if name != "sqlite"]
FIRST, SECOND = "first-secret", "second-secret"


class AskingPostgreSQL(PostgreSQLServer):
    """Lets only ``postgres`` in without a password."""

    def _create_data(self) -> None:
        super()._create_data()
        (self._data / "pg_hba.conf").write_text(
            f"host all postgres {HOST}/32 trust\nhost all all {HOST}/32 scram-sha-256\n"
        )


@dataclass
class Account:
    """A user with a password, of a server that asks for it."""

    server: Server
    driver: str
    database: str

    @property
    def url(self) -> str:
        """The URL of the user, without the password."""
        url = make_url(self.database).set(drivername=self.driver, username="shop")
        return url.render_as_string(hide_password=False)

    def create(self) -> None:
        """Make the user, with the first password."""
        if "postgresql" in self.driver:
            self._run(f"DROP ROLE IF EXISTS shop; CREATE ROLE shop PASSWORD '{FIRST}' LOGIN")
        else:
            self._run(f"CREATE OR REPLACE USER shop@'{HOST}' IDENTIFIED BY '{FIRST}'")
            self._run(f"GRANT ALL ON *.* TO shop@'{HOST}'")

    def rotate(self) -> None:
        """Give the user the second password."""
        if "postgresql" in self.driver:
            self._run(f"ALTER ROLE shop PASSWORD '{SECOND}'")
        else:
            self._run(f"ALTER USER shop@'{HOST}' IDENTIFIED BY '{SECOND}'")

    def _run(self, statement: str) -> None:
        Observer(self.database).run(statement)


@pytest.fixture(scope="module")
def postgresql_that_asks() -> Iterator[Server]:
    yield from or_skip(AskingPostgreSQL())


@pytest.fixture(scope="module")
def mariadb_that_asks() -> Iterator[Server]:
    yield from or_skip(MariaDBServer())


@pytest.fixture(params=DRIVERS)
def account(request: pytest.FixtureRequest) -> Account:
    kind = request.param.partition("-")[0]
    server: Server = request.getfixturevalue(f"{kind}_that_asks")
    driver = SCHEMES[request.param]
    account = Account(server, driver, create_database(server.url, driver))
    account.create()
    return account


@asynccontextmanager
async def database(account: Account, **values: Any) -> AsyncIterator[Database]:
    db = Database(DatabaseSettings(url=account.url, env_file=None, **values))
    yield db
    await db.dispose(within=0)


async def works(db: Database) -> bool:
    """Whether both engines connect."""
    async with db.session() as session, db.read_session() as reading:
        answers = [await each.scalar(text("SELECT 1")) for each in (session, reading)]
    return answers == [1, 1]


async def reconnect(db: Database) -> None:
    """Close the connections that are idle."""
    await db.engine.dispose()
    await db.read_engine.dispose()


async def test_a_file_is_read_again_for_each_connection(account: Account, tmp_path: Path) -> None:
    """Its last newline is no part of the password."""
    file = tmp_path / "password"
    file.write_text(f"{FIRST}\n")
    async with database(account, password_file=str(file)) as db:
        assert await works(db)
        account.rotate()
        await reconnect(db)
        with pytest.raises(DatabaseUnavailable) as refused:
            await works(db)
        file.write_text(f"{SECOND}\n")
        assert await works(db)
        assert FIRST not in f"{refused.value}{db!r}{db.settings!r}{db.engine!r}"


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_function_is_asked_for_each_connection(
    account: Account, asynchronous: bool
) -> None:
    """A plain one, or one of asyncio: a token that ends soon."""
    passwords = [FIRST]

    async def token(prefix: str) -> str:
        await asyncio.sleep(0)
        return passwords[-1]

    source = partial(token, FIRST) if asynchronous else lambda: passwords[-1]
    async with database(account, password=source) as db:
        assert await works(db)
        account.rotate()
        passwords.append(SECOND)
        await reconnect(db)
        assert await works(db)
        assert FIRST not in f"{db!r}{db.settings!r}{db.settings.model_dump()}"


async def test_an_app_is_given_the_function_in_code(account: Account) -> None:
    """By the argument of the blueprint, from the first connection on."""
    app = make_app(account.url, password=lambda: FIRST, create_tables=False)
    async with serving(app):
        assert await works(app.ctx.db)


async def test_a_password_of_the_read_url_stays(account: Account) -> None:
    """It is of another server, which the function does not know."""
    url = make_url(account.url).set(password=FIRST).render_as_string(hide_password=False)
    async with database(account, password=lambda: "wrong", read_url=url) as db:
        async with db.read_session() as session:
            assert await session.scalar(text("SELECT 1")) == 1
        with pytest.raises(DatabaseUnavailable):
            await db.ping()


@pytest.mark.parametrize("content", [None, ""])
async def test_a_password_that_cannot_be_had_is_told(content: str | None, tmp_path: Path) -> None:
    """The database is unavailable, and the reason is not that it refuses."""
    file = tmp_path / "password"
    if content is not None:
        file.write_text(content)
    settings = DatabaseSettings(
        url="postgresql://u@localhost/d", password_file=str(file), env_file=None
    )
    db = Database(settings)
    with pytest.raises(DatabaseUnavailable, match=r"No such file|the source of the password"):
        await db.ping()
    await db.dispose()


def test_two_passwords_are_one_too_many() -> None:
    """Nobody could tell which one counts."""
    with pytest.raises(InvalidSettings, match="PASSWORD_FILE: there is a PASSWORD too"):
        DatabaseSettings(password="x", password_file="y", env_file=None)


def test_sqlite_takes_no_password_from_a_file() -> None:
    """It has none."""
    settings = DatabaseSettings(url="sqlite:///x.db", password_file="y", env_file=None)
    assert settings.rotating_password() is None
    assert DatabaseSettings(password_file="y", env_file=None).rotating_password() is None
