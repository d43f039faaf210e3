--
-- Triggers: what their arguments say, what a row of any type becomes, what an
-- UPDATE queues, and what happens to rows that can never be sent
--
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS userpilot;
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot OPTIONS (region 'us');
CREATE SERVER other FOREIGN DATA WRAPPER userpilot OPTIONS (region 'eu');
CREATE VIEW queued AS
  SELECT server, kind, entity_id, company_id, metadata, bulk FROM userpilot_queue ORDER BY lsn, ctid;
CREATE VIEW dead AS
  SELECT server, kind, entity_id, company_id, metadata, error, attempts, http_status
  FROM userpilot_dead_letters ORDER BY lsn, ctid;
-- takes the queue's rows
CREATE FUNCTION took(OUT entity text, OUT metadata jsonb) RETURNS SETOF record LANGUAGE sql AS $$
  WITH gone AS (DELETE FROM userpilot_queue RETURNING lsn, ctid, entity_id, userpilot_queue.metadata)
  SELECT entity_id, metadata FROM gone ORDER BY lsn, ctid $$;

--
-- Arguments
--
CREATE TABLE accounts (id int PRIMARY KEY, name text, plan text, mrr numeric(10,2), "Odd AS name" text, owner text);
CREATE TRIGGER to_userpilot AFTER INSERT OR UPDATE ON accounts FOR EACH ROW
  EXECUTE FUNCTION userpilot_company_trigger('id', 'name', 'mrr AS monthly_spend', 'plan  as  tier  ', 'Odd AS name');
INSERT INTO accounts VALUES (1, 'Acme', 'pro', 10.50, 'x', 'me');
INSERT INTO accounts VALUES (2);
SELECT * FROM queued;
CREATE OR REPLACE TRIGGER to_userpilot AFTER INSERT OR UPDATE ON accounts FOR EACH ROW
  EXECUTE FUNCTION userpilot_company_trigger('id', 'mrr AS spend', '*', 'server=other');
INSERT INTO accounts VALUES (3, 'Best', 'free', 0, NULL, 'you');
SELECT * FROM queued WHERE entity_id = '3';
CREATE TABLE people (id uuid PRIMARY KEY, email text, account_id int, shoe int);
CREATE TRIGGER to_userpilot AFTER INSERT OR UPDATE ON people FOR EACH ROW
  EXECUTE FUNCTION userpilot_user_trigger('id', 'email', 'account_id AS company_id');
INSERT INTO people VALUES ('00000000-0000-0000-0000-00000000000A', 'a@b', 1, 40), ('00000000-0000-0000-0000-00000000000b', NULL, NULL, 41);
UPDATE people SET shoe = shoe + 1;
UPDATE people SET account_id = 2 WHERE account_id = 1;
SELECT kind, entity_id, company_id, metadata FROM queued WHERE kind = 'user';
-- the id alone
CREATE TABLE bare (code varchar(9));
CREATE TRIGGER t AFTER INSERT OR UPDATE ON bare FOR EACH ROW EXECUTE FUNCTION userpilot_company_trigger('code');
INSERT INTO bare VALUES ('only');
SELECT entity_id, metadata FROM queued WHERE entity_id = 'only';
DELETE FROM userpilot_queue;

--
-- Created in the wrong way: refused, with the right one
--
\set VERBOSITY terse
CREATE FUNCTION says(command text) RETURNS SETOF text LANGUAGE plpgsql AS $$
DECLARE
  message text; hint text;
BEGIN
  EXECUTE command;
  RETURN NEXT 'taken';
EXCEPTION WHEN OTHERS THEN
  GET STACKED DIAGNOSTICS message = MESSAGE_TEXT, hint = PG_EXCEPTION_HINT;
  RETURN NEXT message;
  RETURN NEXT hint;
