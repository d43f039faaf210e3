--
-- exclude_properties, nested and user_values, whichever way a row comes in:
-- what is excluded is nowhere, not in the queue, not in a body, not in a
-- dead letter
--
\set SHOW_CONTEXT never
\set VERBOSITY terse
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS userpilot;

--
-- Their values
--
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot OPTIONS (region 'us', exclude_properties 'email,,phone');
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot OPTIONS (region 'us', exclude_properties '');
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot OPTIONS (region 'us', nested 'yes');
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot OPTIONS (region 'us', user_values 'text');
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot OPTIONS (region 'us', on_invalid 'ignore');
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot OPTIONS (region 'us', refresh_after '10 s');
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot OPTIONS (region 'us', refresh_after 'soon');
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot OPTIONS (region 'us', refresh_after '100 years');
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot OPTIONS (region 'us', refresh_after '1 mon 2 days 03:00',
  exclude_properties ' email , address.street,Größe', nested 'error', user_values 'primitives', on_invalid 'dead_letter');

CREATE TABLE people (id int PRIMARY KEY, email text, score numeric, vip boolean, "Größe" int, account text, meta jsonb);
INSERT INTO people VALUES
  (1, 'a@b.c', 1.50, true, 7, 'c1', '{"plan": "pro", "email": "in@json"}'),
  (2, NULL, NULL, false, NULL, NULL, '{"address": {"city": "Berlin", "street": "secret", "geo": {"lat": 52.5, "tags": [1]}}, "n": 3}');
CREATE TRIGGER c AFTER INSERT OR UPDATE ON people FOR EACH ROW EXECUTE FUNCTION userpilot_company_trigger('id', '*');
CREATE TRIGGER u AFTER INSERT OR UPDATE ON people FOR EACH ROW EXECUTE FUNCTION userpilot_user_trigger('id', 'account AS company_id', '*');
-- every way in, and what it came to
CREATE FUNCTION way(name text, command text, OUT way text, OUT kind text, OUT entity text, OUT company text, OUT metadata jsonb)
RETURNS SETOF record LANGUAGE plpgsql AS $$
BEGIN
  EXECUTE command;
  RETURN QUERY WITH gone AS (DELETE FROM userpilot_queue RETURNING ctid AS place, userpilot_queue.*)
    SELECT name, g.kind, entity_id, company_id, g.metadata FROM gone g ORDER BY lsn, place;
  RETURN QUERY WITH gone AS (DELETE FROM userpilot_dead_letters RETURNING ctid AS place, userpilot_dead_letters.*)
    SELECT name || ' (dead)', g.kind, entity_id, company_id, g.metadata FROM gone g ORDER BY lsn, place;
EXCEPTION WHEN data_exception THEN
  way := name; kind := SQLERRM;
  RETURN NEXT;
END$$;
CREATE FUNCTION ways() RETURNS TABLE (way text, kind text, entity text, company text, metadata jsonb) LANGUAGE sql AS $$
  SELECT * FROM way('call', 'SELECT userpilot_identify_company(id, jsonb_build_object(''email'', email, ''score'', score, ''vip'', vip) || meta) FROM people WHERE id = 1')
  UNION ALL SELECT * FROM way('call', 'SELECT userpilot_identify_user(id, jsonb_build_object(''email'', email, ''score'', score, ''vip'', vip) || meta, account) FROM people WHERE id = 1')
  UNION ALL SELECT * FROM way('nested', 'SELECT userpilot_identify_user(id, meta) FROM people WHERE id = 2')
  UNION ALL SELECT * FROM way('bulk', 'SELECT userpilot_bulk_identify_companies(id, to_jsonb(p) - ''meta'') FROM people p')
  UNION ALL SELECT * FROM way('bulk', 'SELECT userpilot_bulk_identify_users(id, to_jsonb(p) - ''meta'', account) FROM people p')
  UNION ALL SELECT * FROM way('trigger', 'UPDATE people SET account = account || ''x''')
  UNION ALL SELECT * FROM way('trigger', 'UPDATE people SET email = ''new'' WHERE id = 2')
  UNION ALL SELECT * FROM way('sync', 'SELECT userpilot_sync_table(''people'')')
$$;
\pset format unaligned
SELECT * FROM ways();
SELECT userpilot_companies_payload(id, jsonb_build_object('email', email, 'score', score)) FROM people;
SELECT userpilot_users_ndjson(id, jsonb_build_object('email', email, 'score', score), account) FROM people;
SELECT (userpilot_preview_users(id, meta)).rows, (userpilot_preview_users(id, meta)).invalid FROM people;

