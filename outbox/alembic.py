"""For services on Alembic: `op.migrate_outbox()` and what belongs to it. Importing this module registers them.

| operation | does |
|---|---|
| `op.migrate_outbox(table="outbox", *, schema="public")` | what `Outbox(table, schema=schema).migrate` does |
| `op.drop_outbox(table="outbox", *, schema="public", force=False)` | drops the tables, but no message |
| `op.migrate_inbox(table="inbox", *, schema="public")` | what `Inbox(table, schema=schema).migrate` does |
| `op.drop_inbox(table="inbox", *, schema="public", force=False)` | drops the tables, but nothing remembered |

Autogenerate writes them, for the tables that `outbox.sqlalchemy.outbox_tables` has added to the target metadata.
"""

from typing import Any, Final

from outbox._errors import needs
from outbox._inbox import Inbox
from outbox._outbox import Outbox, Tables, one_statement

with needs("alembic"):
    from alembic import util
    from alembic.autogenerate import comparators, renderers
    from alembic.autogenerate.api import AutogenContext
    from alembic.operations import MigrateOperation, Operations
    from alembic.operations.ops import CreateTableOp, ModifyTableOps, UpgradeOps
    from sqlalchemy import Connection, Table

    from outbox.sqlalchemy import KEPT_AS, as_ddl

# By kind: the tables to lock before looking into them, and those to drop.
_TABLES: Final = {
    "outbox": (
        "{outbox}, {waiting}, {dead}",
        "{waiting}, {dead}, {relays}, {claims}, {slots}, {version}, {outbox}",
    ),
    "inbox": ("{inbox}", "{inbox}, {version}"),
}
_NEEDED: Final = {
    "outbox": """EXISTS (SELECT FROM {outbox} WHERE dispatched_at IS NULL)
    OR EXISTS (SELECT FROM {waiting}) OR EXISTS (SELECT FROM {dead})""",
    "inbox": "EXISTS (SELECT FROM {inbox})",
}
_REFUSED: Final = {
    "outbox": "the outbox % has messages that were not delivered: let a relay deliver them and redrive or discard the "
    "dead letters, or drop them with force=True",
    "inbox": "the inbox % remembers messages: forgotten, they could have their effect twice. Drop them with force=True",
}


@Operations.register_operation("migrate_outbox", "migrate_outbox")
@Operations.register_operation("migrate_inbox", "migrate_inbox")
class MigrateTablesOp(MigrateOperation):
    """Creates or upgrades the tables of an outbox or inbox.

    It is one statement, which takes the lock of `migrate`, asks for the version the tables have, and runs what is
    missing. So it does the same online, printed with `--sql`, and in a revision that is older than the library.

    Args:
        tables: The outbox or inbox.
        is_first: Whether autogenerate found none: only then does a downgrade drop them.
    """

    def __init__(self, tables: Tables, *, is_first: bool = False) -> None:
        self.tables = tables
        self.is_first = is_first

    @classmethod
    def migrate_outbox(cls, operations: Operations, table: str = "outbox", *, schema: str = "public") -> None:
        """Creates or upgrades the tables of an outbox, in the transaction of the migration.

        It changes nothing when there is nothing to do. The database raises an error when the tables are newer than
        this version of the library.

        Args:
            operations: Alembic's.
            table: As for `Outbox`.
            schema: As for `Outbox`.
        """
        operations.invoke(cls(Outbox(table, schema=schema)))

    @classmethod
    def migrate_inbox(cls, operations: Operations, table: str = "inbox", *, schema: str = "public") -> None:
        """Creates or upgrades the tables of an inbox, as `migrate_outbox` does those of an outbox.

        Args:
            operations: Alembic's.
            table: As for `Inbox`.
            schema: As for `Inbox`.
        """
        operations.invoke(cls(Inbox(table, schema=schema)))

    def reverse(self) -> MigrateOperation:
        """Drops what is made for the first time; there is no way back from an upgrade."""
        return DropTablesOp(self.tables) if self.is_first else ModifyTableOps(self.tables.table, [])

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Tells what is to be done, as `alembic check` prints it."""
        return f"migrate_{_kind(self.tables)}", self.tables.schema, self.tables.table


@Operations.register_operation("drop_outbox", "drop_outbox")
@Operations.register_operation("drop_inbox", "drop_inbox")
class DropTablesOp(MigrateOperation):
    """Drops the tables of an outbox or inbox, but nothing that is still needed in them.

    Args:
        tables: The outbox or inbox.
        force: Drops what is needed, too.
    """

    def __init__(self, tables: Tables, *, force: bool = False) -> None:
        self.tables = tables
        self.force = force

    @classmethod
    def drop_outbox(
        cls, operations: Operations, table: str = "outbox", *, schema: str = "public", force: bool = False
    ) -> None:
        """Drops the tables of an outbox, and leaves its schema.

        The database raises an error when there are messages that were not delivered, dead letters among them. It
        looks behind a lock, so that no writer can add one in between.

        Args:
            operations: Alembic's.
            table: As for `Outbox`.
            schema: As for `Outbox`.
            force: Drops these messages, too.
        """
        operations.invoke(cls(Outbox(table, schema=schema), force=force))

    @classmethod
    def drop_inbox(
        cls, operations: Operations, table: str = "inbox", *, schema: str = "public", force: bool = False
    ) -> None:
        """Drops the tables of an inbox, and leaves its schema.

        The database raises an error when messages are remembered: forgotten, a duplicate has its effect twice.

        Args:
            operations: Alembic's.
            table: As for `Inbox`.
            schema: As for `Inbox`.
            force: Forgets them.
        """
        operations.invoke(cls(Inbox(table, schema=schema), force=force))

    def reverse(self) -> MigrateTablesOp:
        """Makes them again, empty."""
        return MigrateTablesOp(self.tables, is_first=True)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Tells what is to be done, as `alembic check` prints it."""
        return f"drop_{_kind(self.tables)}", self.tables.schema, self.tables.table


