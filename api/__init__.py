"""HTTP in, HTTP out: refuses, accepts, waits, streams. Knows no model runtime and no SQL."""
