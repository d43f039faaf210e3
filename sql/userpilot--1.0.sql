/* userpilot--1.0.sql: everything CREATE EXTENSION userpilot makes */

-- complain if script is sourced in psql, rather than via CREATE EXTENSION
\echo Use "CREATE EXTENSION userpilot" to load this file. \quit

-- ---------------------------------------------------------------------------
-- Environments: foreign server + user mapping for PUBLIC
-- ---------------------------------------------------------------------------

CREATE FUNCTION userpilot_validator(options text[], catalog oid)
RETURNS void
AS 'MODULE_PATHNAME'
LANGUAGE C STRICT PARALLEL SAFE;

REVOKE ALL ON FUNCTION userpilot_validator(text[], oid) FROM PUBLIC;

COMMENT ON FUNCTION userpilot_validator(text[], oid) IS
'checks the options of servers and user mappings of foreign-data wrapper userpilot';

CREATE FOREIGN DATA WRAPPER userpilot
	VALIDATOR userpilot_validator;

COMMENT ON FOREIGN DATA WRAPPER userpilot IS
'Userpilot environments: a server says where and how to send, its user mapping for PUBLIC holds the API key';

/*
 * No pg_extension_config_dump here: a restored dump must find this table
 * empty, so that only the original sends.
 */
CREATE TABLE userpilot_enabled (
	server text PRIMARY KEY,
	server_oid oid NOT NULL,
	system_identifier bigint NOT NULL,
	database oid NOT NULL,
	enabled_at timestamptz NOT NULL DEFAULT now(),
	by text NOT NULL
);

REVOKE ALL ON TABLE userpilot_enabled FROM PUBLIC;

COMMENT ON TABLE userpilot_enabled IS
'servers that were enabled, each for one database of one system; not dumped, so that a copy never sends by itself';
COMMENT ON COLUMN userpilot_enabled.server IS
'name of the foreign server';
COMMENT ON COLUMN userpilot_enabled.server_oid IS
'OID of that server: another one of the same name is not enabled by it';
COMMENT ON COLUMN userpilot_enabled.system_identifier IS
'system identifier of the cluster that sends';
COMMENT ON COLUMN userpilot_enabled.database IS
'OID of the database that sends; 0: disabled';
COMMENT ON COLUMN userpilot_enabled.enabled_at IS
'when it was last enabled';
COMMENT ON COLUMN userpilot_enabled.by IS
'role that last enabled it';

CREATE FUNCTION userpilot_enable(server name)
RETURNS void
AS 'MODULE_PATHNAME'
LANGUAGE C VOLATILE PARALLEL UNSAFE;

COMMENT ON FUNCTION userpilot_enable(name) IS
'makes this database the one that sends to the server; for the server''s owner';

CREATE FUNCTION userpilot_disable(server name)
RETURNS void
AS 'MODULE_PATHNAME'
LANGUAGE C VOLATILE PARALLEL UNSAFE;

COMMENT ON FUNCTION userpilot_disable(name) IS
'stops sending to the server; what is queued stays queued; for the server''s owner';

-- ---------------------------------------------------------------------------
-- Tables
-- ---------------------------------------------------------------------------

CREATE TABLE userpilot_queue (
	lsn pg_lsn NOT NULL,
	xid xid8 NOT NULL,
	enqueued_at timestamptz NOT NULL,
	batch bigint,
	bulk boolean NOT NULL,
	server text NOT NULL,
	kind text NOT NULL,
	entity_id text NOT NULL,
	company_id text,
	metadata jsonb NOT NULL
);
CREATE INDEX userpilot_queue_look ON userpilot_queue (xid) WHERE NOT bulk;
-- a table without key can otherwise not be deleted from once it is published
ALTER TABLE userpilot_queue REPLICA IDENTITY FULL;
REVOKE ALL ON TABLE userpilot_queue FROM PUBLIC;

COMMENT ON TABLE userpilot_queue IS 'Changes that Userpilot has not acknowledged yet. Written by the functions, triggers and aggregates in the caller''s transaction; rows are deleted only when acknowledged or moved to userpilot_dead_letters, and not updated, but for lsn and xid by userpilot_enable() in a younger cluster.';
COMMENT ON COLUMN userpilot_queue.lsn IS 'WAL insert position when the change was queued: orders two changes made under one row lock. Rows of a bulk SELECT count from the position at its start.';
COMMENT ON COLUMN userpilot_queue.xid IS 'Top-level transaction that queued the change.';
COMMENT ON COLUMN userpilot_queue.enqueued_at IS 'When it was queued; of a bulk SELECT, when its first row was.';
COMMENT ON COLUMN userpilot_queue.batch IS 'Bulk SELECT the row came from: userpilot_batches.id. Null for direct changes.';
COMMENT ON COLUMN userpilot_queue.bulk IS 'Lane: true for aggregates and for what a transaction queues beyond its first 100 rows, false for real time.';
COMMENT ON COLUMN userpilot_queue.server IS 'Foreign server it goes to.';
COMMENT ON COLUMN userpilot_queue.kind IS 'company or user.';
COMMENT ON COLUMN userpilot_queue.entity_id IS 'company_id or user_id at Userpilot.';
COMMENT ON COLUMN userpilot_queue.company_id IS 'A user''s company; null when the change says nothing of it.';
COMMENT ON COLUMN userpilot_queue.metadata IS 'Properties as queued: string, number, boolean or null each; null removes the property.';

CREATE TABLE userpilot_batches (
	id bigint PRIMARY KEY,
	server text NOT NULL,
	kind text NOT NULL,
	snapshot pg_snapshot NOT NULL,
	lsn pg_lsn NOT NULL,
	xid xid8 NOT NULL,
	rows bigint NOT NULL DEFAULT 0,
	unchanged bigint NOT NULL DEFAULT 0,
	invalid bigint NOT NULL DEFAULT 0,
	pending bigint NOT NULL DEFAULT 0,
	statement text,
	started_at timestamptz NOT NULL,
	by text NOT NULL
);
REVOKE ALL ON TABLE userpilot_batches FROM PUBLIC;

COMMENT ON TABLE userpilot_batches IS 'One row per bulk SELECT, and one per trigger that userpilot_sync_table() used: what it could see decides which changes are newer than its rows. Kept for userpilot.retention, and while anything is queued or a dead letter came from it.';
COMMENT ON COLUMN userpilot_batches.id IS 'xid * 1000000 + number within the transaction.';
COMMENT ON COLUMN userpilot_batches.server IS 'Foreign server it goes to.';
COMMENT ON COLUMN userpilot_batches.kind IS 'company or user.';
COMMENT ON COLUMN userpilot_batches.snapshot IS 'Snapshot the SELECT read with.';
COMMENT ON COLUMN userpilot_batches.lsn IS 'WAL insert position when it began.';
COMMENT ON COLUMN userpilot_batches.xid IS 'Transaction it ran in.';
COMMENT ON COLUMN userpilot_batches.rows IS 'Rows queued.';
COMMENT ON COLUMN userpilot_batches.unchanged IS 'Rows left out because Userpilot has what they say.';
COMMENT ON COLUMN userpilot_batches.invalid IS 'Rows that went to userpilot_dead_letters (userpilot_sync_table).';
COMMENT ON COLUMN userpilot_batches.pending IS 'Rows not acknowledged yet, as the worker last counted them: before each job, and after the last.';
COMMENT ON COLUMN userpilot_batches.statement IS 'The statement''s first 1,000 bytes, without others that were sent with it.';
COMMENT ON COLUMN userpilot_batches.started_at IS 'When the SELECT met its first row.';
COMMENT ON COLUMN userpilot_batches.by IS 'Role that ran it.';

