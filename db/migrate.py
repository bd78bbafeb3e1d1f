"""`python -m db.migrate`: bring the database to this version's schema. Safe to run from several hosts at once."""

import sys
import time
from pathlib import Path

from alembic import command
from alembic.config import Config
from psycopg2.errors import LockNotAvailable
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

import settings

_LOCK = 0x5357_0001
"""Advisory lock: the second migrator waits and then finds nothing to do."""


_SCRIPTS = Path(__file__).parent / "migrations"
_PATIENCE_S = 60.0


def upgrade(url: str, scripts: Path = _SCRIPTS, patience_s: float = _PATIENCE_S) -> None:
    """Run every migration that is missing.

    While a change of a table waits for its lock, everyone else waits behind it: it gives up after 1 s, lets
    them pass, and tries again.
    """
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg2://", 1))
    config = Config()
    config.set_main_option("script_location", str(scripts))
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _LOCK})
        connection.execute(text("SET lock_timeout = '1s'"))
        connection.commit()
        config.attributes["connection"] = connection
        deadline = time.monotonic() + patience_s
        while True:
            try:
                command.upgrade(config, "head")
                connection.commit()
                break
            except OperationalError as error:
                connection.rollback()
                if not isinstance(error.orig, LockNotAvailable) or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
    engine.dispose()


def main() -> int:
    upgrade(settings.load().database_url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
