-- What a relay does all the time, in one round trip each. The settings pin the walk along the primary key: statistics
-- taken while the queue was empty would make the planner sort the whole backlog for every batch; what cannot do without
-- is no reason to compile it. A call that is a transaction by itself says how many milliseconds its caller waits: it
-- waits for no lock any longer. There synchronous_commit is off: what a crash of the server forgets of it only means a
-- redelivery. Within a transaction, whose settings and limits these are, it says NULL.

-- Claims the next messages beyond a position that nobody holds. At the lower isolation each statement has a snapshot of
-- its own, which is the point: the first locks rows, skipping those locked by another relay's claim, and may not see
-- one that was committed meanwhile; the second sees each claim that was ever made on them, and leaves out what another
-- relay claimed first. A relay that was declared dead finds no row of its own and claims nothing; one that is not keeps
-- the row locked against being declared so in this moment.
CREATE OR REPLACE FUNCTION {claim}(beyond bigint, relay uuid, most integer, most_bytes bigint, within_ms integer)
RETURNS TABLE (
    "position" bigint, id uuid, topic text, key text, headers text, payload bytea, recorded_at bytea, attempts integer
)
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_sort = off SET enable_bitmapscan = off
SET plan_cache_mode = force_generic_plan SET jit_above_cost = -1
AS $claim$
#variable_conflict use_column
DECLARE
    free bigint[];
    mine bigint[];
    is_large boolean;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE 'messages are claimed at the isolation level read committed' USING ERRCODE = 'active_sql_transaction';
    END IF;
    IF within_ms IS NOT NULL THEN
        PERFORM set_config('synchronous_commit', 'off', true), set_config('lock_timeout', within_ms::text, true);
    END IF;
    SELECT array_agg(f.position), bool_or(f.is_large) INTO free, is_large FROM (
        SELECT o.position, octet_length(o.payload) > 16384 AS is_large
        FROM {outbox} AS o
        WHERE o.position > beyond AND o.dispatched_at IS NULL
            AND o.position NOT IN (SELECT unnest(c.positions) FROM {claims} AS c WHERE c.upto > beyond)
        ORDER BY o.position LIMIT most
        FOR UPDATE SKIP LOCKED) AS f;
    IF free IS NULL THEN
        RETURN;
    END IF;
    IF is_large THEN -- only then, since to add up the sizes costs a fifth of the speed
        free := ARRAY(
            SELECT s.position FROM (
                SELECT o.position, octet_length(o.payload) AS size,
                    sum(octet_length(o.payload)) OVER (ORDER BY o.position ROWS UNBOUNDED PRECEDING) AS bytes
                FROM {outbox} AS o WHERE o.position = ANY(free)) AS s
            WHERE bytes - size < GREATEST(most_bytes, 1));
    END IF;
    WITH alive AS (SELECT FROM {relays} WHERE owner = relay FOR KEY SHARE),
    unclaimed AS (
        SELECT f.position FROM unnest(free) AS f (position) WHERE f.position NOT IN (
            SELECT unnest(c.positions) FROM {claims} AS c WHERE c.upto > beyond))
    INSERT INTO {claims} AS c (upto, owner, positions)
    SELECT max(u.position), relay, array_agg(u.position) FROM unclaimed AS u WHERE EXISTS (SELECT FROM alive)
    HAVING count(*) > 0
    RETURNING c.positions INTO mine;
    -- Its caller may have given up: what it does not know of would be in its hands for as long as it lives.
    IF clock_timestamp() > statement_timestamp() + within_ms * interval '1 ms' THEN
        RAISE 'it took longer than % ms to claim messages', within_ms USING ERRCODE = 'query_canceled';
    END IF;
    -- The time is sent as the eight bytes it is: to decode it in the driver costs as much as all other columns.
    RETURN QUERY
        SELECT o.position, o.id, o.topic, o.key, o.headers, o.payload, timestamptz_send(o.recorded_at), 0
        FROM {outbox} AS o WHERE o.position = ANY(mine) ORDER BY o.position;
END
$claim$;

-- Reads the next messages beyond a position, and up to another, that fall into the slots of a mask and are not in the
-- relay's hands, and notes that they are, for the case of its death. Nobody else reads these slots, so nothing is locked.
-- A relay that was declared dead notes nothing, and reads nothing.
CREATE OR REPLACE FUNCTION {read}(
    mask bigint, is_total boolean, beyond bigint, up_to bigint, in_hand bigint[], relay uuid,
    most integer, most_bytes bigint, within_ms integer
) RETURNS TABLE (
    "position" bigint, id uuid, topic text, key text, headers text, payload bytea, recorded_at bytea, attempts integer,
    lane bigint
)
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_sort = off SET enable_bitmapscan = off
SET plan_cache_mode = force_generic_plan SET jit_above_cost = -1
AS $read$
#variable_conflict use_column
DECLARE
    mine bigint[];
    is_large boolean;
