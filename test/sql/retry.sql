--
-- What an operator does: dead letters and their retry, the trace of one
-- entity, the status, and waiting
--
\set SHOW_CONTEXT never
SET client_min_messages = warning;
SET timezone = 'UTC';
SET datestyle = 'ISO';
CREATE EXTENSION IF NOT EXISTS userpilot;
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot OPTIONS (region 'us');
CREATE SERVER other FOREIGN DATA WRAPPER userpilot OPTIONS (region 'eu');
CREATE VIEW queued AS
  SELECT lsn, xid, enqueued_at, batch, bulk, server, kind, entity_id, company_id, metadata
  FROM userpilot_queue ORDER BY lsn, ctid;

--
-- userpilot_retry()
--
CREATE FUNCTION bury() RETURNS bigint LANGUAGE sql AS $$
  TRUNCATE userpilot_queue, userpilot_dead_letters RESTART IDENTITY;
  INSERT INTO userpilot_dead_letters
    (lsn, xid, enqueued_at, batch, bulk, server, kind, entity_id, company_id, metadata,
     http_status, error, response, attempts, failed_at)
  VALUES
    ('0/100', '700', '2024-02-29 10:00+00', NULL, false, 'userpilot', 'company', 'c1', NULL, '{"name":"Acme","gone":null}',
     400, 'name is wrong', '{"errors":[]}', 1, '2024-02-29 10:01+00'),
    ('0/200', '701', '2024-02-29 11:00+00', 701000001, true, 'userpilot', 'user', 'u1', 'c1', '{}',
     NULL, 'no answer', NULL, 10, '2024-02-29 11:01+00'),
    ('0/300', '702', '2024-02-29 12:00+00', NULL, true, 'userpilot', 'company', 'c2', NULL, '{"n":1.50}',
     413, 'too large', '', 1, '2024-02-29 12:01+00'),
    ('0/400', '703', '2024-02-29 13:00+00', NULL, false, 'other', 'company', 'c1', NULL, '{"n":1}',
     422, 'no', NULL, 1, '2024-02-29 13:01+00'),
    ('0/500', '704', '2024-02-29 14:00+00', NULL, false, 'userpilot', 'company', 'c1', NULL, '{"name":"Later"}',
     400, 'name is wrong', NULL, 1, '2024-02-29 14:01+00');
  SELECT count(*) FROM userpilot_dead_letters;
$$;

-- one by its id: the row comes back as it was
SELECT bury();
SELECT userpilot_retry(1);
SELECT * FROM queued;
SELECT userpilot_retry(1);
SELECT userpilot_retry(2);
SELECT userpilot_retry(99);
SELECT * FROM queued;
SELECT id FROM userpilot_dead_letters ORDER BY id;
-- by kind, entity, server, and several of them
SELECT bury();
SELECT userpilot_retry(kind => 'user');
SELECT userpilot_retry(entity_id => 'c2', kind => 'company');
SELECT userpilot_retry(server => 'other');
SELECT userpilot_retry(entity_id => 'c2');
SELECT server, kind, entity_id FROM queued;
SELECT id FROM userpilot_dead_letters ORDER BY id;
SELECT bury();
SELECT userpilot_retry(entity_id => 'c1', server => 'userpilot');
SELECT server, kind, entity_id, metadata FROM queued;
SELECT bury();
SELECT userpilot_retry(1, 'other');
SELECT userpilot_retry(4, 'other', 'company', 'c1');
SELECT userpilot_retry(kind => 'companies');
SELECT server, dead_letters FROM userpilot_status ORDER BY server;
-- all that are left, in their order
SELECT userpilot_retry();
SELECT server, kind, entity_id, metadata FROM userpilot_queue ORDER BY ctid;
SELECT count(*) FROM userpilot_dead_letters;
SELECT userpilot_retry();
-- what can never be sent stays, until it is mended
SELECT bury();
UPDATE userpilot_dead_letters SET metadata = CASE id
    WHEN 1 THEN '{"": "c9"}'::jsonb
    WHEN 2 THEN '{"address": {"city": "Berlin"}}'
    WHEN 3 THEN (SELECT jsonb_object_agg('p' || i, i) FROM generate_series(1, 501) i)
    ELSE jsonb_build_object('name', repeat('x', 65536)) END,
  entity_id = CASE id WHEN 4 THEN '' ELSE entity_id END;
SELECT id, userpilot_refusal(entity_id, company_id, metadata) FROM userpilot_dead_letters ORDER BY id;
SELECT userpilot_retry();
UPDATE userpilot_dead_letters SET metadata = '{}' WHERE id = 2;
SELECT userpilot_retry();
SELECT server, kind, entity_id FROM queued;
SELECT userpilot_refusal(NULL, '', NULL), userpilot_refusal('c1', '', NULL), userpilot_refusal('c1', NULL, '[]'),
       userpilot_refusal('c1', 'c2', '{"n": null}') IS NULL AS sendable;
