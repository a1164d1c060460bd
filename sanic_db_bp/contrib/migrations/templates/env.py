"""Run by Alembic for each command; the connection and all options come from the app."""

from alembic import context

# Options of context.configure(), such as include_schemas, belong to MigrationsBlueprint(...).
context.configure(**context.config.attributes["configure"])

with context.begin_transaction():
    context.run_migrations()
