--
-- Payload aggregates: byte by byte what would be sent, and nothing is sent
--
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS userpilot;
-- nothing is queued, so no server is needed
SET userpilot.server = 'nowhere';
\pset format unaligned
\pset tuples_only on

--
-- Shapes
--
SELECT userpilot_companies_payload('company_001', '{"name":"Acme","monthly_spend":1000}');
SELECT userpilot_companies_payload(g, jsonb_build_object('n', g) ORDER BY g) FROM generate_series(1, 3) g;
SELECT userpilot_users_payload('u1', '{"name":"Jane"}');
SELECT userpilot_users_payload('u1', '{"name":"Jane"}', 'c1');
SELECT userpilot_users_payload('u' || g, '{}', CASE g WHEN 2 THEN 'c' || g END ORDER BY g) FROM generate_series(1, 3) g;
SELECT userpilot_companies_ndjson(g, jsonb_build_object('n', g) ORDER BY g) FROM generate_series(1, 3) g;
SELECT userpilot_users_ndjson(g, jsonb_build_object('n', g) ORDER BY g) FROM generate_series(1, 3) g;
SELECT userpilot_users_ndjson(g, NULL, g % 2 ORDER BY g) FROM generate_series(1, 3) g;
SELECT pg_typeof(userpilot_companies_payload('a', '{}')), pg_typeof(userpilot_users_payload('a', '{}')),
       pg_typeof(userpilot_users_payload('a', '{}', 'b')), pg_typeof(userpilot_companies_ndjson('a', '{}')),
       pg_typeof(userpilot_users_ndjson('a', '{}')), pg_typeof(userpilot_users_ndjson('a', '{}', 'b'));

-- ids of every type are strings
SELECT userpilot_users_payload(7::smallint, '{}', 1.50), userpilot_users_payload(-9, '{}', 9223372036854775807),
       userpilot_companies_payload('3F333DF6-90A4-4FDA-8DD3-9485D27CEE36'::uuid, NULL);

-- no rows
SELECT userpilot_companies_payload(1, '{}') FROM (SELECT WHERE false) x;
SELECT userpilot_users_payload(1, '{}') FROM (SELECT WHERE false) x;
SELECT userpilot_users_payload(1, '{}', 1) FROM (SELECT WHERE false) x;
SELECT userpilot_companies_ndjson(1, '{}') = '', userpilot_users_ndjson(1, '{}') = '',
       userpilot_users_ndjson(1, '{}', 1) = '' FROM (SELECT WHERE false) x;
SELECT g, userpilot_companies_payload(g, '{}') FILTER (WHERE g = 1) FROM generate_series(1, 2) g GROUP BY g ORDER BY g;

--
-- Values
--
SELECT userpilot_companies_payload('c', '{"t":true,"f":false,"n":null,"s":"","z":0}');
SELECT userpilot_companies_payload('c', '{"a":1,"b":1.0,"c":1.50,"d":-0,"e":-0.0,"f":1e30,"g":1E-7,"h":0.1,"i":-12345678901234567890.12345678901234567890,"j":1e0}');
SELECT length(userpilot_companies_payload('c', '{"big":1e1000,"small":1e-1000}')::text);
-- the order of properties is jsonb's: by length, then by bytes; the last of two wins
SELECT userpilot_companies_payload('c', '{"zz":1,"a":2,"mmm":3,"b":4,"a":5}');

-- what JSON must escape, and only that: quotes, backslashes, control characters
SELECT userpilot_companies_payload(E'quote " backslash \\ slash / tab \t newline \n return \r',
  jsonb_build_object(E'name "quoted" \\ / \t', E'value "quoted" \\ / \b\f\n\r\t \x7f'));
SELECT userpilot_companies_payload('c', jsonb_build_object('all', all_))
  FROM (SELECT string_agg(chr(c), '' ORDER BY c) FROM generate_series(1, 31) c) AS x(all_);
SELECT userpilot_companies_payload('c', jsonb_build_object('all', all_))
  FROM (SELECT string_agg(chr(c), '' ORDER BY c) FROM generate_series(32, 127) c) AS x(all_);