-- attempts start anew, of those that come back only
SELECT bury();
INSERT INTO userpilot_profiles (server, kind, entity_id, attempts, metadata)
  VALUES ('userpilot', 'company', 'c1', 10, '{"a":1}'), ('userpilot', 'company', 'c2', 3, '{}'), ('other', 'company', 'c1', 7, '{}');
SELECT userpilot_retry(entity_id => 'c1', server => 'userpilot');
SELECT server, kind, entity_id, attempts, metadata FROM userpilot_profiles ORDER BY server, entity_id;
-- it is part of the transaction
BEGIN;
SELECT userpilot_retry();
ROLLBACK;
SELECT count(*) FROM userpilot_dead_letters;
BEGIN READ ONLY;
SELECT userpilot_retry();
ROLLBACK;

--
-- userpilot_trace()
--
SELECT * FROM userpilot_trace('companies', 'c1');
-- rolled back, lest so old requests are pruned while they are looked at
BEGIN;
TRUNCATE userpilot_profiles, userpilot_queue;
SELECT bury();
INSERT INTO userpilot_profiles (server, kind, entity_id, company_id, metadata, versions, attempts, synced_at, job) VALUES
  ('userpilot', 'company', 'c1', NULL, '{"name":"Acme"}', '[[1, 2, 0]]', 0, '2024-02-28 00:00+00', NULL),
  ('other', 'company', 'c1', NULL, '{}', '[]', 2, NULL, 5),
  ('userpilot', 'user', 'c1', 'c9', '{}', '[]', 0, '2024-02-27 00:00+00', NULL);
INSERT INTO userpilot_queue (lsn, xid, enqueued_at, batch, bulk, server, kind, entity_id, company_id, metadata) VALUES
  ('0/600', '705', '2024-02-29 15:00+00', NULL, false, 'userpilot', 'company', 'c1', NULL, '{"name":"Newer","x":null}'),
  ('0/700', '706', '2024-02-29 16:00+00', 706000001, true, 'userpilot', 'company', 'c1', NULL, '{}'),
  ('0/800', '707', '2024-02-29 17:00+00', NULL, false, 'userpilot', 'user', 'c1', 'c2', '{}');
INSERT INTO userpilot_requests (at, server, method, path, kind, entity_id, http_status, outcome, request_id, ms, bytes, error) VALUES
  ('2024-02-29 14:00:30+00', 'userpilot', 'POST', '/v1/companies/identify', 'company', 'c1', 400, 'dead', 'req-1', 12.5, 60, 'name is wrong'),
  ('2024-02-28 00:00:00.5+00', 'userpilot', 'POST', '/v1/companies/identify', 'company', 'c1', 200, 'learn', NULL, 8, 60, NULL);
\pset format unaligned
SELECT at, what, server, detail FROM userpilot_trace('company', 'c1');
SELECT at, what, server, detail FROM userpilot_trace('user', 'c1');
SELECT * FROM userpilot_trace('company', 'nobody');
SELECT * FROM userpilot_trace(NULL, 'c1');
SELECT what FROM userpilot_trace(id => 'u1', kind => 'user');
ROLLBACK;
\pset format aligned

--
-- userpilot_status
--
TRUNCATE userpilot_profiles, userpilot_queue, userpilot_dead_letters, userpilot_requests;
CREATE VIEW status AS
  SELECT server, state, pending, companies_realtime AS c_rt, companies_bulk AS c_bulk,
         users_realtime AS u_rt, users_bulk AS u_bulk, job, job_percent, percent, records_per_minute AS rpm, eta
  FROM userpilot_status ORDER BY server;
SELECT * FROM status;
SELECT server, advice, oldest_pending, last_error, last_error_at FROM userpilot_status ORDER BY server;
SELECT count(userpilot_identify_company(g)) FROM generate_series(1, 103) g;
SELECT userpilot_identify_user(1);
SELECT userpilot_bulk_identify_users(g, '{}') FROM generate_series(1, 20) g;
SELECT userpilot_bulk_identify_companies(g, '{}') FROM generate_series(1, 4) g;
SET userpilot.server = other;
SELECT userpilot_identify_user(2);
RESET userpilot.server;
SELECT * FROM status;
SELECT s.server, s.oldest_pending = min(q.enqueued_at) AS oldest
  FROM userpilot_status s JOIN userpilot_queue q USING (server) GROUP BY s.server, s.oldest_pending ORDER BY 1;
-- a server that is gone has no row, though its changes are still there
BEGIN;
DROP SERVER other;
SELECT * FROM status;
ROLLBACK;
-- what the worker said last is shown, but not instead of "disabled"
INSERT INTO userpilot_progress (server, state, companies_bulk, delivered, records_per_minute, advice, last_error, last_error_at, updated_at)
  VALUES ('userpilot', 'outage', 25000, 128, 1800, 'nothing', 'it was down', '2024-02-29 10:00+00', now());
