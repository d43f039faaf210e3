-- tables.sql: what the rows of the bench work on, in a database of its own.
--
-- The baseline is an outbox as people build one: an ordinary logged table
-- with a primary key.  Both sides get the same ids and the same properties.

CREATE EXTENSION userpilot;
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot
	OPTIONS (endpoint 'http://127.0.0.1:9', requests_per_minute '600');
CREATE USER MAPPING FOR PUBLIC SERVER userpilot OPTIONS (api_key 'bench-key');

CREATE TABLE outbox (
	id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	entity_id text NOT NULL,
	metadata jsonb NOT NULL,
	created_at timestamptz NOT NULL DEFAULT now()
);

-- Eight properties
CREATE FUNCTION properties(i bigint) RETURNS jsonb
LANGUAGE sql STABLE PARALLEL SAFE		-- so that it is inlined
RETURN jsonb_build_object(
	'name', 'Company number ' || i, 'plan', CASE i % 3 WHEN 0 THEN 'free' WHEN 1 THEN 'team' ELSE 'enterprise' END,
	'industry', 'manufacturing', 'country', 'DE', 'seats', i % 500, 'monthly_spend', (i % 100000) / 100.0,
	'trial', i % 2 = 0, 'created_at', '2024-05-17T09:30:00Z');

-- One transaction, a loop
CREATE PROCEDURE loop_outbox(n int) LANGUAGE plpgsql AS $$
DECLARE
	m jsonb := properties(1);
BEGIN
	FOR i IN 1..n LOOP
		INSERT INTO outbox (entity_id, metadata) VALUES (i::text, m);
	END LOOP;
END $$;

CREATE PROCEDURE loop_userpilot(n int) LANGUAGE plpgsql AS $$
DECLARE
	m jsonb := properties(1);
BEGIN
	FOR i IN 1..n LOOP
		PERFORM userpilot_identify_company(i::text, m);
	END LOOP;
END $$;

-- A commit every so many rows
CREATE PROCEDURE commits_outbox(n int, every int) LANGUAGE plpgsql AS $$
DECLARE
	m jsonb := properties(1);
BEGIN
	FOR i IN 1..n LOOP
		INSERT INTO outbox (entity_id, metadata) VALUES (i::text, m);
		IF i % every = 0 THEN
			COMMIT;
		END IF;
	END LOOP;
END $$;

CREATE PROCEDURE commits_userpilot(n int, every int) LANGUAGE plpgsql AS $$
DECLARE
	m jsonb := properties(1);
BEGIN
	FOR i IN 1..n LOOP
		PERFORM userpilot_identify_company(i::text, m);
		IF i % every = 0 THEN
			COMMIT;
		END IF;
	END LOOP;
END $$;

-- A source table, and its row trigger as people write it
CREATE TABLE customers (
	id bigint PRIMARY KEY,
	name text, plan text, mrr numeric, seats int, country text, active boolean
);

CREATE FUNCTION to_outbox() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO outbox (entity_id, metadata) VALUES (NEW.id::text, to_jsonb(NEW));
	RETURN NULL;
END $$;

-- The source of bulk SELECTs
CREATE TABLE accounts (id bigint PRIMARY KEY, metadata jsonb NOT NULL);

-- Changes 1..n of round r, a transaction every so many
CREATE PROCEDURE fill(r int, n int, every int) LANGUAGE plpgsql AS $$
BEGIN
	FOR i IN 0..(n - 1) / every LOOP
		PERFORM userpilot_identify_company(j::text, properties(j + r))
			FROM generate_series(i * every + 1, least((i + 1) * every, n)) j;
		COMMIT;
	END LOOP;
END $$;
