"""Two tables in SQLModel's way, whose annotations have to be there when the classes are made."""

from sqlalchemy.orm import registry
from sqlmodel import Field, Relationship, SQLModel


class Model(SQLModel, registry=registry()):
    """Its tables are not those of the documentation."""


class Author(Model, table=True):
    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(max_length=100)

    books: list["Book"] = Relationship(back_populates="author")


class Book(Model, table=True):
    id: int | None = Field(default=None, primary_key=True)
    title: str = Field(max_length=100)
    author_id: int | None = Field(default=None, foreign_key="author.id")

    author: Author | None = Relationship(back_populates="books")
