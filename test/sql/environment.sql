--
-- Servers, user mappings and who may send: what is refused, and in which words
--
\set SHOW_CONTEXT never
-- whether the library is preloaded is not this test's business
SET client_min_messages = error;
CREATE EXTENSION IF NOT EXISTS userpilot;

CREATE ROLE regress_environment_owner;
CREATE ROLE regress_environment_other;
GRANT USAGE ON FOREIGN DATA WRAPPER userpilot TO regress_environment_owner;

--
-- Servers: exactly one of region and endpoint
--
CREATE SERVER env FOREIGN DATA WRAPPER userpilot;
\echo :SQLSTATE
CREATE SERVER env FOREIGN DATA WRAPPER userpilot OPTIONS (timeout '5');
CREATE SERVER env FOREIGN DATA WRAPPER userpilot
  OPTIONS (region 'us', endpoint 'https://analytex.userpilot.io');
\echo :SQLSTATE
CREATE SERVER env TYPE 'any' VERSION 'any' FOREIGN DATA WRAPPER userpilot
  OPTIONS (region 'us');
ALTER SERVER env OPTIONS (DROP region);
ALTER SERVER env OPTIONS (ADD endpoint 'https://analytex.userpilot.io');
ALTER SERVER env OPTIONS (DROP region, ADD endpoint 'https://analytex.userpilot.io');
ALTER SERVER env OPTIONS (SET endpoint 'https://analytex.userpilot.io/v1/');
ALTER SERVER env OPTIONS (SET endpoint 'http://127.0.0.1:8080');
ALTER SERVER env OPTIONS (DROP endpoint, ADD region 'eu');
ALTER SERVER env VERSION 'other';

-- region
ALTER SERVER env OPTIONS (SET region 'US');
\echo :SQLSTATE
ALTER SERVER env OPTIONS (SET region '');
ALTER SERVER env OPTIONS (SET region 'usa');
ALTER SERVER env OPTIONS (SET region
  'a value that is far too long to be repeated in full in a message to anyone');

-- endpoint; the words about it are those of another module
\set VERBOSITY sqlstate
ALTER SERVER env OPTIONS (DROP region, ADD endpoint '');
ALTER SERVER env OPTIONS (DROP region, ADD endpoint 'analytex.userpilot.io');
ALTER SERVER env OPTIONS (DROP region, ADD endpoint 'ftp://analytex.userpilot.io');
ALTER SERVER env OPTIONS (DROP region, ADD endpoint 'http://analytex.userpilot.io');
\set VERBOSITY default
ALTER SERVER env OPTIONS (DROP region, ADD endpoint E'https://a\nb');

-- integers
ALTER SERVER env OPTIONS (requests_per_minute '0');
ALTER SERVER env OPTIONS (requests_per_minute '1000001');
ALTER SERVER env OPTIONS (requests_per_minute '-1');
ALTER SERVER env OPTIONS (requests_per_minute '99999999999999999999');
ALTER SERVER env OPTIONS (requests_per_minute '');
ALTER SERVER env OPTIONS (max_attempts '0');
ALTER SERVER env OPTIONS (max_attempts '1001');
ALTER SERVER env OPTIONS (max_attempts '1.5');
ALTER SERVER env OPTIONS (timeout '0');
ALTER SERVER env OPTIONS (timeout '601');
ALTER SERVER env OPTIONS (timeout '30s');
ALTER SERVER env OPTIONS (timeout ' 30');
ALTER SERVER env OPTIONS (connections '0');
ALTER SERVER env OPTIONS (connections '101');
ALTER SERVER env OPTIONS (connections 'many');
ALTER SERVER env OPTIONS (requests_per_minute '1000000', max_attempts '1000',
  timeout '600', connections '100');
ALTER SERVER env OPTIONS (SET requests_per_minute '1', SET max_attempts '1',
  SET timeout '1', SET connections '1');

-- bulk_format
ALTER SERVER env OPTIONS (bulk_format 'xml');
ALTER SERVER env OPTIONS (bulk_format 'JSON');
ALTER SERVER env OPTIONS (bulk_format 'auto');
ALTER SERVER env OPTIONS (SET bulk_format 'json');
ALTER SERVER env OPTIONS (SET bulk_format 'ndjson');

-- ca_file
ALTER SERVER env OPTIONS (ca_file 'ca.pem');
ALTER SERVER env OPTIONS (ca_file '');
ALTER SERVER env OPTIONS (ca_file E'/etc/ssl/\x07');
DO $$BEGIN
  EXECUTE format('ALTER SERVER env OPTIONS (ca_file %L)', '/' || repeat('x', 2000));
