--
-- userpilot_identify_company() and userpilot_identify_user(): what is queued,
-- in which lane, and that it is queued in the caller's transaction
--
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS userpilot;
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot OPTIONS (region 'us');
CREATE VIEW queued AS
  SELECT server, kind, entity_id, company_id, metadata, bulk, batch
  FROM userpilot_queue ORDER BY lsn, ctid;

--
-- Ids of every type
--
CREATE DOMAIN regress_code AS text CHECK (value <> 'bad');
CREATE DOMAIN regress_number AS regress_code;
CREATE DOMAIN regress_positive AS integer CHECK (value > 0);
SELECT userpilot_identify_company('literal');
SELECT userpilot_identify_company('text'::text);
SELECT userpilot_identify_company('varchar'::varchar(20));
SELECT userpilot_identify_company('domain'::regress_code);
SELECT userpilot_identify_company('domain over domain'::regress_number);
SELECT userpilot_identify_company(7::regress_positive);
SELECT userpilot_identify_company((-32768)::smallint);
SELECT userpilot_identify_company(42);
SELECT userpilot_identify_company(-9223372036854775808);
SELECT userpilot_identify_company(1.50);
SELECT userpilot_identify_company(123456789012345678901234567890::numeric);
SELECT userpilot_identify_company('A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'::uuid);
SELECT userpilot_identify_company(E' spaces,\ttab\nand "quotes" \\ ');
SELECT kind, entity_id FROM queued;
-- as long as an id may be
SELECT userpilot_identify_company(repeat('x', 512));
SELECT length(entity_id) FROM queued OFFSET 13;
TRUNCATE userpilot_queue;

--
-- Arguments left out, null, and by name
--
SELECT userpilot_identify_company('c1', '{"name":"Acme","monthly_spend":1000,"active":true,"gone":null}');
SELECT userpilot_identify_company('c2', NULL);
SELECT userpilot_identify_company(company_id => 'c3'::text, metadata => '{"name":"by name"}');
SELECT userpilot_identify_company(metadata => '{"order":"other"}', company_id => 5);
SELECT userpilot_identify_user('u1');
SELECT userpilot_identify_user('u2', NULL);
SELECT userpilot_identify_user('u3', '{"name":"Jane"}', NULL);
SELECT userpilot_identify_user('u4', '{"name":"Jane"}', 'c1');
SELECT userpilot_identify_user(42, '{}', 7::bigint);
SELECT userpilot_identify_user('u5', '{}', '3f333df6-90a4-4fda-8dd3-9485d27cee36'::uuid);
SELECT userpilot_identify_user('u6', '{}', NULL::bigint);
SELECT userpilot_identify_user('u7', company_id => 'c1');
SELECT userpilot_identify_user(user_id => 'u8', metadata => '{"a":1}', company_id => 'c1');
-- a null that cannot be an id is still no company
SELECT userpilot_identify_user('u9', '{}', NULL::boolean);
SELECT * FROM queued;

-- void, and once for every row of a query
SELECT pg_typeof(userpilot_identify_company('c4'));
SELECT count(userpilot_identify_company(g)) FROM generate_series(1, 3) g;
SELECT count(*) FROM queued;

-- the rest of a row says when and by which transaction
TRUNCATE userpilot_queue;
BEGIN;
SELECT userpilot_identify_company('c1');
SELECT userpilot_identify_company('c1');
SELECT q.xid = pg_current_xact_id() AS mine,
       enqueued_at BETWEEN now() AND clock_timestamp() AS now,
       lsn <= pg_current_wal_insert_lsn() AS behind,
       lsn >= lag(lsn) OVER (ORDER BY ctid) AS rising
  FROM userpilot_queue q ORDER BY q.ctid;
COMMIT;

-- another server
CREATE SERVER other FOREIGN DATA WRAPPER userpilot OPTIONS (region 'eu');
SET userpilot.server = other;
SELECT userpilot_identify_company('c2');
BEGIN;
SET LOCAL userpilot.server = 'userpilot';
SELECT userpilot_identify_company('c3');
COMMIT;
SELECT userpilot_identify_company('c4');
RESET userpilot.server;
SELECT userpilot_identify_company('c5');
ALTER SERVER other RENAME TO "An Other";
SET userpilot.server = 'An Other';
SELECT userpilot_identify_company('c6');
RESET userpilot.server;
SELECT server, entity_id FROM queued;
TRUNCATE userpilot_queue;

-- nobody's lastval() changes
CREATE SEQUENCE regress_sequence START 17;
SELECT nextval('regress_sequence');
SELECT userpilot_identify_company('c1');
SELECT userpilot_bulk_identify_companies('c1', '{}');
SELECT lastval();
DROP SEQUENCE regress_sequence;
TRUNCATE userpilot_queue, userpilot_batches;

