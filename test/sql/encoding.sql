--
-- Characters, in databases of three encodings.  Whatever is not ASCII is
-- written and shown escaped here.
--
\set SHOW_CONTEXT never
SET client_min_messages = warning;
SELECT current_database() AS regression \gset
CREATE DATABASE regress_utf8 TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE 'C' LC_CTYPE 'C';
CREATE DATABASE regress_latin1 TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C';
CREATE DATABASE regress_sql_ascii TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C';

--
-- UTF8
--
\c regress_utf8
SET client_min_messages = warning;
\pset format unaligned
\pset tuples_only on
CREATE EXTENSION userpilot;
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot OPTIONS (region 'us');
CREATE FUNCTION utf8(text) RETURNS text LANGUAGE sql AS $$SELECT encode(convert_to($1, 'UTF8'), 'escape')$$;

SELECT userpilot_identify_company(chr(233), jsonb_build_object(chr(8364), chr(128512)));
SELECT userpilot_identify_user(chr(128512), '{"\u00e9":"\ud83d\ude00"}', chr(233));
SELECT userpilot_bulk_identify_users(chr(8364), '{"\u00e9":"\u20ac"}', chr(233));
SELECT utf8(entity_id), utf8(company_id), utf8(metadata::text) FROM userpilot_queue ORDER BY lsn, ctid;
SELECT utf8(userpilot_users_payload(chr(233), jsonb_build_object(chr(8364), chr(128512)), chr(8364))::text);
SELECT utf8(userpilot_companies_ndjson(chr(233), jsonb_build_object('c1 controls', chr(128) || chr(159), 'separators', chr(8232) || chr(8233), 'last', chr(65535) || chr(1114111))));
-- every plane, parsed back
SELECT count(*) FROM (SELECT c, userpilot_companies_payload(chr(c), jsonb_build_object('k', chr(c))) AS payload
  FROM generate_series(1, 1114111, 97) c WHERE c NOT BETWEEN 55296 AND 57343 GROUP BY c) x
  WHERE payload::jsonb -> 'companies' -> 0 <> jsonb_build_object('company_id', chr(c), 'metadata', jsonb_build_object('k', chr(c)));

-- limits are of characters
TRUNCATE userpilot_queue, userpilot_batches;
SELECT userpilot_identify_company(repeat(chr(128512), 512), jsonb_build_object(repeat(chr(128512), 255), 1));
SELECT userpilot_identify_company('c', jsonb_build_object('a', repeat(chr(128512), 65535)));
SELECT userpilot_identify_user('u', '{}', repeat(chr(233), 512));
SELECT count(*) FROM userpilot_queue;
\set VERBOSITY sqlstate
SELECT userpilot_identify_company(repeat(chr(233), 513));
SELECT userpilot_identify_company('c', jsonb_build_object(repeat(chr(233), 256), 1));
SELECT userpilot_identify_company('c', jsonb_build_object('a', repeat(chr(128512), 65536)));
SELECT userpilot_identify_company('c', jsonb_build_object(repeat('x', 79) || repeat(chr(128512), 80), '[]'::jsonb));
\set VERBOSITY default
-- messages are cut between characters
DO $$
BEGIN
  PERFORM userpilot_identify_company('x' || repeat(chr(233), 600));
EXCEPTION WHEN OTHERS THEN
  DECLARE
    detail text;
  BEGIN
    GET STACKED DIAGNOSTICS detail = PG_EXCEPTION_DETAIL;
    RAISE WARNING '% %', SQLERRM, utf8(detail);
  END;
END$$;
DO $$
BEGIN
  PERFORM userpilot_identify_company('c', jsonb_build_object('x' || repeat(chr(8364), 80), '[]'::jsonb));
EXCEPTION WHEN OTHERS THEN
  RAISE WARNING '%', utf8(SQLERRM);
END$$;
-- a statement, too
SELECT 'xx' || repeat(chr(8364), 1000) AS long \gset
SELECT length(:'long'), userpilot_bulk_identify_companies(1, '{}');
SELECT octet_length(statement) FROM userpilot_batches;