END$$;
ALTER SERVER env OPTIONS (ca_file '/etc/ssl/ca.pem');

-- proxy
ALTER SERVER env OPTIONS (proxy '');
ALTER SERVER env OPTIONS (proxy 'proxy:3128');
ALTER SERVER env OPTIONS (proxy 'ftp://proxy:21');
ALTER SERVER env OPTIONS (proxy 'http://user:secret@proxy:3128');
\echo :SQLSTATE
ALTER SERVER env OPTIONS (proxy 'http://');
ALTER SERVER env OPTIONS (proxy 'http://:3128');
ALTER SERVER env OPTIONS (proxy 'http://[::1');
ALTER SERVER env OPTIONS (proxy 'http://proxy:');
ALTER SERVER env OPTIONS (proxy 'http://proxy:0');
ALTER SERVER env OPTIONS (proxy 'http://proxy:65536');
ALTER SERVER env OPTIONS (proxy 'http://proxy:3128/path');
ALTER SERVER env OPTIONS (proxy 'http://pro xy:3128');
ALTER SERVER env OPTIONS (proxy 'http://proxy.example.com:3128');
ALTER SERVER env OPTIONS (SET proxy 'https://proxy.example.com/');
ALTER SERVER env OPTIONS (SET proxy 'socks5://[::1]:1080');
ALTER SERVER env OPTIONS (SET proxy 'socks5h://192.0.2.1');

-- only_on
ALTER SERVER env OPTIONS (only_on '');
ALTER SERVER env OPTIONS (only_on E'a\tb');
ALTER SERVER env OPTIONS (only_on 'production');

-- names
ALTER SERVER env OPTIONS (regoin 'us');
\echo :SQLSTATE
ALTER SERVER env OPTIONS (request_per_minute '5');
ALTER SERVER env OPTIONS (host 'example.com');
ALTER SERVER env OPTIONS (apikey 'sk-secret');
ALTER SERVER env OPTIONS (api_key 'sk-secret');
\echo :SQLSTATE
ALTER SERVER env OPTIONS (api_key_file '/etc/userpilot/key');
ALTER SERVER env OPTIONS (ADD timeout '5');
ALTER SERVER env OPTIONS (DROP endpoint);

SELECT unnest(srvoptions) FROM pg_foreign_server WHERE srvname = 'env';

--
-- User mappings: exactly one of api_key and api_key_file
--
CREATE USER MAPPING FOR PUBLIC SERVER env;
\echo :SQLSTATE
CREATE USER MAPPING FOR PUBLIC SERVER env
  OPTIONS (api_key 'sk-secret', api_key_file '/etc/userpilot/key');
\echo :SQLSTATE

-- api_key: the key itself is in none of the messages
CREATE USER MAPPING FOR PUBLIC SERVER env OPTIONS (api_key '');
\echo :SQLSTATE
CREATE USER MAPPING FOR PUBLIC SERVER env OPTIONS (api_key 'NX-secret');
CREATE USER MAPPING FOR PUBLIC SERVER env OPTIONS (api_key 'nx-secret');
CREATE USER MAPPING FOR PUBLIC SERVER env OPTIONS (api_key 'Token sk-secret');
CREATE USER MAPPING FOR PUBLIC SERVER env OPTIONS (api_key E'sk-secret\n');
CREATE USER MAPPING FOR PUBLIC SERVER env OPTIONS (api_key E'sk-secret\x7f');
DO $$BEGIN
  EXECUTE format('CREATE USER MAPPING FOR PUBLIC SERVER env OPTIONS (api_key %L)',
                 repeat('x', 513));
END$$;

-- api_key_file
CREATE USER MAPPING FOR PUBLIC SERVER env OPTIONS (api_key_file '');
CREATE USER MAPPING FOR PUBLIC SERVER env OPTIONS (api_key_file 'key');
CREATE USER MAPPING FOR PUBLIC SERVER env OPTIONS (api_key_file E'/etc/\rkey');

-- names
CREATE USER MAPPING FOR PUBLIC SERVER env OPTIONS (api_kye 'sk-secret');
CREATE USER MAPPING FOR PUBLIC SERVER env OPTIONS (password 'sk-secret');
CREATE USER MAPPING FOR PUBLIC SERVER env OPTIONS (region 'us');
\echo :SQLSTATE
CREATE USER MAPPING FOR PUBLIC SERVER env OPTIONS (api_key 'sk-secret', timeout '5');
CREATE USER MAPPING FOR PUBLIC SERVER env OPTIONS (timeoutt '5');