--
-- Lanes: a transaction's first 100 rows are real time, what follows is bulk
--
CREATE VIEW lanes AS
  SELECT kind, bulk, count(*), count(batch) AS of_batch,
         min(entity_id::int), max(entity_id::int) FROM userpilot_queue GROUP BY 1, 2 ORDER BY 1, 2;
SELECT count(userpilot_identify_company(g)) FROM generate_series(1, 100) g;
SELECT * FROM lanes;
TRUNCATE userpilot_queue;
SELECT count(userpilot_identify_company(g)) FROM generate_series(1, 101) g;
SELECT * FROM lanes;
TRUNCATE userpilot_queue;
-- both kinds and all statements together, and every transaction anew
BEGIN;
SELECT count(userpilot_identify_company(g)) FROM generate_series(1, 60) g;
SELECT count(userpilot_identify_user(g)) FROM generate_series(1, 60) g;
COMMIT;
SELECT userpilot_identify_user(61);
SELECT * FROM lanes;
TRUNCATE userpilot_queue;
-- what was rolled back counts: it is about the transaction's manners
BEGIN;
SAVEPOINT s;
SELECT count(userpilot_identify_company(g)) FROM generate_series(1, 100) g;
ROLLBACK TO s;
SELECT userpilot_identify_company(101);
COMMIT;
SELECT * FROM lanes;
TRUNCATE userpilot_queue;
-- a bulk SELECT does not use up the real-time rows
BEGIN;
SELECT userpilot_bulk_identify_companies(g, '{}') FROM generate_series(1, 200) g;
SELECT userpilot_identify_company(201);
COMMIT;
SELECT * FROM lanes;
TRUNCATE userpilot_queue, userpilot_batches;

--
-- Transactions
--
BEGIN;
SELECT userpilot_identify_company('rolled back');
ROLLBACK;
SELECT count(*) FROM queued;

BEGIN;
SELECT userpilot_identify_company('1');
SAVEPOINT a;
SELECT userpilot_identify_company('not 2');
SAVEPOINT b;
SELECT userpilot_identify_company('not 3');
RELEASE b;
ROLLBACK TO a;
SELECT userpilot_identify_company('4');
SAVEPOINT c;
SELECT userpilot_identify_company('5');
RELEASE c;
SELECT 1 / 0;
ROLLBACK TO a;
SELECT userpilot_identify_company('6');
COMMIT;
SELECT entity_id, xid = max(xid) OVER () AS same_xid FROM userpilot_queue ORDER BY lsn;
TRUNCATE userpilot_queue;

-- the first row of all in a subtransaction that fails
BEGIN;
SAVEPOINT a;
SELECT userpilot_identify_company('not 1');
SELECT userpilot_identify_company('');
ROLLBACK TO a;
SELECT userpilot_identify_company('2');
COMMIT;
SELECT entity_id FROM queued;
TRUNCATE userpilot_queue;

-- exception blocks
DO $$
BEGIN
  FOR i IN 1..300 LOOP
    BEGIN
      PERFORM userpilot_identify_company(i);
      IF i % 3 = 0 THEN
        RAISE division_by_zero;
      END IF;
    EXCEPTION WHEN division_by_zero THEN
      PERFORM userpilot_identify_user(i);
    END;
  END LOOP;
END$$;
SELECT kind, count(*), sum(entity_id::int) FROM queued GROUP BY 1 ORDER BY 1;
TRUNCATE userpilot_queue;

-- a procedure that commits in between
DO $$
BEGIN
  FOR i IN 1..6 LOOP
    PERFORM userpilot_identify_company(i);
    IF i % 2 = 0 THEN COMMIT; ELSIF i = 5 THEN ROLLBACK; END IF;
  END LOOP;
END$$;
SELECT entity_id FROM queued;
SELECT count(DISTINCT xid) FROM userpilot_queue;
TRUNCATE userpilot_queue;

-- cursors, also one that outlives its transaction
BEGIN;
DECLARE c CURSOR WITH HOLD FOR SELECT g, userpilot_identify_company(g) FROM generate_series(1, 5) g;
COMMIT;
FETCH 1 FROM c;
CLOSE c;
BEGIN;
DECLARE c CURSOR FOR SELECT g FROM generate_series(6, 9) g WHERE userpilot_identify_company(g)::text = '';
SAVEPOINT s;
FETCH 2 FROM c;
ROLLBACK TO s;
FETCH 1 FROM c;
COMMIT;
SELECT entity_id FROM queued;
TRUNCATE userpilot_queue;