END$$;
CREATE TABLE wrong (id int PRIMARY KEY, name text);
CREATE VIEW wrong_view AS SELECT * FROM wrong;
INSERT INTO wrong VALUES (1, 'a');
CREATE TRIGGER "to Userpilot" BEFORE INSERT ON wrong FOR EACH ROW EXECUTE FUNCTION userpilot_company_trigger('id', 'name');
SELECT says('INSERT INTO wrong VALUES (2)');
DROP TRIGGER "to Userpilot" ON wrong;
CREATE TRIGGER t INSTEAD OF INSERT ON wrong_view FOR EACH ROW EXECUTE FUNCTION userpilot_company_trigger('id', 'name');
SELECT says('INSERT INTO wrong_view VALUES (2)');
CREATE TRIGGER t AFTER TRUNCATE ON wrong EXECUTE FUNCTION userpilot_company_trigger('id', 'name');
SELECT says('TRUNCATE wrong');
DROP TRIGGER t ON wrong;
CREATE TRIGGER t AFTER UPDATE ON wrong EXECUTE FUNCTION userpilot_user_trigger('id', 'name');
SELECT says('UPDATE wrong SET id = id');
SELECT finding, hint FROM userpilot_check_trigger('wrong');
DROP TRIGGER t ON wrong;
CREATE TRIGGER t AFTER INSERT OR UPDATE OR DELETE ON wrong FOR EACH ROW EXECUTE FUNCTION userpilot_user_trigger('id', 'name');
SELECT says('DELETE FROM wrong');
SELECT finding, hint FROM userpilot_check_trigger('wrong');
DROP TRIGGER t ON wrong;
SELECT says('SELECT userpilot_company_trigger()');
SELECT count(*) FROM wrong;
SELECT count(*) FROM queued;

--
-- Every type, under three settings: the same
--
CREATE TYPE mood AS ENUM ('sad', 'ok');
CREATE TYPE pair AS (a int, b timestamptz);
CREATE DOMAIN cents AS numeric(12,4) CHECK (value > 0);
CREATE DOMAIN birthday AS date;
CREATE DOMAIN stamp AS timestamptz;
CREATE TABLE types (
  id serial PRIMARY KEY, gone text,
  c_bool bool, c_int2 int2, c_int4 int4, c_int8 int8, c_num numeric, c_num_nan numeric, c_num_inf numeric,
  c_f4 float4, c_f8 float8, c_f8_third float8, c_f8_nan float8, c_f8_inf float4, c_f8_small float8, c_money money,
  c_text text, c_varchar varchar(20), c_char char(5), c_one "char", c_name name, c_empty text, c_uuid uuid, c_enum mood,
  c_bytea bytea, c_bit bit(4), c_varbit varbit, c_date date, c_date_bc date, c_date_inf date, c_time time, c_timetz timetz, c_ts timestamp, c_tz timestamptz,
  c_tz_inf timestamptz, c_interval interval, c_inet inet, c_cidr cidr, c_mac macaddr, c_mac8 macaddr8,
  c_point point, c_line line, c_lseg lseg, c_box box, c_path path, c_polygon polygon, c_circle circle,
  c_ints int[], c_tzs timestamptz[], c_f8s float8[], c_texts text[], c_range int4range, c_tzrange tstzrange, c_multi nummultirange,
  c_pair pair, c_pairs pair[], c_tsv tsvector, c_tsq tsquery, c_xml xml, c_path_j jsonpath, c_lsn pg_lsn, c_snap pg_snapshot, c_tid tid, c_xid xid, c_xid8 xid8,
  c_oid oid, c_class regclass, c_classes regclass[], c_type regtype, c_proc regprocedure, c_role regrole, c_vector oidvector,
  d_cents cents, d_birthday birthday, d_stamp stamp, c_null int, c_nothing text,
  c_json json, c_jsonb jsonb, c_list jsonb, c_scalar jsonb, c_renamed jsonb);
