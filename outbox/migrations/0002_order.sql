-- Order. A lane is what is kept in order: a hash of the key, or all messages as one. Lanes fall into 64 slots, and a
-- slot is one relay's at a time.

-- Relays of another order stand by (not active) for as long as one is at work: together they would keep none.
ALTER TABLE {relays}
    ADD COLUMN ordering text    NOT NULL DEFAULT 'none' CHECK (ordering IN ('none', 'key', 'total')),
    ADD COLUMN active   boolean NOT NULL DEFAULT true;

-- The epoch grows with each change of hands. What a dead owner had claimed, up to suspect_upto, is a suspect when the
-- next owner dies of it too.
CREATE TABLE {slots} (
    slot         smallint NOT NULL PRIMARY KEY,
    owner        uuid,
    epoch        bigint   NOT NULL DEFAULT 0,
    suspect_upto bigint   NOT NULL DEFAULT -9223372036854775808
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);
INSERT INTO {slots} (slot) SELECT slot FROM generate_series(0, 63) AS slot;

-- Of the waiting messages, those that keep a place in their lane. The first of a lane has a due time; those behind it
-- have none of their own, which is infinity.
ALTER TABLE {waiting} ADD COLUMN lane bigint;
CREATE INDEX {waiting_lane} ON {waiting} (lane, position) WHERE lane IS NOT NULL;
CREATE INDEX {waiting_head} ON {waiting} (due_at, position) WHERE lane IS NOT NULL;

-- A dead letter that was parked stands behind the one that gave up, named by its position.
ALTER TABLE {dead} ADD COLUMN lane bigint, ADD COLUMN behind bigint;
CREATE INDEX {dead_behind} ON {dead} (behind) WHERE behind IS NOT NULL;

-- Where an order is kept, a claim is a note of what is in a relay's hands. Two of them may end with the same message,
-- when a slot has changed hands in the meantime.
ALTER TABLE {claims} DROP CONSTRAINT {claims_pkey}, ADD PRIMARY KEY (upto, owner);
