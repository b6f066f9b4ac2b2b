"""Every SQL statement of this library, each with its why.

Three rules hold for all of them. A search of the fresh messages has a lower bound, so that it never walks over
rows that are dead but cannot be vacuumed while somebody holds an old snapshot. Whatever is done to many messages
is one statement with arrays. And nothing relies on the session: settings are local to a transaction.
"""

from hashlib import sha256
from typing import Final, Literal

# PostgreSQL cuts identifiers after 63 bytes, silently; the longest name made from a table's is table_waiting_crash.
_LONGEST_IDENTIFIER: Final = 63
_LONGEST_TABLE: Final = _LONGEST_IDENTIFIER - len("_waiting_crash")

# What makes the rows of a message, in the order of Message._stored. The time is sent as the eight bytes it is:
# decoding it in the driver costs as much as all other columns together, and most destinations never read it.
_SMALL_BODY: Final = 16 * 1024
_MESSAGE: Final = "position, id, topic, key, headers, payload, timestamptz_send(recorded_at) AS recorded_at"

_HELD: Final = """w.position, w.id, w.topic, w.key, w.headers, w.payload, timestamptz_send(w.recorded_at),
                w.attempts, w.suspect, w.due_at"""

# What a writer gives of a message, and the types. Delayed messages have a due time more.
_WRITTEN: Final = ("id", "topic", "key", "headers", "payload", "recorded_at")
_TYPES: Final = ("uuid", "text", "text", "text", "bytea", "timestamptz")
_COLUMNS: Final = {"outbox": (_WRITTEN, _TYPES), "waiting": ((*_WRITTEN, "due_at"), (*_TYPES, "timestamptz"))}