ALTER TABLE types DROP COLUMN gone;
CREATE TRIGGER t AFTER INSERT ON types FOR EACH ROW EXECUTE FUNCTION userpilot_company_trigger('id', 'c_renamed AS address', '*');
CREATE TABLE source AS TABLE types WITH NO DATA;
ALTER TABLE source DROP COLUMN id;
INSERT INTO source SELECT
  true, (-32768)::int2, 2147483647, 9223372036854775807, 12345678901234567890.1200, numeric 'NaN', numeric '-Infinity',
  0.1::float4, 1e-7::float8, 1/3.0::float8, float8 'NaN', float4 '-Infinity', float8 '2.5e-20', 1234.5::money,
  E'line\n"quote" \\ é', 'var'::varchar, 'ab'::char(5), 'z'::"char", 'n'::name, '', 'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'::uuid, 'ok'::mood,
  '\x00ff'::bytea, B'1010'::bit(4), B'1'::varbit, date '2024-02-29', date '0044-03-15 BC', date 'infinity', time '23:59:59.5', timetz '12:00+02', timestamp '2024-01-31 12:34:56.789', timestamptz '2024-07-01 12:00:00+05:30',
  timestamptz '-infinity', interval '1 year 2 mons 3 days 04:05:06.7', inet '10.0.0.1/8', cidr '10.0.0.0/8', macaddr '08:00:2b:01:02:03', macaddr8 '08:00:2b:01:02:03:04:05',
  point(0.1, 1/3.0::float8), line '{1,2,3}', lseg '((0,0),(1,1))', box '((0,0),(1,1))', path '((0,0),(1,1))', polygon '((0,0),(1,1),(2,0))', circle '<(0,0),1>',
  '{1,NULL,3}'::int[], ARRAY[timestamptz '2024-07-01 12:00:00+05:30'], ARRAY[0.1, 1/3.0]::float8[], '{"a b",c}'::text[], int4range(1, 5), tstzrange('2024-01-01 00:00+00', NULL), '{[1,2),[3,4)}'::nummultirange,
  ROW(1, '2024-07-01 12:00:00+05:30')::pair, ARRAY[ROW(2, '2024-07-01 12:00:00+05:30')::pair], 'a fat cat'::tsvector, 'fat & cat'::tsquery, '<a>1</a>'::xml, '$.a'::jsonpath, '16/B374D848'::pg_lsn, '10:20:10,14'::pg_snapshot, '(1,2)'::tid, '7'::xid, '8'::xid8,
  9::oid, 'accounts'::regclass, '{accounts}'::regclass[], 'mood'::regtype, 'says(text)'::regprocedure, 'pg_monitor'::regrole, '1 2'::oidvector,
  12.5000::cents, date '1970-01-01'::birthday, timestamptz '2024-07-01 12:00:00+05:30'::stamp, NULL::int, NULL::text,
  '{"j": 1, "j_true": true, "deep": {"x": 1}, "list": [1]}'::json, '{"b": "text", "b_null": null, "b_num": 1.50, "deep": {"x": 1}}'::jsonb, '[1, {"a": 2}]'::jsonb, '"just text"'::jsonb, '{"city": "Berlin", "geo": {"x": 1}}'::jsonb;
CREATE FUNCTION insert_types() RETURNS void LANGUAGE sql AS
  $$ INSERT INTO public.types SELECT nextval('public.types_id_seq'), s.* FROM public.source s $$;
BEGIN;
SELECT insert_types();
SET LOCAL datestyle = 'German'; SET LOCAL timezone = 'America/New_York'; SET LOCAL intervalstyle = 'iso_8601';
SET LOCAL extra_float_digits = -15; SET LOCAL bytea_output = 'escape'; SET LOCAL quote_all_identifiers = on;
SELECT insert_types();
SET LOCAL datestyle = 'SQL, DMY'; SET LOCAL timezone = 'Asia/Kathmandu'; SET LOCAL intervalstyle = 'sql_standard';
SET LOCAL extra_float_digits = 3; SET LOCAL search_path = pg_temp; SET LOCAL xmloption = document;
SELECT public.insert_types();
-- and what was set is set still
SHOW datestyle; SHOW search_path;
COMMIT;
SELECT count(*), count(DISTINCT metadata) AS different FROM queued;
\pset format unaligned
SELECT key, value, jsonb_typeof(value) FROM (SELECT metadata FROM queued LIMIT 1) q, jsonb_each(metadata) ORDER BY key COLLATE "C";
\pset format aligned
DELETE FROM userpilot_queue;

-- values that are stored aside
CREATE TABLE big (id int PRIMARY KEY, body text, doc jsonb, n int);
ALTER TABLE big ALTER body SET STORAGE EXTERNAL;
CREATE TRIGGER t AFTER INSERT OR UPDATE ON big FOR EACH ROW EXECUTE FUNCTION userpilot_company_trigger('id', 'body', 'doc');
INSERT INTO big VALUES (1, repeat('v', 65535), jsonb_build_object('long', repeat('x', 60000)), 0);
UPDATE big SET n = 1;
UPDATE big SET body = body || '';
UPDATE big SET body = left(body, -1);
SELECT entity, length(metadata ->> 'body'), length(metadata ->> 'long') FROM took();