--
-- LATIN1
--
\c regress_latin1
SET client_min_messages = warning;
CREATE EXTENSION userpilot;
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot OPTIONS (region 'us');
CREATE FUNCTION utf8(text) RETURNS text LANGUAGE sql AS $$SELECT encode(convert_to($1, 'UTF8'), 'escape')$$;
SELECT userpilot_identify_company(chr(233), jsonb_build_object(chr(252), chr(223)));
SELECT userpilot_identify_user(chr(233), '{"\u00e9":"\u00fc"}', chr(255));
SELECT userpilot_bulk_identify_users(chr(160) || g, jsonb_build_object('k', chr(g)), chr(233)) FROM generate_series(160, 162) g;
SELECT utf8(entity_id), utf8(company_id), utf8(metadata::text) FROM userpilot_queue ORDER BY lsn, ctid;
SELECT utf8(userpilot_users_payload(chr(233), jsonb_build_object(chr(252), chr(223)), chr(255))::text);
SELECT count(*) FROM (SELECT c, userpilot_companies_payload(chr(c), jsonb_build_object('k', chr(c))) AS payload
  FROM generate_series(1, 255) c GROUP BY c) x
  WHERE payload::jsonb -> 'companies' -> 0 <> jsonb_build_object('company_id', chr(c), 'metadata', jsonb_build_object('k', chr(c)));
SELECT userpilot_identify_company(repeat(chr(233), 512), jsonb_build_object('a', repeat(chr(233), 65535)));
\set VERBOSITY sqlstate
SELECT userpilot_identify_company(repeat(chr(233), 513));
-- what this encoding lacks is core's to refuse
SELECT userpilot_identify_company('c', '{"a":"\u20ac"}');
\set VERBOSITY default

--
-- SQL_ASCII: its bytes are sent as they are, so they must be UTF-8
--
\c regress_sql_ascii
SET client_min_messages = warning;
CREATE EXTENSION userpilot;
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot OPTIONS (region 'us');
CREATE FUNCTION bytes(text) RETURNS text LANGUAGE sql AS $$SELECT encode(convert_to($1, 'SQL_ASCII'), 'escape')$$;
SELECT userpilot_identify_company(E'\xc3\xa9', jsonb_build_object(E'\xe2\x82\xac', E'\xf0\x9f\x98\x80'));
SELECT userpilot_identify_user(E'\xf0\x9f\x98\x80', '{}', E'\xc3\xa9');
SELECT userpilot_bulk_identify_users(E'\xe2\x82\xac', jsonb_build_object(E'\xc3\xa9', E'\xc3\xa9'), E'\xc3\xa9');
SELECT bytes(entity_id), bytes(company_id), bytes(metadata::text) FROM userpilot_queue ORDER BY lsn, ctid;
SELECT bytes(userpilot_users_payload(E'\xc3\xa9', jsonb_build_object(E'\xe2\x82\xac', E'\xf0\x9f\x98\x80'), E'\xc3\xa9')::text);
TRUNCATE userpilot_queue, userpilot_batches;
-- ids
SELECT userpilot_identify_company(E'\xe9');
\echo :SQLSTATE
SELECT userpilot_identify_user(E'caf\xe9');
SELECT userpilot_identify_user('u', '{}', E'\xe9');
SELECT userpilot_bulk_identify_companies(E'\xe9', '{}');
SELECT userpilot_bulk_identify_users('u', '{}', E'\xe9');
SELECT userpilot_companies_payload(E'\xe9', '{}');
-- names and values
SELECT userpilot_identify_company('c', jsonb_build_object(E'\xe9', 1));
SELECT userpilot_identify_company('c', jsonb_build_object('city', E'K\xf6ln'));
SELECT userpilot_bulk_identify_users('u', jsonb_build_object('city', E'K\xf6ln'));
SELECT userpilot_users_ndjson('u', jsonb_build_object('city', E'K\xf6ln'));
-- overlong, surrogate, past the last, cut off, stray
SELECT userpilot_identify_company(E'\xc0\x80');
SELECT userpilot_identify_company(E'\xed\xa0\x80');
SELECT userpilot_identify_company(E'\xf4\x90\x80\x80');
SELECT userpilot_identify_company(E'\xe2\x82');
SELECT userpilot_identify_company(E'a\x80');
SELECT userpilot_identify_company(E'\xff');
SELECT count(*) FROM userpilot_queue;
SELECT count(*) FROM userpilot_batches;

-- a database can be dropped while a worker is about
\c :regression
DROP DATABASE regress_utf8;
DROP DATABASE regress_latin1;
DROP DATABASE regress_sql_ascii;
