--
-- What can never be sent is refused in the caller's statement, with a reason
-- and mostly a way out, and queues nothing
--
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS userpilot;
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot OPTIONS (region 'us');

-- the answer to a command: SQLSTATE, message, detail, hint
CREATE FUNCTION answer(command text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
  state text;
  message text;
  detail text;
  hint text;
BEGIN
  EXECUTE command;
  RETURN 'taken';
EXCEPTION WHEN OTHERS THEN
  GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT,
    detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
  RETURN state || ' ' || message || E'\n' || coalesce('    ' || nullif(detail, '') || E'\n', '')
    || coalesce('    ' || nullif(hint, '') || E'\n', '');
END$$;
CREATE TABLE refused (n int GENERATED ALWAYS AS IDENTITY, command text);
CREATE TYPE regress_pair AS (a int, b int);
CREATE TYPE regress_mood AS ENUM ('happy');
CREATE DOMAIN regress_flag AS boolean;
CREATE DOMAIN regress_name AS text CHECK (value <> 'bad');

--
-- Ids
--
INSERT INTO refused (command) VALUES
  -- null and empty
  ($$SELECT userpilot_identify_company(NULL)$$),
  ($$SELECT userpilot_identify_company(NULL::text)$$),
  ($$SELECT userpilot_identify_company(NULL::int)$$),
  ($$SELECT userpilot_identify_company('')$$),
  ($$SELECT userpilot_identify_company(''::varchar)$$),
  ($$SELECT userpilot_identify_user(NULL)$$),
  ($$SELECT userpilot_identify_user(NULL::uuid, '{}', 'c')$$),
  ($$SELECT userpilot_identify_user('')$$),
  ($$SELECT userpilot_identify_user('u', '{}', '')$$),
  ($$SELECT userpilot_identify_user('u', '{}', ''::text)$$),
  -- too long
  ($$SELECT userpilot_identify_company(repeat('x', 513))$$),
  ($$SELECT userpilot_identify_user(repeat('y', 1000000))$$),
  ($$SELECT userpilot_identify_user('u', '{}', repeat('z', 513))$$),
  ($$SELECT userpilot_identify_company(10::numeric ^ 512)$$),
  -- types that are no id, each once
  ($$SELECT userpilot_identify_company(true)$$),
  ($$SELECT userpilot_identify_company(1::float8)$$),
  ($$SELECT userpilot_identify_company(1::float4)$$),
  ($$SELECT userpilot_identify_company('{}'::json)$$),
  ($$SELECT userpilot_identify_company('"a"'::jsonb)$$),
  ($$SELECT userpilot_identify_company(date '2024-02-29')$$),
  ($$SELECT userpilot_identify_company(timestamp '2024-02-29 12:00')$$),
  ($$SELECT userpilot_identify_company(timestamptz '2024-02-29 12:00+00')$$),
  ($$SELECT userpilot_identify_company(time '12:00')$$),
  ($$SELECT userpilot_identify_company(interval '1 day')$$),
  ($$SELECT userpilot_identify_company('\x00'::bytea)$$),
  ($$SELECT userpilot_identify_company(array['a'])$$),
  ($$SELECT userpilot_identify_company('{1,2}'::int[])$$),
  ($$SELECT userpilot_identify_company('abc'::char(5))$$),
  ($$SELECT userpilot_identify_company('a'::"char")$$),
  ($$SELECT userpilot_identify_company('a'::name)$$),
  ($$SELECT userpilot_identify_company(row(1, 'a'))$$),
  ($$SELECT userpilot_identify_company(row(1, 2)::regress_pair)$$),
  ($$SELECT userpilot_identify_company('happy'::regress_mood)$$),
  ($$SELECT userpilot_identify_company(true::regress_flag)$$),
  ($$SELECT userpilot_identify_company('bad'::regress_name)$$),
  ($$SELECT userpilot_identify_company(1::money)$$),
  ($$SELECT userpilot_identify_company('127.0.0.1'::inet)$$),
  ($$SELECT userpilot_identify_company(b'101')$$),
  ($$SELECT userpilot_identify_company(1::oid)$$),
  ($$SELECT userpilot_identify_company(point '(1,2)')$$),
  ($$SELECT userpilot_identify_company(int4range(1, 2))$$),
  ($$SELECT userpilot_identify_company('a'::tsvector)$$),
  ($$SELECT userpilot_identify_user(1.5::float8)$$),
  ($$SELECT userpilot_identify_user('u', '{}', true)$$),
  -- numbers that are none
  ($$SELECT userpilot_identify_company('NaN'::numeric)$$),
  ($$SELECT userpilot_identify_company('Infinity'::numeric)$$),
  ($$SELECT userpilot_identify_user('-Infinity'::numeric)$$),
  ($$SELECT userpilot_identify_user('u', '{}', 'NaN'::numeric)$$);

--
-- Metadata
--
INSERT INTO refused (command) VALUES
  ($$SELECT userpilot_identify_company('c', '"a string"')$$),
  ($$SELECT userpilot_identify_company('c', '1')$$),
  ($$SELECT userpilot_identify_company('c', 'true')$$),
  ($$SELECT userpilot_identify_company('c', 'null')$$),
  ($$SELECT userpilot_identify_company('c', '[]')$$),
  ($$SELECT userpilot_identify_company('c', '[{"name":"Acme"}]')$$),
  ($$SELECT userpilot_identify_company('c', '{"address":{"city":"Berlin"}}')$$),
  ($$SELECT userpilot_identify_company('c', '{"address":{}}')$$),
  ($$SELECT userpilot_identify_company('c', '{"name":"Acme","tags":["a"],"z":1}')$$),
  ($$SELECT userpilot_identify_company('c', '{"tags":[]}')$$),
  ($$SELECT userpilot_identify_user('u', '{"a \"quoted\" name":[1]}')$$),
  ($$SELECT userpilot_identify_user('u', jsonb_build_object(repeat('long', 50), '{}'::jsonb))$$),
  ($$SELECT userpilot_identify_company('c', '{"":1}')$$),
  ($$SELECT userpilot_identify_company('c', (SELECT jsonb_object_agg('p' || g, g) FROM generate_series(1, 501) g))$$),
  ($$SELECT userpilot_identify_company('c', jsonb_build_object(repeat('x', 256), 1))$$),
  ($$SELECT userpilot_identify_company('c', jsonb_build_object('story', repeat('x', 65536)))$$),
  ($$SELECT userpilot_identify_user('u', jsonb_build_object('name', 'Jane', 'story', repeat('x', 1000000)))$$),
  ($$SELECT userpilot_identify_company('c', '{"a":1')$$),
  ($$SELECT userpilot_identify_company('c', '')$$),
  ($$SELECT userpilot_identify_company('c', '{"a":"\u0000"}')$$),
  ($$SELECT userpilot_identify_company('c', 'text'::text)$$),
  ($$SELECT userpilot_identify_company('c', '{}'::json)$$);

--
-- Bulk aggregates and payloads refuse the same, wherever the row stands
--
INSERT INTO refused (command) VALUES
  ($$SELECT userpilot_bulk_identify_companies(NULL::int, '{}')$$),
  ($$SELECT userpilot_bulk_identify_companies('', '{}')$$),
  ($$SELECT userpilot_bulk_identify_companies(true, '{}')$$),
  ($$SELECT userpilot_bulk_identify_companies('c', '[]')$$),
  ($$SELECT userpilot_bulk_identify_companies(CASE g WHEN 700 THEN '' ELSE g::text END, '{}') FROM generate_series(1, 1500) g$$),
  ($$SELECT userpilot_bulk_identify_companies(nullif(g, 1500), '{}') FROM generate_series(1, 1500) g$$),
  ($$SELECT g % 7, userpilot_bulk_identify_companies(nullif(g, 1500), '{}') FROM generate_series(1, 1500) g GROUP BY 1$$),
  ($$SELECT userpilot_bulk_identify_users(g, jsonb_build_object('n', CASE g WHEN 501 THEN '[]'::jsonb ELSE '1' END)) FROM generate_series(1, 501) g$$),
  ($$SELECT userpilot_bulk_identify_users(g, '{}', CASE g WHEN 1200 THEN '' ELSE 'c' END) FROM generate_series(1, 1500) g$$),
  ($$SELECT userpilot_bulk_identify_users(g, '{}', g::float8) FROM generate_series(1, 3) g$$),
  ($$SELECT userpilot_companies_payload(NULL, '{}')$$),
  ($$SELECT userpilot_companies_ndjson('c', '{"a":{}}')$$),
  ($$SELECT userpilot_users_payload('u', '{}', true)$$),
  ($$SELECT userpilot_users_ndjson('u', '{}', '')$$);

-- uses that would queue a row twice, or not at all
INSERT INTO refused (command) VALUES
  ($$SELECT userpilot_bulk_identify_companies(g, '{}') OVER () FROM generate_series(1, 3) g$$),
  ($$SELECT userpilot_bulk_identify_users(g, '{}') OVER (ORDER BY g) FROM generate_series(1, 3) g$$),
  ($$SELECT userpilot_bulk_identify_users(g, '{}', 'c') OVER (PARTITION BY g) FROM generate_series(1, 3) g$$),
  ($$SELECT userpilot_bulk_identify_companies(g, '{}') FROM generate_series(1, 3) g GROUP BY GROUPING SETS ((g), ())$$),
  ($$SELECT userpilot_bulk_identify_users(g, '{}') FROM generate_series(1, 3) g GROUP BY ROLLUP (g)$$),
  ($$SELECT userpilot_bulk_identify_users(g, '{}', 'c') FROM generate_series(1, 3) g GROUP BY CUBE (g, g % 2)$$),
  ($$SELECT userpilot_companies_payload(g, '{}') OVER () FROM generate_series(1, 3) g$$);

\pset format unaligned
\pset tuples_only on
SELECT n, command, E'\n    ' || answer(command) FROM refused ORDER BY n;

--
-- Servers
--
SET userpilot.server = 'nowhere';
SELECT answer($$SELECT userpilot_identify_company('c')$$);
SELECT answer($$SELECT userpilot_bulk_identify_companies('c', '{}')$$);
SET userpilot.server = 'No "Where"';
SELECT answer($$SELECT userpilot_identify_user('u')$$);
SET userpilot.server = '';
SELECT answer($$SELECT userpilot_identify_company('c')$$);
CREATE FOREIGN DATA WRAPPER regress_wrapper;
CREATE SERVER regress_server FOREIGN DATA WRAPPER regress_wrapper;
SET userpilot.server = 'regress_server';
SELECT answer($$SELECT userpilot_identify_company('c')$$);
SELECT answer($$SELECT userpilot_bulk_identify_users('u', '{}')$$);
RESET userpilot.server;
DROP FOREIGN DATA WRAPPER regress_wrapper CASCADE;
-- dropped and renamed under a session that has used it
SELECT count(userpilot_identify_company('c')) FROM (SELECT WHERE false) nothing;
BEGIN;
ALTER SERVER userpilot RENAME TO another;
SELECT answer($$SELECT userpilot_identify_company('c')$$);
ROLLBACK;
BEGIN;
DROP SERVER userpilot;
SELECT answer($$SELECT userpilot_identify_company('c')$$);
ROLLBACK;

CREATE ROLE regress_refused;
CREATE ROLE "regress Refused";
SET ROLE regress_refused;
SELECT answer($$SELECT userpilot_identify_company('c')$$);
SELECT answer($$SELECT userpilot_identify_user('u')$$);
SELECT answer($$SELECT userpilot_bulk_identify_companies('c', '{}')$$);
SELECT answer($$SELECT userpilot_bulk_identify_users('u', '{}')$$);
SET ROLE "regress Refused";
SELECT answer($$SELECT userpilot_identify_company('c')$$);
RESET ROLE;
-- payloads need no server at all
SET ROLE regress_refused;
SELECT userpilot_companies_payload('c', '{}');
RESET ROLE;

--
-- Transactions that must not write
--
BEGIN READ ONLY;
SELECT answer($$SELECT userpilot_identify_company('c')$$);
SELECT answer($$SELECT userpilot_identify_user('u')$$);
SELECT answer($$SELECT userpilot_bulk_identify_companies('c', '{}')$$);
SELECT answer($$SELECT userpilot_bulk_identify_users('u', '{}')$$);
SELECT userpilot_bulk_identify_users('u', '{}') FROM (SELECT WHERE false) nothing;
SELECT userpilot_users_payload('u', '{}');
COMMIT;

-- a function that lies about being safe in parallel
CREATE TABLE regress_many AS SELECT g AS id FROM generate_series(1, 2000) g;
CREATE FUNCTION regress_liar(id int) RETURNS int LANGUAGE plpgsql PARALLEL SAFE AS $$
BEGIN
  PERFORM userpilot_identify_company(id);
  RETURN id;
END$$;
CREATE FUNCTION regress_bulk_liar(id int) RETURNS int LANGUAGE plpgsql PARALLEL SAFE AS $$
BEGIN
  PERFORM userpilot_bulk_identify_companies(id, '{}');
  RETURN id;
END$$;
SET parallel_setup_cost = 0;
SET parallel_tuple_cost = 0;
SET min_parallel_table_scan_size = 0;
SET max_parallel_workers_per_gather = 1;
SELECT count(regress_liar(id)) FROM regress_many;
\echo :SQLSTATE
SELECT count(regress_bulk_liar(id)) FROM regress_many;
\echo :SQLSTATE
-- without lies there is nothing parallel
SELECT answer($$SELECT userpilot_bulk_identify_companies(id, '{}') FROM regress_many$$);
SELECT count(*) FROM userpilot_queue;
TRUNCATE userpilot_queue, userpilot_batches;

--
-- At the limits everything is taken
--
SELECT answer($$SELECT userpilot_identify_company(repeat('x', 512))$$);
SELECT answer($$SELECT userpilot_identify_user('u', '{}', repeat('x', 512))$$);
SELECT answer($$SELECT userpilot_identify_company('c', (SELECT jsonb_object_agg('p' || g, g) FROM generate_series(1, 500) g))$$);
SELECT answer($$SELECT userpilot_identify_company('c', jsonb_build_object(repeat('x', 255), 1))$$);
SELECT answer($$SELECT userpilot_identify_company('c', jsonb_build_object('story', repeat('x', 65535)))$$);
SELECT answer($$SELECT userpilot_bulk_identify_users(g, jsonb_build_object('story', repeat('x', 65535)), repeat('x', 512)) FROM generate_series(1, 3) g$$);
SELECT answer($$SELECT userpilot_identify_company('c', (SELECT jsonb_object_agg(lpad(g::text, 255, 'p'), repeat('v', 1000)) FROM generate_series(1, 500) g))$$);
SELECT count(*) FROM userpilot_queue;
TRUNCATE userpilot_queue, userpilot_batches;

--
-- Nothing of all that was refused is queued
--
SELECT count(*) FROM refused;
SELECT n, command FROM refused WHERE answer(command) = 'taken';
SELECT count(*) FROM userpilot_queue;
SELECT count(*) FROM userpilot_batches;
-- nor after an uncaught error
BEGIN;
SELECT count(userpilot_identify_company(g)) FROM generate_series(1, 10) g;
SELECT userpilot_identify_company('c', '[]');
COMMIT;
SELECT userpilot_bulk_identify_companies(nullif(g, 1500), '{}') FROM generate_series(1, 1500) g;
SELECT count(*) FROM userpilot_queue;
SELECT count(*) FROM userpilot_batches;

DROP TABLE refused, regress_many;
DROP FUNCTION answer(text), regress_liar(int), regress_bulk_liar(int);
DROP TYPE regress_pair, regress_mood, regress_flag, regress_name;
DROP ROLE regress_refused, "regress Refused";
DROP EXTENSION userpilot CASCADE;