CREATE TABLE userpilot_profiles (
	-- bytewise: quick to search, and no other after an upgrade of the C library
	server text COLLATE "C" NOT NULL,
	kind text COLLATE "C" NOT NULL,
	entity_id text COLLATE "C" NOT NULL,
	company_id text,
	metadata jsonb NOT NULL DEFAULT '{}',
	versions jsonb NOT NULL DEFAULT '[]',
	attempts integer NOT NULL DEFAULT 0,
	synced_at timestamptz,
	believed_since timestamptz,
	job bigint,
	-- what tells keys apart comes first
	PRIMARY KEY (entity_id, kind, server)
) WITH (fillfactor = 70);
REVOKE ALL ON TABLE userpilot_profiles FROM PUBLIC;

COMMENT ON TABLE userpilot_profiles IS 'What Userpilot is known to have: last acknowledged, not read back. A key in versions but not in metadata is unknown and will be sent again rather than believed.';
COMMENT ON COLUMN userpilot_profiles.server IS 'Foreign server.';
COMMENT ON COLUMN userpilot_profiles.kind IS 'company or user.';
COMMENT ON COLUMN userpilot_profiles.entity_id IS 'company_id or user_id at Userpilot.';
COMMENT ON COLUMN userpilot_profiles.company_id IS 'A user''s company as acknowledged; null when unknown or none.';
COMMENT ON COLUMN userpilot_profiles.metadata IS 'Acknowledged properties; a null was acknowledged as removed.';
COMMENT ON COLUMN userpilot_profiles.versions IS 'Which change wrote each key: a list of [lsn, xid, order, keys...]; the entry without keys is for every property in metadata not named in another. The key "" is the company.';
COMMENT ON COLUMN userpilot_profiles.attempts IS 'Bodies sent since the last one that was acknowledged or ended as a dead letter.';
COMMENT ON COLUMN userpilot_profiles.synced_at IS 'Last acknowledgement; null if there was none.';
COMMENT ON COLUMN userpilot_profiles.believed_since IS 'Oldest acknowledgement that metadata rests on; after server option refresh_after (30 days, each entity up to a quarter earlier) all of it counts as unknown. Null while nothing is known.';
COMMENT ON COLUMN userpilot_profiles.job IS 'Job the entity is in flight in: userpilot_jobs.id.';

CREATE TABLE userpilot_jobs (
	id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
	server text NOT NULL,
	kind text NOT NULL,
	format text NOT NULL,
	records integer NOT NULL,
	bytes bigint NOT NULL,
	status text NOT NULL,
	job_id text,
	filename text,
	total_rows bigint,
	completed_rows bigint,
	http_status integer,
	request_id text,
	attempts integer NOT NULL DEFAULT 0,
	error text,
	response text,
	created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
	submitted_at timestamptz,
	polled_at timestamptz,
	finished_at timestamptz
);
CREATE INDEX userpilot_jobs_open ON userpilot_jobs (id) WHERE finished_at IS NULL;
REVOKE ALL ON TABLE userpilot_jobs FROM PUBLIC;

COMMENT ON TABLE userpilot_jobs IS 'Bulk jobs, newest last; kept for userpilot.retention.';
COMMENT ON SEQUENCE userpilot_jobs_id_seq IS 'Of userpilot_jobs.id.';
COMMENT ON COLUMN userpilot_jobs.id IS 'Ours; job_id is Userpilot''s.';
COMMENT ON COLUMN userpilot_jobs.server IS 'Foreign server.';
COMMENT ON COLUMN userpilot_jobs.kind IS 'company or user.';
COMMENT ON COLUMN userpilot_jobs.format IS 'json (body) or ndjson (file upload).';
COMMENT ON COLUMN userpilot_jobs.records IS 'Records in the body.';
COMMENT ON COLUMN userpilot_jobs.bytes IS 'Bytes of the records, without multipart framing.';
COMMENT ON COLUMN userpilot_jobs.status IS 'prepared, unknown, then as Userpilot says: queued, validating, processing, pending_refresh; final: completed, failed, refused (its rows never left the queue), dissolved (its records go one by one).';
COMMENT ON COLUMN userpilot_jobs.job_id IS 'Userpilot''s id, opaque.';
COMMENT ON COLUMN userpilot_jobs.filename IS 'Name of an NDJSON upload, with a random uuid, by which it is found again after a lost answer; null for JSON.';
COMMENT ON COLUMN userpilot_jobs.total_rows IS 'As Userpilot says.';
COMMENT ON COLUMN userpilot_jobs.completed_rows IS 'As Userpilot says; less than records in a completed job means that records were dropped.';
COMMENT ON COLUMN userpilot_jobs.http_status IS 'Of the last answer.';
COMMENT ON COLUMN userpilot_jobs.request_id IS 'x-request-id of the submission; Userpilot''s support asks for it.';
COMMENT ON COLUMN userpilot_jobs.attempts IS 'Submissions, less those refused for the moment and those that turned out not to have arrived.';
COMMENT ON COLUMN userpilot_jobs.error IS 'What went wrong, in words.';
COMMENT ON COLUMN userpilot_jobs.response IS 'Body of the last answer, at most 8 kB.';
COMMENT ON COLUMN userpilot_jobs.created_at IS 'When it was prepared.';
COMMENT ON COLUMN userpilot_jobs.submitted_at IS 'When Userpilot accepted it.';
COMMENT ON COLUMN userpilot_jobs.polled_at IS 'Last poll.';
COMMENT ON COLUMN userpilot_jobs.finished_at IS 'When it reached a final status.';

CREATE TABLE userpilot_job_chunks (
	job bigint NOT NULL REFERENCES userpilot_jobs ON DELETE CASCADE,
	seq integer NOT NULL,
	records text NOT NULL,
	PRIMARY KEY (job, seq)
);
ALTER TABLE userpilot_job_chunks ALTER COLUMN records SET STORAGE EXTERNAL;
REVOKE ALL ON TABLE userpilot_job_chunks FROM PUBLIC;

COMMENT ON TABLE userpilot_job_chunks IS 'Records of unfinished jobs in pieces of about 128 kB; deleted when the job is done with.';
COMMENT ON COLUMN userpilot_job_chunks.job IS 'userpilot_jobs.id.';
COMMENT ON COLUMN userpilot_job_chunks.seq IS 'Order within the job.';
COMMENT ON COLUMN userpilot_job_chunks.records IS 'One record per line, each as JSON and ended by a newline.';

CREATE TABLE userpilot_requests (
	id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
	at timestamptz NOT NULL,
	server text NOT NULL,
	method text NOT NULL,
	path text NOT NULL,
	job bigint,
	kind text,
	entity_id text,
	http_status integer,
	outcome text NOT NULL,
	request_id text,
	ms double precision NOT NULL,
	bytes bigint NOT NULL,
	error text
);
CREATE INDEX userpilot_requests_entity ON userpilot_requests (entity_id) WHERE entity_id IS NOT NULL;
REVOKE ALL ON TABLE userpilot_requests FROM PUBLIC;

