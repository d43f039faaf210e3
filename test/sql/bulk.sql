--
-- Bulk aggregates: any number of rows with one SELECT
--
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS userpilot;
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot OPTIONS (region 'us');
CREATE VIEW queued AS
  SELECT kind, bulk, batch IS NOT NULL AS of_batch, count(*) AS rows, count(company_id) AS companies,
         count(DISTINCT entity_id) AS entities, count(DISTINCT batch) AS batches
  FROM userpilot_queue GROUP BY 1, 2, 3 ORDER BY 1, 2, 3;
-- rows queued of every batch beside what its record says
CREATE VIEW batches AS
  SELECT b.kind, b.rows, count(q.*) AS queued
  FROM userpilot_batches b FULL JOIN userpilot_queue q ON q.batch = b.id
  WHERE q.batch IS NOT NULL OR b.id IS NOT NULL
  GROUP BY b.id, b.kind, b.rows ORDER BY b.id;

CREATE TABLE accounts AS
  SELECT g AS id, 'name ' || g AS name, g % 10 AS plan, nullif(g % 4, 0) AS owner
  FROM generate_series(1, 1000) g;

--
-- What one row becomes
--
SELECT userpilot_bulk_identify_companies(id, jsonb_build_object('name', name)) FROM accounts WHERE id = 7;
SELECT userpilot_bulk_identify_users('u1', '{"name":"Jane"}');
SELECT userpilot_bulk_identify_users('u2', NULL, 'c1');
SELECT userpilot_bulk_identify_users('u3'::varchar, '{}', NULL);
SELECT userpilot_bulk_identify_users('3f333df6-90a4-4fda-8dd3-9485d27cee36'::uuid, '{}', 5::smallint);
SELECT server, kind, entity_id, company_id, metadata, bulk FROM userpilot_queue ORDER BY xid;
SELECT * FROM queued;
SELECT * FROM batches;
TRUNCATE userpilot_queue, userpilot_batches;

-- and what is recorded of its SELECT
BEGIN;
SELECT userpilot_bulk_identify_companies(id, '{}') /* the first */ FROM accounts WHERE id <= 3;
SELECT userpilot_bulk_identify_users(id, '{}') /* the second */ FROM accounts WHERE id <= 2;
SELECT count(*) FROM userpilot_batches;
COMMIT;
SELECT b.server, b.kind, b.rows, b.statement, b.by = current_user AS by_me,
       b.started_at <= clock_timestamp() AS started,
       pg_snapshot_xmax(b.snapshot) IS NOT NULL AS has_snapshot,
       b.id / 1000000 = b.xid::text::bigint AS id_from_xid, b.id % 1000000 AS number,
       bool_and(q.xid = b.xid) AS xid_matches, min(q.lsn) = b.lsn AND count(DISTINCT q.lsn) = b.rows AS lsn_matches
  FROM userpilot_batches b JOIN userpilot_queue q ON q.batch = b.id
  GROUP BY b.id ORDER BY b.id;
TRUNCATE userpilot_queue, userpilot_batches;

-- only the statement itself goes on record, whatever was sent with it
SELECT 'secret' AS first \; SELECT userpilot_bulk_identify_companies(1, '{}') \; SELECT 'secret' AS last;
SELECT statement FROM userpilot_batches;
TRUNCATE userpilot_queue, userpilot_batches;

CREATE TEMP TABLE counted AS SELECT userpilot_bulk_identify_companies(1, '{}') \; SELECT 'secret' AS last;
SELECT statement ~ 'secret' AS leaks FROM userpilot_batches;
DROP TABLE counted;
TRUNCATE userpilot_queue, userpilot_batches;

-- a cursor reads what was there when it was opened: older than what the same
-- transaction has queued since is not to be queued after it
BEGIN;
DECLARE early CURSOR FOR SELECT userpilot_bulk_identify_companies(1, '{"plan": "old"}');
SELECT userpilot_identify_company(1, '{"plan": "new"}');
SAVEPOINT before;
FETCH early;
ROLLBACK TO before;
SELECT userpilot_bulk_identify_companies(1, '{"plan": "newer"}');
ROLLBACK;
BEGIN;
DECLARE early CURSOR FOR SELECT userpilot_bulk_identify_companies(1, '{"plan": "old"}');
UPDATE accounts SET id = id WHERE id = 1;
SELECT userpilot_bulk_identify_companies(1, '{"plan": "new"}');
FETCH early;
ROLLBACK;
BEGIN;
DECLARE early CURSOR WITH HOLD FOR SELECT userpilot_bulk_identify_companies(1, '{"plan": "old"}');
SELECT userpilot_identify_company(1, '{"plan": "new"}');
COMMIT;
SELECT count(*) FROM userpilot_queue;

