"""`python -m db.migrate`: bring the database to this version's schema. Safe to run from several hosts at once."""

import sys
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, text

import settings

_LOCK = 0x5357_0001
"""Advisory lock: the second migrator waits and then finds nothing to do."""


def upgrade(url: str) -> None:
    """Run every migration that is missing."""
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg2://", 1))
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _LOCK})
        connection.commit()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        connection.commit()
    engine.dispose()


def main() -> int:
    upgrade(settings.load().database_url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
