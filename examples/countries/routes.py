"""The handlers; hardly two of them ask for their session in the same way."""

from datetime import datetime
from functools import partial
from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints
from sanic import Blueprint, HTTPResponse, Request, empty, json
from sanic.exceptions import BadRequest, Forbidden, Unauthorized
from sanic.views import HTTPMethodView
from sanic_ext import validate
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, joinedload

from sanic_db_bp import AsyncReadSession, ReadSession, on_commit, transactional
from sanic_db_bp.contrib.errors import RowNotFound, get_or_404
from sanic_db_bp.contrib.pagination import keyset_page, offset_page

from .data import count_rows
from .live import announce
from .models import Country, Note, Reader, Subdivision

MOST_NOTES = 20

bp = Blueprint("countries")


@bp.on_request
async def identify_reader(request: Request) -> None:
    """Look up who sends an API key; who sends none costs no query, and no connection."""
    request.ctx.reader = None
    if key := request.headers.get("x-api-key"):
        known = select(Reader).where(Reader.key_hash == Reader.hash_key(key))
        request.ctx.reader = await request.ctx.session.scalar(known)
        if request.ctx.reader is None:
            raise Unauthorized("Nobody has this key")


async def not_found(request: Request, error: RowNotFound) -> HTTPResponse:
    """In place of "It was not found", for `get_one()` and `get_or_404()` alike."""
    return json({"message": f"There is no {request.path}"}, status=404)


def get_country(code: str, session: Session) -> Country:
    """The dependency behind each `country: Country`, in the session of the handler."""
    return session.get_one(Country, code.upper())


@bp.get("/")
async def index(request: Request) -> HTTPResponse:
    """No session in sight: `count_rows` joins that of the request."""
    return json(await count_rows())


@bp.get("/countries")
async def list_countries(request: Request, session: AsyncReadSession) -> HTTPResponse:
    """All, or those named like `?name=`: a read session needs no BEGIN and no COMMIT."""
    query = select(Country).order_by(Country.name)
    if name := request.args.get("name"):
        query = query.where(Country.name.icontains(name, autoescape=True))
    return json([country.to_dict() for country in await session.scalars(query)])


@bp.get("/countries/<code:str>")
def show_country(request: Request, code: str, country: Country) -> HTTPResponse:
    """A `def` that loads lazily, and yet the event loop is not blocked."""
    subdivisions = [subdivision.to_dict() for subdivision in country.subdivisions]
    return json(country.to_dict() | {"subdivisions": subdivisions})


@bp.get("/subdivisions")
async def list_subdivisions(request: Request, session: AsyncReadSession) -> HTTPResponse:
    """Ten at a time, from the place on that the cursor of the page before names."""
    query = select(Subdivision)
    page = await keyset_page(
        session, query, Subdivision.name, cursor=request.args.get("cursor"), size=10
    )
    found = [subdivision.to_dict() for subdivision in page.items]
    return json({"subdivisions": found, "next": page.next, "previous": page.previous})


@bp.get("/subdivisions/<code:str>")
def show_subdivision(request: Request, code: str, session: ReadSession) -> HTTPResponse:
    """A plain session for reading; `path` goes up through the parents, lazily."""
    subdivision = session.get_one(Subdivision, code.upper())
    parts = [part.to_dict() for part in subdivision.parts]
    return json(subdivision.to_dict() | {"path": subdivision.path, "parts": parts})


@bp.post("/countries/<code:str>/visits")
@transactional(isolation="SERIALIZABLE", retries=3)
async def visit_country(request: Request, code: str, country: Country) -> HTTPResponse:
    """Of two visits at once one may have to run again, from the lookup of the country on."""
    country.visits += 1
    return json({"visits": country.visits})


class NewReader(BaseModel):
    name: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=50)]
    key: Annotated[str, StringConstraints(min_length=8)]


@bp.post("/readers")
@validate(json=NewReader)
def add_reader(request: Request, session: Session, body: NewReader) -> HTTPResponse:
    """No look whether somebody has this key already: the COMMIT finds out, and it is a 409."""
    session.add(Reader(name=body.name, key_hash=Reader.hash_key(body.key)))
    return json({"name": body.name}, status=201)


class NewNote(BaseModel):
    text: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=500)]


class NotesView(HTTPMethodView):
    """The notes on a country."""

    async def get(self, request: Request, code: str, country: Country) -> HTTPResponse:
        return json([note.to_dict() for note in country.notes])

    @validate(json=NewNote)
    async def post(
        self, request: Request, code: str, country: Country, session: AsyncSession, body: NewNote
    ) -> HTTPResponse:
        """Committed before the answer is sent; an error, here one note too many, rolls back."""
        note = Note(text=body.text, country=country, reader=request.ctx.reader)
        session.add(note)
        await session.flush()
        if len(country.notes) > MOST_NOTES:
            raise BadRequest(f"{country.name} has {MOST_NOTES} notes already")
        on_commit(partial(announce, request.app, note.to_dict()))
        return json(note.to_dict(), status=201)


bp.add_route(NotesView.as_view(), "/countries/<code:str>/notes")


class Named(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    name: str


class NoteOnPage(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    text: str
    created_at: datetime
    country: Named
    reader: Named | None


class NotesPage(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    items: list[NoteOnPage]
    number: int
    pages: int


@bp.get("/notes/pages/<number:int>")
def list_notes(request: Request, number: int, session: ReadSession) -> HTTPResponse:
    """The newest first; pydantic makes the answer of the objects."""
    query = select(Note).options(joinedload(Note.country), joinedload(Note.reader))
    page = offset_page(session, query.order_by(Note.id.desc()), number=number, size=10)
    return json(NotesPage.model_validate(page).model_dump(mode="json"))


# A longer number fits no column.
@bp.delete("/notes/<note_id:[0-9]{1,9}>")
async def delete_note(request: Request, note_id: str, session: Session) -> HTTPResponse:
    """A plain session in an `async def`: the same transaction as in the middleware above."""
    note = get_or_404(session, Note, int(note_id))
    if note.reader is not request.ctx.reader:
        raise Forbidden("This note is somebody else's")
    session.delete(note)
    return empty()
