"""Where Alembic runs the migrations: in the connection and transaction that ``migrating.upgrade`` gives it."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], target_metadata=None)
context.run_migrations()
