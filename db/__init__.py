"""Postgres: the truth about every job. Nothing else of the project opens a database connection."""
