"""In front of the wheel on PYTHONPATH this makes the service use Python's own SQLite."""

raise ImportError("as where there is no wheel of pysqlite3")