-- flattened, and strings for users
ALTER SERVER userpilot OPTIONS (SET nested 'flatten', SET user_values 'strings');
SELECT * FROM ways();
SELECT userpilot_companies_payload(id, jsonb_build_object('email', email, 'address', jsonb_build_object('street', 's', 'city', 'c'))) FROM people;
SELECT userpilot_users_payload(id, jsonb_build_object('email', email, 'score', score, 'vip', vip), account) FROM people;
-- an excluded object is excluded whole; deep names, arrays and limits still count
ALTER SERVER userpilot OPTIONS (SET exclude_properties 'address,email');
SELECT * FROM way('excluded whole', $$SELECT userpilot_identify_company(1, '{"address": {"street": "s"}, "addressee": 1, "a": {"address": 2}}')$$);
SELECT * FROM way('trigger', $$UPDATE people SET meta = meta || '{"addressee": 1}' WHERE id = 2$$);
SELECT * FROM way('sync', $$SELECT userpilot_sync_table('people')$$);
SELECT * FROM way('array', $$SELECT userpilot_identify_company(1, '{"a": {"b": [1]}}')$$);
SELECT * FROM way('same name', $$SELECT userpilot_identify_company(1, '{"a": {"b": 1}, "a.b": 2}')$$);
SELECT * FROM way('empty', $$SELECT userpilot_identify_company(1, '{"a": {}, "b": {"c": {}}}')$$);
SELECT * FROM way('too many', $$SELECT userpilot_identify_company(1, jsonb_build_object('a', (SELECT jsonb_object_agg(i, i) FROM generate_series(1, 501) i)))$$);
-- names that grow with each level are refused before they fill the memory
SELECT * FROM way('deep', $$SELECT userpilot_identify_company(1, (repeat('{"a":', 600) || '1' || repeat('}', 600))::jsonb)$$);
SELECT * FROM way('long and deep', $$SELECT userpilot_identify_company(1, ('{"' || repeat('k', 100000) || '":' || repeat('{"a":', 1000) || '1' || repeat('}', 1000) || '}')::jsonb)$$);
SELECT * FROM way('many and deep', $$SELECT userpilot_identify_company(1, jsonb_build_object(repeat('k', 200), (SELECT jsonb_object_agg(i, i) FROM generate_series(1, 20000) i)))$$);
SELECT * FROM way('numbers', $$SELECT userpilot_identify_user(1, '{"i": 10, "d": 1.500, "e": 1e3, "s": "1", "z": null, "b": false}')$$);
SELECT * FROM way('not excluded', $$SELECT userpilot_identify_user(1, '{"Email": 1, "emails": 2, "mail": 3}', 'email')$$);
-- by other servers too
CREATE SERVER other FOREIGN DATA WRAPPER userpilot OPTIONS (region 'eu');
SET userpilot.server = 'other';
SELECT * FROM way('another server', $$SELECT userpilot_identify_user(1, '{"email": 1}')$$);
SELECT userpilot_users_payload(1, '{"email": 1}');
RESET userpilot.server;
-- nor does what else a statement calls change a bulk SELECT's server
CREATE SERVER "another by a name that needs more room" FOREIGN DATA WRAPPER userpilot
  OPTIONS (region 'eu', exclude_properties 'one,two,three,four');
CREATE FUNCTION elsewhere(i int) RETURNS int LANGUAGE plpgsql
  SET userpilot.server = 'another by a name that needs more room' AS $$
BEGIN
  PERFORM userpilot_identify_company('elsewhere ' || i, '{"the name of a property, as long": 1}');
  RETURN i;
END$$;
SELECT userpilot_bulk_identify_companies('here ' || i, '{"a": 1, "address": 2, "email": 3}'), count(elsewhere(i)) FROM generate_series(1, 3) i;
SELECT server, entity_id, metadata FROM userpilot_queue WHERE entity_id ~ 'here ' ORDER BY server, entity_id;
DELETE FROM userpilot_queue WHERE entity_id ~ 'here ';
-- keys of a JSON column that are gone are nothing that is excluded
SELECT * FROM way('key gone', $$UPDATE people SET meta = '{}' WHERE id = 1$$);
-- nor are those that could never be sent
SELECT way, kind, entity, company FROM way('trigger, deep', $$UPDATE people SET meta = (repeat('{"a":', 600) || '1' || repeat('}', 600))::jsonb WHERE id = 1$$);
SELECT * FROM way('deep gone', $$UPDATE people SET meta = '{}' WHERE id = 1$$);
-- in dead letters
UPDATE people SET email = 'secret';
DELETE FROM userpilot_queue;
SELECT * FROM way('dead', $$INSERT INTO people (id, email, account) VALUES (3, 'secret', '')$$);
-- nowhere
UPDATE people SET score = 2;
INSERT INTO people (id, email, account) VALUES (4, 'secret', '');
SELECT what, count(*) > 0 AS there, count(*) FILTER (WHERE row ~ 'secret') AS secrets
  FROM (SELECT 'queue' AS what, q::text AS row FROM userpilot_queue q UNION ALL SELECT 'dead', d::text FROM userpilot_dead_letters d) s
  GROUP BY 1 ORDER BY 1;
DELETE FROM userpilot_queue;
DELETE FROM userpilot_dead_letters;
\pset format aligned

--
-- What Userpilot has is compared with what would be sent
--
INSERT INTO userpilot_profiles (server, kind, entity_id, metadata, synced_at, believed_since)
  VALUES ('userpilot', 'user', 'u1', '{"score": "1.5", "a.b": "x"}', now(), now());
SELECT userpilot_bulk_identify_users('u1', '{"email": "new", "score": 1.50, "a": {"b": "x"}}') AS same,
  userpilot_bulk_identify_users('u1', '{"email": "new", "score": 1.51, "a": {"b": "x"}}') AS other;
SELECT (userpilot_preview_users('u1', '{"email": "new", "score": 1.50, "a": {"b": "x"}}')).unchanged;

DROP FUNCTION ways, way;
DROP TABLE people;
DROP EXTENSION userpilot CASCADE;