-- 512 characters are few enough, and a file need not be there yet
DO $$BEGIN
  EXECUTE format('CREATE USER MAPPING FOR PUBLIC SERVER env OPTIONS (api_key %L)',
                 repeat('x', 512));
END$$;
ALTER USER MAPPING FOR PUBLIC SERVER env OPTIONS (ADD api_key_file '/no/such/key');
ALTER USER MAPPING FOR PUBLIC SERVER env OPTIONS (DROP api_key);
ALTER USER MAPPING FOR PUBLIC SERVER env OPTIONS (DROP api_key, ADD api_key_file '/no/such/key');

SELECT unnest(umoptions) FROM pg_user_mappings WHERE srvname = 'env';

--
-- Nothing else takes options
--
ALTER FOREIGN DATA WRAPPER userpilot OPTIONS (ADD region 'us');
ALTER FOREIGN DATA WRAPPER userpilot OPTIONS (ADD debug 'true');
CREATE FOREIGN TABLE env_table (id int) SERVER env OPTIONS (endpoint 'https://example.com');
CREATE FOREIGN TABLE env_table (id int) SERVER env OPTIONS (table_name 'companies');
CREATE FOREIGN TABLE env_table (id int OPTIONS (key 'true')) SERVER env;

-- and the validator is for the wrapper, not for calling
SELECT userpilot_validator('{region}', 'pg_foreign_server'::regclass);
SELECT userpilot_validator('{NULL}', 'pg_foreign_server'::regclass);
SELECT userpilot_validator(array[repeat('region', 20) || '=us'], 'pg_foreign_server'::regclass);
SELECT userpilot_validator('{region=us}', NULL);

--
-- What can redirect a connection, change whom it trusts or read files is for
-- superusers; an owner cannot even alter what has it set
--
SET ROLE regress_environment_owner;
CREATE SERVER owned FOREIGN DATA WRAPPER userpilot OPTIONS (endpoint 'https://example.com');
\echo :SQLSTATE
CREATE SERVER owned FOREIGN DATA WRAPPER userpilot OPTIONS (region 'us', only_on 'production');
ALTER SERVER owned OPTIONS (DROP region, ADD endpoint 'https://example.com');
ALTER SERVER owned OPTIONS (ca_file '/etc/ssl/ca.pem');
ALTER SERVER owned OPTIONS (proxy 'http://proxy:3128');
ALTER SERVER owned OPTIONS (timeout '10', DROP only_on);
CREATE USER MAPPING FOR PUBLIC SERVER owned OPTIONS (api_key_file '/etc/passwd');
CREATE USER MAPPING FOR PUBLIC SERVER owned OPTIONS (api_key 'sk-secret');
SELECT userpilot_validator('{}', 'pg_foreign_server'::regclass);
RESET ROLE;
ALTER SERVER owned OPTIONS (proxy 'http://proxy:3128');
SET ROLE regress_environment_owner;
ALTER SERVER owned OPTIONS (SET timeout '20');
ALTER SERVER owned OPTIONS (SET timeout '20', DROP proxy);
RESET ROLE;

--
-- Who sends
--
CREATE FOREIGN DATA WRAPPER foreign_wrapper;
CREATE SERVER foreign_server FOREIGN DATA WRAPPER foreign_wrapper;
CREATE VIEW enabled AS
  SELECT server, by = current_user AS by_me,
         system_identifier = (SELECT system_identifier FROM pg_control_system()) AS this_system,
         database = (SELECT oid FROM pg_database WHERE datname = current_database()) AS this_database
  FROM userpilot_enabled ORDER BY server;

SELECT userpilot_enable('nowhere');
\echo :SQLSTATE
SELECT userpilot_enable('No "Where"');
SELECT userpilot_enable('foreign_server');
\echo :SQLSTATE
SELECT userpilot_enable(NULL);
SELECT userpilot_disable('nowhere');
SELECT userpilot_disable('foreign_server');
SELECT userpilot_disable(NULL);

SELECT userpilot_enable('env');
SELECT userpilot_enable('env');
SELECT * FROM enabled;

-- what another database had is taken over
UPDATE userpilot_enabled
  SET system_identifier = 1, database = 1, by = 'nobody', enabled_at = '2000-01-01';
