"""``sslmode`` and ``sslrootcert`` mean the same on every driver: the servers are asked."""

import asyncio
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import trustme
from sqlalchemy import make_url, text

from sanic_db_bp import Database, DatabaseSettings, DatabaseUnavailable, InvalidSettings
from tests.conftest import or_skip
from tests.databases import SCHEMES
from tests.pgbouncer import PgBouncer
from tests.proxy import proxied
from tests.servers import MariaDBServer

DRIVERS = [name for name in SCHEMES if name != "sqlite"]

ENCRYPTED = (
    "SELECT variable_value <> '' FROM information_schema.session_status "
    "WHERE variable_name = 'Ssl_cipher'"
)


class Certified:
    """A server with a certificate of an authority of its own, for the name ``localhost``."""

    _folder: Path

    def _make_certificate(self) -> None:
        authority = trustme.CA()
        certificate = authority.issue_cert("localhost")
        self.authority = self._folder / "ca.pem"
        authority.cert_pem.write_to_path(str(self.authority))
        certificate.private_key_pem.write_to_path(str(self._folder / "key.pem"))
        certificate.cert_chain_pems[0].write_to_path(str(self._folder / "cert.pem"))
        key = self._folder / "key.pem"
        key.chmod(0o600)
        folder = self._folder.stat()
        shutil.chown(key, folder.st_uid, folder.st_gid)


class CertifiedPgBouncer(Certified, PgBouncer):
    """PostgreSQL as clients see it; the server of the wheel is built without TLS."""

    def _create_data(self) -> None:
        super()._create_data()
        self._make_certificate()

    def _more_configuration(self) -> str:
        files = {kind: self._folder / f"{kind}.pem" for kind in ("cert", "key")}
        lines = [f"client_tls_{kind}_file = {path}" for kind, path in files.items()]
        return "\n".join(["client_tls_sslmode = allow", *lines, ""])


class CertifiedMariaDB(Certified, MariaDBServer):
    def _create_data(self) -> None:
        super()._create_data()
        self._make_certificate()

    def _command(self, port: int) -> list[str | Path]:
        files = [f"--ssl-{kind}={self._folder / kind}.pem" for kind in ("cert", "key")]
        return [*super()._command(port), *files]


@pytest.fixture(scope="module")
def postgresql_with_tls(postgresql_server: str) -> Iterator[CertifiedPgBouncer]:
    yield from or_skip(CertifiedPgBouncer(postgresql_server))


@pytest.fixture(scope="module")
def mariadb_with_tls() -> Iterator[CertifiedMariaDB]:
    yield from or_skip(CertifiedMariaDB())


@dataclass
class Target:
    """A server with TLS, and the driver to connect with."""

    server: CertifiedPgBouncer | CertifiedMariaDB
    driver: str

    @property
    def authority(self) -> str:
        """The file with the certificate of the authority."""
        return str(self.server.authority)

    async def is_encrypted(self, *, host: str = "localhost", **query: str) -> bool:
        """Connect with parameters in the URL, and ask the server whether it is in secret."""
        pooler = self.server if isinstance(self.server, CertifiedPgBouncer) else None
        name = "postgres" if pooler else "mysql"
        url = make_url(self.server.url)
        url = url.set(drivername=self.driver, database=name, host=host, query=query)
        written = url.render_as_string(hide_password=False)
        async with database(written, pgbouncer=bool(pooler)) as db, db.session() as session:
            if pooler is None:
                return bool(await session.scalar(text(ENCRYPTED)))
            await session.execute(text("SELECT 1"))
            (client,) = await asyncio.to_thread(pooler.clients, name)
            return bool(client["tls"])


@asynccontextmanager
async def database(url: str, **values: Any) -> AsyncIterator[Database]:
    db = Database(DatabaseSettings(url=url, env_file=None, **values))
    yield db
    await db.dispose(within=0)


@pytest.fixture(params=DRIVERS)
def target(request: pytest.FixtureRequest) -> Target:
    kind = request.param.partition("-")[0]
    return Target(request.getfixturevalue(f"{kind}_with_tls"), SCHEMES[request.param])


@pytest.fixture(autouse=True)
def no_certificates_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


