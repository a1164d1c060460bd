"""Hostile settings, URLs and requests: refused by name, never a crash, and no secret in any output.

Every setting is fuzzed from every place that it may come from.
"""

import json
import logging
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from unittest.mock import patch
from urllib.parse import quote

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sanic import Sanic

from sanic_db_bp import ConfigurationError, Database, DatabaseBlueprint, DatabaseSettings
from sanic_db_bp.engine import make_engine
from tests.examples.test_countries import demo
from tests.processes import Process
from tests.test_startup import SINGLE
from tests.test_startup import start as start

SECRET = "Tr0ub4dor-and-3"
FIELDS = sorted(DatabaseSettings.model_fields)
# The names of files are no secrets, and what a file of any name holds is tested apart.
VALUES = sorted(DatabaseSettings.model_fields.keys() - {"env_file", "secrets_dir"})

bounded = settings(max_examples=30, deadline=None, derandomize=True, database=None)

bombs = st.sampled_from(
    [
        "[" * 100_000,
        '{"a": ' * 20_000,
        '{"a": ' + "9" * 20_000 + "}",
        '{"a": 1e999999}',
        '{"a": NaN, "b": -Infinity}',
        "9" * 10_000,
        "-" + "9" * 400,
        "1e400",
        "nan",
        "-inf",
        "0x7f",
        "1_000",
        "٣",
        "\ud7ff\u202e\u0000",
        "a\r\nb",
        "\x1b[2J",
        "on\n",
        " ",
    ]
)
texts = st.one_of(
    bombs,
    st.text(max_size=30),
    st.integers().map(str),
    st.floats().map(str),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=10,
    ).map(json.dumps),
)
secretive = st.one_of(
    st.just(SECRET),
    st.builds(lambda before, after: before + SECRET + after, *[st.text(max_size=6)] * 2),
    st.builds(lambda key: json.dumps({key: SECRET}), st.text(max_size=6)),
)
schemes = st.one_of(
    st.sampled_from(
        ["postgres", "postgresql", "postgresql+asyncpg", "mysql+asyncmy", "mariadb", "sqlite"]
    ),
    st.text(max_size=8),
)
urls = st.builds(
    "{}://{}:{}@{}:{}/{}?{}={}".format,
    schemes,
    st.text(max_size=8),
    st.sampled_from([SECRET, f"{SECRET}@", f"%{SECRET}", f"{SECRET}/", f"[{SECRET}", f"{SECRET}#"]),
    st.sampled_from(["host", "[::1]", "[::1", "%2Ftmp", "a,b", "\u2603", ""]) | st.text(max_size=8),
    st.sampled_from(["5432", "", "-1", "99999", "x", "9" * 5000]),
    st.text(max_size=8),
    st.sampled_from(["sslmode", "connect_timeout", "options", "application_name", "host", "x"]),
    st.text(max_size=8),
)
values = st.one_of(texts, secretive, urls)
anything = st.one_of(
    values,
    st.binary(max_size=20),
    st.integers(),
    st.floats(),
    st.lists(values, max_size=2),
    st.dictionaries(st.text(max_size=5), values, max_size=2),
)


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty folder to work in, and no setting in the environment."""
    for name in os.environ:
        if name.upper().startswith(("SANIC_", "DATABASE_URL")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def output() -> Iterator[list[str]]:
    """Everything that is logged."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler = Keep()
    logging.getLogger().addHandler(handler)
    yield lines
    logging.getLogger().removeHandler(handler)


def load(make: Callable[[], DatabaseSettings]) -> str:
    """Make settings and the engine of them; give all that a user could see of it."""
    try:
        loaded = make()
        shown = f"{loaded!r} {loaded!s}"
        if loaded.url is not None:
            database = Database(loaded)
            shown += f"{database!r} {database.url!r}"
            shown += repr(make_engine(loaded, database.url))
    except ConfigurationError as error:
        return f"{error!r}" + "".join(traceback.format_exception(error))
    return shown