class Queries:
    """The statements for one outbox; schema and table are validated and quoted here, once.

    Raises:
        ValueError: When a name cannot be an identifier.
    """

    def __init__(self, table: str, schema: str) -> None:
        if len(table.encode("utf-8", "replace")) > _LONGEST_TABLE:
            raise ValueError(f"the table name {table!r} is too long: at most {_LONGEST_TABLE} bytes")
        self.schema = _quoted(schema)
        self._insert_many: dict[tuple[str, int], str] = {}
        self.names = names = {
            "outbox": f"{self.schema}.{_quoted(table)}",
            **{
                name: f"{self.schema}.{_quoted(f'{table}_{name}')}"
                for name in ("waiting", "dead", "relays", "claims", "version", "position")
            },
        }
        names["sequence"] = names.pop("position")
        names["sequence_text"] = _literal(names["sequence"])
        names["waiting_due"] = _quoted(f"{table}_waiting_due")
        names["waiting_crash"] = _quoted(f"{table}_waiting_crash")
        outbox, waiting, dead = names["outbox"], names["waiting"], names["dead"]
        relays, claims, version = names["relays"], names["claims"], names["version"]

        # --- the writer ---------------------------------------------------------------------------------

        # One message: a plain VALUES is the fastest there is. The clock is the database's unless a time is given.
        self.insert = f"""
            INSERT INTO {outbox} (id, topic, key, headers, payload, recorded_at)
            VALUES ($1, $2, $3, $4, $5, COALESCE($6, clock_timestamp()))"""

        # --- the relay: its life ------------------------------------------------------------------------

        # Twice is as good as once: the answer to the first may have been lost.
        self.register = f"""
            INSERT INTO {relays} (owner, until) VALUES ($1, clock_timestamp() + $2::interval)
            ON CONFLICT (owner) DO UPDATE SET until = EXCLUDED.until"""

        # Renewing finds nothing once another relay has declared this one dead: then it must stop at once.
        self.renew = f"UPDATE {relays} SET until = clock_timestamp() + $2::interval WHERE owner = $1 RETURNING true"

        # Waits for a claim of this relay that may still be committing on a connection given up long ago, so that the
        # next statements see it.
        self.lock_relay = f"SELECT FROM {relays} WHERE owner = $1 FOR UPDATE"

        # A relay leaves only with empty hands: one that still holds a claim is left to be taken over. What is held
        # was due when it was claimed, so its due time is past.
        self.unregister = f"""
            DELETE FROM {relays} WHERE owner = $1
                AND NOT EXISTS (SELECT FROM {claims} WHERE owner = $1)
                AND NOT EXISTS (SELECT FROM {waiting} WHERE owner = $1 AND due_at <= clock_timestamp())"""

        # Declares relays dead. One that is recording a claim at this moment has its row locked and is skipped, so
        # that the next statement, with its newer snapshot, sees every claim of the dead.
        self.bury_relays = f"""
            DELETE FROM {relays} WHERE owner IN (
                SELECT owner FROM {relays} WHERE until < clock_timestamp() AND owner <> $1 FOR UPDATE SKIP LOCKED)
            RETURNING owner"""

        # Claims of nobody, which cannot be as long as nobody deletes from the relays by hand; looked for now and then.
        self.orphans = f"""
            SELECT owner FROM {claims} WHERE owner NOT IN (SELECT owner FROM {relays})
            UNION
            SELECT owner FROM {waiting}
            WHERE due_at <= statement_timestamp() AND owner NOT IN (SELECT owner FROM {relays})"""

        # What the dead held becomes a suspect, due at once and tried alone: one of them may have been the killer.
        self.take_over_claims = f"""
            WITH orphaned AS (DELETE FROM {claims} WHERE owner = ANY($1::uuid[]) RETURNING positions),
            held AS (
                DELETE FROM {outbox} WHERE dispatched_at IS NULL
                    AND position = ANY(ARRAY(SELECT unnest(positions) FROM orphaned)) RETURNING *)
            INSERT INTO {waiting} (position, id, recorded_at, topic, key, headers, payload, due_at, suspect)
            SELECT position, id, recorded_at, topic, key, headers, payload, clock_timestamp(), 'crash' FROM held"""

        self.take_over_waiting = f"""
            UPDATE {waiting} SET owner = NULL, suspect = 'crash', due_at = clock_timestamp(),
                error = CASE WHEN suspect = 'crash' THEN 'the process died while dispatching it' ELSE error END
            WHERE owner = ANY($1::uuid[]) AND due_at <= statement_timestamp()"""

        # --- the relay: its claim -----------------------------------------------------------------------

        # The next messages beyond $1 that nobody holds. Rows locked by another relay's claim are skipped, not
        # waited for. This snapshot may be older than a claim committed meanwhile: record_claim decides.
        # A large body stays behind, to be fetched by itself if there is room for it: a limit on their sum, computed
        # here, would cost a fifth of the speed.
        self.lock_fresh = f"""
            SELECT position, id, topic, key, headers,
                CASE WHEN octet_length(payload) <= {_SMALL_BODY} THEN payload END AS payload,
                timestamptz_send(recorded_at) AS recorded_at, 0 AS attempts
            FROM {outbox}
            WHERE position > $1 AND dispatched_at IS NULL
                AND position NOT IN (SELECT unnest(positions) FROM {claims} WHERE upto > $1)
            ORDER BY position LIMIT $2
            FOR UPDATE SKIP LOCKED"""

        self.body = f"SELECT payload FROM {outbox} WHERE position = $1"

        # Run with the rows locked and so with a snapshot that sees each claim that was ever made on them: what
        # another relay claimed first is left out. A relay that was declared dead finds no row of its own and
        # claims nothing; one that is not keeps the row locked against being declared so in this moment.
        self.record_claim = f"""
            WITH alive AS (SELECT FROM {relays} WHERE owner = $2 FOR KEY SHARE),
            mine AS (
                SELECT position FROM unnest($3::bigint[]) AS position WHERE position NOT IN (
                    SELECT unnest(positions) FROM {claims} WHERE upto > $1))
            INSERT INTO {claims} (upto, owner, positions)
            SELECT max(position), $2, array_agg(position) FROM mine WHERE EXISTS (SELECT FROM alive)
            HAVING count(*) > 0
            RETURNING upto, positions"""

        # After a COMMIT without an answer: what the table says this relay holds, and the relay does not know of.
        self.unknown_claims = f"SELECT upto, positions FROM {claims} WHERE owner = $1 AND upto <> ALL($2::bigint[])"
        self.let_go = f"""
            UPDATE {waiting} SET owner = NULL, attempts = attempts - CASE WHEN suspect = 'crash' THEN 1 ELSE 0 END
            WHERE owner = $1 AND due_at <= statement_timestamp() AND position <> ALL($2::bigint[])"""

        # Waiting messages whose time has come, beyond the last that was claimed ($2, $3), up to $4 and no more than
        # reach $5 bytes together. The time is that of the
        # statement: clock_timestamp() is volatile and would make this walk over all that wait for the future.
        self.claim_due = f"""
            WITH alive AS (SELECT FROM {relays} WHERE owner = $1 FOR KEY SHARE),
            free AS (
                SELECT due_at, position, octet_length(payload) AS size FROM {waiting}
                WHERE (due_at, position) > ($2, $3) AND due_at <= statement_timestamp() AND owner IS NULL
                    AND suspect IS DISTINCT FROM 'crash' AND EXISTS (SELECT FROM alive)
                ORDER BY due_at, position LIMIT $4
                FOR UPDATE SKIP LOCKED),
            due AS (
                SELECT position FROM (
                    SELECT position, size, sum(size) OVER (ORDER BY due_at, position ROWS UNBOUNDED PRECEDING) AS bytes
                    FROM free) AS next
                WHERE bytes - size < $5)
            UPDATE {waiting} AS w SET owner = $1 FROM due WHERE w.position = due.position
            RETURNING {_HELD}"""

        # One suspect of a crash, by an index of its own; its attempt is counted here, before the dispatch it may
        # not survive.
        self.claim_crash_suspect = f"""
            WITH alive AS (SELECT FROM {relays} WHERE owner = $1 FOR KEY SHARE),
            due AS (
                SELECT position FROM {waiting}
                WHERE suspect = 'crash' AND due_at <= statement_timestamp() AND owner IS NULL
                    AND EXISTS (SELECT FROM alive)
                ORDER BY due_at, position LIMIT 1
                FOR UPDATE SKIP LOCKED)
            UPDATE {waiting} AS w SET owner = $1, attempts = attempts + 1 FROM due WHERE w.position = due.position
            RETURNING {_HELD}"""

        # --- the relay: its settling --------------------------------------------------------------------

        self.remove = f"DELETE FROM {outbox} WHERE position = ANY($1::bigint[])"
        self.mark = f"""
            UPDATE {outbox} SET dispatched_at = clock_timestamp()
            WHERE position = ANY($1::bigint[]) AND dispatched_at IS NULL"""
        self.remove_waiting = f"DELETE FROM {waiting} WHERE position = ANY($1::bigint[])"
        self.mark_waiting = f"""
            WITH done AS (DELETE FROM {waiting} WHERE position = ANY($1::bigint[]) RETURNING *)
            INSERT INTO {outbox} (position, id, recorded_at, dispatched_at, topic, key, headers, payload)
            SELECT position, id, recorded_at, clock_timestamp(), topic, key, headers, payload FROM done"""
        self.drop_claims = f"DELETE FROM {claims} WHERE upto = ANY($2::bigint[]) AND owner = $1"

        # A fresh message that did not get through first moves to where messages wait, still in the relay's hands.
        self.set_aside = f"""
            WITH held AS (
                DELETE FROM {outbox} WHERE position = ANY($2::bigint[]) AND dispatched_at IS NULL RETURNING *)
            INSERT INTO {waiting} (position, id, recorded_at, topic, key, headers, payload, due_at, owner)
            SELECT position, id, recorded_at, topic, key, headers, payload, clock_timestamp(), $1 FROM held"""

        # Due times count from the database's clock. What another relay has taken over is not touched.
        self.postpone = f"""
            UPDATE {waiting} AS w SET owner = NULL, due_at = clock_timestamp() + m.delay,
                attempts = m.attempts, suspect = m.suspect, error = COALESCE(m.error, w.error)
            FROM unnest($2::bigint[], $3::interval[], $4::integer[], $5::text[], $6::text[])
                AS m (position, delay, attempts, suspect, error)
            WHERE w.position = m.position AND w.owner = $1"""

        self.bury = f"""
            WITH given_up AS (
                DELETE FROM {waiting} AS w USING unnest($2::bigint[], $3::integer[], $4::text[])
                    AS m (position, attempts, error)
                WHERE w.position = m.position AND w.owner = $1
                RETURNING w.position, id, recorded_at, topic, key, headers, payload, m.attempts, m.error)
            INSERT INTO {dead} (position, id, recorded_at, topic, key, headers, payload, attempts, error)
            SELECT * FROM given_up"""

        # --- the relay: its lower bound -----------------------------------------------------------------

        # The lowest message that is pending and in nobody's hands, beyond $1 and up to $2.
        self.lowest_fresh = f"""
            SELECT position FROM {outbox}
            WHERE position > $1 AND position <= $2 AND dispatched_at IS NULL
                AND position NOT IN (SELECT unnest(positions) FROM {claims} WHERE upto > $1)
            ORDER BY position LIMIT 1"""

        self.last_position = f"SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {names['sequence']}"

        # Everybody who may still commit a position that was taken before this statement: a writer holds this lock
        # from before it takes a position until after its commit is visible. An unrelated transaction does not.
        self.writers = f"""
            SELECT DISTINCT virtualtransaction FROM pg_catalog.pg_locks
            WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' AND granted
                AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
                AND relation = {_literal(outbox)}::regclass"""

        # --- the verbs ----------------------------------------------------------------------------------

        self.retrieve = f"""
            SELECT {_MESSAGE}, attempts FROM (
                (SELECT position, id, topic, key, headers, payload, recorded_at, 0 AS attempts FROM {outbox}
                 WHERE dispatched_at IS NULL ORDER BY position LIMIT $1)
                UNION ALL
                (SELECT position, id, topic, key, headers, payload, recorded_at, attempts FROM {waiting}
                 ORDER BY position LIMIT $1)) AS pending
            ORDER BY position LIMIT $1"""

        self.retrieve_dispatched = f"""
            SELECT {_MESSAGE}, dispatched_at FROM {outbox} WHERE dispatched_at IS NOT NULL ORDER BY position LIMIT $1"""

        self.clear = f"""
            WITH fresh AS (DELETE FROM {outbox}), later AS (DELETE FROM {waiting}), held AS (DELETE FROM {claims})
            DELETE FROM {dead}"""

        # Only the lowest marked ones are looked at: in a table where nothing is old enough yet, not all of it.
        self.cleanup = f"""
            DELETE FROM {outbox} WHERE position IN (
                SELECT position FROM (
                    SELECT position, dispatched_at FROM {outbox} WHERE dispatched_at IS NOT NULL
                    ORDER BY position LIMIT $2 FOR UPDATE SKIP LOCKED) AS lowest
                WHERE dispatched_at < clock_timestamp() - $1::interval)"""

        self.counts = f"""
            SELECT o.total + w.total AS total, o.dispatched, o.total - o.dispatched + w.total AS pending,
                w.total AS waiting, (SELECT count(*) FROM {dead}) AS dead
            FROM (SELECT count(*) AS total, count(dispatched_at) AS dispatched FROM {outbox}) AS o,
                (SELECT count(*) AS total FROM {waiting}) AS w"""

        self.dead_letters = f"""
            SELECT {_MESSAGE}, attempts, error, died_at FROM {dead}
            WHERE $2::uuid[] IS NULL OR id = ANY($2) ORDER BY position LIMIT $1"""

        # Due at one and the same time, which leaves the order to their positions.
        self.redrive = f"""
            WITH again AS (
                DELETE FROM {dead} WHERE $1::uuid[] IS NULL OR id = ANY($1) RETURNING *)
            INSERT INTO {waiting} (position, id, recorded_at, topic, key, headers, payload, due_at, error)
            SELECT position, id, recorded_at, topic, key, headers, payload, statement_timestamp(), error FROM again"""

        self.discard = f"DELETE FROM {dead} WHERE id = ANY($1::uuid[])"

        # --- the schema ---------------------------------------------------------------------------------

        # One channel for each outbox; a hash, since a channel's name is cut after 63 bytes like any other.
        self.channel = "outbox_" + sha256(outbox.encode("utf-8", "replace")).hexdigest()[:24]

        # One migration at a time in this database: two outboxes may share a schema that neither has made yet.
        self.lock_migration = "SELECT pg_advisory_xact_lock(hashtextextended('asyncpg-outbox: migrate', 0))"
        self.schema_exists = f"SELECT EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = {_literal(schema)})"
        self.create_schema = f"CREATE SCHEMA {self.schema}"
        self.create_version = f"""
            CREATE TABLE IF NOT EXISTS {version} (
                version integer NOT NULL PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT clock_timestamp())"""
        self.version_exists = f"SELECT to_regclass({_literal(version)}) IS NOT NULL"
        self.current_version = f"SELECT COALESCE(max(version), 0) FROM {version}"
        # With a place for the number: this one is printed for a script, too.
        self.record_version = f"INSERT INTO {version.replace('{', '{{').replace('}', '}}')} (version) VALUES ({{}})"

    @staticmethod
    def begin(milliseconds: int) -> str:
        """Returns the statements that open a relay's transaction, which may take so long.

        All settings are local to the transaction, since behind a pooler the session is somebody else's the next
        moment. synchronous_commit: a claim or a settling lost in a crash of the server only means a redelivery.
        enable_* and plan_cache_mode pin the walk along the primary key: statistics taken while the queue was empty
        would make the planner sort the whole backlog for every batch; what cannot do without is no reason to compile
        it (jit itself is set by the driver, for the session). The timeouts end on the server what the relay
        has given up, or was frozen in the middle of.
        """
        return f"""
            BEGIN ISOLATION LEVEL READ COMMITTED;
            SET LOCAL synchronous_commit = off;
            SET LOCAL enable_seqscan = off; SET LOCAL enable_sort = off; SET LOCAL enable_bitmapscan = off;
            SET LOCAL plan_cache_mode = force_generic_plan; SET LOCAL jit_above_cost = -1;
            SET LOCAL idle_in_transaction_session_timeout = {milliseconds};
            SET LOCAL statement_timeout = {milliseconds}"""

    def insert_many(self, table: Literal["outbox", "waiting"], rows: int) -> str:
        """Returns the statement that writes up to so many messages, in the order of its arguments.

        A row whose id is NULL is filling: so a few statements, one for each power of two, serve every count.
        Values rather than arrays, since for an array the driver first asks the server for its type.
        """
        if (table, rows) not in self._insert_many:
            self._insert_many[table, rows] = self._make_insert_many(table, rows)
        return self._insert_many[table, rows]

    def _make_insert_many(self, table: Literal["outbox", "waiting"], rows: int) -> str:
        columns, types = _COLUMNS[table]
        width = len(columns)
        first = ", ".join(f"${number}::{kind}" for number, kind in enumerate(types, 1))
        others = (
            ", ".join(f"${number}" for number in range(row * width + 1, (row + 1) * width + 1))
            for row in range(1, rows)
        )
        values = "), (".join([first, *others])
        selected = ", ".join(columns).replace("recorded_at", "COALESCE(recorded_at, clock_timestamp())")
        return f"""
            INSERT INTO {self.names[table]} ({", ".join(columns)})
            SELECT {selected} FROM (VALUES ({values})) AS m ({", ".join(columns)}) WHERE id IS NOT NULL"""


def _quoted(name: str) -> str:
    if not name or "\0" in name or not _is_text(name):
        raise ValueError(f"{name!r} cannot be the name of a table or schema: it is empty, or has NUL or a surrogate")
    if len(name.encode()) > _LONGEST_IDENTIFIER:
        raise ValueError(f"the name {name!r} is too long: PostgreSQL keeps 63 bytes of it")
    return '"' + name.replace('"', '""') + '"'


def _is_text(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _literal(text: str) -> str:
    # With an escape string a backslash means itself under every setting of standard_conforming_strings.
    return "E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"
