"""Stores on other engines than SQLite. Nothing here is imported unless DATABASE_URL asks for it."""