async def test_disable_is_in_the_clear(target: Target) -> None:
    """Nothing is encrypted, though the server offers it."""
    assert not await target.is_encrypted(sslmode="disable")


async def test_disable_looks_at_no_file(target: Target) -> None:
    """One that is missing is missed by nobody."""
    assert not await target.is_encrypted(sslmode="disable", sslrootcert="/none.pem")


async def test_require_encrypts_and_believes_any_certificate(target: Target) -> None:
    """It keeps from listeners, not from impostors."""
    assert await target.is_encrypted(sslmode="require")


@pytest.mark.parametrize("mode", ["verify-ca", "verify-full"])
async def test_an_unknown_authority_is_refused(target: Target, mode: str) -> None:
    """Nobody of those whom the system trusts has signed the certificate."""
    with pytest.raises(DatabaseUnavailable, match=r"(?i)certificate"):
        await target.is_encrypted(sslmode=mode)


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
async def test_a_known_authority_is_believed(target: Target, mode: str) -> None:
    """The file of the setting has its certificate."""
    assert await target.is_encrypted(sslmode=mode, sslrootcert=target.authority)


async def test_another_authority_is_refused(target: Target, tmp_path: Path) -> None:
    """Also by require, once it is given one."""
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    for mode in ("require", "verify-ca", "verify-full"):
        with pytest.raises(DatabaseUnavailable, match=r"(?i)certificate"):
            await target.is_encrypted(sslmode=mode, sslrootcert=str(other))


async def test_only_verify_full_looks_at_the_name(target: Target) -> None:
    """The certificate is for localhost, not for the address."""
    asked = {"host": "127.0.0.1", "sslrootcert": target.authority}
    assert await target.is_encrypted(sslmode="verify-ca", **asked)
    with pytest.raises(DatabaseUnavailable, match=r"(?i)certificate"):
        await target.is_encrypted(sslmode="verify-full", **asked)


