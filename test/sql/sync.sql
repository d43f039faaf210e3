--
-- userpilot_sync_table(), what a bulk SELECT leaves out, previews, cancelling.
-- No worker runs here: what Userpilot has is written into the profiles.
--
\set SHOW_CONTEXT never
\set VERBOSITY terse
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS userpilot;
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot OPTIONS (region 'us');
CREATE FUNCTION took(OUT kind text, OUT entity text, OUT company text, OUT metadata jsonb, OUT bulk boolean) RETURNS SETOF record LANGUAGE sql AS $$
  WITH gone AS (DELETE FROM userpilot_queue RETURNING ctid AS place, userpilot_queue.*)
  SELECT gone.kind, entity_id, company_id, gone.metadata, gone.bulk FROM gone ORDER BY lsn, place $$;
-- as if all that is queued had been acknowledged
CREATE FUNCTION acknowledge() RETURNS void LANGUAGE sql AS $$
  WITH gone AS (DELETE FROM userpilot_queue RETURNING *)
  INSERT INTO userpilot_profiles (server, kind, entity_id, company_id, metadata, synced_at, believed_since)
  SELECT DISTINCT ON (server, kind, entity_id) server, kind, entity_id, company_id, metadata, now(), now()
  FROM gone ORDER BY server, kind, entity_id, lsn DESC
  ON CONFLICT (server, kind, entity_id) DO UPDATE SET metadata = userpilot_profiles.metadata || excluded.metadata,
    company_id = coalesce(excluded.company_id, userpilot_profiles.company_id) $$;
CREATE VIEW dead AS SELECT kind, entity_id, metadata, error FROM userpilot_dead_letters ORDER BY lsn, ctid;
CREATE TABLE accounts (gone int, id text, name text, plan text, active boolean DEFAULT true);
ALTER TABLE accounts DROP COLUMN gone;
CREATE TRIGGER to_userpilot AFTER INSERT OR UPDATE ON accounts FOR EACH ROW
  EXECUTE FUNCTION userpilot_company_trigger('id', 'name', 'plan');
ALTER TABLE accounts DISABLE TRIGGER ALL;
INSERT INTO accounts SELECT 'c' || i, 'n' || i, 'free' FROM generate_series(1, 5) i;

--
-- Which tables
--
SELECT * FROM userpilot_sync_table('accounts');
CREATE TABLE plain (id int);
SELECT * FROM userpilot_sync_table('plain');
SELECT * FROM userpilot_sync_table(NULL);
ALTER TABLE accounts ENABLE TRIGGER ALL;

--
-- All, then nothing, then what has changed
--
SELECT * FROM userpilot_sync_table('accounts');
SELECT rows, unchanged, invalid, pending, statement, by = current_user AS mine, server, kind FROM userpilot_batches;
SELECT * FROM took();
SELECT * FROM userpilot_sync_table('accounts');
SELECT acknowledge();
SELECT * FROM userpilot_sync_table('accounts');
SELECT count(*) FROM took();
SELECT rows, unchanged, invalid, pending FROM userpilot_batches ORDER BY id DESC LIMIT 1;
ALTER TABLE accounts DISABLE TRIGGER ALL;
UPDATE accounts SET plan = 'pro' WHERE id = 'c2';
UPDATE accounts SET plan = NULL WHERE id = 'c3';
ALTER TABLE accounts ENABLE TRIGGER ALL;
SELECT * FROM userpilot_sync_table('accounts');
SELECT * FROM took();
-- bulk SELECTs and previews say the same
SELECT (userpilot_preview_companies(id, jsonb_build_object('name', name, 'plan', plan))).* FROM accounts;
SELECT userpilot_bulk_identify_companies(id, jsonb_build_object('name', name, 'plan', plan)) FROM accounts;
SELECT * FROM took();
-- fewer keys are contained, other ones are not; a number is equal however it is written
SELECT userpilot_bulk_identify_companies(id, jsonb_build_object('name', name)) FROM accounts;
SELECT userpilot_bulk_identify_companies(id, jsonb_build_object('other', NULL)) FROM accounts WHERE id = 'c1';
UPDATE userpilot_profiles SET metadata = '{"n": 1.0, "t": "1", "b": true, "z": null}' WHERE entity_id = 'c1';
SELECT v, userpilot_bulk_identify_companies('c1', v::jsonb)
  FROM unnest('{"{\"n\":1}","{\"n\":1.00}","{\"n\":\"1\"}","{\"t\":1}","{\"b\":true}","{\"b\":\"true\"}","{\"b\":null}","{\"z\":null}","{}"}'::text[]) v GROUP BY v ORDER BY v COLLATE "C";