--
-- JSON columns: keys that are gone become null
--
CREATE TABLE docs (id int PRIMARY KEY, name text, a jsonb, b json);
CREATE TRIGGER t AFTER INSERT OR UPDATE ON docs FOR EACH ROW EXECUTE FUNCTION userpilot_company_trigger('id', 'name', 'a', 'b');
INSERT INTO docs VALUES (1, 'Acme', '{"x": 1, "y": 2}', '{"name": "of b", "z": 3}');
UPDATE docs SET a = '{"y": 2}';
-- moved from one column to the other; a name that only the other column has still
UPDATE docs SET a = '{"y": 2, "z": 3}', b = '{}';
UPDATE docs SET a = NULL;
-- what was no object, and then is one, or nothing
UPDATE docs SET a = '5';
UPDATE docs SET a = NULL;
UPDATE docs SET a = '[1]';
UPDATE docs SET a = '{"k": {"deep": 1}, "l": 1}';
UPDATE docs SET a = '{"l": {"deep": 1}}';
-- nothing has changed
UPDATE docs SET a = '{"l": {"deep": 1}}';
SELECT * FROM took();

--
-- UPDATE: all or nothing
--
CREATE TABLE things (id int PRIMARY KEY, name text, plan text, seen int, twice int GENERATED ALWAYS AS (seen * 2) STORED);
CREATE TRIGGER t AFTER INSERT OR UPDATE ON things FOR EACH ROW EXECUTE FUNCTION userpilot_company_trigger('id', 'name', 'plan', 'twice');
INSERT INTO things VALUES (1, 'a', 'free', 0);
DELETE FROM userpilot_queue;
UPDATE things SET name = name, plan = 'free';
SELECT * FROM took();
UPDATE things SET plan = 'pro';
UPDATE things SET seen = 1;
UPDATE things SET plan = NULL;
SELECT * FROM took();
-- a changed id is a new entity
UPDATE things SET id = 2;
SELECT * FROM took();
-- twice in a transaction; a savepoint that is rolled back
BEGIN;
UPDATE things SET name = 'b';
SAVEPOINT s;
UPDATE things SET name = 'never';
ROLLBACK TO s;
UPDATE things SET name = 'c';
COMMIT;
SELECT * FROM took();
INSERT INTO things VALUES (2, 'd', 'x') ON CONFLICT (id) DO UPDATE SET name = excluded.name;
INSERT INTO things VALUES (2, 'e', 'x') ON CONFLICT (id) DO NOTHING;
MERGE INTO things USING (VALUES (2, 'merged'), (3, 'new')) v(id, name) ON v.id = things.id
  WHEN MATCHED THEN UPDATE SET name = v.name WHEN NOT MATCHED THEN INSERT (id, name) VALUES (v.id, v.name);
COPY things (id, name) FROM stdin;
4	copied
\.
WITH changed AS (UPDATE things SET name = 'cte' WHERE id = 4 RETURNING id) SELECT count(*) FROM changed;
DELETE FROM things WHERE id = 4;
SELECT * FROM took();

-- a BEFORE trigger has the last word on what is stored
CREATE FUNCTION shout() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN NEW.name := upper(NEW.name); RETURN NEW; END$$;
CREATE TRIGGER b BEFORE INSERT OR UPDATE ON things FOR EACH ROW EXECUTE FUNCTION shout();
UPDATE things SET name = 'quiet' WHERE id = 2;
UPDATE things SET name = 'quiet' WHERE id = 2;
SELECT * FROM took();
DROP TRIGGER b ON things;

-- an AFTER trigger that changes the row again, before and after ours by name
CREATE FUNCTION again() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.name NOT LIKE '% again' THEN
    UPDATE things SET name = NEW.name || ' again' WHERE id = NEW.id;
  END IF;
  RETURN NULL;
END$$;
CREATE TRIGGER a_before AFTER INSERT OR UPDATE ON things FOR EACH ROW EXECUTE FUNCTION again();
UPDATE things SET name = 'one' WHERE id = 2;
SELECT * FROM took();
INSERT INTO things VALUES (5, 'inserted');
SELECT * FROM took();
ALTER TRIGGER a_before ON things RENAME TO z_after;
UPDATE things SET name = 'two' WHERE id = 2;
SELECT * FROM took();
DROP TRIGGER z_after ON things;
-- one that leaves our columns alone, puts them back, changes the id, deletes
CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF pg_trigger_depth() = 1 THEN
    EXECUTE TG_ARGV[0] USING NEW.id, OLD.name;
  END IF;
  RETURN NULL;
