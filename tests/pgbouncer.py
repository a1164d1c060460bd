"""A real PgBouncer before a PostgreSQL server, as it is run in production."""

import os
import shutil
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row
from sqlalchemy import make_url

from tests.servers import HOST, Server, ServerUnavailable

BACKENDS = 3

CONFIGURATION = """\
[databases]
* = {server}

[pgbouncer]
listen_addr = {listen_addr}
listen_port = {listen_port}
unix_socket_dir =
auth_type = trust
auth_file = {users}
admin_users = {user}
pool_mode = transaction
default_pool_size = {backends}
max_client_conn = 200
"""


class PgBouncer(Server):
    """PgBouncer in transaction mode, with few connections to the server.

    Args:
        server: the URL of PostgreSQL.
    """

    address = ""
    data_query = "SHOW CONFIG"

    def __init__(self, server: str) -> None:
        super().__init__()
        self._server = make_url(server)
        self.address = f"postgresql://{self._server.username}@{HOST}"

    def in_front_of(self, database: str) -> str:
        """Give the URL of a database of the server, by way of this pooler."""
        url = make_url(database).set(host=HOST, port=self._port, password=None)
        return url.render_as_string()

    def _create_data(self) -> None:
        search = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"
        binary = shutil.which("pgbouncer", path=search)
        if binary is None:
            raise ServerUnavailable("PgBouncer: install pgbouncer")
        self._binary = Path(binary)
        self._configuration = self._folder / "pgbouncer.ini"
        self._users = self._folder / "users.txt"
        self._users.write_text(f'"{self._server.username}" ""\n')

    def _command(self, port: int) -> list[str | Path]:
        server = self._server
        parts = {"host": server.host, "port": server.port or 5432, "user": server.username}
        if server.password:
            parts["password"] = server.password
        configuration = CONFIGURATION.format(
            server=" ".join(f"{name}={value}" for name, value in parts.items()),
            user=server.username,
            listen_addr=HOST,
            listen_port=port,
            users=self._users,
            backends=BACKENDS,
        )
        self._configuration.write_text(configuration + self._more_configuration())
        return [self._binary, self._configuration]

    def _more_configuration(self) -> str:
        return ""

    def clients(self, database: str) -> list[dict[str, Any]]:
        """Give what its console shows of the clients of a database."""
        with self._console(self._port) as console:
            shown = console.execute("SHOW CLIENTS").fetchall()
        return [client for client in shown if client["database"] == database]

    def _console(self, port: int | None) -> psycopg.Connection[dict[str, Any]]:
        url = f"{self.address}:{port}/pgbouncer?sslmode=disable"
        return psycopg.connect(url, autocommit=True, row_factory=dict_row)

    def _answers(self, port: int) -> bool:
        """Tell whether it answers, by the path of its configuration in its own console."""
        try:
            with self._console(port) as console:
                shown = {row["key"]: row["value"] for row in console.execute(self.data_query)}
        except psycopg.Error:
            return False
        return shown["conffile"] == str(self._configuration)