-- what was rolled back was not queued
BEGIN;
SAVEPOINT before;
SELECT userpilot_identify_company(i, '{}'), 1 / (2 - i) FROM generate_series(1, 2) i;
ROLLBACK TO before;
SELECT userpilot_bulk_identify_companies(1, '{}');
ROLLBACK;

-- a long statement is cut, and a role has its name on its own
CREATE ROLE regress_bulk;
GRANT USAGE ON FOREIGN SERVER userpilot TO regress_bulk;
SET ROLE regress_bulk;
SELECT repeat('x', 2000) AS long \gset
SELECT userpilot_bulk_identify_companies(1, '{}'), length(:'long');
RESET ROLE;
SELECT by, length(statement), left(statement, 54) FROM userpilot_batches;
TRUNCATE userpilot_queue, userpilot_batches;
REVOKE USAGE ON FOREIGN SERVER userpilot FROM regress_bulk;
DROP ROLE regress_bulk;

--
-- No rows: 0, and no record
--
SELECT userpilot_bulk_identify_companies(id, '{}') FROM accounts WHERE false;
SELECT userpilot_bulk_identify_users(id, '{}') FROM accounts WHERE false;
SELECT userpilot_bulk_identify_users(id, '{}', id) FROM accounts WHERE false;
SELECT plan, userpilot_bulk_identify_companies(id, '{}') FROM accounts WHERE false GROUP BY 1;
SELECT userpilot_bulk_identify_companies(id, '{}') FILTER (WHERE false) FROM accounts;
SELECT * FROM queued;
SELECT * FROM batches;

--
-- Every number around what is written at once
--
SELECT n, userpilot_bulk_identify_companies(g, jsonb_build_object('n', n))
  FROM unnest(array[1, 499, 500, 501, 1000, 1001]) n, generate_series(1, n) g GROUP BY n ORDER BY n;
SELECT metadata ->> 'n' AS n, count(*), min(entity_id::int), max(entity_id::int) FROM userpilot_queue GROUP BY 1 ORDER BY count(*);
SELECT * FROM batches;
TRUNCATE userpilot_queue, userpilot_batches;
DO $$
DECLARE
  n int;
  said bigint;
  queued bigint;
BEGIN
  FOREACH n IN ARRAY array[1, 2, 499, 500, 501, 999, 1000, 1001, 2500] LOOP
    SELECT userpilot_bulk_identify_users(g, '{"a":1}', g % 3) INTO said FROM generate_series(1, n) g;
    SELECT count(*) INTO queued FROM userpilot_queue;
    IF said <> n OR queued <> n THEN
      RAISE 'of % rows % are said to be queued and % are', n, said, queued;
    END IF;
    DELETE FROM userpilot_queue;
  END LOOP;
END$$;
TRUNCATE userpilot_queue, userpilot_batches;

-- more than 1 MB before 500 rows, stored out of line; nothing of it is lost
SELECT userpilot_bulk_identify_companies(g, jsonb_build_object('story',
    (SELECT string_agg(md5(g || '-' || i), '') FROM generate_series(1, 1000) i)))
  FROM generate_series(1, 120) g;
SELECT * FROM batches;
SELECT count(*) FROM userpilot_queue
  WHERE metadata ->> 'story' = (SELECT string_agg(md5(entity_id || '-' || i), '') FROM generate_series(1, 1000) i);
SELECT pg_relation_size(reltoastrelid) > 1000000 AS out_of_line FROM pg_class WHERE oid = 'userpilot_queue'::regclass;
TRUNCATE userpilot_queue, userpilot_batches;
-- metadata that already lies out of line in its own table
CREATE TABLE documents (id int, meta jsonb);
ALTER TABLE documents ALTER meta SET STORAGE EXTERNAL;
INSERT INTO documents SELECT g, jsonb_build_object('story', repeat(g::text, 9000)) FROM generate_series(1, 9) g;
SELECT userpilot_bulk_identify_users(id, meta) FROM documents;
DROP TABLE documents;
SELECT count(*) FROM userpilot_queue WHERE metadata ->> 'story' = repeat(entity_id, 9000);
TRUNCATE userpilot_queue, userpilot_batches;

