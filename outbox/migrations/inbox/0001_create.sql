-- The messages that one consumer has accepted, by id. Ids of version 7 grow with time, and so both indexes grow at
-- their right edge: a row costs its two entries and no page is read for it. Cleanup walks the second from its left.
CREATE TABLE {inbox} (
    id          uuid        NOT NULL PRIMARY KEY,
    accepted_at timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX {inbox_accepted_at} ON {inbox} (accepted_at);