async def test_the_authorities_of_the_system_are_asked(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``sslrootcert=system`` believes them, and verifies the name too."""
    system = {"sslmode": "verify-full", "sslrootcert": "system"}
    with pytest.raises(DatabaseUnavailable, match=r"(?i)certificate"):
        await target.is_encrypted(**system)
    monkeypatch.setenv("SSL_CERT_FILE", target.authority)
    assert await target.is_encrypted(**system)


@pytest.mark.parametrize("mode", ["require", "verify-ca"])
async def test_the_system_is_not_believed_without_the_name(
    mariadb_with_tls: CertifiedMariaDB, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Where libpq would refuse the mode: anybody can have a certificate of a public authority."""
    target = Target(mariadb_with_tls, "mysql+asyncmy")
    monkeypatch.setenv("SSL_CERT_FILE", target.authority)
    asked = {"sslmode": mode, "sslrootcert": "system"}
    assert await target.is_encrypted(**asked)
    with pytest.raises(DatabaseUnavailable, match=r"(?i)certificate"):
        await target.is_encrypted(host="127.0.0.1", **asked)


@pytest.mark.parametrize(
    "target", [name for name in DRIVERS if "psycopg" not in name], indirect=True
)
async def test_a_disposal_closes_the_sockets_of_silent_servers(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TLS has a farewell of its own: the event loop may end before a server has answered it."""
    monkeypatch.setattr("sanic_db_bp.connections.pool.CLOSE_WITHIN", 0.2)
    pgbouncer = isinstance(target.server, CertifiedPgBouncer)
    url = make_url(target.server.url).set(
        drivername=target.driver,
        database="postgres" if pgbouncer else "mysql",
        query={"sslmode": "require"},
    )
    written = url.render_as_string(hide_password=False)
    async with proxied(written) as proxy:
        async with database(proxy.url, pgbouncer=pgbouncer) as db:
            async with db.session() as session:
                raw: Any = await (await session.connection()).get_raw_connection()
                own = raw.driver_connection
                transport = own._writer.transport if hasattr(own, "_writer") else own._transport
                used = transport.get_extra_info("socket")
                assert transport.get_extra_info("ssl_object") is not None
            proxy.freeze()
        # Closed, and the driver told of it, in the next turn of the event loop.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert used.fileno() == -1


@pytest.mark.parametrize("driver", ["asyncmy", "aiomysql"])
async def test_a_server_without_tls_is_left(mariadb_server: str, driver: str) -> None:
    """The drivers alone would go on in the clear."""
    url = make_url(mariadb_server).set(drivername=f"mysql+{driver}", query={"sslmode": "require"})
    async with database(url.render_as_string(hide_password=False)) as db:
        with pytest.raises(DatabaseUnavailable):
            await db.ping()


@pytest.mark.parametrize(
    "query",
    [
        "ssl_mode=VERIFY_IDENTITY&ssl_ca={ca}",
        "ssl-mode=VERIFY_CA&ssl-ca={ca}",
        "ssl_ca={ca}",
        "ssl_mode=REQUIRED",
    ],
)
async def test_the_names_of_mysql_are_understood(
    mariadb_with_tls: CertifiedMariaDB, query: str
) -> None:
    """A hosting's URL works as it is."""
    target = Target(mariadb_with_tls, "mysql+asyncmy")
    written = make_url(f"mysql://h/?{query.format(ca=target.authority)}")
    assert await target.is_encrypted(**{name: str(v) for name, v in written.query.items()})


def refused(prefix: str = "SANIC_DB_", **values: Any) -> str:
    """Give what the list of wrong settings says, each with the name of its variable."""
    with pytest.raises(InvalidSettings) as caught:
        DatabaseSettings.load(prefix, env_file=None, **values)
    return str(caught.value)


MYSQL = ["mysql+asyncmy", "mysql+aiomysql"]
POSTGRESQL = ["postgresql+asyncpg", "postgresql+psycopg"]


@pytest.mark.parametrize(
    ("scheme", "query"),
    [
        *product(MYSQL, ["sslmode=prefer", "ssl=true", "ssl_cipher=x"]),
        *product(MYSQL + POSTGRESQL, ["sslmode=on", "sslrootcert=/none.pem"]),
    ],
)
def test_what_cannot_be_carried_out_is_refused(scheme: str, query: str) -> None:
    """Silence would mean less secrecy than was asked for; a wait would change nothing."""
    assert "SANIC_DB_URL: ssl" in refused(url=f"{scheme}://u@localhost/d?{query}")


def test_the_variable_is_named_that_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a replica, of another database, or ``DATABASE_URL``."""
    url = "postgresql://u@localhost/d?sslmode=on"
    assert "SANIC_DB_READ_URL: sslmode" in refused(read_url=url)
    assert "SANIC_REPORTS_URL: sslmode" in refused("SANIC_REPORTS_", url=url)
    monkeypatch.setenv("DATABASE_URL", url)
    assert "DATABASE_URL: sslmode" in refused()


@pytest.mark.parametrize("name", ["sslrootcert", "sslcert", "sslkey"])
@pytest.mark.parametrize("scheme", MYSQL + POSTGRESQL)
def test_a_file_that_is_missing_is_named(scheme: str, name: str) -> None:
    """At once: nothing that comes up would bring it."""
    told = refused(url=f"{scheme}://u@localhost/d?sslmode=verify-full&{name}=/none.pem")
    assert re.search(f"SANIC_DB_URL: {name}: .*/none.pem", told)


@pytest.mark.parametrize("names", [("sslrootcert",), ("sslcert", "sslkey")])
def test_a_file_that_is_no_certificate_is_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    """With the parameters that it may stand for."""
    file = tmp_path / "notes.txt"
    file.write_text("no certificate")
    query = "&".join(f"{name}={file}" for name in names)
    told = refused(url=f"mysql+asyncmy://u@localhost/d?sslmode=require&{query}")
    assert "SANIC_DB_URL: sslrootcert, sslcert or sslkey: the file cannot be used" in told


@pytest.mark.parametrize("scheme", POSTGRESQL)
def test_the_system_is_only_believed_with_the_name(scheme: str) -> None:
    """As libpq has it: anybody can have a certificate of a public authority."""
    told = refused(url=f"{scheme}://u@localhost/d?sslmode=require&sslrootcert=system")
    assert "SANIC_DB_URL: sslrootcert=system needs sslmode=verify-full" in told