--
-- Shapes of SELECT
--
-- groups, hashed and sorted
SET enable_sort = off;
EXPLAIN (COSTS off) SELECT plan, userpilot_bulk_identify_companies(id, '{}') FROM accounts GROUP BY plan;
SELECT sum(n), count(*) FROM (SELECT plan, userpilot_bulk_identify_companies(id, '{}') AS n FROM accounts GROUP BY plan) x;
RESET enable_sort;
SET enable_hashagg = off;
EXPLAIN (COSTS off) SELECT plan, userpilot_bulk_identify_companies(id, '{}') FROM accounts GROUP BY plan;
SELECT plan, userpilot_bulk_identify_users(id, '{}', owner) FROM accounts GROUP BY plan ORDER BY plan;
RESET enable_hashagg;
SELECT * FROM queued;
SELECT * FROM batches;
TRUNCATE userpilot_queue, userpilot_batches;
-- as many groups as rows, spilling or not
SET work_mem = '64kB';
SELECT count(n), sum(n) FROM (SELECT id, userpilot_bulk_identify_companies(id, jsonb_build_object('name', name)) AS n
  FROM accounts, generate_series(1, 10) GROUP BY id, generate_series) x;
RESET work_mem;
SELECT * FROM queued;
SELECT * FROM batches;
TRUNCATE userpilot_queue, userpilot_batches;

SELECT userpilot_bulk_identify_companies(id, '{}') FILTER (WHERE plan = 3) AS three,
       userpilot_bulk_identify_companies(DISTINCT plan, '{}') AS plans,
       userpilot_bulk_identify_users(id, '{}' ORDER BY name DESC) AS users,
       userpilot_bulk_identify_users(id, '{}', owner) AS owned
  FROM accounts;
SELECT * FROM queued;
SELECT rows FROM userpilot_batches ORDER BY rows;
TRUNCATE userpilot_queue, userpilot_batches;

-- the order is the SELECT's
SELECT userpilot_bulk_identify_companies(g, '{}' ORDER BY g DESC) FROM generate_series(1, 5) g;
SELECT string_agg(entity_id, ' ' ORDER BY ctid) FROM userpilot_queue;
TRUNCATE userpilot_queue, userpilot_batches;

WITH sent AS MATERIALIZED (
  SELECT plan, userpilot_bulk_identify_companies(id, '{}') AS n FROM accounts GROUP BY plan
)
SELECT count(*), sum(n) FROM sent;
WITH changed AS (
  UPDATE accounts SET name = upper(name) WHERE id <= 10 RETURNING id, name
)
SELECT userpilot_bulk_identify_companies(id, jsonb_build_object('name', name)) FROM changed;
SELECT x, (SELECT userpilot_bulk_identify_users(10 * x + g, '{}') FROM generate_series(1, x) g) FROM generate_series(0, 3) x;
SELECT * FROM queued;
SELECT * FROM batches;
TRUNCATE userpilot_queue, userpilot_batches;

-- HAVING and LIMIT do not unqueue what was read
SELECT plan, userpilot_bulk_identify_companies(id, '{}') FROM accounts GROUP BY 1 HAVING count(*) < 0;
SELECT * FROM batches;
TRUNCATE userpilot_queue, userpilot_batches;

-- prepared statements, generic plans, no rows in between
PREPARE send(int) AS SELECT userpilot_bulk_identify_companies(g, '{}') FROM generate_series(1, $1) g;
SET plan_cache_mode = force_generic_plan;
EXECUTE send(2);
EXECUTE send(0);
EXECUTE send(3);
DEALLOCATE send;
RESET plan_cache_mode;
-- SQL and plpgsql functions
CREATE FUNCTION send_sql(n int) RETURNS bigint LANGUAGE sql AS
  'SELECT userpilot_bulk_identify_companies(g, ''{}'') FROM generate_series(1, n) g';
