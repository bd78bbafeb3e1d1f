"""The migrations make exactly the tables that db.models declares."""

import contextlib
from pathlib import Path

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine

from db import migrate
from db.models import Base


def test_up_from_empty_equals_the_models_and_is_repeatable(database_url: str) -> None:
    migrate.upgrade(database_url)
    engine = create_engine(database_url.replace("postgresql://", "postgresql+psycopg2://", 1))
    with contextlib.closing(engine.connect()) as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    engine.dispose()


def test_there_is_one_head() -> None:
    versions = list((Path(migrate.__file__).parent / "migrations" / "versions").glob("*.py"))
    assert versions