COMMENT ON TABLE userpilot_requests IS 'HTTP calls, as userpilot.log_requests asks; kept for userpilot.retention.';
COMMENT ON SEQUENCE userpilot_requests_id_seq IS 'Of userpilot_requests.id.';
COMMENT ON COLUMN userpilot_requests.id IS 'Order of the answers.';
COMMENT ON COLUMN userpilot_requests.at IS 'When the answer came, or the call was given up.';
COMMENT ON COLUMN userpilot_requests.server IS 'Foreign server.';
COMMENT ON COLUMN userpilot_requests.method IS 'GET or POST.';
COMMENT ON COLUMN userpilot_requests.path IS 'Path below the endpoint.';
COMMENT ON COLUMN userpilot_requests.job IS 'userpilot_jobs.id the call was about.';
COMMENT ON COLUMN userpilot_requests.kind IS 'company or user, of a real-time call.';
COMMENT ON COLUMN userpilot_requests.entity_id IS 'Entity of a real-time call.';
COMMENT ON COLUMN userpilot_requests.http_status IS 'Null if there was no whole answer.';
COMMENT ON COLUMN userpilot_requests.outcome IS 'What the extension did with it: acknowledged, back-off, throttled, outage, paused, dead letter, slot taken, too large, dissolved, unknown.';
COMMENT ON COLUMN userpilot_requests.request_id IS 'x-request-id of the answer.';
COMMENT ON COLUMN userpilot_requests.ms IS 'Milliseconds from start to end.';
COMMENT ON COLUMN userpilot_requests.bytes IS 'Bytes of body sent.';
COMMENT ON COLUMN userpilot_requests.error IS 'What went wrong, in words.';