CREATE FUNCTION send_plpgsql(n int) RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
  RETURN (SELECT userpilot_bulk_identify_companies(g, '{}') FROM generate_series(1, n) g);
END$$;
SELECT send_sql(4), send_sql(5), send_plpgsql(6), send_plpgsql(7);
SELECT * FROM batches;
DROP FUNCTION send_sql(int), send_plpgsql(int);
TRUNCATE userpilot_queue, userpilot_batches;

--
-- Transactions
--
BEGIN;
SELECT userpilot_bulk_identify_companies(id, '{}') FROM accounts;
ROLLBACK;
SELECT * FROM batches;

BEGIN;
SELECT userpilot_bulk_identify_companies(g, '{}') FROM generate_series(1, 3) g;
SAVEPOINT a;
SELECT userpilot_bulk_identify_companies(g, '{}') FROM generate_series(1, 501) g;
SAVEPOINT b;
SELECT userpilot_bulk_identify_companies(g, '{}') FROM generate_series(1, 2) g;
RELEASE b;
ROLLBACK TO a;
SAVEPOINT c;
SELECT userpilot_bulk_identify_users(g, '{}') FROM generate_series(1, 4) g;
RELEASE c;
COMMIT;
SELECT * FROM batches;
SELECT id % 1000000 AS number FROM userpilot_batches ORDER BY 1;
TRUNCATE userpilot_queue, userpilot_batches;

DO $$
BEGIN
  PERFORM userpilot_bulk_identify_companies(g, '{}') FROM generate_series(1, 5) g;
  BEGIN
    PERFORM userpilot_bulk_identify_companies(nullif(g, 900), '{}') FROM generate_series(1, 1000) g;
  EXCEPTION WHEN null_value_not_allowed THEN
    PERFORM userpilot_bulk_identify_users(g, '{}') FROM generate_series(1, 6) g;
  END;
END$$;
SELECT * FROM batches;
TRUNCATE userpilot_queue, userpilot_batches;

-- cursors: the groups that are fetched are queued
SET enable_hashagg = off;
BEGIN;
DECLARE c CURSOR FOR SELECT plan, userpilot_bulk_identify_companies(id, '{}') FROM accounts GROUP BY plan ORDER BY plan;
FETCH 2 FROM c;
FETCH 1 FROM c;
COMMIT;
SELECT * FROM queued;
SELECT * FROM batches;
TRUNCATE userpilot_queue, userpilot_batches;
-- one that outlives its transaction has queued everything with it
BEGIN;
DECLARE c CURSOR WITH HOLD FOR SELECT plan, userpilot_bulk_identify_companies(id, '{}') FROM accounts GROUP BY plan ORDER BY plan;
COMMIT;
FETCH 1 FROM c;
CLOSE c;
SELECT * FROM batches;
TRUNCATE userpilot_queue, userpilot_batches;
-- a cursor must not go on where its record would be lost, or its rows
BEGIN;
DECLARE c CURSOR FOR SELECT plan, userpilot_bulk_identify_companies(id, '{}') FROM accounts GROUP BY plan ORDER BY plan;
SAVEPOINT s;
FETCH 1 FROM c;
ROLLBACK TO s;
FETCH 1 FROM c;
ROLLBACK;
BEGIN;
DECLARE c CURSOR FOR SELECT plan, userpilot_bulk_identify_companies(id, '{}') FROM accounts GROUP BY plan ORDER BY plan;
FETCH 1 FROM c;
SAVEPOINT s;
FETCH 1 FROM c;
ROLLBACK;
SELECT * FROM queued;
SELECT * FROM batches;
-- opened, never fetched
BEGIN;
DECLARE c CURSOR FOR SELECT userpilot_bulk_identify_companies(id, '{}') FROM accounts;
COMMIT;
SELECT * FROM batches;
RESET enable_hashagg;

-- the snapshot is the one the SELECT read with
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT userpilot_bulk_identify_companies(1, '{}');
SELECT userpilot_bulk_identify_companies(2, '{}');
COMMIT;
SELECT count(*), count(DISTINCT snapshot::text), count(DISTINCT xid) FROM userpilot_batches;
TRUNCATE userpilot_queue, userpilot_batches;

DROP VIEW queued, batches;
DROP TABLE accounts;
DROP EXTENSION userpilot CASCADE;
