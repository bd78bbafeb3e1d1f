"""Models. A backend adapts one runtime to one contract (`backends.base`); nothing here knows a queue or a database."""