END$$;
CREATE TRIGGER a AFTER UPDATE ON things FOR EACH ROW EXECUTE FUNCTION meddle('UPDATE things SET seen = NULL, name = name WHERE id = $1');
UPDATE things SET name = 'left alone' WHERE id = 2;
SELECT DISTINCT * FROM took();
CREATE OR REPLACE TRIGGER a AFTER UPDATE ON things FOR EACH ROW EXECUTE FUNCTION meddle('UPDATE things SET name = $2 WHERE id = $1');
UPDATE things SET name = 'put back' WHERE id = 2;
SELECT DISTINCT * FROM took();
CREATE OR REPLACE TRIGGER a AFTER UPDATE ON things FOR EACH ROW EXECUTE FUNCTION meddle('UPDATE things SET id = id + 100 WHERE id = $1');
UPDATE things SET name = 'moved' WHERE id = 2;
SELECT DISTINCT * FROM took();
CREATE OR REPLACE TRIGGER a AFTER UPDATE ON things FOR EACH ROW EXECUTE FUNCTION meddle('DELETE FROM things WHERE id = $1');
UPDATE things SET name = 'gone' WHERE id = 102;
SELECT * FROM took();
DROP TRIGGER a ON things;

-- deferred to the commit: only what is there then
CREATE TABLE late (id int PRIMARY KEY, name text);
CREATE CONSTRAINT TRIGGER t AFTER INSERT OR UPDATE ON late DEFERRABLE INITIALLY DEFERRED
  FOR EACH ROW EXECUTE FUNCTION userpilot_company_trigger('id', 'name');
BEGIN;
INSERT INTO late VALUES (1, 'a'), (2, 'deleted');
UPDATE late SET name = 'b' WHERE id = 1;
UPDATE late SET name = 'c' WHERE id = 1;
DELETE FROM late WHERE id = 2;
SELECT * FROM took();
COMMIT;
SELECT DISTINCT * FROM took();

-- partitions, inheritance, foreign keys
CREATE TABLE parted (id int, region text, name text, PRIMARY KEY (id, region)) PARTITION BY LIST (region);
CREATE TABLE parted_us PARTITION OF parted FOR VALUES IN ('us');
CREATE TABLE parted_eu (name text, dropped int, region text NOT NULL, id int NOT NULL);
ALTER TABLE parted_eu DROP COLUMN dropped;
ALTER TABLE parted ATTACH PARTITION parted_eu FOR VALUES IN ('eu');
CREATE TRIGGER t AFTER INSERT OR UPDATE ON parted FOR EACH ROW EXECUTE FUNCTION userpilot_company_trigger('id', 'name', 'region');
INSERT INTO parted VALUES (1, 'us', 'a'), (2, 'eu', 'b');
UPDATE parted SET region = 'eu', name = 'moved' WHERE id = 1;
UPDATE parted SET name = 'again' WHERE id = 1;
UPDATE parted_eu SET name = 'direct' WHERE id = 2;
SELECT * FROM took();
CREATE TABLE parent (id int, name text);
CREATE TABLE child (more int) INHERITS (parent);
CREATE TRIGGER t AFTER INSERT OR UPDATE ON parent FOR EACH ROW EXECUTE FUNCTION userpilot_company_trigger('id', 'name');
INSERT INTO parent VALUES (1, 'parent');
INSERT INTO child VALUES (2, 'child has no trigger');
UPDATE parent SET name = name || '!';
SELECT * FROM took();
CREATE TABLE referenced (id int PRIMARY KEY);
CREATE TABLE referencing (id int PRIMARY KEY, r int REFERENCES referenced ON UPDATE CASCADE ON DELETE SET NULL);
CREATE TRIGGER t AFTER INSERT OR UPDATE ON referencing FOR EACH ROW EXECUTE FUNCTION userpilot_user_trigger('id', 'r AS company_id', 'r AS account');
INSERT INTO referenced VALUES (1); INSERT INTO referencing VALUES (7, 1);
UPDATE referenced SET id = 9; DELETE FROM referenced;
SELECT entity_id, company_id, metadata FROM queued;
DELETE FROM userpilot_queue;