DELETE FROM userpilot_queue;
UPDATE userpilot_profiles SET metadata = '{"name": "n1", "plan": "free"}' WHERE entity_id = 'c1';
-- group by group
SELECT active, userpilot_bulk_identify_companies(id, jsonb_build_object('plan', plan)) FROM accounts GROUP BY active;
DELETE FROM userpilot_queue;

--
-- Not left out: what is pending, in flight, dead, too old, or unknown
--
CREATE FUNCTION queued_by_sync(prepare text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
  result text;
BEGIN
  EXECUTE prepare;
  PERFORM userpilot_sync_table('accounts');
  SELECT string_agg(entity_id || CASE WHEN bulk THEN '' ELSE ' (was there)' END, ', ' ORDER BY lsn, ctid) INTO result FROM userpilot_queue;
  RAISE EXCEPTION USING MESSAGE = coalesce(result, 'none');
EXCEPTION WHEN raise_exception THEN
  RETURN SQLERRM;
END$$;
UPDATE userpilot_profiles p SET metadata = jsonb_build_object('name', name, 'plan', plan) FROM accounts a WHERE a.id = p.entity_id;
SELECT queued_by_sync('');
SELECT queued_by_sync($$SELECT userpilot_identify_company('c1', '{"name": "n1"}')$$);
SELECT queued_by_sync($$SELECT userpilot_identify_user('c1', '{"name": "n1"}')$$);
SELECT queued_by_sync($$UPDATE userpilot_profiles SET job = 1 WHERE entity_id = 'c2'$$);
SELECT queued_by_sync($$UPDATE userpilot_profiles SET attempts = 1 WHERE entity_id = 'c3'$$);
SELECT queued_by_sync($$INSERT INTO userpilot_dead_letters (lsn, xid, enqueued_at, bulk, server, kind, entity_id, metadata, error, attempts)
  VALUES ('0/1', '3', now(), false, 'userpilot', 'company', 'c4', '{}', 'e', 0)$$);
SELECT queued_by_sync($$UPDATE userpilot_profiles SET metadata = metadata - 'plan' WHERE entity_id = 'c5'$$);
SELECT queued_by_sync($$UPDATE userpilot_profiles SET synced_at = NULL WHERE entity_id = 'c5'$$);
SELECT queued_by_sync($$UPDATE userpilot_profiles SET believed_since = now() - interval '31 days' WHERE entity_id = 'c1'$$);
SELECT queued_by_sync($$UPDATE userpilot_profiles SET believed_since = now() - interval '22 days' WHERE entity_id = 'c1'$$);
SELECT queued_by_sync($$ALTER SERVER userpilot OPTIONS (ADD refresh_after '10 days'); UPDATE userpilot_profiles SET believed_since = now() - interval '11 days' WHERE entity_id = 'c1'$$);
SELECT queued_by_sync($$SELECT userpilot_invalidate('userpilot', 'company', 'c2')$$);
SELECT queued_by_sync($$SELECT userpilot_invalidate('userpilot')$$);
-- spread: of a thousand that were acknowledged at once, some are due at three quarters, all at the end
INSERT INTO userpilot_profiles (server, kind, entity_id, metadata, synced_at, believed_since)
  SELECT 'userpilot', 'company', 's' || i, '{"a": 1}', now(), now() - interval '26 days' FROM generate_series(1, 1000) i;
SELECT n > 300 AND n < 700 AS spread FROM (SELECT userpilot_bulk_identify_companies('s' || i, '{"a": 1}') AS n FROM generate_series(1, 1000) i) q;
DELETE FROM userpilot_queue;
DELETE FROM userpilot_profiles WHERE entity_id ~ '^s';

--
-- In one transaction: nothing hides what is newer
--
-- two rows of one entity in one SELECT, two SELECTs in one statement
SELECT userpilot_bulk_identify_companies('c1', jsonb_build_object('name', v)) FROM (VALUES ('other'), ('n1')) t(v);
SELECT * FROM took();
SELECT userpilot_bulk_identify_companies('c1', '{"name": "other"}'), userpilot_bulk_identify_companies('c1', '{"name": "n1"}');
SELECT * FROM took();
-- ids of batches of a dump from elsewhere are in nobody's way
INSERT INTO userpilot_batches (id, server, kind, snapshot, lsn, xid, started_at, by)
  SELECT (pg_snapshot_xmax(pg_current_snapshot())::text::bigint + x) * 1000000 + n, 'userpilot', 'company', '3:3:', '0/1', '3', now(), 'elsewhere'
  FROM generate_series(0, 3) x, generate_series(1, 2) n;
SELECT userpilot_bulk_identify_companies('c9', '{"name": "beside restored ones"}');
SELECT b.rows, b.by <> 'elsewhere' AS its_own FROM userpilot_queue q JOIN userpilot_batches b ON b.id = q.batch;
DELETE FROM userpilot_queue;
DELETE FROM userpilot_batches;

--
-- Invalid rows: dead letters, once
--
INSERT INTO userpilot_profiles (server, kind, entity_id, metadata, synced_at, believed_since)
  SELECT 'userpilot', 'company', id, '{}', now(), now() FROM accounts ON CONFLICT DO NOTHING;
ALTER TABLE accounts DISABLE TRIGGER ALL;
INSERT INTO accounts VALUES (NULL, 'no id'), ('', 'empty'), ('long', repeat('x', 65536)), ('new', 'good');
ALTER TABLE accounts ENABLE TRIGGER ALL;
SELECT * FROM userpilot_sync_table('accounts');
SELECT rows, unchanged, invalid FROM userpilot_batches ORDER BY id DESC LIMIT 1;
SELECT * FROM userpilot_sync_table('accounts');
SELECT kind, entity_id, length(metadata::text), error FROM dead;
SELECT kind, entity FROM took();
-- a value that is wrong in another way is another dead letter
UPDATE accounts SET id = NULL WHERE id = '';
SELECT invalid FROM userpilot_sync_table('accounts');
SELECT count(*) FROM dead;
SELECT (userpilot_preview_companies(id, jsonb_build_object('name', name, 'plan', plan))).* FROM accounts;
SELECT userpilot_bulk_identify_companies(id, jsonb_build_object('name', name)) FROM accounts;
DELETE FROM accounts WHERE coalesce(id, '') = '' OR length(name) > 9;
DELETE FROM userpilot_dead_letters;
DELETE FROM userpilot_queue;
-- many of them take no longer each
CREATE TABLE many (id int, name text);
INSERT INTO many SELECT NULL, 'n' || i FROM generate_series(1, 5000) i;
CREATE TRIGGER t AFTER INSERT OR UPDATE ON many FOR EACH ROW EXECUTE FUNCTION userpilot_company_trigger('id', 'name');
SET statement_timeout = '20s';
SELECT * FROM userpilot_sync_table('many');
SELECT * FROM userpilot_sync_table('many');
RESET statement_timeout;
SELECT count(*) FROM dead;
DELETE FROM userpilot_dead_letters;
DROP TABLE many;
-- a column of the trigger that is gone
ALTER TABLE accounts RENAME plan TO tier;
SELECT * FROM userpilot_sync_table('accounts');
ALTER TABLE accounts RENAME tier TO plan;

--
-- Conditions
--
UPDATE accounts SET active = id <> 'c4';
DELETE FROM userpilot_queue;
DELETE FROM userpilot_profiles;
CREATE OR REPLACE TRIGGER to_userpilot AFTER INSERT OR UPDATE ON accounts FOR EACH ROW
  WHEN (NEW.active AND NEW.tableoid = 'accounts'::regclass AND NEW.* IS DISTINCT FROM NULL)
  EXECUTE FUNCTION userpilot_company_trigger('id', 'name', 'plan');
SELECT * FROM userpilot_sync_table('accounts');
SELECT entity FROM took();
-- one that compares with what was before: the rest of it counts
CREATE OR REPLACE TRIGGER to_userpilot AFTER UPDATE ON accounts FOR EACH ROW
  WHEN (NEW.active AND OLD.name IS DISTINCT FROM NEW.name)
  EXECUTE FUNCTION userpilot_company_trigger('id', 'name', 'plan');
SELECT * FROM userpilot_sync_table('accounts');
SELECT entity FROM took();
CREATE OR REPLACE TRIGGER to_userpilot AFTER UPDATE ON accounts FOR EACH ROW
  WHEN (OLD.name IS DISTINCT FROM NEW.name)
  EXECUTE FUNCTION userpilot_company_trigger('id', 'name', 'plan');
SELECT * FROM userpilot_sync_table('accounts');
SELECT count(*) FROM took();

--
-- Two triggers: companies and users of one table, each left out
--
CREATE TABLE both_kinds (id int PRIMARY KEY, name text, account text);
CREATE TRIGGER c AFTER INSERT OR UPDATE ON both_kinds FOR EACH ROW EXECUTE FUNCTION userpilot_company_trigger('account', 'name AS company');
CREATE TRIGGER u AFTER INSERT OR UPDATE ON both_kinds FOR EACH ROW EXECUTE FUNCTION userpilot_user_trigger('id', 'name', 'account AS company_id');
CREATE TRIGGER off AFTER INSERT OR UPDATE ON both_kinds FOR EACH ROW EXECUTE FUNCTION userpilot_user_trigger('id', 'account AS never');
ALTER TABLE both_kinds DISABLE TRIGGER off;
INSERT INTO both_kinds VALUES (1, 'a', 'c1'), (2, 'b', 'c2');
SELECT acknowledge();
SELECT * FROM userpilot_sync_table('both_kinds');
SELECT count(*) FROM took();
UPDATE userpilot_profiles SET company_id = 'c1' WHERE kind = 'user' AND entity_id = '2';
SELECT * FROM userpilot_sync_table('both_kinds');
SELECT * FROM took();
-- two aggregates in one SELECT
SELECT userpilot_bulk_identify_companies(account, jsonb_build_object('company', name)) AS companies,
  userpilot_bulk_identify_users(id, jsonb_build_object('name', name)) AS users FROM both_kinds;
SELECT count(*) FROM took();

--
-- Partitions, inheritance, a quoted name
--
CREATE SCHEMA "regress Sync";
CREATE TABLE "regress Sync"."Parted" (id int, region text, "Full Name" text) PARTITION BY LIST (region);
CREATE TABLE "regress Sync".us PARTITION OF "regress Sync"."Parted" FOR VALUES IN ('us');
CREATE TABLE "regress Sync".eu (region text, junk int, "Full Name" text, id int);
ALTER TABLE "regress Sync".eu DROP COLUMN junk;
ALTER TABLE "regress Sync"."Parted" ATTACH PARTITION "regress Sync".eu FOR VALUES IN ('eu');
INSERT INTO "regress Sync"."Parted" VALUES (1, 'us', 'a'), (2, 'eu', 'b');
CREATE TRIGGER t AFTER INSERT OR UPDATE ON "regress Sync"."Parted" FOR EACH ROW WHEN (NEW.id < 99)
  EXECUTE FUNCTION userpilot_company_trigger('id', 'Full Name', 'region');
SELECT * FROM userpilot_sync_table('"regress Sync"."Parted"');
SELECT entity, metadata FROM took() ORDER BY 1;
SELECT * FROM userpilot_sync_table('"regress Sync".eu');
SELECT entity, metadata FROM took();
DROP SCHEMA "regress Sync" CASCADE;
CREATE TABLE child () INHERITS (plain);
INSERT INTO plain VALUES (1);
INSERT INTO child VALUES (2);
CREATE TRIGGER t AFTER INSERT OR UPDATE ON plain FOR EACH ROW EXECUTE FUNCTION userpilot_company_trigger('id');
SELECT * FROM userpilot_sync_table('plain');
SELECT entity FROM took();

--
-- Whose rights
--
CREATE ROLE regress_sync_owner;
CREATE ROLE regress_sync_caller;
CREATE SCHEMA regress_sync AUTHORIZATION regress_sync_owner;
CREATE SCHEMA regress_hostile AUTHORIZATION regress_sync_caller;
GRANT USAGE ON SCHEMA regress_sync, regress_hostile TO PUBLIC;
CREATE TABLE ran_as (who name, session name);
GRANT INSERT ON ran_as TO PUBLIC;
SET ROLE regress_sync_owner;
CREATE TABLE regress_sync.t (id int PRIMARY KEY, name text);
CREATE TRIGGER t AFTER INSERT OR UPDATE ON regress_sync.t FOR EACH ROW EXECUTE FUNCTION userpilot_company_trigger('id', 'name');
INSERT INTO regress_sync.t VALUES (1, 'a');
SELECT * FROM userpilot_sync_table('regress_sync.t');
RESET ROLE;
-- not with a superuser's rights either: the owner may not send
SELECT * FROM userpilot_sync_table('regress_sync.t');
GRANT USAGE ON FOREIGN SERVER userpilot TO regress_sync_owner;
SET ROLE regress_sync_caller;
SELECT * FROM userpilot_sync_table('regress_sync.t');
RESET ROLE;
GRANT SELECT ON regress_sync.t TO regress_sync_caller;
SET ROLE regress_sync_caller;
SELECT * FROM userpilot_sync_table('regress_sync.t');
RESET ROLE;
GRANT USAGE ON FOREIGN SERVER userpilot TO regress_sync_caller;
SET ROLE regress_sync_caller;
SELECT * FROM userpilot_sync_table('regress_sync.t');
SELECT userpilot_cancel(1);
RESET ROLE;
SELECT entity FROM took();
ALTER TABLE regress_sync.t ENABLE ROW LEVEL SECURITY;
SET ROLE regress_sync_caller;
SELECT * FROM userpilot_sync_table('regress_sync.t');
RESET ROLE;
SET ROLE regress_sync_owner;
SELECT * FROM userpilot_sync_table('regress_sync.t');
ALTER TABLE regress_sync.t FORCE ROW LEVEL SECURITY;
RESET ROLE;
SELECT * FROM userpilot_sync_table('regress_sync.t');
SET ROLE regress_sync_owner;
ALTER TABLE regress_sync.t DISABLE ROW LEVEL SECURITY, NO FORCE ROW LEVEL SECURITY;
-- the owner's code does not run as the caller, and what it sets is undone
CREATE FUNCTION regress_sync.spy(int) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO public.ran_as VALUES (current_user, session_user);
  PERFORM set_config('search_path', 'regress_sync', false), set_config('work_mem', '123kB', false);
  RETURN true;
END$$;
CREATE OR REPLACE TRIGGER t AFTER INSERT OR UPDATE ON regress_sync.t FOR EACH ROW WHEN (regress_sync.spy(NEW.id))
  EXECUTE FUNCTION userpilot_company_trigger('id', 'name');
RESET ROLE;
DELETE FROM userpilot_profiles;
SELECT * FROM userpilot_sync_table('regress_sync.t');
SELECT DISTINCT who FROM ran_as;
SELECT current_setting('search_path') ~ 'regress' AS path_changed, current_setting('work_mem') = '123kB' AS work_mem_changed;
DELETE FROM ran_as;
-- and it cannot become someone else
SET ROLE regress_sync_owner;
CREATE OR REPLACE FUNCTION regress_sync.spy(int) RETURNS boolean LANGUAGE plpgsql AS $$BEGIN RESET ROLE; RETURN true; END$$;
RESET ROLE;
SELECT * FROM userpilot_sync_table('regress_sync.t');
SELECT current_user = session_user AS same;
-- the caller's functions do not stand in for the owner's
CREATE FUNCTION helper(int) RETURNS boolean LANGUAGE sql AS 'SELECT true';
SET ROLE regress_sync_owner;
CREATE OR REPLACE FUNCTION regress_sync.spy(int) RETURNS boolean LANGUAGE plpgsql AS $$BEGIN RETURN helper($1); END$$;
SET ROLE regress_sync_caller;
CREATE FUNCTION regress_hostile.helper(int) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO public.ran_as VALUES (current_user, session_user);
  RETURN true;
END$$;
SET search_path = regress_hostile, public;
\set VERBOSITY sqlstate
SELECT * FROM userpilot_sync_table('regress_sync.t');
\set VERBOSITY terse
RESET search_path;
RESET ROLE;
SELECT * FROM ran_as;
DELETE FROM userpilot_queue;

--
-- Taken back
--
DELETE FROM userpilot_batches;
GRANT SELECT ON userpilot_batches TO regress_sync_caller;
SET ROLE regress_sync_caller;
SELECT userpilot_bulk_identify_companies('k' || i, '{"a": 1}') FROM generate_series(1, 5) i;
RESET ROLE;
SELECT max(id) AS batch FROM userpilot_batches \gset
SET ROLE regress_sync_owner;
SELECT userpilot_cancel(:batch) AS not_his;
RESET ROLE;
-- one is in flight, one was sent already and no answer came
INSERT INTO userpilot_profiles (server, kind, entity_id, job, attempts) VALUES ('userpilot', 'company', 'k1', 1, 1), ('userpilot', 'company', 'k2', NULL, 1);
SELECT userpilot_identify_company('k3', '{"a": 2}');
SET ROLE regress_sync_caller;
SELECT userpilot_cancel(:batch);
SELECT userpilot_cancel(:batch);
SELECT rows, pending FROM userpilot_batches WHERE id = :batch;
RESET ROLE;
SELECT entity, metadata, bulk FROM took();
SELECT userpilot_cancel(NULL);
SELECT userpilot_cancel(-1);
-- not with a snapshot that does not see what has been sent meanwhile
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT userpilot_cancel(1);
ROLLBACK;
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT userpilot_invalidate('userpilot');
ROLLBACK;
-- the server's owner may, too
SELECT userpilot_bulk_identify_companies('k9', '{"a": 1}');
SELECT userpilot_cancel((SELECT max(id) FROM userpilot_batches));
SELECT count(*) FROM took();

-- previews: nothing at all, users, jobs and minutes; nothing is queued
SELECT (userpilot_preview_companies(id, '{}')).* FROM plain WHERE false;
SELECT (userpilot_preview_users(i, '{"a": 1}', CASE WHEN i > 1 THEN 'c' ELSE '' END)).* FROM generate_series(1, 20002) i;
SELECT (userpilot_preview_users(i, CASE i WHEN 3 THEN '[]' ELSE '{"a": 1}' END::jsonb)).* FROM generate_series(1, 3) i;
-- reading is enough for a preview
BEGIN READ ONLY;
SELECT (userpilot_preview_companies(i, '{"a": 1}')).new FROM generate_series(1, 3) i;
SELECT userpilot_bulk_identify_companies(1, '{"a": 1}');
ROLLBACK;
SELECT i % 2 AS half, (userpilot_preview_companies(i, '{"a": 1}')).rows FROM generate_series(1, 3) i GROUP BY 1 ORDER BY 1;
REVOKE USAGE ON FOREIGN SERVER userpilot FROM regress_sync_owner;
SET ROLE regress_sync_owner;
SELECT (userpilot_preview_companies(1, '{}')).*;
RESET ROLE;
SELECT count(*) FROM took();
SELECT count(*) FROM dead;
SELECT count(*) FROM userpilot_batches WHERE statement ~ 'preview';

DROP VIEW dead;
DROP TABLE accounts, both_kinds, child, plain, ran_as;
DROP FUNCTION took, acknowledge, queued_by_sync, helper;
DROP SCHEMA regress_sync, regress_hostile CASCADE;
DROP OWNED BY regress_sync_owner, regress_sync_caller;
DROP ROLE regress_sync_owner, regress_sync_caller;
DROP EXTENSION userpilot CASCADE;