SELECT userpilot_companies_payload('c', '{"a":"\u0001\u001f\u007f\u0022\u005c\u002f\\u0041"}');
-- a line of NDJSON stays one line
SELECT userpilot_companies_ndjson(E'a\nb\r', E'{"x\\ny":"1\\n2\\r\\n3"}');
SELECT userpilot_users_payload('"', '{}', E'\\"');

-- it is JSON, and says what was put in
SELECT bool_and(payload::jsonb = jsonb_build_object('companies', jsonb_build_array(
         jsonb_build_object('company_id', 'c' || chr(c), 'metadata', jsonb_build_object('n' || chr(c), chr(c) || 'v')))))
  FROM (SELECT c, userpilot_companies_payload('c' || chr(c), jsonb_build_object('n' || chr(c), chr(c) || 'v')) AS payload
        FROM generate_series(1, 127) c GROUP BY c) x;

--
-- Many rows
--
CREATE TABLE rows AS
  SELECT g AS id, CASE WHEN g % 3 > 0 THEN md5(g::text) END AS company,
    jsonb_build_object('name', md5(g::text) || chr(1 + g % 127), 'n', g, 'ratio', round(g / 7.0, 3),
                       'flag', g % 2 = 0, 'none', NULL,
                       'quote' || chr(34) || g % 10, repeat(E'\\"\n', g % 20)) AS meta
  FROM generate_series(1, 10000) g;
CREATE VIEW source AS
  SELECT id, jsonb_build_object('company_id', id::text, 'metadata', meta) AS company,
         CASE WHEN company IS NULL THEN '{}' ELSE jsonb_build_object('company_id', company) END
           || jsonb_build_object('user_id', id::text, 'metadata', meta) AS user_
  FROM rows;
SELECT count(*), count(*) FILTER (WHERE r.value::jsonb = s.company)
  FROM json_array_elements((SELECT userpilot_companies_payload(id, meta ORDER BY id) -> 'companies' FROM rows)) WITH ORDINALITY AS r(value, n)
  JOIN source s ON s.id = r.n;
SELECT count(*), count(*) FILTER (WHERE r.value::jsonb = s.user_)
  FROM json_array_elements((SELECT userpilot_users_payload(id, meta, company ORDER BY id) -> 'users' FROM rows)) WITH ORDINALITY AS r(value, n)
  JOIN source s ON s.id = r.n;
SELECT count(*), count(*) FILTER (WHERE r.line::jsonb = s.user_)
  FROM (SELECT userpilot_users_ndjson(id, meta, company ORDER BY id) FROM rows) AS f(file),
       string_to_table(rtrim(file, E'\n'), E'\n') WITH ORDINALITY AS r(line, n)
  JOIN source s ON s.id = r.n;
SELECT count(*), count(*) FILTER (WHERE r.line::jsonb = s.company)
  FROM (SELECT userpilot_companies_ndjson(id, meta ORDER BY id) FROM rows) AS f(file),
       string_to_table(rtrim(file, E'\n'), E'\n') WITH ORDINALITY AS r(line, n)
  JOIN source s ON s.id = r.n;
SELECT right(userpilot_companies_ndjson(id, meta), 1) = E'\n' FROM rows;

-- one request holds 10,000 records: groups of that size, here with 25,000 rows
SELECT part, json_array_length(payload -> 'companies'), payload #>> '{companies,0,company_id}', payload #>> '{companies,-1,company_id}'
  FROM (SELECT (g - 1) / 10000 AS part, userpilot_companies_payload(g, '{}' ORDER BY g) AS payload
        FROM generate_series(1, 25000) g GROUP BY 1) x ORDER BY part;
SELECT count(*), sum(json_array_length(payload -> 'users'))
  FROM (SELECT userpilot_users_payload(id, meta) AS payload FROM rows GROUP BY id % 1000) x;

-- a final function may be called again: nothing is used up, and two share one state
SELECT userpilot_companies_payload(g, '{}' ORDER BY g)::text = userpilot_companies_payload(g, '{}' ORDER BY g)::text
  FROM generate_series(1, 3) g;
SELECT userpilot_companies_payload(g, '{}') FROM generate_series(1, 2) g GROUP BY ROLLUP (g) ORDER BY g;

SELECT count(*) FROM userpilot_queue;

DROP VIEW source;
DROP TABLE rows;
DROP EXTENSION userpilot CASCADE;