CREATE TABLE userpilot_dead_letters (
	id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
	lsn pg_lsn NOT NULL,
	xid xid8 NOT NULL,
	enqueued_at timestamptz NOT NULL,
	batch bigint,
	bulk boolean NOT NULL,
	server text NOT NULL,
	kind text NOT NULL,
	entity_id text NOT NULL,
	company_id text,
	metadata jsonb NOT NULL,
	http_status integer,
	error text NOT NULL,
	response text,
	attempts integer NOT NULL,
	failed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX userpilot_dead_letters_entity ON userpilot_dead_letters (server, kind, entity_id);
REVOKE ALL ON TABLE userpilot_dead_letters FROM PUBLIC;

COMMENT ON TABLE userpilot_dead_letters IS 'Changes that Userpilot refused for good, and rows of triggers and userpilot_sync_table() that can never be sent, as they were queued, with the reason. userpilot_retry() moves back what can be sent.';
COMMENT ON SEQUENCE userpilot_dead_letters_id_seq IS 'Of userpilot_dead_letters.id.';
COMMENT ON COLUMN userpilot_dead_letters.id IS 'For userpilot_retry(id); negative for rows of triggers and userpilot_sync_table(), which were never sent.';
COMMENT ON COLUMN userpilot_dead_letters.lsn IS 'As queued.';
COMMENT ON COLUMN userpilot_dead_letters.xid IS 'As queued.';
COMMENT ON COLUMN userpilot_dead_letters.enqueued_at IS 'As queued.';
COMMENT ON COLUMN userpilot_dead_letters.batch IS 'As queued.';
COMMENT ON COLUMN userpilot_dead_letters.bulk IS 'As queued.';
COMMENT ON COLUMN userpilot_dead_letters.server IS 'As queued.';
COMMENT ON COLUMN userpilot_dead_letters.kind IS 'As queued.';
COMMENT ON COLUMN userpilot_dead_letters.entity_id IS 'As queued.';
COMMENT ON COLUMN userpilot_dead_letters.company_id IS 'As queued.';
COMMENT ON COLUMN userpilot_dead_letters.metadata IS 'As queued.';
COMMENT ON COLUMN userpilot_dead_letters.http_status IS 'Of the answer that ended it; null if there was none.';
COMMENT ON COLUMN userpilot_dead_letters.error IS 'The reason, in words.';
COMMENT ON COLUMN userpilot_dead_letters.response IS 'The answer''s body, at most 8 kB.';
COMMENT ON COLUMN userpilot_dead_letters.attempts IS 'Bodies sent before it was given up.';
COMMENT ON COLUMN userpilot_dead_letters.failed_at IS 'When it was given up.';

CREATE TABLE userpilot_progress (
	server text PRIMARY KEY,
	state text NOT NULL,
	companies_realtime bigint NOT NULL DEFAULT 0,
	companies_bulk bigint NOT NULL DEFAULT 0,
	users_realtime bigint NOT NULL DEFAULT 0,
	users_bulk bigint NOT NULL DEFAULT 0,
	oldest_pending timestamptz,
	delivered bigint NOT NULL DEFAULT 0,
	delivering_since timestamptz,
	records_per_minute double precision,
	advice text,
	last_error text,
	last_error_at timestamptz,
	updated_at timestamptz NOT NULL
) WITH (fillfactor = 50);
REVOKE ALL ON TABLE userpilot_progress FROM PUBLIC;

COMMENT ON TABLE userpilot_progress IS 'What the worker last said of each server; read it through userpilot_status.';
COMMENT ON COLUMN userpilot_progress.server IS 'Foreign server.';
COMMENT ON COLUMN userpilot_progress.state IS 'paused, outage, idle, sending or waiting for the slot.';
COMMENT ON COLUMN userpilot_progress.companies_realtime IS 'Queued rows the worker counted, by kind and lane.';
COMMENT ON COLUMN userpilot_progress.companies_bulk IS 'Queued rows the worker counted, by kind and lane.';
COMMENT ON COLUMN userpilot_progress.users_realtime IS 'Queued rows the worker counted, by kind and lane.';
COMMENT ON COLUMN userpilot_progress.users_bulk IS 'Queued rows the worker counted, by kind and lane.';
COMMENT ON COLUMN userpilot_progress.oldest_pending IS 'enqueued_at of the oldest row of that count.';
COMMENT ON COLUMN userpilot_progress.delivered IS 'Records acknowledged since delivering_since.';
COMMENT ON COLUMN userpilot_progress.delivering_since IS 'When the present backlog began to be delivered.';
COMMENT ON COLUMN userpilot_progress.records_per_minute IS 'Rate measured on the present backlog.';
COMMENT ON COLUMN userpilot_progress.advice IS 'What to do, if anything.';
COMMENT ON COLUMN userpilot_progress.last_error IS 'Last trouble, in words.';
COMMENT ON COLUMN userpilot_progress.last_error_at IS 'When it occurred.';
COMMENT ON COLUMN userpilot_progress.updated_at IS 'When the worker wrote this.';

CREATE TABLE userpilot_recent_calls (
	server text NOT NULL,
	at timestamptz NOT NULL,
	calls integer NOT NULL
);
ALTER TABLE userpilot_recent_calls REPLICA IDENTITY FULL;
REVOKE ALL ON TABLE userpilot_recent_calls FROM PUBLIC;

COMMENT ON TABLE userpilot_recent_calls IS 'Real-time calls of the last minutes, so that the limit holds over a crash of the server.';
COMMENT ON COLUMN userpilot_recent_calls.server IS 'Foreign server.';
COMMENT ON COLUMN userpilot_recent_calls.at IS 'When they were marked.';
COMMENT ON COLUMN userpilot_recent_calls.calls IS 'How many.';

CREATE TABLE userpilot_worker_starts (
	only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
	starts integer NOT NULL,
	at timestamptz NOT NULL
);
REVOKE ALL ON TABLE userpilot_worker_starts FROM PUBLIC;

COMMENT ON TABLE userpilot_worker_starts IS 'Starts of the worker in a row that got nowhere: after three the next ones wait, up to an hour.';
COMMENT ON COLUMN userpilot_worker_starts.only_row IS 'There is one row.';
COMMENT ON COLUMN userpilot_worker_starts.starts IS 'Starts since the worker last delivered something or left in good order.';
COMMENT ON COLUMN userpilot_worker_starts.at IS 'Last start.';

-- What a dump must carry: the truth that is pending, and what is known
SELECT pg_catalog.pg_extension_config_dump('userpilot_queue', '');
SELECT pg_catalog.pg_extension_config_dump('userpilot_batches', '');
SELECT pg_catalog.pg_extension_config_dump('userpilot_profiles', '');
SELECT pg_catalog.pg_extension_config_dump('userpilot_jobs', '');
SELECT pg_catalog.pg_extension_config_dump('userpilot_jobs_id_seq', '');
SELECT pg_catalog.pg_extension_config_dump('userpilot_job_chunks', '');
SELECT pg_catalog.pg_extension_config_dump('userpilot_dead_letters', '');
SELECT pg_catalog.pg_extension_config_dump('userpilot_dead_letters_id_seq', '');

-- ---------------------------------------------------------------------------
-- Real time
-- ---------------------------------------------------------------------------

CREATE FUNCTION userpilot_identify_company(company_id "any", metadata jsonb DEFAULT '{}')
RETURNS void
LANGUAGE C VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_identify_company("any", jsonb) IS
'Queues a company for Userpilot, in this transaction. company_id: text, varchar, smallint to bigint, numeric, uuid or a literal; 1 to 512 characters. metadata: a JSON object of strings, numbers, booleans and nulls (null removes the property); at most 500 properties, names of 255 and strings of 65,535 characters. Goes to the server userpilot.server names, of which the caller needs USAGE. API: POST /v1/companies/identify.';

CREATE FUNCTION userpilot_identify_user(user_id "any", metadata jsonb DEFAULT '{}', company_id "any" DEFAULT NULL)
RETURNS void
LANGUAGE C VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_identify_user("any", jsonb, "any") IS
'Queues a user for Userpilot, in this transaction; with company_id the user moves to that company, without it stays. Arguments as of userpilot_identify_company(). API: POST /v1/identify.';

-- ---------------------------------------------------------------------------
-- Bulk
-- ---------------------------------------------------------------------------

CREATE FUNCTION userpilot_bulk_companies_trans(internal, "any", jsonb)
RETURNS internal
LANGUAGE C VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_bulk_companies_trans(internal, "any", jsonb) IS
'Transition function of userpilot_bulk_identify_companies().';

CREATE FUNCTION userpilot_bulk_users_trans(internal, "any", jsonb)
RETURNS internal
LANGUAGE C VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_bulk_users_trans(internal, "any", jsonb) IS
'Transition function of userpilot_bulk_identify_users().';

CREATE FUNCTION userpilot_bulk_users_trans(internal, "any", jsonb, "any")
RETURNS internal
LANGUAGE C VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_bulk_users_trans(internal, "any", jsonb, "any") IS
'Transition function of userpilot_bulk_identify_users().';

CREATE FUNCTION userpilot_bulk_final(internal)
RETURNS bigint
LANGUAGE C VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_bulk_final(internal) IS
'Final function of the bulk aggregates.';

CREATE AGGREGATE userpilot_bulk_identify_companies(company_id "any", metadata jsonb) (
	SFUNC = userpilot_bulk_companies_trans,
	STYPE = internal,
	FINALFUNC = userpilot_bulk_final,
	FINALFUNC_MODIFY = READ_WRITE,
	PARALLEL = UNSAFE
);
COMMENT ON AGGREGATE userpilot_bulk_identify_companies("any", jsonb) IS
'Queues every row''s company for the bulk lane and returns how many rows; rows of which Userpilot has every value already are left out (userpilot_batches.unchanged), unless something of theirs is under way. Use it in the select list of a SELECT (also of INSERT ... SELECT and CREATE TABLE AS), without or with a plain GROUP BY. What the SELECT''s snapshot cannot see counts as newer than its rows. Arguments as of userpilot_identify_company(). API: POST /v1/companies/bulk_identify, at most 10,000 records per job, 1,800 per minute.';

CREATE AGGREGATE userpilot_bulk_identify_users(user_id "any", metadata jsonb) (
	SFUNC = userpilot_bulk_users_trans,
	STYPE = internal,
	FINALFUNC = userpilot_bulk_final,
	FINALFUNC_MODIFY = READ_WRITE,
	PARALLEL = UNSAFE
);
COMMENT ON AGGREGATE userpilot_bulk_identify_users("any", jsonb) IS
'Queues every row''s user for the bulk lane and returns how many rows; companies stay as they are. See userpilot_bulk_identify_companies(). API: POST /v1/users/bulk_identify.';

CREATE AGGREGATE userpilot_bulk_identify_users(user_id "any", metadata jsonb, company_id "any") (
	SFUNC = userpilot_bulk_users_trans,
	STYPE = internal,
	FINALFUNC = userpilot_bulk_final,
	FINALFUNC_MODIFY = READ_WRITE,
	PARALLEL = UNSAFE
);
COMMENT ON AGGREGATE userpilot_bulk_identify_users("any", jsonb, "any") IS
'Queues every row''s user and company for the bulk lane and returns how many rows. See userpilot_bulk_identify_companies(). API: POST /v1/users/bulk_identify.';

-- ---------------------------------------------------------------------------
-- Previews: what a bulk SELECT would come to, nothing queued
-- ---------------------------------------------------------------------------

CREATE TYPE userpilot_preview AS (
	rows bigint,
	new bigint,
	changed bigint,
	unchanged bigint,
	invalid bigint,
	records bigint,
	jobs bigint,
	minutes double precision
);
COMMENT ON TYPE userpilot_preview IS
'What a bulk SELECT would come to: its rows are new to Userpilot, changed, unchanged (left out) or invalid (it would be refused); new and changed ones make records, in jobs of at most 10,000, and take minutes alone, at 1,800 records a minute; what is queued already comes first.';
COMMENT ON COLUMN userpilot_preview.rows IS 'Rows that reached the aggregate.';
COMMENT ON COLUMN userpilot_preview.new IS 'Of entities that Userpilot never acknowledged.';
COMMENT ON COLUMN userpilot_preview.changed IS 'Something differs, is unknown or under way.';
COMMENT ON COLUMN userpilot_preview.unchanged IS 'Nothing differs: left out.';
COMMENT ON COLUMN userpilot_preview.invalid IS 'The bulk SELECT would raise.';
COMMENT ON COLUMN userpilot_preview.records IS 'New and changed; two rows of one entity count twice, but go as one.';
COMMENT ON COLUMN userpilot_preview.jobs IS 'Jobs of at most 10,000 records that they make.';
COMMENT ON COLUMN userpilot_preview.minutes IS 'That they take alone, at 1,800 records a minute.';

CREATE FUNCTION userpilot_preview_companies_trans(internal, "any", jsonb)
RETURNS internal
LANGUAGE C VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_preview_companies_trans(internal, "any", jsonb) IS
'Transition function of userpilot_preview_companies().';

CREATE FUNCTION userpilot_preview_users_trans(internal, "any", jsonb)
RETURNS internal
LANGUAGE C VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_preview_users_trans(internal, "any", jsonb) IS
'Transition function of userpilot_preview_users().';

CREATE FUNCTION userpilot_preview_users_trans(internal, "any", jsonb, "any")
RETURNS internal
LANGUAGE C VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_preview_users_trans(internal, "any", jsonb, "any") IS
'Transition function of userpilot_preview_users().';

CREATE FUNCTION userpilot_preview_final(internal)
RETURNS userpilot_preview
LANGUAGE C VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_preview_final(internal) IS
'Final function of the preview aggregates.';

CREATE AGGREGATE userpilot_preview_companies(company_id "any", metadata jsonb) (
	SFUNC = userpilot_preview_companies_trans,
	STYPE = internal,
	FINALFUNC = userpilot_preview_final,
	FINALFUNC_MODIFY = READ_WRITE,
	PARALLEL = UNSAFE
);
COMMENT ON AGGREGATE userpilot_preview_companies("any", jsonb) IS
'What userpilot_bulk_identify_companies() would come to for these rows: rows, new, changed, unchanged, invalid, records, jobs, minutes. Queues nothing; read it as SELECT (userpilot_preview_companies(id, metadata)).* FROM ... Needs USAGE on the server userpilot.server names.';

CREATE AGGREGATE userpilot_preview_users(user_id "any", metadata jsonb) (
	SFUNC = userpilot_preview_users_trans,
	STYPE = internal,
	FINALFUNC = userpilot_preview_final,
	FINALFUNC_MODIFY = READ_WRITE,
	PARALLEL = UNSAFE
);
COMMENT ON AGGREGATE userpilot_preview_users("any", jsonb) IS
'What userpilot_bulk_identify_users() would come to for these rows. See userpilot_preview_companies().';

CREATE AGGREGATE userpilot_preview_users(user_id "any", metadata jsonb, company_id "any") (
	SFUNC = userpilot_preview_users_trans,
	STYPE = internal,
	FINALFUNC = userpilot_preview_final,
	FINALFUNC_MODIFY = READ_WRITE,
	PARALLEL = UNSAFE
);
COMMENT ON AGGREGATE userpilot_preview_users("any", jsonb, "any") IS
'What userpilot_bulk_identify_users() would come to for these rows and companies. See userpilot_preview_companies().';

-- ---------------------------------------------------------------------------
-- Payloads: what would be sent, nothing sent
-- ---------------------------------------------------------------------------

CREATE FUNCTION userpilot_companies_payload_trans(internal, "any", jsonb)
RETURNS internal
LANGUAGE C STABLE PARALLEL UNSAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_companies_payload_trans(internal, "any", jsonb) IS
'Transition function of userpilot_companies_payload().';

CREATE FUNCTION userpilot_companies_ndjson_trans(internal, "any", jsonb)
RETURNS internal
LANGUAGE C STABLE PARALLEL UNSAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_companies_ndjson_trans(internal, "any", jsonb) IS
'Transition function of userpilot_companies_ndjson().';

CREATE FUNCTION userpilot_companies_payload_final(internal)
RETURNS json
LANGUAGE C STABLE PARALLEL UNSAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_companies_payload_final(internal) IS
'Final function of userpilot_companies_payload().';

CREATE FUNCTION userpilot_users_payload_trans(internal, "any", jsonb)
RETURNS internal
LANGUAGE C STABLE PARALLEL UNSAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_users_payload_trans(internal, "any", jsonb) IS
'Transition function of userpilot_users_payload().';

CREATE FUNCTION userpilot_users_payload_trans(internal, "any", jsonb, "any")
RETURNS internal
LANGUAGE C STABLE PARALLEL UNSAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_users_payload_trans(internal, "any", jsonb, "any") IS
'Transition function of userpilot_users_payload().';

CREATE FUNCTION userpilot_users_ndjson_trans(internal, "any", jsonb)
RETURNS internal
LANGUAGE C STABLE PARALLEL UNSAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_users_ndjson_trans(internal, "any", jsonb) IS
'Transition function of userpilot_users_ndjson().';

CREATE FUNCTION userpilot_users_ndjson_trans(internal, "any", jsonb, "any")
RETURNS internal
LANGUAGE C STABLE PARALLEL UNSAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_users_ndjson_trans(internal, "any", jsonb, "any") IS
'Transition function of userpilot_users_ndjson().';

CREATE FUNCTION userpilot_users_payload_final(internal)
RETURNS json
LANGUAGE C STABLE PARALLEL UNSAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_users_payload_final(internal) IS
'Final function of userpilot_users_payload().';

CREATE FUNCTION userpilot_ndjson_final(internal)
RETURNS text
LANGUAGE C STABLE PARALLEL UNSAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_ndjson_final(internal) IS
'Final function of the NDJSON aggregates.';

CREATE AGGREGATE userpilot_companies_payload(company_id "any", metadata jsonb) (
	SFUNC = userpilot_companies_payload_trans,
	STYPE = internal,
	FINALFUNC = userpilot_companies_payload_final
);
COMMENT ON AGGREGATE userpilot_companies_payload("any", jsonb) IS
'The JSON body of POST /v1/companies/bulk_identify for these rows; nothing is queued or sent. Userpilot takes 10,000 records and 50 MB a request: GROUP BY (row_number - 1) / 10000 for more.';

CREATE AGGREGATE userpilot_companies_ndjson(company_id "any", metadata jsonb) (
	SFUNC = userpilot_companies_ndjson_trans,
	STYPE = internal,
	FINALFUNC = userpilot_ndjson_final
);
COMMENT ON AGGREGATE userpilot_companies_ndjson("any", jsonb) IS
'The NDJSON file for POST /v1/companies/bulk_identify: one record a line. COPY in text format doubles backslashes and so breaks JSON; write it with psql -qAtX -o FILE.';

CREATE AGGREGATE userpilot_users_payload(user_id "any", metadata jsonb) (
	SFUNC = userpilot_users_payload_trans,
	STYPE = internal,
	FINALFUNC = userpilot_users_payload_final
);
COMMENT ON AGGREGATE userpilot_users_payload("any", jsonb) IS
'The JSON body of POST /v1/users/bulk_identify for these rows, without companies. See userpilot_companies_payload().';

CREATE AGGREGATE userpilot_users_payload(user_id "any", metadata jsonb, company_id "any") (
	SFUNC = userpilot_users_payload_trans,
	STYPE = internal,
	FINALFUNC = userpilot_users_payload_final
);
COMMENT ON AGGREGATE userpilot_users_payload("any", jsonb, "any") IS
'The JSON body of POST /v1/users/bulk_identify for these rows. See userpilot_companies_payload().';

CREATE AGGREGATE userpilot_users_ndjson(user_id "any", metadata jsonb) (
	SFUNC = userpilot_users_ndjson_trans,
	STYPE = internal,
	FINALFUNC = userpilot_ndjson_final
);
COMMENT ON AGGREGATE userpilot_users_ndjson("any", jsonb) IS
'The NDJSON file for POST /v1/users/bulk_identify, without companies. See userpilot_companies_ndjson().';

CREATE AGGREGATE userpilot_users_ndjson(user_id "any", metadata jsonb, company_id "any") (
	SFUNC = userpilot_users_ndjson_trans,
	STYPE = internal,
	FINALFUNC = userpilot_ndjson_final
);
COMMENT ON AGGREGATE userpilot_users_ndjson("any", jsonb, "any") IS
'The NDJSON file for POST /v1/users/bulk_identify. See userpilot_companies_ndjson().';

-- ---------------------------------------------------------------------------
-- Triggers, and the tables they are on
-- ---------------------------------------------------------------------------

CREATE FUNCTION userpilot_company_trigger()
RETURNS trigger
LANGUAGE C
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_company_trigger() IS
'Queues the table''s rows as companies: CREATE TRIGGER to_userpilot AFTER INSERT OR UPDATE ON accounts FOR EACH ROW EXECUTE FUNCTION userpilot_company_trigger(''id'', ''name'', ''mrr AS monthly_spend''). Arguments: the id''s column; then columns, each under its own name or AS another, ''*'' for all others; ''server=name'' for another server than the database''s userpilot.server. Numbers and booleans stay what they are, dates and times become ISO 8601 (timestamptz in UTC), all else text; a JSON column spreads its primitive members; NULL removes the property. An UPDATE queues all named columns if one has changed. The table''s owner needs USAGE on the server, who changes rows needs none. What can never be sent becomes a dead letter with a warning (server option on_invalid). userpilot_check_trigger() says what is wrong.';

CREATE FUNCTION userpilot_user_trigger()
RETURNS trigger
LANGUAGE C
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_user_trigger() IS
'Queues the table''s rows as users; the column AS company_id is the user''s company: userpilot_user_trigger(''id'', ''email'', ''account_id AS company_id''). See userpilot_company_trigger().';

CREATE FUNCTION userpilot_check_trigger("table" regclass)
RETURNS TABLE (trigger text, finding text, hint text)
LANGUAGE C STABLE PARALLEL UNSAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_check_trigger(regclass) IS
'What is wrong with a table''s userpilot triggers and what to do about it, in words; "ok" for one of which nothing is known.';

CREATE FUNCTION userpilot_sync_table("table" regclass, OUT rows bigint, OUT queued bigint, OUT unchanged bigint, OUT invalid bigint)
RETURNS record
LANGUAGE C VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_sync_table(regclass) IS
'Queues the rows of a table for the bulk lane, as its own enabled userpilot triggers would, but for what Userpilot has already: first load, nightly reconciliation, after a trigger was changed, repair. Returns how many rows were read, queued, left out as unchanged, and invalid: these are in userpilot_dead_letters. Needs SELECT on the table and USAGE on the server; the table''s owner needs USAGE, too.';

-- ---------------------------------------------------------------------------
-- Watching and steering
-- ---------------------------------------------------------------------------

CREATE FUNCTION userpilot_disabled_reason(server oid)
RETURNS text
LANGUAGE C VOLATILE STRICT PARALLEL UNSAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_disabled_reason(oid) IS
'Why this database does not send to a server, in words; null if it does.';

CREATE FUNCTION userpilot_worker_pid()
RETURNS integer
LANGUAGE C VOLATILE PARALLEL RESTRICTED
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_worker_pid() IS
'Process id of this database''s worker; null if none runs, which is normal while nothing is to be done.';

CREATE FUNCTION userpilot_launch_problem()
RETURNS text
LANGUAGE C VOLATILE PARALLEL RESTRICTED
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_launch_problem() IS
'Why no worker can run, in words; null if nothing is in its way.';

CREATE FUNCTION userpilot_wake()
RETURNS void
LANGUAGE C VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_wake() IS
'Makes the worker read the whole queue when this transaction commits; needed only after rows were moved into it by hand.';
REVOKE ALL ON FUNCTION userpilot_wake() FROM PUBLIC;

CREATE PROCEDURE userpilot_wait(timeout interval)
LANGUAGE C
AS 'MODULE_PATHNAME';
COMMENT ON PROCEDURE userpilot_wait(interval) IS
'Returns when every change committed before the call is delivered or in userpilot_dead_letters. Raises query_canceled on timeout, and object_not_in_prerequisite_state if this transaction itself has queued changes.';

CREATE PROCEDURE userpilot_check(server text DEFAULT NULL)
LANGUAGE C
AS 'MODULE_PATHNAME';
COMMENT ON PROCEDURE userpilot_check(text) IS
'Says in words whether this database can deliver to a server (default: userpilot.server): preloaded, enabled, worker slots, reachable, key accepted, job slot. Makes one call, GET /v1/background_jobs. Needs USAGE on the server.';

CREATE FUNCTION userpilot_cancel(batch bigint)
RETURNS bigint
LANGUAGE C VOLATILE STRICT PARALLEL UNSAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_cancel(bigint) IS
'Takes back what a bulk SELECT or userpilot_sync_table has queued and nothing was sent of yet, and returns how many rows; what is under way stays. batch: userpilot_batches.id. For who ran it and the server''s owner.';

CREATE FUNCTION userpilot_invalidate(server text, kind text DEFAULT NULL,
									 id text DEFAULT NULL, since timestamptz DEFAULT NULL)
RETURNS bigint
LANGUAGE C VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_invalidate(text, text, text, timestamptz) IS
'Stops believing what Userpilot is known to have, and returns for how many companies and users: all of a server, of a kind, one entity, or those acknowledged since a time. Sends nothing by itself: what is queued next goes whole, even if it was sent before. For the server''s owner; after a failover that lost changes, a restore, or changes made at Userpilot by others.';

CREATE FUNCTION userpilot_refusal(entity_id text, company_id text, metadata jsonb)
RETURNS text
LANGUAGE C STABLE PARALLEL SAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_refusal(text, text, jsonb) IS
'Why a change can never be sent, in words; null if it can. Sends nothing. Dead letters of which it says something are not retried.';

CREATE FUNCTION userpilot_kind(kind text)
RETURNS text
LANGUAGE C IMMUTABLE STRICT PARALLEL SAFE
AS 'MODULE_PATHNAME';
COMMENT ON FUNCTION userpilot_kind(text) IS
'Its argument, which must be company or user; for the functions below.';

-- ---------------------------------------------------------------------------
-- In SQL.  Resolved in pg_catalog: the schema may be another's, or one in which
-- others create, whose operators and functions might fit better.
-- ---------------------------------------------------------------------------

SET LOCAL search_path TO pg_catalog, pg_temp;

CREATE FUNCTION @extschema@.userpilot_retry(dead_letter bigint DEFAULT NULL, server text DEFAULT NULL,
								kind text DEFAULT NULL, entity_id text DEFAULT NULL)
RETURNS bigint
LANGUAGE sql VOLATILE PARALLEL UNSAFE
BEGIN ATOMIC
	SELECT @extschema@.userpilot_wake(), @extschema@.userpilot_kind($3);
	WITH back AS (
		DELETE FROM @extschema@.userpilot_dead_letters d
		WHERE @extschema@.userpilot_refusal(d.entity_id, d.company_id, d.metadata) IS NULL AND d.id = coalesce($1, d.id) AND d.server = coalesce($2, d.server)
		  AND d.kind = coalesce($3, d.kind) AND d.entity_id = coalesce($4, d.entity_id)
		RETURNING d.*
	), again AS (
		UPDATE @extschema@.userpilot_profiles p SET attempts = 0
		FROM back b
		WHERE p.server = b.server AND p.kind = b.kind AND p.entity_id = b.entity_id AND p.attempts > 0
	), moved AS (
		INSERT INTO @extschema@.userpilot_queue (lsn, xid, enqueued_at, batch, bulk, server, kind, entity_id, company_id, metadata)
		SELECT b.lsn, b.xid, b.enqueued_at, b.batch, b.bulk, b.server, b.kind, b.entity_id, b.company_id, b.metadata
		FROM back b ORDER BY b.lsn
		RETURNING 1
	)
	SELECT count(*) FROM moved;
END;
COMMENT ON FUNCTION @extschema@.userpilot_retry(bigint, text, text, text) IS
'Moves dead letters back into the queue, as they were, and returns how many: one by its id, those of a server, of a kind, of an entity, or all. Those that can never be sent stay: userpilot_refusal() says why. An older value still does not overwrite a newer one. For whoever may write the tables.';
REVOKE ALL ON FUNCTION @extschema@.userpilot_retry(bigint, text, text, text) FROM PUBLIC;

CREATE FUNCTION @extschema@.userpilot_trace(kind text, id text)
RETURNS TABLE (at timestamptz, what text, server text, detail jsonb)
LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
	SELECT t.at, t.what, t.server, t.detail FROM (
		SELECT p.synced_at, CASE WHEN p.synced_at IS NULL THEN 'never acknowledged' ELSE 'last acknowledged' END, p.server,
			jsonb_strip_nulls(jsonb_build_object('metadata', p.metadata, 'company_id', p.company_id,
				'attempts', p.attempts, 'job', p.job, 'versions', p.versions))
		FROM @extschema@.userpilot_profiles p WHERE p.kind = @extschema@.userpilot_kind($1) AND p.entity_id = $2
		UNION ALL
		SELECT q.enqueued_at, CASE WHEN q.bulk THEN 'queued for a bulk job' ELSE 'queued for real time' END, q.server,
			jsonb_strip_nulls(jsonb_build_object('company_id', q.company_id, 'batch', q.batch, 'lsn', q.lsn, 'xid', q.xid))
				|| jsonb_build_object('metadata', q.metadata)
		FROM @extschema@.userpilot_queue q WHERE q.kind = $1 AND q.entity_id = $2
		UNION ALL
		SELECT d.failed_at, 'dead letter', d.server,
			jsonb_strip_nulls(jsonb_build_object('id', d.id, 'error', d.error, 'http_status', d.http_status,
				'attempts', d.attempts, 'company_id', d.company_id, 'enqueued_at', d.enqueued_at))
				|| jsonb_build_object('metadata', d.metadata)
		FROM @extschema@.userpilot_dead_letters d WHERE d.kind = $1 AND d.entity_id = $2
		UNION ALL
		SELECT r.at, 'request', r.server,
			jsonb_strip_nulls(jsonb_build_object('outcome', r.outcome, 'http_status', r.http_status,
				'request_id', r.request_id, 'ms', r.ms, 'error', r.error))
		FROM @extschema@.userpilot_requests r WHERE r.kind = $1 AND r.entity_id = $2
	) AS t(at, what, server, detail)
	ORDER BY t.at NULLS FIRST;
END;
COMMENT ON FUNCTION @extschema@.userpilot_trace(text, text) IS
'Everything about one entity, oldest first: what Userpilot is known to have, what is queued, dead letters, calls. kind: company or user.';
REVOKE ALL ON FUNCTION @extschema@.userpilot_trace(text, text) FROM PUBLIC;

CREATE VIEW @extschema@.userpilot_status AS
WITH counted AS MATERIALIZED (
	-- exact up to 20,000 rows; beyond, what the worker counted
	SELECT q.server, q.kind, q.bulk, count(*) AS rows, min(q.enqueued_at) AS oldest
	FROM (SELECT server, kind, bulk, enqueued_at FROM @extschema@.userpilot_queue LIMIT 20000) q
	GROUP BY q.server, q.kind, q.bulk
), total AS (
	SELECT coalesce(sum(rows), 0) < 20000 AS exact FROM counted
), servers AS (
	SELECT s.oid AS serverid, s.srvname::text AS server
	FROM pg_catalog.pg_foreign_server s
	JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_foreign_data_wrapper'::pg_catalog.regclass
		AND d.objid = s.srvfdw AND d.deptype = 'e'
		AND d.refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass
	JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid AND e.extname = 'userpilot'
	UNION ALL
	-- dropped or renamed, with changes still queued, or dead
	SELECT NULL::oid, c.server
	FROM (
		SELECT server FROM counted
		UNION
		SELECT server FROM (SELECT server FROM @extschema@.userpilot_dead_letters LIMIT 20000) l
	) c
	WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_foreign_server s WHERE s.srvname = c.server)
), backlog AS (
	SELECT s.serverid, s.server, t.exact,
		CASE WHEN t.exact THEN coalesce(c.companies_realtime, 0) ELSE greatest(p.companies_realtime, c.companies_realtime, 0) END AS companies_realtime,
		CASE WHEN t.exact THEN coalesce(c.companies_bulk, 0) ELSE greatest(p.companies_bulk, c.companies_bulk, 0) END AS companies_bulk,
		CASE WHEN t.exact THEN coalesce(c.users_realtime, 0) ELSE greatest(p.users_realtime, c.users_realtime, 0) END AS users_realtime,
		CASE WHEN t.exact THEN coalesce(c.users_bulk, 0) ELSE greatest(p.users_bulk, c.users_bulk, 0) END AS users_bulk,
		CASE WHEN t.exact THEN c.oldest ELSE least(p.oldest_pending, c.oldest) END AS oldest
	FROM servers s
	CROSS JOIN total t
	LEFT JOIN @extschema@.userpilot_progress p ON p.server = s.server
	LEFT JOIN LATERAL (
		SELECT sum(c.rows) FILTER (WHERE c.kind = 'company' AND NOT c.bulk) AS companies_realtime,
			sum(c.rows) FILTER (WHERE c.kind = 'company' AND c.bulk) AS companies_bulk,
			sum(c.rows) FILTER (WHERE c.kind = 'user' AND NOT c.bulk) AS users_realtime,
			sum(c.rows) FILTER (WHERE c.kind = 'user' AND c.bulk) AS users_bulk,
			min(c.oldest) AS oldest
		FROM counted c WHERE c.server = s.server
	) c ON true
), whole AS (
	SELECT b.*, b.companies_realtime + b.companies_bulk + b.users_realtime + b.users_bulk AS pending,
		j.id AS job, j.records AS job_records, coalesce(j.completed_rows, 0) AS job_completed,
		coalesce(j.completed_before, 0) AS completed_before,
		-- since it was asked for it has gone on
		CASE WHEN j.completed_rows > 0 THEN least(j.records, j.completed_rows + 1800 / 60.0
			* coalesce(current_setting('userpilot.time_scale', true)::float8, 1)
			* extract(epoch FROM greatest(clock_timestamp() - j.polled_at, '0')))
			ELSE 0 END AS job_expected,
		p.state AS said, p.delivered, p.records_per_minute, p.advice, p.last_error, p.last_error_at
	FROM backlog b
	LEFT JOIN @extschema@.userpilot_progress p ON p.server = b.server
	LEFT JOIN LATERAL (
		-- the one under way, or the next; one before it until its rows are gone
		-- from the queue
		SELECT j.id, j.records, j.completed_rows, j.polled_at, coalesce(sum(j.completed_rows)
			OVER (ORDER BY j.id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS completed_before
		FROM (
			SELECT * FROM @extschema@.userpilot_jobs n WHERE n.server = b.server ORDER BY n.id DESC LIMIT 3
		) j
		WHERE j.finished_at IS NULL
			OR (j.status = 'completed' AND EXISTS (SELECT FROM @extschema@.userpilot_job_chunks c WHERE c.job = j.id))
		ORDER BY j.finished_at IS NOT NULL, j.submitted_at IS NULL, j.id LIMIT 1
	) j ON true
)
SELECT w.server,
	CASE
		WHEN d.reason IS NOT NULL THEN 'disabled'
		WHEN w.said IN ('paused', 'outage') THEN w.said
		WHEN w.pending = 0 AND w.job IS NULL THEN 'idle'
		WHEN w.said = 'waiting for the slot' THEN w.said
		ELSE 'sending'
	END AS state,
	w.pending, w.companies_realtime, w.companies_bulk, w.users_realtime, w.users_bulk,
	w.oldest AS oldest_pending,
	(SELECT count(*) FROM (
		SELECT FROM @extschema@.userpilot_dead_letters l WHERE l.server = w.server LIMIT 20000
	) l) AS dead_letters,
	w.job,
	CASE WHEN w.job IS NOT NULL THEN round(100.0 * least(w.job_completed, w.job_records) / greatest(w.job_records, 1), 1) END AS job_percent,
	CASE WHEN w.pending > 0 THEN round(100.0 * (coalesce(w.delivered, 0) + w.completed_before + w.job_completed)
		/ greatest(coalesce(w.delivered, 0) + w.pending, 1), 1) END AS percent,
	round(w.records_per_minute::numeric) AS records_per_minute,
	CASE WHEN w.pending > 0 AND d.reason IS NULL THEN
		-- what is in the job is in it alone, at the job's rate
		make_interval(secs => round(60.0 * greatest((w.pending - w.completed_before - w.job_expected)
			/ coalesce(nullif(w.records_per_minute, 0), CASE WHEN w.companies_bulk + w.users_bulk > 0 THEN 1800 ELSE 600 END),
			CASE WHEN w.job IS NOT NULL THEN (least(w.job_records, w.pending) - w.job_expected) / 1800.0 END, 0)))
	END AS eta,
	coalesce(d.reason, @extschema@.userpilot_launch_problem(),
		(SELECT format('the worker was started %s times and got nowhere: see the server log', n.starts)
			FROM @extschema@.userpilot_worker_starts n WHERE n.starts >= 3),
		b.advice, w.advice) AS advice,
	w.last_error, w.last_error_at,
	b.worker
FROM whole w
CROSS JOIN (
	SELECT o.worker, CASE WHEN o.blockers <> '{}' THEN format(
		'the worker waits for a lock: %s', (SELECT string_agg(CASE WHEN pid = 0
			THEN 'a prepared transaction (pg_prepared_xacts) holds it'
			ELSE format('process %s holds it', pid) END, ', ') FROM unnest(o.blockers) AS pid)) END AS advice
	FROM (
		SELECT p.worker, pg_blocking_pids(p.worker) AS blockers
		FROM @extschema@.userpilot_worker_pid() AS p(worker)
	) o
) b
CROSS JOIN LATERAL (
	SELECT CASE WHEN w.serverid IS NULL
		THEN format('disabled: there is no server %I (any more); create it, or delete its rows from userpilot_queue and userpilot_dead_letters', w.server)
		ELSE @extschema@.userpilot_disabled_reason(w.serverid) END AS reason
) d;

REVOKE ALL ON TABLE @extschema@.userpilot_status FROM PUBLIC;
GRANT SELECT ON TABLE @extschema@.userpilot_status, @extschema@.userpilot_jobs TO pg_monitor;

COMMENT ON VIEW @extschema@.userpilot_status IS
'One row per server, and per name of a dropped one that has queued changes or dead letters: what is pending, how far it is, and what to do. Costs the same at any backlog: rows are counted up to 20,000, beyond that the worker''s own count is shown.';
COMMENT ON COLUMN @extschema@.userpilot_status.server IS 'Foreign server.';
COMMENT ON COLUMN @extschema@.userpilot_status.state IS 'disabled, paused, outage, idle, sending or waiting for the slot.';
COMMENT ON COLUMN @extschema@.userpilot_status.pending IS 'Rows queued.';
COMMENT ON COLUMN @extschema@.userpilot_status.companies_realtime IS 'Rows queued, by kind and lane.';
COMMENT ON COLUMN @extschema@.userpilot_status.companies_bulk IS 'Rows queued, by kind and lane.';
COMMENT ON COLUMN @extschema@.userpilot_status.users_realtime IS 'Rows queued, by kind and lane.';
COMMENT ON COLUMN @extschema@.userpilot_status.users_bulk IS 'Rows queued, by kind and lane.';
COMMENT ON COLUMN @extschema@.userpilot_status.oldest_pending IS 'When the oldest of them was queued.';
COMMENT ON COLUMN @extschema@.userpilot_status.dead_letters IS 'Rows in userpilot_dead_letters, counted up to 20,000.';
COMMENT ON COLUMN @extschema@.userpilot_status.job IS 'Running job: userpilot_jobs.id.';
COMMENT ON COLUMN @extschema@.userpilot_status.job_percent IS 'Records of the running job that Userpilot has processed.';
COMMENT ON COLUMN @extschema@.userpilot_status.percent IS 'Of everything since the queue was last empty.';
COMMENT ON COLUMN @extschema@.userpilot_status.records_per_minute IS 'Rate measured since then.';
COMMENT ON COLUMN @extschema@.userpilot_status.eta IS 'Time left until all is delivered, at that rate; at the API''s documented rate until one is measured.';
COMMENT ON COLUMN @extschema@.userpilot_status.advice IS 'What to do, if anything.';
COMMENT ON COLUMN @extschema@.userpilot_status.last_error IS 'Last trouble, in words.';
COMMENT ON COLUMN @extschema@.userpilot_status.last_error_at IS 'When it occurred.';
COMMENT ON COLUMN @extschema@.userpilot_status.worker IS 'Process id of the worker; null while nothing is to be done.';