@Operations.implementation_for(MigrateTablesOp)
def _migrate(operations: Operations, operation: MigrateTablesOp) -> None:
    operations.execute(as_ddl(operation.tables._upgrade_sql()))


@Operations.implementation_for(DropTablesOp)
def _drop(operations: Operations, operation: DropTablesOp) -> None:
    operations.execute(as_ddl(_removal(operation.tables, force=operation.force)))


def _kind(tables: Tables) -> str:
    return type(tables).__name__.lower()


def _removal(tables: Tables, *, force: bool) -> str:
    kind, names = _kind(tables), {**tables._version.names, **tables._names}
    guarded, dropped = _TABLES[kind]
    # Behind the lock nobody can write what would then be dropped unseen.
    guard = f"""\
LOCK TABLE {guarded.format(**names)} IN ACCESS EXCLUSIVE MODE;
IF {_NEEDED[kind].format(**names)} THEN
    RAISE EXCEPTION '{_REFUSED[kind]}', {names["outbox_text"]};
END IF;
"""
    return one_statement(f"{'' if force else guard}DROP TABLE IF EXISTS {dropped.format(**names)};\n")


# --- autogenerate ---------------------------------------------------------------------------------------


def _compare(context: AutogenContext, upgrade_ops: UpgradeOps, _: object) -> None:
    """Puts a migration of ours in the place of what Alembic would do to our tables."""
    assert context.connection is not None
    for metadata in util.to_list(context.metadata, []):
        for tables, added in metadata.info.get(KEPT_AS, ()):
            applied = _applied(context.connection, tables)
            tables._refuse_newer(applied)
            _drop_operations(context, upgrade_ops, added, is_stale=applied < len(tables._scripts))
            if applied < len(tables._scripts):
                upgrade_ops.ops.append(MigrateTablesOp(tables, is_first=applied == 0))


def _applied(connection: Connection, tables: Tables) -> int:
    """Returns the version that the tables have; 0 is that there are none."""

    def ask(query: str) -> Any:
        # Without parameters a percent sign in a name is one, whatever the driver.
        return connection.exec_driver_sql(query, execution_options={"no_parameters": True}).scalar()

    queries = tables._version
    return int(ask(queries.current_version)) if ask(queries.version_exists) else 0


def _drop_operations(context: AutogenContext, upgrade_ops: UpgradeOps, added: list[Table], *, is_stale: bool) -> None:
    """Removes the creation of our tables, and while they are to be upgraded everything about them.

    Those that are there but are to be created are in a schema that Alembic was not told to look at.
    """
    assert context.dialect is not None
    ours = {(table.schema, table.name) for table in added}
    ours |= {(None, name) for schema, name in ours if schema == context.dialect.default_schema_name}
    created = {_table_of(op) for op in upgrade_ops.ops if isinstance(op, CreateTableOp)}
    unwanted = ours if is_stale else ours & created
    upgrade_ops.ops[:] = [op for op in upgrade_ops.ops if _table_of(op) not in unwanted]


def _table_of(operation: MigrateOperation) -> tuple[str | None, str | None]:
    return getattr(operation, "schema", None), getattr(operation, "table_name", None)


# Behind Alembic's own comparison, of which older versions (before 1.18) keep a list in the order of its making.
_LAST: Final[dict[str, Any]] = {"priority": util.DispatchPriority.LAST} if hasattr(util, "DispatchPriority") else {}
comparators.dispatch_for("schema", **_LAST)(_compare)


@renderers.dispatch_for(MigrateTablesOp)
@renderers.dispatch_for(DropTablesOp)
def _render(context: AutogenContext, operation: MigrateTablesOp | DropTablesOp) -> str:
    context.imports.add("import outbox.alembic")
    prefix = context.opts.get("alembic_module_prefix") or ""
    verb, schema, table = operation.to_diff_tuple()
    return f"{prefix}{verb}({table!r}, schema={schema!r})"
