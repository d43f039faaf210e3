--
-- CREATE and DROP EXTENSION: what comes, what it says of itself, what anyone
-- may use of it, what a dump carries, and that nothing stays behind
--
\set SHOW_CONTEXT never
SET client_min_messages = warning;
DROP EXTENSION IF EXISTS userpilot CASCADE;

-- a schema of choice, one that must be quoted
CREATE SCHEMA "Regress install";
CREATE EXTENSION userpilot SCHEMA "Regress install";
CREATE EXTENSION userpilot;
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot OPTIONS (region 'us');

-- everything works without that schema in the search path
SELECT "Regress install".userpilot_identify_company('a', '{"x":1}');
SELECT "Regress install".userpilot_identify_user('b');
SELECT "Regress install".userpilot_bulk_identify_companies(g, '{}') FROM generate_series(1, 3) g;
SELECT "Regress install".userpilot_companies_payload('a', '{}');
BEGIN;
SELECT "Regress install".userpilot_enable('userpilot');
SELECT "Regress install".userpilot_disable('userpilot');
ROLLBACK;
SELECT state, pending FROM "Regress install".userpilot_status;
SELECT what FROM "Regress install".userpilot_trace('company', 'a');
SELECT "Regress install".userpilot_retry(1);
CALL "Regress install".userpilot_wait('0');
SELECT kind, entity_id, bulk FROM "Regress install".userpilot_queue ORDER BY kind, entity_id;

-- the objects are fixed to their schema
ALTER EXTENSION userpilot SET SCHEMA public;

-- a session follows the extension to another schema
DROP EXTENSION userpilot CASCADE;
DROP SCHEMA "Regress install";
CREATE EXTENSION userpilot SCHEMA public;
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot OPTIONS (region 'us');
SELECT public.userpilot_identify_company('c');
SELECT public.userpilot_bulk_identify_users(g, '{}') FROM generate_series(1, 2) g;
SELECT kind, entity_id FROM public.userpilot_queue ORDER BY kind, entity_id;
SELECT kind, rows FROM public.userpilot_batches;

--
-- What it consists of
--
CREATE TEMP VIEW member AS
  SELECT d.classid, d.objid,
         replace(pg_describe_object(d.classid, d.objid, 0), 'public.', '') COLLATE "C" AS object
  FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid
  WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'
    AND e.extname = 'userpilot' AND d.classid <> 'pg_type'::regclass;

-- what does not say what it is for: nothing
SELECT object FROM member
  WHERE (classid <> 'pg_class'::regclass
         OR objid NOT IN (SELECT oid FROM pg_class WHERE relkind = 'i'))
    AND obj_description(objid, classid::regclass::name) IS NULL;
SELECT c.relname, attname
  FROM pg_class c JOIN pg_attribute ON attrelid = c.oid
  WHERE c.relname LIKE 'userpilot%' AND relkind IN ('r', 'v', 'c') AND attnum > 0
    AND col_description(attrelid, attnum) IS NULL;

-- what anyone may use
SELECT object FROM member
  WHERE classid = 'pg_proc'::regclass AND has_function_privilege('public', objid, 'EXECUTE')
  ORDER BY object;
-- and what not
SELECT object FROM member
  WHERE classid = 'pg_proc'::regclass AND NOT has_function_privilege('public', objid, 'EXECUTE')
  ORDER BY object;
SELECT object FROM member JOIN pg_class c ON c.oid = objid
  WHERE classid = 'pg_class'::regclass AND relkind IN ('r', 'v')
    AND (has_table_privilege('public', objid, 'SELECT,INSERT,UPDATE,DELETE,TRUNCATE,REFERENCES,TRIGGER')
         OR has_any_column_privilege('public', objid, 'SELECT,INSERT,UPDATE,REFERENCES'));
SELECT object FROM member JOIN pg_class c ON c.oid = objid
  WHERE CASE WHEN classid = 'pg_class'::regclass AND relkind = 'S'
             THEN has_sequence_privilege('public', objid, 'USAGE,SELECT,UPDATE') END;
SELECT has_foreign_data_wrapper_privilege('public', 'userpilot', 'USAGE');
SELECT relname FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
  WHERE relname ^@ 'userpilot' AND relkind IN ('r', 'v', 'S')
    AND has_table_privilege('pg_monitor', c.oid, 'SELECT') ORDER BY relname COLLATE "C";

-- nothing runs with another's rights, and nothing in parallel that must not
SELECT object FROM member JOIN pg_proc p ON p.oid = objid
  WHERE classid = 'pg_proc'::regclass AND prosecdef;
SELECT object, proparallel, provolatile FROM member JOIN pg_proc p ON p.oid = objid
  WHERE classid = 'pg_proc'::regclass AND proparallel <> 'u' ORDER BY object;

-- what a dump carries, and what it leaves out
SELECT object, objid = ANY (extconfig) AS dumped, relreplident
  FROM member JOIN pg_class c ON c.oid = objid
  JOIN pg_extension ON extname = 'userpilot'
  WHERE classid = 'pg_class'::regclass AND relkind IN ('r', 'S') ORDER BY object;
SELECT count(*) FROM pg_extension, unnest(extcondition) condition
  WHERE extname = 'userpilot' AND condition <> '';

-- rows can be deleted from a published queue
SET client_min_messages = error;
CREATE PUBLICATION regress_install FOR TABLE userpilot_queue;
DELETE FROM userpilot_queue WHERE entity_id = 'c';
DROP PUBLICATION regress_install;

--
-- DROP EXTENSION
--
DROP VIEW member;
DROP EXTENSION userpilot;
DROP SERVER userpilot;
DROP EXTENSION userpilot;
SELECT 'class' AS kind, relname::text AS name FROM pg_class WHERE relname ~ 'userpilot'
UNION ALL SELECT 'routine', proname FROM pg_proc WHERE proname ~ 'userpilot'
UNION ALL SELECT 'type', typname FROM pg_type WHERE typname ~ 'userpilot'
UNION ALL SELECT 'wrapper', fdwname FROM pg_foreign_data_wrapper WHERE fdwname = 'userpilot'
UNION ALL SELECT 'server', srvname FROM pg_foreign_server
UNION ALL SELECT 'trigger', tgname FROM pg_trigger WHERE tgname ~ 'userpilot'
UNION ALL SELECT 'extension', extname FROM pg_extension WHERE extname = 'userpilot';

-- all of it comes and goes with its transaction
BEGIN;
CREATE EXTENSION userpilot SCHEMA public;
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot OPTIONS (region 'us');
SELECT userpilot_identify_company('d');
SELECT count(*) FROM userpilot_queue;
ROLLBACK;
\set VERBOSITY sqlstate
SELECT userpilot_identify_company('d');
\set VERBOSITY default
SELECT count(*) FROM pg_extension WHERE extname = 'userpilot';

-- installing it is for superusers
CREATE ROLE regress_install;
SET ROLE regress_install;
CREATE EXTENSION userpilot;
RESET ROLE;
DROP ROLE regress_install;