INSERT INTO userpilot_jobs (server, kind, format, records, bytes, status, completed_rows)
  VALUES ('userpilot', 'company', 'json', 64, 1000, 'processing', 32);
SELECT * FROM status;
SELECT server, advice, last_error, last_error_at FROM userpilot_status ORDER BY server;
UPDATE userpilot_jobs SET completed_rows = 1000;
SELECT server, job, job_percent FROM userpilot_status WHERE job IS NOT NULL;
UPDATE userpilot_jobs SET finished_at = now();
SELECT server, job FROM userpilot_status WHERE job IS NOT NULL;
-- past 20,000 rows the worker's count is shown where it is the larger
TRUNCATE userpilot_queue;
INSERT INTO userpilot_queue (lsn, xid, enqueued_at, bulk, server, kind, entity_id, metadata)
  SELECT '0/1', '1', now(), true, 'userpilot', 'company', g, '{}' FROM generate_series(1, 19999) g;
SELECT server, pending, c_bulk FROM status WHERE server = 'userpilot';
INSERT INTO userpilot_queue (lsn, xid, enqueued_at, bulk, server, kind, entity_id, metadata)
  SELECT '0/1', '1', now(), true, 'userpilot', 'company', g, '{}' FROM generate_series(1, 2) g;
SELECT server, pending, c_bulk FROM status WHERE server = 'userpilot';
UPDATE userpilot_progress SET companies_bulk = 0;
SELECT server, pending, c_bulk FROM status WHERE server = 'userpilot';
TRUNCATE userpilot_queue, userpilot_progress, userpilot_jobs, userpilot_job_chunks;
-- a copy of another database says so
INSERT INTO userpilot_enabled (server, server_oid, system_identifier, database, by) VALUES ('userpilot', 1, 1, 1, 'nobody');
SELECT server, state, advice FROM userpilot_status ORDER BY server;
TRUNCATE userpilot_enabled;
-- the wrapper may have another name
BEGIN;
ALTER FOREIGN DATA WRAPPER userpilot RENAME TO other;
SELECT server, state FROM userpilot_status ORDER BY server;
ROLLBACK;
ALTER SERVER userpilot OPTIONS (only_on 'production');
BEGIN;
SELECT userpilot_enable('userpilot');
SELECT server, state, advice FROM userpilot_status WHERE server = 'userpilot';
ROLLBACK;
SELECT userpilot_disabled_reason(0);

--
-- userpilot_wait()
--
CALL userpilot_wait('0');
CALL userpilot_wait('1 hour');
CALL userpilot_wait(NULL);
\echo :SQLSTATE
CALL userpilot_wait('-1 second');
\echo :SQLSTATE
CALL userpilot_wait(interval '1 day -25 hours');
-- own changes cannot be delivered before they are committed
BEGIN;
SELECT userpilot_identify_company('c1');
CALL userpilot_wait('1 minute');
\echo :SQLSTATE
ROLLBACK;
BEGIN;
SELECT userpilot_bulk_identify_companies('c1', '{}');
CALL userpilot_wait('1 minute');
ROLLBACK;
-- a snapshot that does not move would see the same for ever
BEGIN ISOLATION LEVEL REPEATABLE READ;
CALL userpilot_wait('1 minute');
\echo :SQLSTATE
ROLLBACK;
BEGIN ISOLATION LEVEL SERIALIZABLE;
CALL userpilot_wait('1 minute');
ROLLBACK;
-- nothing is delivered while disabled
SELECT userpilot_identify_company('c1');
CALL userpilot_wait('0');
\echo :SQLSTATE
CALL userpilot_wait('50 milliseconds');
BEGIN;
CALL userpilot_wait('50 milliseconds');
ROLLBACK;
DO $$
BEGIN
  CALL userpilot_wait('50 milliseconds');
EXCEPTION WHEN query_canceled THEN
  RAISE WARNING 'caught: %', SQLERRM;
END$$;
SET statement_timeout = '50ms';
CALL userpilot_wait('1 hour');
RESET statement_timeout;
-- dead letters are not waited for, nor is what another transaction may yet commit
INSERT INTO userpilot_dead_letters (lsn, xid, enqueued_at, batch, bulk, server, kind, entity_id, company_id, metadata, error, attempts)
  SELECT lsn, xid, enqueued_at, batch, bulk, server, kind, entity_id, company_id, metadata, 'by hand', 1 FROM userpilot_queue;
TRUNCATE userpilot_queue;
BEGIN;
SELECT userpilot_identify_company('c2');
PREPARE TRANSACTION 'regress_retry';
CALL userpilot_wait('0');
ROLLBACK PREPARED 'regress_retry';
CALL userpilot_wait('0');

DROP VIEW queued, status;
DROP FUNCTION bury();
DROP EXTENSION userpilot CASCADE;
