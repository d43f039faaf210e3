--
-- What an ordinary role can and cannot do
--
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS userpilot;
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot OPTIONS (region 'us');
CREATE ROLE regress_rights;
CREATE ROLE regress_rights_group;
CREATE ROLE regress_rights_member ROLE regress_rights;
CREATE ROLE regress_rights_monitor;
GRANT regress_rights_group TO regress_rights_member;
GRANT pg_monitor TO regress_rights_monitor;
CREATE SCHEMA regress_rights AUTHORIZATION regress_rights;

-- what a role may do with each relation of the extension
CREATE VIEW regress_relations AS
  SELECT c.oid, c.relname::text COLLATE "C" AS name, c.relkind FROM pg_class c JOIN pg_depend d
    ON d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'
    JOIN pg_extension e ON d.refclassid = 'pg_extension'::regclass AND e.oid = d.refobjid
  WHERE e.extname = 'userpilot' AND c.relkind IN ('r', 'v');
GRANT SELECT ON regress_relations TO PUBLIC;
CREATE FUNCTION attempt(command text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
  EXECUTE command;
  RETURN 'taken';
EXCEPTION WHEN OTHERS THEN
  RETURN SQLSTATE || ' ' || SQLERRM;
END$$;

--
-- Tables and the view: neither read nor written
--
SELECT userpilot_identify_company('secret', '{"name":"secret"}');
SET ROLE regress_rights;
SELECT attempt(format('SELECT FROM %I', name)) FROM regress_relations ORDER BY name;
SELECT verb, count(*), count(*) FILTER (WHERE attempt(format(verb, name)) ~ '^42501 ') AS denied
  FROM regress_relations, (VALUES ('INSERT INTO %I DEFAULT VALUES'), ('DELETE FROM %I'), ('TRUNCATE %I'),
    ('LOCK TABLE %I'), ('ALTER TABLE %I RENAME TO other'), ('DROP TABLE %I'),
    ('CREATE INDEX ON %I ((1))'), ('COMMENT ON TABLE %I IS ''''')) v(verb)
  WHERE relkind = 'r' GROUP BY verb ORDER BY verb COLLATE "C";
SELECT attempt('UPDATE userpilot_queue SET metadata = ''{}''');
SELECT attempt('UPDATE userpilot_enabled SET database = 1');
SELECT attempt('UPDATE userpilot_profiles SET attempts = 0');
SELECT attempt('CREATE TRIGGER t AFTER INSERT ON userpilot_queue EXECUTE FUNCTION suppress_redundant_updates_trigger()');
SELECT attempt('CREATE RULE r AS ON INSERT TO userpilot_queue DO NOTHING');
SELECT attempt('SELECT nextval(''userpilot_jobs_id_seq'')');
SELECT attempt('SELECT setval(''userpilot_dead_letters_id_seq'', 1)');
-- a view of one's own does not help
CREATE VIEW regress_rights.v AS SELECT * FROM userpilot_queue;
SELECT attempt('SELECT FROM regress_rights.v');

--
-- Functions that are not for everyone
--
SELECT attempt('SELECT userpilot_retry()');
SELECT attempt('SELECT userpilot_retry(1)');
SELECT attempt('SELECT userpilot_trace(''company'', ''secret'')');
SELECT attempt('SELECT userpilot_wake()');
SELECT attempt('SELECT userpilot_validator(''{}'', 1417)');
SELECT attempt('SELECT userpilot_enable(''userpilot'')');
SELECT attempt('SELECT userpilot_disable(''userpilot'')');
SELECT attempt('DROP EXTENSION userpilot');
SELECT attempt('ALTER EXTENSION userpilot UPDATE');
SELECT attempt('ALTER FUNCTION userpilot_wake() RENAME TO other');
-- with EXECUTE alone they still cannot: nothing runs with another's rights
RESET ROLE;
GRANT EXECUTE ON FUNCTION userpilot_retry, userpilot_trace, userpilot_wake TO regress_rights;
SET ROLE regress_rights;
SELECT attempt('SELECT userpilot_retry()');
SELECT attempt('SELECT * FROM userpilot_trace(''company'', ''secret'')');
RESET ROLE;
REVOKE EXECUTE ON FUNCTION userpilot_retry, userpilot_trace, userpilot_wake FROM regress_rights;
-- what an operator needs, as doc/operations.md has it; rolled back
BEGIN;
CREATE ROLE regress_operator IN ROLE pg_monitor;
GRANT EXECUTE ON FUNCTION userpilot_retry, userpilot_trace, userpilot_wake TO regress_operator;
GRANT SELECT ON userpilot_queue, userpilot_requests TO regress_operator;
GRANT INSERT ON userpilot_queue TO regress_operator;
GRANT SELECT, DELETE ON userpilot_dead_letters TO regress_operator;
GRANT SELECT, UPDATE (attempts) ON userpilot_profiles TO regress_operator;
INSERT INTO userpilot_dead_letters (lsn, xid, enqueued_at, bulk, server, kind, entity_id, metadata, error, attempts)
	VALUES ('0/1', '3', now(), false, 'userpilot', 'company', 'operated', '{}', 'for the operator', 1);
SET LOCAL ROLE regress_operator;
SELECT server, dead_letters FROM userpilot_status;
SELECT what FROM userpilot_trace('company', 'operated');
SELECT userpilot_retry(entity_id => 'operated');
SELECT count(*) FROM userpilot_jobs;
ROLLBACK;
SELECT proname FROM pg_proc WHERE proname ^@ 'userpilot' AND prosecdef;

--
-- Servers, mappings and keys
--
SET ROLE regress_rights;
SELECT attempt('CREATE SERVER mine FOREIGN DATA WRAPPER userpilot OPTIONS (region ''us'')');
SELECT attempt('ALTER SERVER userpilot OPTIONS (SET region ''eu'')');
SELECT attempt('DROP SERVER userpilot');
SELECT attempt('CREATE USER MAPPING FOR PUBLIC SERVER userpilot OPTIONS (api_key ''k'')');
SELECT attempt('CREATE USER MAPPING FOR CURRENT_USER SERVER userpilot OPTIONS (api_key ''k'')');
RESET ROLE;
GRANT USAGE ON FOREIGN SERVER userpilot TO regress_rights;
SET ROLE regress_rights;
-- with USAGE core lets a role map itself, which is never read; a file it must not name
SELECT attempt('CREATE USER MAPPING FOR CURRENT_USER SERVER userpilot OPTIONS (api_key_file ''/etc/passwd'')');
SELECT attempt('CREATE USER MAPPING FOR CURRENT_USER SERVER userpilot OPTIONS (endpoint ''https://example.com'')');
SELECT attempt('CREATE USER MAPPING FOR PUBLIC SERVER userpilot OPTIONS (api_key ''k'')');
SELECT attempt('SELECT userpilot_enable(''userpilot'')');
RESET ROLE;
CREATE USER MAPPING FOR PUBLIC SERVER userpilot OPTIONS (api_key 'secret-of-ours');
SET ROLE regress_rights;
SELECT umoptions FROM pg_user_mappings WHERE srvname = 'userpilot';
SELECT attempt('SELECT umoptions FROM pg_user_mapping');
RESET ROLE;
REVOKE USAGE ON FOREIGN SERVER userpilot FROM regress_rights;

--
-- USAGE: who may send
--
SET ROLE regress_rights;
SELECT attempt($$SELECT userpilot_identify_company('c')$$);
SELECT attempt($$SELECT userpilot_identify_user('u')$$);
SELECT attempt($$SELECT userpilot_bulk_identify_companies('c', '{}')$$);
SELECT attempt($$SELECT userpilot_companies_payload('c', '{}')$$);
-- granted, it takes effect in the next command, and so does taking it back
RESET ROLE;
GRANT USAGE ON FOREIGN SERVER userpilot TO regress_rights;
SET ROLE regress_rights;
SELECT attempt($$SELECT userpilot_identify_company('c')$$);
SELECT attempt($$SELECT userpilot_bulk_identify_users('u', '{}')$$);
RESET ROLE;
REVOKE USAGE ON FOREIGN SERVER userpilot FROM regress_rights;
SET ROLE regress_rights;
SELECT attempt($$SELECT userpilot_identify_company('c')$$);
SELECT attempt($$SELECT userpilot_bulk_identify_users('u', '{}')$$);
-- also within one transaction, where the queue is open already
RESET ROLE;
BEGIN;
GRANT USAGE ON FOREIGN SERVER userpilot TO regress_rights;
SET ROLE regress_rights;
SELECT userpilot_identify_company('c');
RESET ROLE;
REVOKE USAGE ON FOREIGN SERVER userpilot FROM regress_rights;
SET ROLE regress_rights;
SELECT userpilot_identify_company('c');
ROLLBACK;
RESET ROLE;
SELECT kind, entity_id FROM userpilot_queue ORDER BY lsn, ctid;
SELECT by FROM userpilot_batches;
TRUNCATE userpilot_queue, userpilot_batches;

-- the session's role changes under what it remembers
SELECT attempt($$SELECT userpilot_identify_company('c')$$);
SET ROLE regress_rights;
SELECT attempt($$SELECT userpilot_identify_company('c')$$);
RESET ROLE;
SELECT attempt($$SELECT userpilot_identify_company('c')$$);
SET SESSION AUTHORIZATION regress_rights;
SELECT attempt($$SELECT userpilot_identify_company('c')$$);
RESET SESSION AUTHORIZATION;
-- so does a function's
CREATE FUNCTION send_as_owner() RETURNS void LANGUAGE sql SECURITY DEFINER AS
  $$SELECT userpilot_identify_company('by definer')$$;
SET ROLE regress_rights;
SELECT send_as_owner();
SELECT attempt($$SELECT userpilot_identify_company('c')$$);
RESET ROLE;
DROP FUNCTION send_as_owner();

-- through a group, given and taken
GRANT USAGE ON FOREIGN SERVER userpilot TO regress_rights_group;
SET ROLE regress_rights;
SELECT attempt($$SELECT userpilot_identify_company('through the group')$$);
SET ROLE regress_rights_group;
SELECT attempt($$SELECT userpilot_identify_company('as the group')$$);
RESET ROLE;
REVOKE regress_rights_group FROM regress_rights_member;
SET ROLE regress_rights;
SELECT attempt($$SELECT userpilot_identify_company('c')$$);
RESET ROLE;
GRANT regress_rights_group TO regress_rights_member;
SET ROLE regress_rights;
SELECT attempt($$SELECT userpilot_identify_company('again through the group')$$);
RESET ROLE;
REVOKE USAGE ON FOREIGN SERVER userpilot FROM regress_rights_group;
SET ROLE regress_rights;
SELECT attempt($$SELECT userpilot_identify_company('c')$$);
RESET ROLE;
-- through everyone
GRANT USAGE ON FOREIGN SERVER userpilot TO PUBLIC;
SET ROLE regress_rights;
SELECT attempt($$SELECT userpilot_identify_company('as anyone')$$);
RESET ROLE;
REVOKE USAGE ON FOREIGN SERVER userpilot FROM PUBLIC;
SELECT entity_id FROM userpilot_queue WHERE entity_id <> 'c' ORDER BY lsn, ctid;
TRUNCATE userpilot_queue;

--
-- A search path cannot make anyone run a caller's code
--
GRANT USAGE ON FOREIGN SERVER userpilot TO regress_rights;
CREATE TABLE ran_as (who text, what text);
GRANT INSERT, SELECT ON ran_as TO PUBLIC;
SET ROLE regress_rights;
CREATE FUNCTION regress_rights.trap(what text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO public.ran_as VALUES (current_user, what);
  RETURN true;
END$$;
CREATE FUNCTION regress_rights.eq(text, text) RETURNS boolean LANGUAGE sql AS $$SELECT regress_rights.trap('text = text')$$;
CREATE FUNCTION regress_rights.eq(xid8, xid8) RETURNS boolean LANGUAGE sql AS $$SELECT regress_rights.trap('xid8 = xid8')$$;
CREATE FUNCTION regress_rights.eq(bigint, bigint) RETURNS boolean LANGUAGE sql AS $$SELECT regress_rights.trap('bigint = bigint')$$;
CREATE FUNCTION regress_rights.eq(oid, oid) RETURNS boolean LANGUAGE sql AS $$SELECT regress_rights.trap('oid = oid')$$;
CREATE FUNCTION regress_rights.eq(name, text) RETURNS boolean LANGUAGE sql AS $$SELECT regress_rights.trap('name = text')$$;
CREATE OPERATOR regress_rights.= (LEFTARG = text, RIGHTARG = text, FUNCTION = regress_rights.eq);
CREATE OPERATOR regress_rights.= (LEFTARG = xid8, RIGHTARG = xid8, FUNCTION = regress_rights.eq);
CREATE OPERATOR regress_rights.= (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = regress_rights.eq);
CREATE OPERATOR regress_rights.= (LEFTARG = oid, RIGHTARG = oid, FUNCTION = regress_rights.eq);
CREATE OPERATOR regress_rights.= (LEFTARG = name, RIGHTARG = text, FUNCTION = regress_rights.eq);
CREATE FUNCTION regress_rights.pg_visible_in_snapshot(xid8, pg_snapshot) RETURNS boolean LANGUAGE sql AS $$SELECT regress_rights.trap('pg_visible_in_snapshot')$$;
CREATE FUNCTION regress_rights.count(text) RETURNS bigint LANGUAGE sql AS $$SELECT regress_rights.trap('count')::int::bigint$$;
CREATE FUNCTION regress_rights.now() RETURNS timestamptz LANGUAGE sql AS $$SELECT CASE WHEN regress_rights.trap('now') THEN pg_catalog.now() END$$;
CREATE FUNCTION regress_rights.length(text) RETURNS int LANGUAGE sql AS $$SELECT regress_rights.trap('length')::int$$;
CREATE TABLE regress_rights.userpilot_queue (lsn pg_lsn, xid xid8, enqueued_at timestamptz, batch bigint, bulk boolean,
  server text, kind text, entity_id text, company_id text, metadata jsonb);
CREATE TABLE regress_rights.userpilot_batches (id bigint);
CREATE TABLE regress_rights.userpilot_enabled (server text, system_identifier bigint, database oid);
CREATE TEMP TABLE userpilot_queue (LIKE regress_rights.userpilot_queue);
CREATE TEMP TABLE pg_extension (extname name, extnamespace oid, extowner oid);
CREATE TEMP TABLE pg_foreign_server (srvname name);
-- the trap works
BEGIN;
SET LOCAL search_path = pg_temp, regress_rights, pg_catalog, public;
SELECT 'a'::text = 'b'::text AS trapped;
SELECT * FROM ran_as;
ROLLBACK;
-- nothing falls into it
BEGIN;
SET LOCAL search_path = pg_temp, regress_rights, pg_catalog, public;
SELECT public.userpilot_identify_company('trapped?', '{"name":"x"}');
SELECT public.userpilot_identify_user('trapped?', '{"name":"x"}', 'c');
SELECT public.userpilot_bulk_identify_companies('trapped?', '{"name":"x"}');
SELECT public.attempt('SELECT public.userpilot_enable(''userpilot'')');
COMMIT;
SET search_path = pg_temp, regress_rights, pg_catalog, public;
CALL public.userpilot_wait('0');
CALL public.userpilot_check('userpilot2');
RESET search_path;
RESET ROLE;
-- as the owner, too: a server of one's own makes these functions write
ALTER SERVER userpilot OWNER TO regress_rights;
SET ROLE regress_rights;
-- rows from before may have been meant for another server of this name
SELECT public.userpilot_enable('userpilot');
RESET ROLE;
CREATE TEMP TABLE aside AS TABLE public.userpilot_queue;
TRUNCATE public.userpilot_queue;
SET ROLE regress_rights;
BEGIN;
SET LOCAL search_path = pg_temp, regress_rights, pg_catalog, public;
SELECT public.userpilot_enable('userpilot');
SELECT public.userpilot_enable('userpilot');
SELECT public.userpilot_disable('userpilot');
ROLLBACK;
-- and functions called by a superuser with that path: operators of the extension's own SQL are bound
RESET ROLE;
INSERT INTO public.userpilot_queue TABLE aside;
DROP TABLE aside;
BEGIN;
SET LOCAL search_path = regress_rights, pg_catalog, public;
SELECT state FROM public.userpilot_status;
SELECT count(*) OPERATOR(pg_catalog.>=) 0 FROM public.userpilot_trace('company', 'trapped?');
SELECT public.userpilot_retry(1);
COMMIT;
SELECT DISTINCT who, what FROM ran_as ORDER BY 1, 2;
SELECT kind, entity_id FROM public.userpilot_queue ORDER BY lsn, ctid;
SELECT count(*) FROM regress_rights.userpilot_queue;
SELECT count(*) FROM regress_rights.userpilot_enabled;
DISCARD TEMP;

--
-- Procedures for everyone
--
TRUNCATE userpilot_queue, userpilot_batches;
ALTER SERVER userpilot OWNER TO CURRENT_USER;
REVOKE USAGE ON FOREIGN SERVER userpilot FROM regress_rights;
SET ROLE regress_rights;
CALL userpilot_wait('1 second');
CALL userpilot_check();
CALL userpilot_check('nowhere');
BEGIN;
CALL userpilot_check();
ROLLBACK;
SELECT userpilot_launch_problem() IS NULL AS no_problem;

-- who watches needs pg_monitor, and sees no data of a company or user
SET ROLE regress_rights_monitor;
SELECT server, state, advice FROM userpilot_status;
SELECT count(*) FROM userpilot_jobs;
SELECT name FROM regress_relations WHERE attempt(format('SELECT FROM %I', name)) = 'taken' ORDER BY name;
RESET ROLE;

--
-- Code of whoever owns the extension's schema is not taken for PostgreSQL's
--
DROP EXTENSION userpilot CASCADE;
CREATE SCHEMA regress_home AUTHORIZATION regress_rights;
SET ROLE regress_rights;
CREATE FUNCTION regress_home.times(numeric, bigint) RETURNS numeric LANGUAGE plpgsql AS $$BEGIN RAISE 'ran as %', current_user; END$$;
CREATE OPERATOR regress_home.* (LEFTARG = numeric, RIGHTARG = bigint, FUNCTION = regress_home.times);
CREATE OPERATOR regress_home./ (LEFTARG = numeric, RIGHTARG = bigint, FUNCTION = regress_home.times);
CREATE FUNCTION regress_home.jsonb_build_object(text, jsonb, text, text, text, int, text, bigint, text, jsonb) RETURNS jsonb
  LANGUAGE plpgsql AS $$BEGIN RAISE 'ran as %', current_user; END$$;
RESET ROLE;
CREATE EXTENSION userpilot SCHEMA regress_home;
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot OPTIONS (region 'us');
INSERT INTO regress_home.userpilot_jobs (server, kind, format, records, bytes, status, completed_rows)
  VALUES ('userpilot', 'company', 'json', 10, 10, 'processing', 5);
INSERT INTO regress_home.userpilot_profiles (server, kind, entity_id) VALUES ('userpilot', 'company', 'a');
SELECT state, job_percent FROM regress_home.userpilot_status;
SELECT what FROM regress_home.userpilot_trace('company', 'a');
SELECT regress_home.userpilot_retry();
DROP EXTENSION userpilot CASCADE;
DROP SCHEMA regress_home CASCADE;
CREATE EXTENSION userpilot;

DROP VIEW regress_relations;
DROP TABLE ran_as;
DROP FUNCTION attempt(text);
DROP SCHEMA regress_rights CASCADE;
DROP OWNED BY regress_rights, regress_rights_group;
DROP ROLE regress_rights, regress_rights_group, regress_rights_member, regress_rights_monitor;
DROP EXTENSION userpilot CASCADE;
