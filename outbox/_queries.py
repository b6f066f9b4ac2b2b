"""Every SQL statement of this library, each with its why.

Three rules hold for all of them. A search of the fresh messages has a lower bound, so that it never walks over
rows that are dead but cannot be vacuumed while somebody holds an old snapshot. Whatever is done to many messages
is one statement with arrays. And nothing relies on the session: settings are local to a transaction.
"""

from hashlib import sha256
from typing import Final, Literal

Ordering = Literal["none", "key", "total"]
"""What is kept in order: nothing, the messages of a key, or all."""

# PostgreSQL cuts identifiers after 63 bytes, silently; the longest name made from a table's is table_waiting_crash.
_LONGEST_IDENTIFIER: Final = 63
_LONGEST_TABLE: Final = _LONGEST_IDENTIFIER - len("_waiting_crash")

# What makes the rows of a message, in the order of Message._stored. The time is sent as the eight bytes it is:
# decoding it in the driver costs as much as all other columns together, and most destinations never read it.
_SMALL_BODY: Final = 16 * 1024
_MESSAGE: Final = "position, id, topic, key, headers, payload, timestamptz_send(recorded_at) AS recorded_at"

_HELD: Final = """w.position, w.id, w.topic, w.key, w.headers, w.payload, timestamptz_send(w.recorded_at),
                w.attempts, w.suspect, w.due_at"""

# Since when a message has been waiting. Who writes it may give any time, one ahead of the database's clock too, and
# none that is finite: an age of those is an error of the driver or, before PostgreSQL 17, of the server.
_SINCE: Final = "LEAST(GREATEST({}, 'epoch'), statement_timestamp())"

# A lane is what is kept in order. Two keys of one hash share a lane, which only means less at once; who has no key
# has none. The bytes decide, whatever the collation of the database takes for equal.
SLOTS: Final = {"none": 0, "key": 64, "total": 1}
_LANE_OF: Final = {"key": 'hashtextextended(key COLLATE "C", 0)', "total": "0::bigint"}
_SLOT_OF: Final = {"key": f"(COALESCE({_LANE_OF['key']}, position) & 63)", "total": "0"}

# By table, what every relay must be allowed to do.
_RELAY_RIGHTS: Final = {
    "outbox": "SELECT UPDATE DELETE",
    "waiting": "SELECT INSERT UPDATE DELETE",
    "relays": "SELECT INSERT UPDATE DELETE",
    "claims": "SELECT INSERT DELETE",
    "slots": "SELECT UPDATE",
    "dead": "INSERT",
    "version": "SELECT",
    "sequence": "SELECT",
}

# What a writer gives of a message, and the types. Delayed messages have a due time more.
_WRITTEN: Final = ("id", "topic", "key", "headers", "payload", "recorded_at")
_TYPES: Final = ("uuid", "text", "text", "text", "bytea", "timestamptz")
_COLUMNS: Final = {"outbox": (_WRITTEN, _TYPES), "waiting": ((*_WRITTEN, "due_at"), (*_TYPES, "timestamptz"))}


