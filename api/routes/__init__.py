"""The table of contents: path, types, one call. No logic."""