-- the first hundred are real time
BEGIN;
INSERT INTO things SELECT i, 'n' FROM generate_series(1001, 1150) i;
COMMIT;
UPDATE things SET name = 'fresh' WHERE id = 1150;
SELECT bulk, count(*), min(entity_id), max(entity_id), max(metadata ->> 'name') FROM queued GROUP BY 1 ORDER BY 1;
DELETE FROM userpilot_queue;

--
-- What can never be sent
--
CREATE SEQUENCE mine;
SELECT nextval('mine');
SET client_min_messages = warning;
\set VERBOSITY default
CREATE TABLE refused (id text, name text, doc json, account text);
CREATE TRIGGER t AFTER INSERT OR UPDATE ON refused FOR EACH ROW EXECUTE FUNCTION userpilot_user_trigger('id', 'name', 'doc', 'account AS company_id');
INSERT INTO refused VALUES (NULL, 'no id');
\set VERBOSITY terse
INSERT INTO refused VALUES ('', 'empty id');
INSERT INTO refused VALUES (repeat('i', 513), 'long id');
INSERT INTO refused VALUES ('u', repeat('v', 65536));
INSERT INTO refused VALUES ('u', 'long name', ('{"' || repeat('n', 256) || '": 1}')::json);
INSERT INTO refused VALUES ('u', 'empty company', NULL, '');
-- what json takes, and no other
INSERT INTO refused VALUES ('u1', 'zero', '{"a": "\u0000"}');
INSERT INTO refused VALUES ('u2', 'huge', ('{"a": 1e' || repeat('9', 10) || '}')::json);
INSERT INTO refused SELECT 'many', NULL, json_object_agg('k' || i, i) FROM generate_series(1, 501) i;
SELECT kind, left(entity_id, 10) AS entity_id, company_id, left(metadata::text, 30) AS metadata, left(error, 120) AS error, attempts FROM dead;
SELECT count(*) FROM queued;
SELECT lastval();
-- the statement, and its transaction, go on
DELETE FROM userpilot_dead_letters;
BEGIN;
INSERT INTO refused SELECT NULL, 'n' || i FROM generate_series(1, 30) i;
INSERT INTO refused VALUES ('good', 'good');
ROLLBACK;
SELECT count(*) FROM dead;
BEGIN;
INSERT INTO refused SELECT NULL, 'n' || i FROM generate_series(1, 30) i;
INSERT INTO refused VALUES ('good', 'good');
COMMIT;
SELECT count(*) FROM dead;
SELECT * FROM took();
SELECT lastval();
-- ids of a dump from elsewhere are in nobody's way
SELECT id < 0 AS negative FROM userpilot_dead_letters LIMIT 1;
DELETE FROM userpilot_dead_letters;
INSERT INTO userpilot_dead_letters (id, lsn, xid, enqueued_at, bulk, server, kind, entity_id, metadata, error, attempts)
  SELECT -((pg_snapshot_xmax(pg_current_snapshot())::text::bigint + x) * 1000000 + n), '0/1', '3', now(), false, 'userpilot', 'user', 'old', '{}', 'old', 0
  FROM generate_series(0, 5) x, generate_series(1, 3) n;
INSERT INTO refused VALUES (NULL, 'beside restored ones');
SELECT count(*) FROM dead WHERE error NOT LIKE 'old';
DELETE FROM userpilot_dead_letters;
-- as an error instead
ALTER SERVER userpilot OPTIONS (ADD on_invalid 'error');
INSERT INTO refused VALUES (NULL, 'no id');
SELECT says('INSERT INTO refused VALUES (NULL)');
ALTER SERVER userpilot OPTIONS (SET on_invalid 'dead_letter');
SELECT count(*) FROM dead;

-- columns that were renamed or dropped
INSERT INTO bare VALUES ('before');
ALTER TABLE bare RENAME code TO key;
INSERT INTO bare VALUES ('after');
SELECT entity_id, error FROM dead;
SELECT finding, hint FROM userpilot_check_trigger('bare');
DELETE FROM userpilot_dead_letters;
DELETE FROM userpilot_queue;
ALTER TABLE things DROP COLUMN plan;
UPDATE things SET name = 'plan is gone' WHERE id = 3;
SELECT entity_id, metadata, error FROM dead;
SELECT count(*) FROM queued;
SELECT finding FROM userpilot_check_trigger('things');
CREATE OR REPLACE TRIGGER t AFTER INSERT OR UPDATE ON things FOR EACH ROW EXECUTE FUNCTION userpilot_company_trigger('id', 'name');
UPDATE things SET name = 'good again' WHERE id = 3;
SELECT * FROM took();
SELECT lastval();
DELETE FROM userpilot_dead_letters;

