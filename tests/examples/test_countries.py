"""The example app as its users see it: a process of its own, over HTTP and websockets."""

import asyncio
import csv
import io
import os
import re
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect

from examples.countries.data import DEMO_KEY
from examples.countries.routes import MOST_NOTES
from tests.manager import MAY_STOP

PROJECT = Path(__file__).parents[2]
APP = "examples.countries.app:create_app"
ADA = {"X-API-Key": DEMO_KEY}
LOADED = {"country": 249, "subdivision": 5046, "reader": 1}


@contextmanager
def running(
    folder: Path, *command: str, port: int = 0, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """Run a command of this Python in a folder; stop it as Ctrl-C does."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SANIC_") and name != "DATABASE_URL"
    }
    path = os.pathsep.join(filter(None, [str(PROJECT), inherited.get("PYTHONPATH")]))
    environment |= {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PORT": str(port)}
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=20)
            finally:
                process.kill()


def read_until(process: subprocess.Popen[str], *texts: str) -> str:
    """Read what a process prints, until each of the texts has come, twice if it is there twice."""
    assert process.stdout is not None
    screen = ""
    for line in process.stdout:
        screen += line
        if all(screen.count(text) >= texts.count(text) for text in texts):
            return screen
    pytest.fail(f"it ended without all of {texts}:\n{screen}")


@contextmanager
def demo(folder: Path) -> Iterator[httpx.Client]:
    """Run the demo, and give a client of it."""
    port = free_port()
    with running(folder, "-m", "examples.countries", port=port) as process:
        read_until(process, "Worker ready")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            yield client


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """One server for the tests below: each writes to a country of its own."""
    with demo(tmp_path_factory.mktemp("countries")) as client:
        yield client


def notes_on(client: httpx.Client, code: str) -> list[str]:
    return [note["text"] for note in client.get(f"/countries/{code}/notes").json()]


def search_url(client: httpx.Client) -> str:
    return str(client.base_url.copy_with(scheme="ws", path="/search"))


def test_first_start_loads_everything(client: httpx.Client) -> None:
    """The tables are created and filled before the server answers."""
    assert client.get("/").json().items() >= LOADED.items()


def test_countries_are_listed_by_name(client: httpx.Client) -> None:
    """Without a name all countries are listed, with one those that hold it in any case."""
    countries = client.get("/countries").json()
    assert len(countries) == 249
    assert countries[0]["name"] == "Afghanistan"
    found = client.get("/countries", params={"name": "INLAND"}).json()
    assert found == [{"code": "FI", "name": "Finland", "flag": "🇫🇮", "visits": 0}]


def test_percent_sign_is_no_wildcard(client: httpx.Client) -> None:
    """What the user types is searched for literally."""
    assert client.get("/countries", params={"name": "%"}).json() == []


def test_country_shows_its_subdivisions(client: httpx.Client) -> None:
    """The plain `def` handler loads them lazily, in the order of their codes."""
    country = client.get("/countries/fr").json()
    assert country["name"] == "France"
    assert len(country["subdivisions"]) == 124
    assert country["subdivisions"][0] == {
        "code": "FR-01",
        "name": "Ain",
        "type": "Metropolitan department",
    }


def test_subdivision_shows_its_path_and_parts(client: httpx.Client) -> None:
    """A read session goes up through the parents and down to the parts."""
    assert client.get("/subdivisions/fr-29").json() == {
        "code": "FR-29",
        "name": "Finistère",
        "type": "Metropolitan department",
        "path": "France / Bretagne / Finistère",
        "parts": [],
    }
    parts = client.get("/subdivisions/fr-bre").json()["parts"]
    assert [part["code"] for part in parts] == ["FR-22", "FR-29", "FR-35", "FR-56"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/countries/xx"),
        ("GET", "/countries/xx/notes"),
        ("GET", "/countries/xx/subdivisions.csv"),
        ("POST", "/countries/xx/visits"),
        ("GET", "/subdivisions/xx-1"),
        ("DELETE", "/notes/1000"),
    ],
)
def test_unknown_thing_is_not_found(client: httpx.Client, method: str, path: str) -> None:
    """A row that is not there is a 404, whether the handler or its dependency looks for it."""
    response = client.request(method, path)
    assert response.status_code == 404
    assert response.json() == {"message": f"There is no {path}"}


async def test_visits_at_once_are_all_counted(client: httpx.Client) -> None:
    """No visit is lost, and each gets a number of its own."""
    async with httpx.AsyncClient(base_url=client.base_url) as visitors:
        visits = [visitors.post("/countries/se/visits") for _ in range(10)]
        numbers = [response.json()["visits"] for response in await asyncio.gather(*visits)]
        country = await visitors.get("/countries/se")
    assert sorted(numbers) == list(range(1, 11))
    assert country.json()["visits"] == 10


def test_note_is_kept_with_its_reader(client: httpx.Client) -> None:
    """A note is there after its POST, and names the owner of the key."""
    posted = client.post("/countries/it/notes", json={"text": " Pasta! "}, headers=ADA)
    assert posted.status_code == 201
    note = posted.json()
    assert (note["text"], note["country"], note["reader"]) == ("Pasta!", "IT", "Ada")
    assert datetime.now(UTC) - datetime.fromisoformat(note["created_at"]) < timedelta(minutes=1)
    assert client.get("/countries/it/notes").json() == [note]


def test_note_needs_no_reader(client: httpx.Client) -> None:
    """Who sends no key writes anonymously."""
    note = client.post("/countries/hu/notes", json={"text": "Goulash!"}).json()
    assert note["reader"] is None


@pytest.mark.parametrize(
    "body",
    ["", "no JSON", "{}", '{"text": "  "}', '{"text": 1}', f'{{"text": "{"x" * 501}"}}'],
    ids=["empty", "no JSON", "nothing", "blank", "a number", "too long"],
)
def test_invalid_note_is_refused(client: httpx.Client, body: str) -> None:
    """A body that does not validate is a 400, and nothing is written."""
    response = client.post("/countries/at/notes", content=body)
    assert response.status_code == 400
    assert notes_on(client, "at") == []


def test_note_too_many_is_rolled_back(client: httpx.Client) -> None:
    """The note was flushed already when the handler refuses it; it is gone all the same."""
    texts = [f"{number} bottles" for number in range(MOST_NOTES)]
    for text in texts:
        assert client.post("/countries/ie/notes", json={"text": text}).status_code == 201
    response = client.post("/countries/ie/notes", json={"text": "one more"})
    assert response.status_code == 400
    assert response.json()["message"] == f"Ireland has {MOST_NOTES} notes already"
    assert notes_on(client, "ie") == texts


def test_unknown_key_is_refused(client: httpx.Client) -> None:
    """The middleware answers before any handler does."""
    response = client.get("/countries", headers={"X-API-Key": "guessed"})
    assert response.status_code == 401


def test_reader_deletes_their_own_note_only(client: httpx.Client) -> None:
    """Somebody else gets a 403 and the note stays; its reader gets rid of it."""
    note = client.post("/countries/pt/notes", json={"text": "Fado!"}, headers=ADA).json()
    assert client.delete(f"/notes/{note['id']}").status_code == 403
    assert notes_on(client, "pt") == ["Fado!"]
    assert client.delete(f"/notes/{note['id']}", headers=ADA).status_code == 204
    assert notes_on(client, "pt") == []


def test_subdivisions_come_in_pages(client: httpx.Client) -> None:
    """Following the cursors leads to each of them once, in the order of their names, and back."""
    first = page = client.get("/subdivisions").json()
    found = list(page["subdivisions"])
    while page["next"] and len(found) < 100:
        page = client.get("/subdivisions", params={"cursor": page["next"]}).json()
        found += page["subdivisions"]
    assert len({each["code"] for each in found}) == 100
    names = [each["name"] for each in found]
    assert names == sorted(names)
    second = client.get("/subdivisions", params={"cursor": first["next"]}).json()
    back = client.get("/subdivisions", params={"cursor": second["previous"]}).json()
    assert back["subdivisions"] == first["subdivisions"]
    assert client.get("/subdivisions", params={"cursor": "nonsense"}).status_code == 400


def test_notes_come_in_pages(client: httpx.Client) -> None:
    """The newest first, each with the names of its country and reader."""
    client.post("/countries/fi/notes", json={"text": "Sauna!"}, headers=ADA)
    page = client.get("/notes/pages/1").json()
    note = page["items"][0]
    assert (note["text"], note["country"]["name"], note["reader"]["name"]) == (
        "Sauna!",
        "Finland",
        "Ada",
    )
    assert page["number"] == 1 <= page["pages"]
    assert client.get("/notes/pages/0").status_code == 400


def test_key_belongs_to_one_reader(client: httpx.Client) -> None:
    """The second to come with it is told of a conflict, and nothing else."""
    body = {"name": "Grace", "key": "let-grace-in"}
    assert client.post("/readers", json=body).status_code == 201
    refused = client.post("/readers", json=body | {"name": "Eve"})
    assert refused.status_code == 409
    assert "grace" not in refused.text.lower()
    note = client.post(
        "/countries/us/notes", json={"text": "COBOL!"}, headers={"X-API-Key": "let-grace-in"}
    )
    assert note.json()["reader"] == "Grace"


def test_work_is_counted(client: httpx.Client) -> None:
    """In the header of each answer, and for Prometheus."""
    assert "1 query" in client.get("/countries").headers["server-timing"]
    assert 'sanic_db_transactions_total{database="db",outcome="committed"}' in (
        client.get("/metrics").text
    )


def test_traces_are_printed_where_asked_for(tmp_path: Path) -> None:
    """Each statement is a span below that of its route."""
    port = free_port()
    with running(tmp_path, "-m", "examples.countries", port=port, TRACES="1") as process:
        read_until(process, "Worker ready")
        httpx.get(f"http://127.0.0.1:{port}/countries")
        read_until(process, '"name": "GET /countries"')


def test_tests_of_the_example_pass(tmp_path: Path) -> None:
    """They show the pytest plugin, and touch no database but their own."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "pytest_sanic_db_bp", f"--rootdir={PROJECT}"]
    tests = str(PROJECT / "examples" / "countries")
    with running(tmp_path, "-m", "pytest", *options, tests) as process:
        screen, _ = process.communicate(timeout=120)
    assert "2 passed" in screen, screen
    assert not list(tmp_path.glob("*.db"))


def test_subdivisions_are_streamed_as_csv(client: httpx.Client) -> None:
    """All rows arrive, in chunks, with quotes where a name needs them."""
    response = client.get("/countries/gb/subdivisions.csv")
    assert response.headers["content-type"] == "text/csv; charset=utf-8"
    assert response.headers["transfer-encoding"] == "chunked"
    rows = list(csv.reader(io.StringIO(response.text)))
    assert len(rows) == 221
    assert ["GB-BCP", "Unitary authority", "Bournemouth, Christchurch and Poole"] in rows


def test_websocket_answers_each_search(client: httpx.Client) -> None:
    """One connection searches again and again, also in vain."""
    with connect(search_url(client)) as websocket:
        for text, answer in [
            ("finist", "Finistère, France"),
            ("atlantis", ""),
            ("NEUCH", "Neuchâtel, Switzerland"),
        ]:
            websocket.send(text)
            assert websocket.recv(10) == answer


def test_websocket_tells_of_committed_notes_only(client: httpx.Client) -> None:
    """Every note that was kept is announced, and none that was rolled back."""
    with connect(search_url(client)) as websocket:
        for number in range(MOST_NOTES + 1):
            client.post("/countries/cz/notes", json={"text": str(number)})
        client.post("/countries/sk/notes", json={"text": "the end"})
        told = [websocket.recv(10) for _ in range(MOST_NOTES + 1)]
    assert told == [f"CZ: {number}" for number in range(MOST_NOTES)] + ["SK: the end"]


def test_health_asks_the_database(client: httpx.Client) -> None:
    """The app is ready, and shows its pool."""
    response = client.get("/health/ready")
    assert response.status_code == 200
    assert response.json()["databases"]["db"]["pool"]


def test_second_start_keeps_all_but_old_notes(tmp_path: Path) -> None:
    """A restart loads nothing twice; the background task deletes notes older than a month."""
    with demo(tmp_path) as client:
        for text in ("old", "new"):
            client.post("/countries/no/notes", json={"text": text})
    month_ago = datetime.now(UTC) - timedelta(days=31)
    with closing(sqlite3.connect(tmp_path / "countries.db")) as database, database:
        database.execute("UPDATE note SET created_at = ? WHERE text = 'old'", [str(month_ago)[:26]])
    with demo(tmp_path) as client:
        deadline = time.monotonic() + 10
        while notes_on(client, "no") != ["new"]:
            assert time.monotonic() < deadline, "the old note is still there"
            time.sleep(0.1)
        assert client.get("/").json() == LOADED | {"note": 1}


def ask_like_curl(line: str) -> httpx.Response:
    """Send what a curl line on the screen would send."""
    method, url, headers, data = "", "", {}, None
    words = iter(shlex.split(line, comments=True)[1:])
    for word in words:
        if word == "-X":
            method = next(words)
        elif word == "-H":
            name, _, value = next(words).partition(": ")
            headers[name] = value
        elif word == "-d":
            data = next(words)
        else:
            url = word
    return httpx.request(method or ("POST" if data else "GET"), url, headers=headers, content=data)


def test_lines_on_the_screen_work(tmp_path: Path) -> None:
    """`python -m examples.countries` serves each curl line that it prints."""
    port = free_port()
    with running(tmp_path, "-m", "examples.countries", port=port) as process:
        screen = read_until(process, "exec counts", "Worker ready")
        lines = re.findall(r"^  (curl .*)$", screen, re.MULTILINE)
        for line in lines:
            assert ask_like_curl(line).is_success, line
    assert len(lines) == 14
    assert process.returncode == 0


def test_two_workers_load_once(tmp_path: Path) -> None:
    """Workers that start together fill the tables once, and both of them come up."""
    port = free_port()
    command = ["-m", "tests.manager", "sanic", APP, "--workers", "2", "--port", str(port)]
    with running(tmp_path, *command) as process:
        # In any order: the manager hears of a worker before the worker tells.
        screen = read_until(process, MAY_STOP, "Worker ready", "Worker ready")
        assert httpx.get(f"http://127.0.0.1:{port}/").json() == LOADED | {"note": 0}
    assert "ERROR" not in screen
    assert process.returncode == 0


def test_command_prints_counts(tmp_path: Path) -> None:
    """The command counts rows in the same database, without a server."""
    with demo(tmp_path) as client:
        client.post("/countries/dk/notes", json={"text": "Hygge!"})
    with running(tmp_path, "-m", "sanic", APP, "exec", "counts") as process:
        screen, _ = process.communicate(timeout=30)
    counts = dict(re.findall(r"^(\w+) +(\d+)$", screen, re.MULTILINE))
    assert counts == {"country": "249", "subdivision": "5046", "reader": "1", "note": "1"}


def test_tables_of_the_demo_are_those_that_migrations_start_from(tmp_path: Path) -> None:
    """What `create_tables` has made is what autogenerate expects: there is nothing to write."""
    with demo(tmp_path):
        pass
    for command, said in [("db-init", "Made migrations/db."), ("db-check", "as the models say")]:
        with running(tmp_path, "-m", "sanic", APP, "exec", command) as process:
            screen, _ = process.communicate(timeout=30)
        assert said in screen
