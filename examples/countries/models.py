"""The tables: plain SQLAlchemy, fit for SQLite, PostgreSQL and MariaDB alike."""

from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from sqlalchemy import DateTime, Dialect, ForeignKey, String, TypeDecorator
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC, also in databases that store no time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value and value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value and (value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC))


class Base(DeclarativeBase):
    # Flags and names such as Kǝngǝrli need all of Unicode.
    __table_args__ = ({"mysql_charset": "utf8mb4"},)


class Country(Base):
    """A country of ISO 3166-1."""

    __tablename__ = "country"

    code: Mapped[str] = mapped_column(String(2), primary_key=True)
    name: Mapped[str] = mapped_column(String(100), index=True)
    flag: Mapped[str] = mapped_column(String(8))
    visits: Mapped[int] = mapped_column(default=0)

    subdivisions: Mapped[list["Subdivision"]] = relationship(
        back_populates="country", order_by="Subdivision.code"
    )
    notes: Mapped[list["Note"]] = relationship(back_populates="country", order_by="Note.id")

    @property
    def path(self) -> str:
        return self.name

    def to_dict(self) -> dict[str, Any]:
        return {"code": self.code, "name": self.name, "flag": self.flag, "visits": self.visits}


class Subdivision(Base):
    """A region, province, county ... of ISO 3166-2, perhaps a part of another one."""

    __tablename__ = "subdivision"

    code: Mapped[str] = mapped_column(String(6), primary_key=True)
    name: Mapped[str] = mapped_column(String(100), index=True)
    type: Mapped[str] = mapped_column(String(50))
    country_code: Mapped[str] = mapped_column(ForeignKey("country.code"), index=True)
    parent_code: Mapped[str | None] = mapped_column(ForeignKey("subdivision.code"), index=True)

    country: Mapped[Country] = relationship(back_populates="subdivisions")
    parent: Mapped["Subdivision | None"] = relationship(
        back_populates="parts", remote_side="Subdivision.code"
    )
    parts: Mapped[list["Subdivision"]] = relationship(
        back_populates="parent", order_by="Subdivision.code"
    )

    @property
    def path(self) -> str:
        """Where it lies, for instance "France / Bretagne / Finistère"."""
        return f"{(self.parent or self.country).path} / {self.name}"

    def to_dict(self) -> dict[str, Any]:
        return {"code": self.code, "name": self.name, "type": self.type}


class Reader(Base):
    """Someone who writes notes, known by an API key."""

    __tablename__ = "reader"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50))
    key_hash: Mapped[str] = mapped_column(String(64), unique=True)

    @staticmethod
    def hash_key(key: str) -> str:
        return sha256(key.encode()).hexdigest()


class Note(Base):
    """What a reader has to say about a country."""

    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String(500))
    created_at: Mapped[datetime] = mapped_column(
        UtcDateTime, default=lambda: datetime.now(UTC), index=True
    )
    country_code: Mapped[str] = mapped_column(ForeignKey("country.code"), index=True)
    reader_id: Mapped[int | None] = mapped_column(ForeignKey("reader.id"))

    country: Mapped[Country] = relationship(back_populates="notes")
    reader: Mapped[Reader | None] = relationship()

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "text": self.text,
            "country": self.country_code,
            "reader": self.reader and self.reader.name,
            "created_at": self.created_at.isoformat(timespec="seconds"),
        }
