"""The database: tables, sessions, migrations, and repositories that hold all SQL."""