-- a trigger's rows go with its statement
CREATE TABLE regress_accounts (id int PRIMARY KEY, name text NOT NULL);
CREATE FUNCTION regress_accounts_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM userpilot_identify_company(NEW.id, jsonb_build_object('name', NEW.name));
  RETURN NULL;
END$$;
CREATE TRIGGER changed AFTER INSERT OR UPDATE ON regress_accounts
  FOR EACH ROW EXECUTE FUNCTION regress_accounts_changed();
INSERT INTO regress_accounts VALUES (1, 'one'), (2, 'two');
INSERT INTO regress_accounts VALUES (3, 'three'), (2, 'twice');
UPDATE regress_accounts SET name = upper(name) WHERE id = 2;
SELECT entity_id, metadata FROM queued;
TRUNCATE userpilot_queue;
DROP TABLE regress_accounts;
DROP FUNCTION regress_accounts_changed();

-- a deferred trigger queues while the transaction commits
CREATE TABLE regress_late (id int);
CREATE FUNCTION regress_late() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM userpilot_identify_company(NEW.id);
  PERFORM userpilot_bulk_identify_users(NEW.id, '{}');
  RETURN NULL;
END$$;
CREATE CONSTRAINT TRIGGER late AFTER INSERT ON regress_late DEFERRABLE INITIALLY DEFERRED
  FOR EACH ROW EXECUTE FUNCTION regress_late();
BEGIN;
INSERT INTO regress_late VALUES (1), (2);
SELECT count(*) FROM queued;
COMMIT;
SELECT kind, entity_id, bulk FROM queued ORDER BY kind, entity_id;
SELECT rows FROM userpilot_batches;
TRUNCATE userpilot_queue, userpilot_batches;
DROP TABLE regress_late;
DROP FUNCTION regress_late();

--
-- Two-phase commit
--
BEGIN;
SELECT userpilot_identify_company('committed');
SELECT userpilot_bulk_identify_companies(g, '{}') FROM generate_series(1, 3) g;
PREPARE TRANSACTION 'regress_identify_1';
SELECT count(*) FROM queued;
BEGIN;
SELECT userpilot_identify_company('rolled back');
SELECT userpilot_bulk_identify_companies(g, '{}') FROM generate_series(4, 6) g;
PREPARE TRANSACTION 'regress_identify_2';
SELECT userpilot_identify_company('meanwhile');
ROLLBACK PREPARED 'regress_identify_2';
COMMIT PREPARED 'regress_identify_1';
SELECT entity_id, bulk FROM queued ORDER BY entity_id;
SELECT rows FROM userpilot_batches;
TRUNCATE userpilot_queue, userpilot_batches;

--
-- The extension comes and goes in a subtransaction
--
BEGIN;
SAVEPOINT a;
DROP EXTENSION userpilot CASCADE;
CREATE EXTENSION userpilot;
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot OPTIONS (region 'eu');
SELECT userpilot_identify_company('into the new queue');
SELECT userpilot_bulk_identify_companies('into the new queue', '{}');
ROLLBACK TO a;
SELECT userpilot_identify_company('into the old queue');
COMMIT;
SELECT entity_id FROM queued;
SELECT count(*) FROM userpilot_batches;
TRUNCATE userpilot_queue;

-- what fails while its row is written leaves nothing behind, whoever catches it
CREATE INDEX boom ON userpilot_queue (metadata);
CREATE FUNCTION large() RETURNS jsonb LANGUAGE sql
RETURN jsonb_build_object('a', (SELECT string_agg(md5(i::text), '') FROM generate_series(1, 800) i));
BEGIN;
SAVEPOINT a;
SELECT userpilot_identify_company('c1', large());
ROLLBACK TO a;
SELECT 'still here';
SAVEPOINT a;
SELECT userpilot_identify_company('c1', large());
ROLLBACK TO a;
DO $$
BEGIN
  PERFORM userpilot_identify_company('c1', large());
EXCEPTION WHEN program_limit_exceeded THEN
  NULL;
END $$;
SELECT userpilot_identify_company('c2');
COMMIT;
SELECT entity_id FROM queued;
DROP INDEX boom;
DROP FUNCTION large();
TRUNCATE userpilot_queue;

-- a library that does not know the table keeps its hands off it
BEGIN;
ALTER TABLE userpilot_queue ADD COLUMN more text;
SELECT userpilot_identify_company('c1');
ROLLBACK;
BEGIN;
ALTER TABLE userpilot_queue RENAME company_id TO company;
SELECT userpilot_bulk_identify_companies('c1', '{}');
ROLLBACK;
SELECT count(*) FROM queued;

DROP VIEW queued, lanes;
DROP DOMAIN regress_number, regress_code, regress_positive;
DROP EXTENSION userpilot CASCADE;