SELECT userpilot_enable('env');
SELECT e.*, enabled_at > '2000-01-01' AS newer FROM enabled e JOIN userpilot_enabled USING (server);

-- it is all part of the transaction
BEGIN;
SELECT userpilot_disable('env');
SELECT * FROM enabled;
ROLLBACK;
SELECT * FROM enabled;
BEGIN READ ONLY;
SELECT userpilot_enable('env');
ROLLBACK;

-- only owners, who need no privilege on the table
SET ROLE regress_environment_other;
SELECT userpilot_enable('owned');
\echo :SQLSTATE
SELECT userpilot_disable('env');
SELECT * FROM userpilot_enabled;
SET ROLE regress_environment_owner;
SELECT userpilot_enable('owned');
SELECT userpilot_disable('env');
-- who pauses a server can go on with what was queued meanwhile
BEGIN;
SET LOCAL userpilot.server = 'owned';
SET LOCAL client_min_messages = error;
SELECT userpilot_identify_company('c1', '{}');
SELECT userpilot_disable('owned');
SELECT userpilot_enable('owned');
ROLLBACK;
RESET ROLE;
-- another server of that name: what the first has got says nothing of it, and
-- what it was to get is not for another owner
BEGIN;
SELECT userpilot_disable('owned');
INSERT INTO userpilot_profiles (server, kind, entity_id, metadata) VALUES ('owned', 'company', 'c1', '{"a": 1}');
DROP SERVER owned CASCADE;
CREATE SERVER owned FOREIGN DATA WRAPPER userpilot OPTIONS (region 'eu');
ALTER SERVER owned OWNER TO regress_environment_owner;
SET ROLE regress_environment_owner;
SAVEPOINT before;
SELECT userpilot_enable('owned');
RESET ROLE;
SELECT count(*) FROM userpilot_profiles WHERE server = 'owned';
ROLLBACK TO before;
INSERT INTO userpilot_dead_letters (lsn, xid, enqueued_at, bulk, server, kind, entity_id, metadata, error, attempts)
  VALUES ('0/1', '3', now(), false, 'owned', 'company', 'c2', '{}', 'no', 1);
SET ROLE regress_environment_owner;
SELECT userpilot_enable('owned');
ROLLBACK;
RESET ROLE;
SELECT server, by FROM userpilot_enabled WHERE server = 'owned';

-- a search path of the caller's changes nothing
CREATE SCHEMA regress_environment_trap;
CREATE FUNCTION regress_environment_trap.eq(text, text) RETURNS boolean
  LANGUAGE plpgsql AS $$BEGIN RAISE 'trapped'; END$$;
CREATE OPERATOR regress_environment_trap.= (
  LEFTARG = text, RIGHTARG = text, FUNCTION = regress_environment_trap.eq);
CREATE TABLE regress_environment_trap.userpilot_enabled (server text);
BEGIN;
SELECT set_config('search_path', 'regress_environment_trap, pg_catalog, ' || current_schema(), true) IS NULL AS trap_set;
SELECT userpilot_disable('owned');
SELECT userpilot_enable('owned');
SELECT userpilot_disable('owned');
COMMIT;
DROP SCHEMA regress_environment_trap CASCADE;

SELECT userpilot_disable('env');
SELECT userpilot_disable('env');
SELECT count(*) FROM userpilot_enabled WHERE database <> 0;

-- every object says what it is for
SELECT c.relname, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
  WHERE c.oid = 'userpilot_enabled'::regclass AND a.attnum > 0
    AND col_description(c.oid, a.attnum) IS NULL;
SELECT obj_description('userpilot_enabled'::regclass, 'pg_class') IS NOT NULL
   AND obj_description('userpilot_enable'::regproc, 'pg_proc') IS NOT NULL
   AND obj_description('userpilot_disable'::regproc, 'pg_proc') IS NOT NULL
   AND obj_description('userpilot_validator'::regproc, 'pg_proc') IS NOT NULL
   AND obj_description(oid, 'pg_foreign_data_wrapper') IS NOT NULL AS described
  FROM pg_foreign_data_wrapper WHERE fdwname = 'userpilot';

DROP VIEW enabled;
DROP FOREIGN DATA WRAPPER foreign_wrapper CASCADE;
DROP SERVER env CASCADE;
DROP SERVER owned CASCADE;
DROP OWNED BY regress_environment_owner;
DROP ROLE regress_environment_owner;
DROP ROLE regress_environment_other;