def refused(shown: str, names: set[str]) -> bool:
    """Whether settings were refused, by the name of one of those that were given."""
    return "wrong database setting" in shown and any(
        f"- SANIC_DB_{name.upper()}:" in shown for name in names
    )


def accepted(shown: str) -> bool:
    return shown.startswith("DatabaseSettings(")


def check(shown: str, names: set[str]) -> None:
    """Valid or refused by name, and without the secret."""
    assert SECRET not in shown
    assert accepted(shown) or refused(shown, names) or "ENGINE_OPTIONS" in shown


@bounded
@given(st.dictionaries(st.sampled_from(VALUES), values, min_size=1, max_size=4))
def test_hostile_environment(output: list[str], given_values: dict[str, str]) -> None:
    """From the environment."""
    environment = {
        f"SANIC_DB_{name.upper()}": value.replace("\0", "").encode(errors="replace").decode()
        for name, value in given_values.items()
    }
    output.clear()
    with patch.dict(os.environ, environment):
        check(load(lambda: DatabaseSettings(env_file=None)), set(given_values))
    assert SECRET not in "".join(output)


@bounded
@given(st.dictionaries(st.sampled_from(VALUES), anything, min_size=1, max_size=4))
def test_hostile_arguments(output: list[str], given_values: dict[str, object]) -> None:
    """From code."""
    output.clear()
    check(load(lambda: DatabaseSettings(env_file=None, **given_values)), set(given_values))
    assert SECRET not in "".join(output)


@bounded
@given(st.dictionaries(st.sampled_from(VALUES), anything, min_size=1, max_size=4))
def test_hostile_app_config(output: list[str], given_values: dict[str, object]) -> None:
    """From ``app.config``, which keeps no secret of them."""
    output.clear()
    with ExitStack() as stack:
        app = Sanic("shop", configure_logging=False)
        stack.callback(Sanic.unregister_app, app)
        app.config.DB_ENV_FILE = None
        app.config.update({f"DB_{name.upper()}": value for name, value in given_values.items()})
        app.blueprint(DatabaseBlueprint())
        check(load(lambda: app.ctx.db.settings), {*given_values, "env_file"})
        secret = {"url", "read_url", "password", "connect_args", "engine_options"}
        kept = {name for name in secret if f"DB_{name.upper()}" in app.config}
        assert not kept
    assert SECRET not in "".join(output)


@bounded
@given(st.binary(max_size=60), st.dictionaries(st.sampled_from(VALUES), values, max_size=4))
def test_hostile_env_file(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, given_values: dict[str, str]
) -> None:
    """From ``.env``, which may be any bytes."""
    file = tmp_path_factory.getbasetemp() / "hostile.env"
    lines = [
        f"SANIC_DB_{name.upper()}={value}".encode(errors="replace")
        for name, value in given_values.items()
    ]
    file.write_bytes(b"\n".join([*lines, junk]))
    # A line break in a value begins another variable.
    check(load(lambda: DatabaseSettings(env_file=str(file))), {*FIELDS})


@bounded
@given(st.dictionaries(st.sampled_from(VALUES), st.binary(max_size=40) | values, max_size=4))
def test_hostile_secrets(
    tmp_path_factory: pytest.TempPathFactory, given_values: dict[str, bytes | str]
) -> None:
    """From a folder of secrets, which may be any bytes."""
    folder = tmp_path_factory.mktemp("secrets")
    for name, value in given_values.items():
        raw = value if isinstance(value, bytes) else value.encode(errors="replace")
        (folder / f"sanic_db_{name}").write_bytes(raw)
    check(
        load(lambda: DatabaseSettings(env_file=None, secrets_dir=str(folder))),
        {*given_values, "secrets_dir"},
    )


@bounded
@given(st.sampled_from(["env_file", "secrets_dir"]), anything)
def test_hostile_file_names(name: str, value: object) -> None:
    """The two settings that name other places may be anything, too."""
    shown = load(lambda: DatabaseSettings(**{name: value}))
    assert accepted(shown) or refused(shown, {name})