class Queries:
    """The statements for one outbox; schema and table are validated and quoted here, once.

    Raises:
        TypeError: When a name is no str.
        ValueError: When a name cannot be an identifier.
    """

    def __init__(self, table: str, schema: str) -> None:
        if not all(isinstance(name, str) for name in (table, schema)):
            raise TypeError(
                f"table and schema are names, a str each, not {type(table).__name__} and {type(schema).__name__}"
            )
        if len(table.encode("utf-8", "replace")) > _LONGEST_TABLE:
            raise ValueError(f"the table name {table!r} is too long: at most {_LONGEST_TABLE} bytes")
        self.schema = _quoted(schema)
        self._insert_many: dict[tuple[str, int], str] = {}
        self.names = names = {
            "outbox": f"{self.schema}.{_quoted(table)}",
            **{
                name: f"{self.schema}.{_quoted(f'{table}_{name}')}"
                for name in ("waiting", "dead", "relays", "claims", "slots", "version", "position")
            },
        }
        names["sequence"] = names.pop("position")
        names["sequence_text"] = _literal(names["sequence"])
        names["outbox_text"], names["claims_text"] = _literal(names["outbox"]), _literal(names["claims"])
        for index in ("waiting_due", "waiting_crash", "waiting_lane", "waiting_head", "dead_behind"):
            names[index] = _quoted(f"{table}_{index}")
        names["claims_pkey"] = _quoted(f"{table}_claims_pkey")  # which PostgreSQL has chosen
        outbox, waiting, dead = names["outbox"], names["waiting"], names["dead"]
        relays, claims, slots, version = names["relays"], names["claims"], names["slots"], names["version"]

        # --- the writer ---------------------------------------------------------------------------------

        # One message: a plain VALUES is the fastest there is. The clock is the database's unless a time is given.
        self.insert = f"""
            INSERT INTO {outbox} (id, topic, key, headers, payload, recorded_at)
            VALUES ($1, $2, $3, $4, $5, COALESCE($6, clock_timestamp()))"""

        # --- the relay: its life ------------------------------------------------------------------------

        # Taken before the next two, so that of two relays of another order one sees the other.
        self.lock_ordering = f"SELECT FROM {slots} WHERE slot = 0 FOR UPDATE"

        # Twice is as good as once: the answer to the first may have been lost.
        self.register = f"""
            INSERT INTO {relays} (owner, until, ordering, active)
            VALUES ($1, clock_timestamp() + $2::interval, $3,
                NOT EXISTS (SELECT FROM {relays} WHERE active AND ordering <> $3))
            ON CONFLICT (owner) DO UPDATE SET until = EXCLUDED.until
            RETURNING active"""

        self.activate = f"""
            UPDATE {relays} SET active = true
            WHERE owner = $1 AND NOT EXISTS (SELECT FROM {relays} WHERE active AND ordering <> $2)
            RETURNING true"""

        # Renewing finds nothing once another relay has declared this one dead: then it must stop at once.
        self.renew = f"UPDATE {relays} SET until = clock_timestamp() + $2::interval WHERE owner = $1 RETURNING true"

        # Waits for a claim of this relay that may still be committing on a connection given up long ago, so that the
        # next statements see it.
        self.lock_relay = f"SELECT FROM {relays} WHERE owner = $1 FOR UPDATE"

        # In one simple query, which takes no arguments: the name is one of our own.
        self.wait_for_own = f"""
            SAVEPOINT own;
            SELECT FROM {relays.replace("{", "{{").replace("}", "}}")} WHERE owner = '{{}}' FOR UPDATE;
            ROLLBACK TO SAVEPOINT own"""

        # A relay leaves only with empty hands: one that still holds a claim is left to be taken over. This is rare, and
        # looks at all that waits: what is held was due when it was claimed, but the clock may have been set since.
        self.unregister = f"""
            DELETE FROM {relays} WHERE owner = $1
                AND NOT EXISTS (SELECT FROM {claims} WHERE owner = $1)
                AND NOT EXISTS (SELECT FROM {waiting} WHERE owner = $1)"""

        # Declares relays dead. One that is recording a claim at this moment has its row locked and is skipped, so
        # that the next statement, with its newer snapshot, sees every claim of the dead.
        self.bury_relays = f"""
            DELETE FROM {relays} WHERE owner IN (
                SELECT owner FROM {relays} WHERE until < clock_timestamp() AND owner <> $1 FOR UPDATE SKIP LOCKED)
            RETURNING owner, ordering"""

        # How long until the next relay may be declared dead.
        self.next_death = f"SELECT min(until) - clock_timestamp() FROM {relays} WHERE owner <> $1"

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
            WHERE owner = ANY($1::uuid[])"""

        # Of relays that kept an order: what was in their hands is tried again together, since most deaths are
        # nobody's fault. What was in the hands of two dead owners of a slot in a row is a suspect.
        self.suspect_in_slots = f"""
            WITH held AS (
                DELETE FROM {outbox} AS o USING {slots} AS s
                WHERE o.dispatched_at IS NULL
                    AND o.position = ANY(ARRAY(SELECT unnest(positions) FROM {claims} WHERE owner = ANY($1::uuid[])))
                    AND s.owner = ANY($1) AND o.position <= s.suspect_upto
                    AND s.slot = CASE WHEN $2 THEN {_SLOT_OF["total"]} ELSE {_SLOT_OF["key"]} END
                RETURNING o.*, CASE WHEN $2 THEN {_LANE_OF["total"]} ELSE {_LANE_OF["key"]} END AS lane)
            INSERT INTO {waiting} (position, id, recorded_at, topic, key, headers, payload, due_at, suspect, lane)
            SELECT position, id, recorded_at, topic, key, headers, payload,
                CASE WHEN lane IS NULL THEN statement_timestamp() ELSE 'infinity' END, 'crash', lane FROM held"""

        self.free_slots = f"""
            UPDATE {slots} AS s SET owner = NULL, epoch = epoch + 1, suspect_upto =
                COALESCE((SELECT max(upto) FROM {claims} AS c WHERE c.owner = s.owner), s.suspect_upto)
            WHERE owner = ANY($1::uuid[])"""

        self.drop_all_claims = f"DELETE FROM {claims} WHERE owner = ANY($1::uuid[])"

        # --- the relay: its claim -----------------------------------------------------------------------

        # Positions come as the text of an array: for an array the driver asks each element whether it is one itself,
        # which takes four times as long as to write the text.

        def held(which: str) -> str:
            """Returns the query for what is claimed, by the claims of which this is true.

            With something appended the planner takes each array for ten positions. By statistics of their length it
            may come to so many that it looks them up without a hash, and a claim takes seconds.
            """
            return f"SELECT unnest(positions || '{{}}'::bigint[]) FROM {claims} WHERE {which}"

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
                AND position NOT IN ({held("upto > $1")})
            ORDER BY position LIMIT $2
            FOR UPDATE SKIP LOCKED"""

        self.body = f"SELECT payload FROM {outbox} WHERE position = $1"

        # Run with the rows locked and so with a snapshot that sees each claim that was ever made on them: what
        # another relay claimed first is left out. A relay that was declared dead finds no row of its own and
        # claims nothing; one that is not keeps the row locked against being declared so in this moment.
        self.record_claim = f"""
            WITH alive AS (SELECT FROM {relays} WHERE owner = $2 FOR KEY SHARE),
            mine AS (
                SELECT position FROM unnest($3::text::bigint[]) AS position
                WHERE position NOT IN ({held("upto > $1")}))
            INSERT INTO {claims} (upto, owner, positions)
            SELECT max(position), $2, array_agg(position) FROM mine WHERE EXISTS (SELECT FROM alive)
            HAVING count(*) > 0
            RETURNING upto, CASE WHEN cardinality(positions) < $4 THEN positions END AS positions"""

        # After a COMMIT without an answer: what the table says this relay holds, and the relay does not know of.
        self.unknown_claims = f"SELECT upto, positions FROM {claims} WHERE owner = $1 AND upto <> ALL($2::bigint[])"
        self.let_go = f"""
            UPDATE {waiting} SET owner = NULL, attempts = attempts - CASE WHEN suspect = 'crash' THEN 1 ELSE 0 END
            WHERE owner = $1 AND position <> ALL($2::bigint[])"""

        self.claim_due = self._claim_due("true")
        self.claim_crash_suspect = self._claim_crash_suspect("due_at <= statement_timestamp()")

        # Relays that keep no order may find what was left by those that did.
        self.free_lanes = f"""
            UPDATE {waiting} SET lane = NULL, due_at = LEAST(due_at, statement_timestamp())
            WHERE lane IS NOT NULL AND owner IS NULL"""

        # --- the relay: its settling --------------------------------------------------------------------

        self.remove = f"DELETE FROM {outbox} WHERE position = ANY($1::text::bigint[])"
        self.mark = f"""
            UPDATE {outbox} SET dispatched_at = clock_timestamp()
            WHERE position = ANY($1::text::bigint[]) AND dispatched_at IS NULL"""
        # The same message by its id, in a subquery that is looked up one by one: a join would be planned by statistics
        # that may have been taken while the table was empty. (Not by format(): the table's name may hold braces.)
        the_same = """
            position = ANY(ARRAY(
                SELECT m.position FROM unnest($1::text::bigint[], $2::uuid[]) AS m (position, id)
                WHERE m.id = (SELECT t.id FROM {} AS t WHERE t.position = m.position)))"""
        self.remove_waiting = f"DELETE FROM {waiting} WHERE {the_same.replace('{}', waiting)}"
        self.mark_waiting = f"""
            WITH done AS ({self.remove_waiting} RETURNING *)
            INSERT INTO {outbox} (position, id, recorded_at, dispatched_at, topic, key, headers, payload)
            SELECT position, id, recorded_at, clock_timestamp(), topic, key, headers, payload FROM done"""
        self.drop_claims = f"DELETE FROM {claims} WHERE upto = ANY($2::bigint[]) AND owner = $1"

        # In one round trip, while all of the claims $3 are there: those of them that are finished by it, $4, and then
        # what was delivered. A server that crashed, or failed over to one that was behind, may have forgotten a claim,
        # and given out its positions anew. The answer is how many messages were found.
        of_claims = f"""
            WITH known AS (
                SELECT count(*) = cardinality($3::bigint[]) AS are_all FROM {claims}
                WHERE upto = ANY($3) AND owner = $2),
            dropped AS (
                DELETE FROM {claims} WHERE upto = ANY($4::bigint[]) AND owner = $2 AND (SELECT are_all FROM known)
                RETURNING upto)"""
        if_known = "AND (SELECT are_all FROM known) AND (SELECT count(*) FROM dropped) >= 0"
        self.remove_claimed, self.mark_claimed = (f"{of_claims} {one} {if_known}" for one in (self.remove, self.mark))

        # Where the same message still is; locked, it stays there.
        self.still_fresh = f"SELECT position FROM {outbox} WHERE {the_same.replace('{}', outbox)} FOR UPDATE"

        # Which of these no other relay than $1 has claimed; they are locked, so it stays like that.
        self.not_claimed_by_others = f"""
            SELECT position FROM unnest($2::text::bigint[]) AS position
            WHERE position NOT IN ({held("owner <> $1")})"""

        # A fresh message that did not get through first moves to where messages wait, still in the relay's hands.
        self.set_aside = f"""
            WITH held AS (
                DELETE FROM {outbox} WHERE position = ANY($2::text::bigint[]) AND dispatched_at IS NULL RETURNING *)
            INSERT INTO {waiting} (position, id, recorded_at, topic, key, headers, payload, due_at, owner)
            SELECT position, id, recorded_at, topic, key, headers, payload, clock_timestamp(), $1 FROM held"""

        # Due times count from the database's clock; without a delay it stands behind the head of its lane. What
        # another relay has taken over is not touched.
        self.postpone = f"""
            UPDATE {waiting} AS w SET owner = NULL, due_at = COALESCE(clock_timestamp() + m.delay, 'infinity'),
                attempts = m.attempts, suspect = m.suspect, error = COALESCE(m.error, w.error), lane = m.lane
            FROM unnest($2::bigint[], $3::interval[], $4::integer[], $5::text[], $6::text[], $7::bigint[])
                AS m (position, delay, attempts, suspect, error, lane)
            WHERE w.position = m.position AND w.owner = $1"""

        self.bury = f"""
            WITH given_up AS (
                DELETE FROM {waiting} AS w
                USING unnest($2::bigint[], $3::integer[], $4::text[], $5::bigint[], $6::bigint[])
                    AS m (position, attempts, error, lane, behind)
                WHERE w.position = m.position AND w.owner = $1
                RETURNING w.position, id, recorded_at, topic, key, headers, payload,
                    m.attempts, m.error, m.lane, m.behind)
            INSERT INTO {dead} (position, id, recorded_at, topic, key, headers, payload, attempts, error, lane, behind)
            SELECT * FROM given_up"""

        # --- the relay: its lower bound -----------------------------------------------------------------

        # The lowest message that is pending and in nobody's hands, beyond $1 and up to $2.
        self.lowest_fresh = f"""
            SELECT position FROM {outbox}
            WHERE position > $1 AND position <= $2 AND dispatched_at IS NULL
                AND position NOT IN ({held("upto > $1")})
            ORDER BY position LIMIT 1"""

        # How long the oldest has been waiting of all that is due and in the hands of nobody or of $1, who holds the
        # claims $3. An index lookup each: for those beyond $2, those claimed, and those that waited for their time.
        # Positions follow the time of recording closely enough.
        self.oldest = f"""
            SELECT statement_timestamp() - LEAST(
                (SELECT {_SINCE.format("recorded_at")} FROM {outbox}
                 WHERE position > $2 AND dispatched_at IS NULL
                    AND position NOT IN ({held("upto > $2")})
                 ORDER BY position LIMIT 1),
                (SELECT {_SINCE.format("recorded_at")} FROM {outbox}
                 WHERE dispatched_at IS NULL AND position = ANY(ARRAY(
                    SELECT unnest(positions) FROM {claims} WHERE upto = ANY($3::bigint[]) AND owner = $1))
                 ORDER BY position LIMIT 1),
                (SELECT {_SINCE.format("recorded_at, due_at")} FROM {waiting}
                 WHERE due_at <= statement_timestamp() AND (owner IS NULL OR owner = $1)
                 ORDER BY due_at, position LIMIT 1))"""

        self.last_position = f"SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {names['sequence']}"

        # Everybody who may still commit a position that was taken before this statement: a writer holds this lock
        # from before it takes a position until after its commit is visible. An unrelated transaction does not. A
        # prepared one has no pid. Who holds it on the claims as well, and has taken no position, only settles: relays
        # do that all the time, and must not wait for each other.
        self.writers = f"""
            SELECT virtualtransaction, pid FROM pg_catalog.pg_locks
            WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' AND granted
                AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
                AND relation IN ({names["outbox_text"]}::regclass, {names["sequence_text"]}::regclass,
                    {names["claims_text"]}::regclass)
            GROUP BY virtualtransaction, pid
            HAVING bool_or(relation = {names["outbox_text"]}::regclass) AND (
                bool_or(relation = {names["sequence_text"]}::regclass)
                OR NOT bool_or(relation = {names["claims_text"]}::regclass))"""

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
                w.total AS waiting, (SELECT count(*) FROM {dead}) AS dead,
                statement_timestamp() - LEAST(o.since, w.since) AS oldest
            FROM (
                SELECT count(*) AS total, count(dispatched_at) AS dispatched,
                    min({_SINCE.format("recorded_at")}) FILTER (WHERE dispatched_at IS NULL) AS since
                FROM {outbox}) AS o,
                (SELECT count(*) AS total,
                    min({_SINCE.format("recorded_at, due_at")}) FILTER (WHERE due_at <= statement_timestamp()) AS since
                FROM {waiting}) AS w"""

        self.dead_letters = f"""
            SELECT {_MESSAGE}, attempts, error, died_at, behind FROM {dead}
            WHERE $2::uuid[] IS NULL OR id = ANY($2) ORDER BY position LIMIT $1"""

        # Due at one and the same time, which leaves the order to their positions. Who was parked goes where the one
        # that it was parked behind goes, and the other way round.
        self.redrive = f"""
            WITH heads AS (
                SELECT COALESCE(behind, position) AS head FROM {dead} WHERE $1::uuid[] IS NULL OR id = ANY($1)),
            again AS (
                DELETE FROM {dead}
                WHERE position IN (SELECT head FROM heads) OR behind IN (SELECT head FROM heads) RETURNING *)
            INSERT INTO {waiting} (position, id, recorded_at, topic, key, headers, payload, due_at, error, lane)
            SELECT position, id, recorded_at, topic, key, headers, payload, statement_timestamp(), error, lane
            FROM again"""

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

    def _claim_due(self, mine: str) -> str:
        """Returns the statement that claims waiting messages whose time has come, of those that are mine.

        Beyond the last that was claimed ($2, $3), up to $4, and no more than reach $5 bytes together. The time is
        that of the statement: clock_timestamp() is volatile and would make this walk over all that wait for the
        future.
        """
        waiting = self.names["waiting"]
        return f"""
            WITH alive AS (SELECT FROM {self.names["relays"]} WHERE owner = $1 FOR KEY SHARE),
            free AS (
                SELECT due_at, position, octet_length(payload) AS size FROM {waiting}
                WHERE (due_at, position) > ($2, $3) AND due_at <= statement_timestamp() AND owner IS NULL
                    AND suspect IS DISTINCT FROM 'crash' AND {mine} AND EXISTS (SELECT FROM alive)
                ORDER BY due_at, position LIMIT $4
                FOR UPDATE SKIP LOCKED),
            due AS (
                SELECT position FROM (
                    SELECT position, size, sum(size) OVER (ORDER BY due_at, position ROWS UNBOUNDED PRECEDING) AS bytes
                    FROM free) AS next
                WHERE bytes - size < $5)
            UPDATE {waiting} AS w SET owner = $1 FROM due WHERE w.position = due.position
            RETURNING {_HELD}"""

    def _claim_crash_suspect(self, mine: str) -> str:
        """Returns the statement that claims one suspect of a crash, of those that are mine and due.

        By an index of its own; the attempt is counted here, before the dispatch it may not survive.
        """
        waiting = self.names["waiting"]
        return f"""
            WITH alive AS (SELECT FROM {self.names["relays"]} WHERE owner = $1 FOR KEY SHARE),
            due AS (
                SELECT position FROM {waiting} AS first
                WHERE suspect = 'crash' AND {mine} AND owner IS NULL AND EXISTS (SELECT FROM alive)
                ORDER BY due_at, position LIMIT 1
                FOR UPDATE SKIP LOCKED)
            UPDATE {waiting} AS w
            SET owner = $1, attempts = attempts + 1, due_at = LEAST(due_at, statement_timestamp())
            FROM due WHERE w.position = due.position
            RETURNING {_HELD}, w.lane"""

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

        A row whose id is NULL is filling: so a few statements, four for each power of two, serve every count.
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


class LaneQueries:
    """The statements of a relay that keeps an order.

    Whose slot a message falls into is told by a bit of $1's mask, 64 of them in a bigint.
    """

    def __init__(self, queries: Queries, ordering: Literal["key", "total"]) -> None:
        names = queries.names
        outbox, waiting, dead = names["outbox"], names["waiting"], names["dead"]
        relays, claims, slots = names["relays"], names["claims"], names["slots"]
        lane, slot = _LANE_OF[ordering], _SLOT_OF[ordering]

        def mine(mask: str) -> str:  # all of them: nothing to compute
            return f"({mask}::bigint = -1 OR (1::bigint << ({slot})::integer) & {mask}::bigint <> 0)"

        # --- slots --------------------------------------------------------------------------------------

        self.slots = f"SELECT slot, owner, epoch FROM {slots} WHERE slot < {SLOTS[ordering]}"
        self.living = f"""
            SELECT owner FROM {relays}
            WHERE active AND ordering = '{ordering}' AND until > clock_timestamp() AND owner <> $1"""

        # Others act on it at once, so it must outlive a crash of the server, unlike all else a relay commits.
        self.durable = "SET LOCAL synchronous_commit = on"

        self.gain = f"""
            WITH alive AS (SELECT FROM {relays} WHERE owner = $1 AND active FOR KEY SHARE)
            UPDATE {slots} SET owner = $1, epoch = epoch + 1 WHERE slot IN (
                SELECT slot FROM {slots}
                WHERE owner IS NULL AND slot < {SLOTS[ordering]} AND EXISTS (SELECT FROM alive)
                ORDER BY slot LIMIT $2
                FOR UPDATE SKIP LOCKED)
            RETURNING slot, epoch"""
        self.release = f"""
            UPDATE {slots} SET owner = NULL, epoch = epoch + 1 WHERE owner = $1 AND slot = ANY($2::smallint[])"""

        # How many of the slots that this relay believes to own it owns, each in its epoch; both in one number, for
        # speed. And one more, if it lives. Nobody can declare it dead, and it can hand over nothing, until the
        # transaction that asks has ended.
        self.owned = f"""
            WITH alive AS (SELECT FROM {relays} WHERE owner = $1 FOR KEY SHARE)
            SELECT count(*) + (SELECT count(*) FROM alive) FROM {slots}
            WHERE owner = $1 AND {SLOTS["key"]} * epoch + slot = ANY($2::bigint[])"""

        # A server that crashed may have forgotten that these are in this relay's hands. If it is dead they are not.
        self.hold_on = f"""
            WITH alive AS (SELECT FROM {relays} WHERE owner = $1 FOR KEY SHARE)
            UPDATE {waiting} SET owner = $1, due_at = LEAST(due_at, statement_timestamp())
            WHERE position = ANY($2::bigint[]) AND owner IS NULL AND EXISTS (SELECT FROM alive)"""

        # Lanes of another order, or hashed by another server. No longer in order, they are all due.
        self.relane = f"""
            UPDATE {waiting} SET lane = {lane}, due_at = LEAST(due_at, statement_timestamp())
            WHERE lane IS NOT NULL AND lane IS DISTINCT FROM {lane} AND {mine("$1")}"""

        # The first of a lane has a due time. When its owner died it may have none yet.
        self.wake_heads = f"""
            UPDATE {waiting} AS w SET due_at = statement_timestamp()
            WHERE lane IS NOT NULL AND due_at = 'infinity' AND {mine("$1")}
                AND NOT EXISTS (SELECT FROM {waiting} AS e WHERE e.lane = w.lane AND e.position < w.position)"""

        # Not by what is in the relay's own hands: what was read after that is a fresh row, and would be overtaken.
        self.blocked = f"""
            SELECT DISTINCT lane FROM {waiting}
            WHERE lane IS NOT NULL AND owner IS DISTINCT FROM $2 AND {mine("$1")}"""
        self.parked = f"SELECT DISTINCT lane, behind FROM {dead} WHERE behind IS NOT NULL AND {mine('$1')}"

        # --- fresh messages -----------------------------------------------------------------------------

        # Nobody else reads these, so nothing is locked. What this relay has in its hands is left out ($4); that is
        # empty but for a walk over what was read before.
        self.read = f"""
            SELECT position, id, topic, key, headers,
                CASE WHEN octet_length(payload) <= {_SMALL_BODY} THEN payload END AS payload,
                timestamptz_send(recorded_at) AS recorded_at, 0 AS attempts, {lane} AS lane
            FROM {outbox}
            WHERE position > $2 AND position <= $3 AND dispatched_at IS NULL AND {mine("$1")}
                AND position NOT IN (SELECT unnest($4::bigint[]))
            ORDER BY position LIMIT $5"""

        # The same as without an order, of what falls into the slots of $1: nobody else has any of it in hand.
        self.oldest = f"""
            SELECT statement_timestamp() - LEAST(
                (SELECT {_SINCE.format("recorded_at")} FROM {outbox}
                 WHERE position > $2 AND dispatched_at IS NULL AND {mine("$1")}
                 ORDER BY position LIMIT 1),
                (SELECT {_SINCE.format("recorded_at, due_at")} FROM {waiting}
                 WHERE due_at <= statement_timestamp() AND {mine("$1")}
                 ORDER BY due_at, position LIMIT 1))"""

        # Notes what is in a relay's hands, for the case of its death. One that was declared dead notes nothing.
        self.claim = f"""
            WITH alive AS (SELECT FROM {relays} WHERE owner = $2 FOR KEY SHARE)
            INSERT INTO {claims} (upto, owner, positions)
            SELECT $1, $2, $3::text::bigint[] WHERE EXISTS (SELECT FROM alive)
            ON CONFLICT (upto, owner) DO UPDATE SET positions = EXCLUDED.positions
            RETURNING true"""
        self.drop_claims_but = f"DELETE FROM {claims} WHERE owner = $1 AND upto <> ALL($2::bigint[])"

        # Since when the writers are at it; another role's are told to those who may know.
        self.ages = """
            SELECT pid, clock_timestamp() - xact_start AS age FROM pg_catalog.pg_stat_activity
            WHERE pid = ANY($1::integer[])"""

        # --- waiting messages ---------------------------------------------------------------------------

        self.claim_due = queries._claim_due(f"lane IS NULL AND {mine('$6')}")
        # The first of its lane, which has a due time or, when the one before it has just been delivered, not yet.
        self.claim_crash_suspect = queries._claim_crash_suspect(f"""
            {mine("$2")} AND (lane IS NULL OR position <= $3)
            AND (due_at <= statement_timestamp() OR due_at = 'infinity')
            AND (lane IS NULL OR NOT EXISTS (
                SELECT FROM {waiting} AS e WHERE e.lane = first.lane AND e.position < first.position))""")

        # Heads only: behind one that is not due, any number of others must not be in the way.
        self.due_lanes = f"""
            SELECT lane FROM {waiting} AS head
            WHERE lane IS NOT NULL AND due_at <= statement_timestamp() AND owner IS NULL
                AND suspect IS DISTINCT FROM 'crash' AND {mine("$1")}
                AND NOT EXISTS (SELECT FROM {waiting} AS e WHERE e.lane = head.lane AND e.position < head.position)
            ORDER BY due_at, position LIMIT $2"""

        # The next of each lane, $3 at most, no more than reach $4 bytes together, and none beyond $5: the head alone
        # if it is in trouble, else all up to the next that is. A lane whose head is in somebody's hands, or not due,
        # gives none.
        self.claim_lanes = f"""
            WITH alive AS (SELECT FROM {relays} WHERE owner = $1 FOR KEY SHARE),
            next AS (
                SELECT position FROM unnest($2::bigint[]) AS wanted (lane) CROSS JOIN LATERAL (
                    SELECT position, row_number() OVER line AS place, first_value(is_free) OVER line AS is_free,
                        count(*) FILTER (WHERE in_trouble) OVER line AS troubles, sum(size) OVER line - size AS bytes
                    FROM (
                        SELECT position, octet_length(payload) AS size,
                            attempts > 0 OR suspect IS NOT NULL AS in_trouble,
                            owner IS NULL AND suspect IS DISTINCT FROM 'crash'
                                AND (due_at <= statement_timestamp() OR due_at = 'infinity') AS is_free
                        FROM {waiting} AS w WHERE w.lane = wanted.lane ORDER BY position LIMIT $3) AS first
                    WINDOW line AS (ORDER BY position ROWS UNBOUNDED PRECEDING)) AS lined_up
                WHERE is_free AND (place = 1 OR troubles = 0) AND bytes < $4 AND position <= $5
                    AND EXISTS (SELECT FROM alive))
            UPDATE {waiting} AS w SET owner = $1, due_at = statement_timestamp()
            FROM next WHERE w.position = next.position
            RETURNING {_HELD}, w.lane"""

        self.head = f"SELECT position FROM {waiting} WHERE lane = $1 ORDER BY position LIMIT 1"
        self.lanes_left = f"""
            SELECT lane FROM unnest($2::bigint[]) AS asked (lane)
            WHERE EXISTS (SELECT FROM {waiting} AS w WHERE w.lane = asked.lane AND owner IS DISTINCT FROM $1)"""

        # --- parking ------------------------------------------------------------------------------------

        # Each behind the last of the heads before it.
        parked = "position, id, recorded_at, topic, key, headers, payload"
        self.park = f"""
            WITH heads AS (
                SELECT lane, head, lead(head) OVER (PARTITION BY lane ORDER BY head) AS next
                FROM unnest($1::bigint[], $2::bigint[]) AS p (lane, head)),
            followers AS (
                DELETE FROM {waiting} AS w USING heads AS p
                WHERE w.lane = p.lane AND w.position > p.head AND (w.position < p.next) IS NOT FALSE
                    AND w.owner IS NULL
                RETURNING w.*, p.head)
            INSERT INTO {dead} ({parked}, attempts, error, lane, behind)
            SELECT {parked}, attempts, 'parked behind the dead letter at position ' || head, lane, head
            FROM followers"""

        # Heads that were redriven or discarded.
        self.departed = f"""
            SELECT head FROM unnest($1::bigint[]) AS parked (head)
            WHERE NOT EXISTS (SELECT FROM {dead} WHERE position = head)"""
        self.unpark = f"""
            WITH alive AS (SELECT FROM {relays} WHERE owner = $1 FOR KEY SHARE),
            back AS (DELETE FROM {dead} WHERE behind = ANY($2::bigint[]) AND EXISTS (SELECT FROM alive) RETURNING *)
            INSERT INTO {waiting} ({parked}, due_at, error, lane)
            SELECT {parked}, statement_timestamp(), error, lane FROM back"""


class InboxQueries:
    """The statements for one inbox; the names are validated and quoted as those of an outbox are, by its queries."""

    def __init__(self, table: str, schema: str) -> None:
        # An inbox keeps its version as an outbox does.
        self.version = Queries(table, schema)
        inbox = self.version.names["outbox"]
        self.names = {"inbox": inbox, "inbox_accepted_at": _quoted(f"{table}_accepted_at")}

        # The unique index decides. It waits for a transaction that has accepted the same message and not ended yet.
        self.accept = f"INSERT INTO {inbox} (id) VALUES ($1) ON CONFLICT (id) DO NOTHING RETURNING true"

        # By the index on the time, the oldest first. Two at once do not wait for each other. With an array the rows
        # are found by their key, whatever the planner takes for the number of them. statement_timestamp() is stable,
        # which an index needs.
        self.cleanup = f"""
            DELETE FROM {inbox} WHERE id = ANY(ARRAY(
                SELECT id FROM {inbox} WHERE accepted_at < statement_timestamp() - $1::interval
                ORDER BY accepted_at LIMIT $2
                FOR UPDATE SKIP LOCKED))"""


class OperatorQueries:
    """The statements of whoever looks after one outbox: its state, its dead letters, and what may ail it."""

    def __init__(self, queries: Queries) -> None:
        names = queries.names
        outbox, waiting, dead = names["outbox"], names["waiting"], names["dead"]
        relays, claims, slots = names["relays"], names["claims"], names["slots"]
        tables = ("outbox", "waiting", "dead", "relays", "claims", "slots", "version")
        listed = ", ".join(f"('{name}', {_literal(names[name])})" for name in tables)

        # --- status -------------------------------------------------------------------------------------

        # What is held was due when it was claimed. With an order, a claim is a note and may hold a little more.
        self.relays = f"""
            SELECT owner, ordering, active, until - statement_timestamp() AS lease,
                statement_timestamp() - started_at AS age,
                (SELECT COALESCE(sum(cardinality(positions)), 0) FROM {claims} AS c WHERE c.owner = r.owner)
                + (SELECT count(*) FROM {waiting} AS w WHERE w.owner = r.owner) AS claimed,
                (SELECT count(*) FROM {slots} AS s WHERE s.owner = r.owner) AS slots
            FROM {relays} AS r ORDER BY started_at, owner"""
        self.dead_by_topic = f"SELECT topic, count(*) AS dead FROM {dead} GROUP BY topic ORDER BY dead DESC, topic"

        # --- dead letters -------------------------------------------------------------------------------

        # Without the bodies, which may be large: by id, topic, key, a part of the error, and age.
        self.find_dead = f"""
            SELECT id, position, topic, key, attempts, error, died_at, statement_timestamp() - died_at AS age, behind
            FROM {dead}
            WHERE ($1::uuid[] IS NULL OR id = ANY($1)) AND ($2::text IS NULL OR topic = $2)
                AND ($3::text IS NULL OR key = $3) AND ($4::text IS NULL OR strpos(lower(error), lower($4)) > 0)
                AND ($5::interval IS NULL OR died_at < statement_timestamp() - $5)
                AND ($6::interval IS NULL OR died_at > statement_timestamp() - $6)
            ORDER BY position LIMIT $7"""

        # --- doctor: the messages and the relays --------------------------------------------------------

        # With the order that relays have been keeping for so long that they must have shared the slots.
        self.slots = f"""
            SELECT slot, owner, owner IN (SELECT owner FROM {relays}) AS is_known,
                (SELECT min(ordering) FROM {relays} WHERE active AND ordering <> 'none'
                    AND until > statement_timestamp() AND started_at < statement_timestamp() - interval '1 minute')
                AS ordering
            FROM {slots} ORDER BY slot"""
        # For a human, who knows that no relay is at work.
        self.free_lost_slots = (
            f"UPDATE {slots} SET owner = NULL, epoch = epoch + 1 WHERE owner NOT IN (SELECT owner FROM {relays})"
        )
        self.dead_letters = f"SELECT count(*) AS dead FROM {dead}"

        # --- doctor: the horizon ------------------------------------------------------------------------

        # Who sees an old state of the database, so that no row that died since can be vacuumed. Sessions in other
        # databases do not count, but for those that stream to a standby. Another role's show only to those who may see
        # them.
        self.open_transactions = """
            SELECT pid, usename, application_name, state, clock_timestamp() - xact_start AS age,
                clock_timestamp() - query_start AS query_age
            FROM pg_catalog.pg_stat_activity
            WHERE (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL) AND pid <> pg_backend_pid()
                AND (datname = current_database() OR backend_type = 'walsender')
                AND backend_type IS DISTINCT FROM 'autovacuum worker'
            ORDER BY xact_start"""
        self.prepared = """
            SELECT gid, owner, clock_timestamp() - prepared AS age FROM pg_catalog.pg_prepared_xacts
            WHERE database = current_database() ORDER BY prepared"""
        self.replication_slots = """
            SELECT slot_name, slot_type, xmin IS NOT NULL AS holds_all FROM pg_catalog.pg_replication_slots
            WHERE NOT active AND (xmin IS NOT NULL OR catalog_xmin IS NOT NULL)
                AND (database IS NULL OR database = current_database())
            ORDER BY slot_name"""

        # --- doctor: the tables -------------------------------------------------------------------------

        self.dead_rows = f"""
            SELECT t.name AS table_name, n_live_tup AS live, n_dead_tup AS dead, last_autovacuum
            FROM (VALUES {listed}) AS t (kind, name)
            JOIN pg_catalog.pg_stat_all_tables ON relid = to_regclass(t.name)"""
        self.options = f"""
            SELECT kind, t.name AS table_name, COALESCE(reloptions, ARRAY[]::text[]) AS options
            FROM (VALUES {listed}) AS t (kind, name) JOIN pg_catalog.pg_class ON oid = to_regclass(t.name)"""
        self.indexes = f"""
            SELECT t.name AS table_name, '"' || replace(c.relname, '"', '""') || '"' AS name, indisprimary, indisvalid
            FROM (VALUES {listed}) AS t (kind, name)
            LEFT JOIN (pg_catalog.pg_index AS i JOIN pg_catalog.pg_class AS c ON c.oid = i.indexrelid)
                ON indrelid = to_regclass(t.name)"""

        # --- doctor: the server -------------------------------------------------------------------------

        self.server = """
            SELECT current_setting('server_version_num')::integer / 10000 AS version,
                pg_is_in_recovery() AS is_standby, current_setting('fsync') AS fsync,
                current_setting('full_page_writes') AS full_page_writes,
                current_setting('synchronous_commit') AS synchronous_commit,
                current_setting('autovacuum') AS autovacuum, current_setting('track_counts') AS track_counts"""
        self.notification_queue = "SELECT pg_notification_queue_usage() AS usage"
        self.now = "SELECT clock_timestamp()"

        wanted = ", ".join(
            f"({_literal(names[name])}, '{right}')"
            for name, rights in _RELAY_RIGHTS.items()
            for right in rights.split()
        )
        self.missing_rights = f"""
            SELECT current_user AS role, name AS table_name, string_agg(right_, ', ' ORDER BY right_) AS rights
            FROM (VALUES {wanted}) AS needed (name, right_)
            WHERE NOT has_table_privilege(to_regclass(name), right_)
            GROUP BY name ORDER BY name"""
        self.sees_others = "SELECT current_user AS role, pg_has_role('pg_read_all_stats', 'USAGE') AS sees_others"

        # --- bench --------------------------------------------------------------------------------------

        self.drop = f"DROP TABLE IF EXISTS {', '.join(names[name] for name in tables)}"
        # The floor: what anybody would write by hand.
        self.plain_insert = f"INSERT INTO {outbox} (id, topic, headers, payload) VALUES ($1, $2, '{{}}', $3)"
        self.fill = f"""
            INSERT INTO {outbox} (id, topic, payload)
            SELECT gen_random_uuid(), 'bench', $2 FROM generate_series(1, $1)"""
        self.plain_lock = f"""
            SELECT position, id, topic, key, headers, payload FROM {outbox}
            ORDER BY position LIMIT $1 FOR UPDATE SKIP LOCKED"""


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