--
-- userpilot_check_trigger
--
CREATE TABLE checked (id json, name text, extra text, "quoted table" int);
CREATE TRIGGER t AFTER UPDATE OF name ON checked FOR EACH ROW EXECUTE FUNCTION userpilot_user_trigger('id', 'name', 'extra', 'name AS extra', 'nosuch', 'id AS company_id', 'server=none');
ALTER TABLE checked DISABLE TRIGGER t;
SELECT finding, hint FROM userpilot_check_trigger('checked');
ALTER TABLE checked ENABLE REPLICA TRIGGER t;
SELECT finding, hint FROM userpilot_check_trigger('checked') WHERE finding ~ 'replicated';
SELECT finding, hint FROM userpilot_check_trigger('source');
CREATE TRIGGER t AFTER INSERT ON source FOR EACH ROW EXECUTE FUNCTION userpilot_company_trigger();
SELECT finding FROM userpilot_check_trigger('source');

--
-- Roles, and whose setting names the server
--
CREATE ROLE regress_owner;
CREATE ROLE regress_app;
ALTER ROLE regress_app SET userpilot.server = 'other';
CREATE SCHEMA regress_owner AUTHORIZATION regress_owner;
SET ROLE regress_owner;
CREATE TABLE regress_owner.owned (id int PRIMARY KEY, name text);
CREATE TRIGGER t AFTER INSERT OR UPDATE ON regress_owner.owned FOR EACH ROW EXECUTE FUNCTION userpilot_company_trigger('id', 'name');
GRANT USAGE ON SCHEMA regress_owner TO regress_app;
GRANT INSERT, UPDATE, SELECT ON regress_owner.owned TO regress_app;
\set VERBOSITY default
INSERT INTO regress_owner.owned VALUES (1, 'owner lacks USAGE');
RESET ROLE;
SELECT count(*) FROM queued;
SELECT count(*) FROM dead;
SELECT finding, hint FROM userpilot_check_trigger('regress_owner.owned');
\set VERBOSITY terse
GRANT USAGE ON FOREIGN SERVER userpilot TO regress_owner;
SET ROLE regress_app;
INSERT INTO regress_owner.owned VALUES (2, 'app lacks USAGE');
UPDATE regress_owner.owned SET name = 'app may change it' WHERE id = 1;
SET userpilot.server = 'other';
INSERT INTO regress_owner.owned VALUES (3, 'not the session''s server');
INSERT INTO regress_owner.owned VALUES (NULL, 'null');
RESET ROLE;
SET userpilot.server = 'nosuch';
INSERT INTO regress_owner.owned VALUES (4, 'nor a missing one');
RESET userpilot.server;
-- a value that is only checked is not taken
ALTER SYSTEM SET userpilot.server = 'nosuch';
ALTER SYSTEM RESET userpilot.server;
INSERT INTO regress_owner.owned VALUES (5, 'nor one for later');
SELECT server, entity_id, metadata FROM queued;
DELETE FROM userpilot_queue;
-- the refused row of a role without any right is kept all the same
ALTER TABLE regress_owner.owned DROP CONSTRAINT owned_pkey, ALTER id DROP NOT NULL;
SET ROLE regress_app;
INSERT INTO regress_owner.owned VALUES (NULL, 'null');
SELECT count(*) FROM userpilot_dead_letters;
RESET ROLE;
SELECT entity_id, metadata FROM dead;
DROP TABLE regress_owner.owned;
DROP SERVER other CASCADE;
INSERT INTO accounts VALUES (77, 'its server is gone');
SELECT count(*) FROM queued;

DROP VIEW queued, dead, wrong_view;
DROP FUNCTION took, says, insert_types;
DROP TABLE accounts, people, bare, wrong, types, source, big, docs, things, late, parted, child, parent, referencing, referenced, refused, checked;
DROP FUNCTION shout, again, meddle;
DROP SEQUENCE mine;
DROP DOMAIN cents, birthday, stamp;
DROP TYPE mood, pair;
DROP SCHEMA regress_owner CASCADE;
DROP OWNED BY regress_owner, regress_app;
DROP ROLE regress_owner, regress_app;
DROP EXTENSION userpilot CASCADE;