BEGIN
    IF within_ms IS NOT NULL THEN
        PERFORM set_config('synchronous_commit', 'off', true), set_config('lock_timeout', within_ms::text, true);
    END IF;
    SELECT array_agg(f.position), bool_or(f.is_large) INTO mine, is_large FROM (
        SELECT o.position, octet_length(o.payload) > 16384 AS is_large
        FROM {outbox} AS o
        WHERE o.position > beyond AND o.position <= up_to AND o.dispatched_at IS NULL
            AND (mask = -1 OR mask & (1::bigint << CASE WHEN is_total THEN 0 ELSE
                (COALESCE(hashtextextended(o.key COLLATE "C", 0), o.position) & 63)::integer END) <> 0)
            AND o.position NOT IN (SELECT unnest(in_hand))
        ORDER BY o.position LIMIT most) AS f;
    IF is_large THEN
        mine := ARRAY(
            SELECT s.position FROM (
                SELECT o.position, octet_length(o.payload) AS size,
                    sum(octet_length(o.payload)) OVER (ORDER BY o.position ROWS UNBOUNDED PRECEDING) AS bytes
                FROM {outbox} AS o WHERE o.position = ANY(mine)) AS s
            WHERE bytes - size < GREATEST(most_bytes, 1));
    END IF;
    WITH alive AS (SELECT FROM {relays} WHERE owner = relay FOR KEY SHARE)
    INSERT INTO {claims} AS c (upto, owner, positions)
    SELECT max(m.position), relay, mine FROM unnest(mine) AS m (position) WHERE EXISTS (SELECT FROM alive)
    HAVING count(*) > 0
    ON CONFLICT (upto, owner) DO UPDATE SET positions = EXCLUDED.positions
    RETURNING c.positions INTO mine;
    IF clock_timestamp() > statement_timestamp() + within_ms * interval '1 ms' THEN
        RAISE 'it took longer than % ms to read messages', within_ms USING ERRCODE = 'query_canceled';
    END IF;
    RETURN QUERY
        SELECT o.position, o.id, o.topic, o.key, o.headers, o.payload, timestamptz_send(o.recorded_at), 0,
            CASE WHEN is_total THEN 0 ELSE hashtextextended(o.key COLLATE "C", 0) END
        FROM {outbox} AS o WHERE o.position = ANY(mine) ORDER BY o.position;
END
$read$;

-- Settles messages that were delivered as they were claimed: deletes or marks them, and drops the claims that are
-- finished by it, as long as all of the claims are there. A server that crashed, or failed over to one that was behind,
-- may have forgotten a claim, and given out its positions anew. Returns how many messages were found; -1 where an order
-- is kept, and the relay does not live or does not own each of its slots in its epoch (see the statement "owned").
CREATE OR REPLACE FUNCTION {settle}(
    delivered bigint[], held bigint[], finished bigint[], epochs bigint[], relay uuid, is_kept boolean,
    within_ms integer
) RETURNS bigint
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_sort = off SET enable_bitmapscan = off
SET plan_cache_mode = force_generic_plan SET jit_above_cost = -1
AS $settle$
DECLARE
    found_now bigint := 0;
BEGIN
    IF within_ms IS NOT NULL THEN
        PERFORM set_config('synchronous_commit', 'off', true), set_config('lock_timeout', within_ms::text, true);
    END IF;
    IF epochs IS NOT NULL AND (
        WITH alive AS (SELECT FROM {relays} WHERE owner = relay FOR KEY SHARE)
        SELECT count(*) + (SELECT count(*) FROM alive) FROM {slots}
        WHERE owner = relay AND 64 * epoch + slot = ANY(epochs)) <= cardinality(epochs)
    THEN
        RETURN -1;
    END IF;
    IF (SELECT count(*) FROM {claims} WHERE upto = ANY(held) AND owner = relay) < cardinality(held) THEN
        RETURN 0;
    END IF;
    DELETE FROM {claims} WHERE upto = ANY(finished) AND owner = relay;
    IF is_kept THEN
        UPDATE {outbox} SET dispatched_at = clock_timestamp()
        WHERE position = ANY(delivered) AND dispatched_at IS NULL;
    ELSE
        DELETE FROM {outbox} WHERE position = ANY(delivered);
    END IF;
    GET DIAGNOSTICS found_now = ROW_COUNT;
    RETURN found_now;
END
$settle$;