@settings(bounded, max_examples=100)
@given(urls)
def test_hostile_urls(url: str) -> None:
    """A URL is refused in words, or is one that an engine can be made of."""
    check(load(lambda: DatabaseSettings(url=url, env_file=None)), {"url"})
    with suppress(ConfigurationError):
        check(load(lambda: DatabaseSettings(read_url=url, env_file=None)), {"read_url"})


WRONG = {
    "port": {"URL": f"postgresql://me:{SECRET}@host:port/shop"},
    "database": {"URL": f"mssql+pyodbc://me:{SECRET}@host/shop"},
    "unquoted": {"URL": f"postgresql://me:{SECRET}@{SECRET}@host/shop"},
    "misplaced": {"PASSWORD": SECRET, "POOL_SIZE": SECRET, "ISOLATION_LEVEL": SECRET},
    "json": {"CONNECT_ARGS": f'{{"password": "{SECRET}"'},
    "engine": {"ENGINE_OPTIONS": json.dumps({"nonsense": SECRET})},
    "driver": {"CONNECT_ARGS": json.dumps({"password": SECRET})},
    "share": {"URL": f"postgresql://me:{SECRET}@host/shop", "MAX_CONNECTIONS": "1"},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_failing_start_keeps_the_secret(start: Callable[..., Process], wrong: str) -> None:
    """The process ends with a code that is not zero, and nothing of its output is the password."""
    environment = {f"SANIC_DB_{name}": value for name, value in WRONG[wrong].items()}
    with start([*SINGLE, "--debug"], SANIC_DB_STARTUP_TIMEOUT="0", **environment) as server:
        assert server.wait_for_end() != 0
        assert SECRET not in server.output
        if wrong != "driver":
            assert all(name in server.words for name in WRONG[wrong].keys() - {"PASSWORD", "URL"})


# --- The inputs of the example app


@pytest.fixture(scope="module")
def countries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The example app in a process of its own."""
    with demo(tmp_path_factory.mktemp("countries")) as client:
        yield client


garbage = st.one_of(
    st.text(max_size=20),
    st.integers().map(str),
    st.sampled_from(
        ["9" * 40, "-1", "\0", "\ud800", "%", "' OR 1=1 --", "../..", "a" * 3000, "FR"]
    ),
)
bodies = st.one_of(
    st.binary(max_size=50),
    st.builds(lambda text: json.dumps({"text": text}).encode(), garbage),
    st.sampled_from([b"[" * 50_000, b'{"text": NaN}', b'{"text": null}', b"[]", b'"text"']),
)
routes = st.sampled_from(
    [
        ("GET", "/countries?name={}"),
        ("GET", "/countries/{}"),
        ("GET", "/subdivisions/{}"),
        ("GET", "/countries/{}/subdivisions.csv"),
        ("POST", "/countries/{}/visits"),
        ("GET", "/countries/{}/notes"),
        ("POST", "/countries/{}/notes"),
        ("POST", "/countries/FR/notes"),
        ("DELETE", "/notes/{}"),
    ]
)


@example(("DELETE", "/notes/{}"), "9" * 40, b"", None)
@example(("POST", "/countries/FR/notes"), "", b'{"text": "\\ud800"}', None)
@example(("POST", "/countries/FR/notes"), "", b'{"text": "\\u0000"}', None)
@example(("GET", "/countries/{}"), "%ED%A0%80", b"", None)
@settings(bounded, max_examples=80)
@given(
    routes,
    garbage.map(lambda text: quote(text, safe="", errors="surrogatepass")),
    bodies,
    st.none() | st.binary(max_size=10).map(bytes.hex) | st.just("\x7f"),
)
def test_garbage_is_the_clients_fault(
    countries: httpx.Client, route: tuple[str, str], part: str, body: bytes, key: str | None
) -> None:
    """Whatever a client sends to the example app, the app is not to blame."""
    method, path = route
    headers = {"content-type": "application/json"}
    if key is not None:
        headers["x-api-key"] = key
    answer = countries.request(method, path.format(part), content=body, headers=headers)
    assert answer.status_code < 500, (answer.request.url, answer.text)
