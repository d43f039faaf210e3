--
-- The source tables: real organisations, and users made up for them
--
-- :directory holds the registries of the IEEE, as package ieee-data has them.
-- An assignment can be in two registries, and a few are twice in one: the id
-- is made of registry, assignment and, from the second on, a number.  Nothing
-- is random: two machines with the same registries have the same tables.
--
CREATE TEMP TABLE registered (registry text, assignment text, name text, address text);

SELECT format('COPY registered FROM %L (FORMAT csv, HEADER)', :'directory' || '/' || name || '.csv')
FROM unnest(ARRAY['oui', 'mam', 'oui36', 'iab']) AS name
\gexec

CREATE TABLE companies (
	id text PRIMARY KEY,
	name text NOT NULL,
	address text,
	country text,
	registry text NOT NULL,
	addresses bigint NOT NULL		-- how many devices it can number
);

INSERT INTO companies
SELECT registry || '-' || assignment || CASE WHEN nth > 1 THEN '-' || nth ELSE '' END,
	coalesce(name, 'Private'), address,
	substring(address FROM ' ([A-Z]{2})(?: [-A-Z0-9 ]*)?$'),
	registry, 1::bigint << (48 - 4 * length(assignment))
FROM (SELECT registry, assignment, name, nullif(btrim(address), '') AS address,
		row_number() OVER (PARTITION BY registry, assignment
						   ORDER BY name COLLATE "C", address COLLATE "C") AS nth
	FROM registered) AS r;

CREATE TABLE users (
	id bigint PRIMARY KEY,
	company_id text NOT NULL REFERENCES companies,
	name text NOT NULL,
	email text NOT NULL,
	admin boolean NOT NULL,
	signed_up date NOT NULL
);

-- one company in sixteen has a user, half of these have two
INSERT INTO users
SELECT row_number() OVER (ORDER BY c.id COLLATE "C", n), c.id,
	first[1 + (h >> n) % 12] || ' ' || last[1 + (h >> (n + 4)) % 12],
	lower(first[1 + (h >> n) % 12]) || '.' || n || '@' || lower(c.id) || '.example',
	n = 1, date '2020-01-01' + h % 2000
FROM (SELECT id, ('x' || substr(md5(id), 1, 6))::bit(24)::int AS h FROM companies) AS c
CROSS JOIN generate_series(1, 2) AS n
CROSS JOIN (SELECT
	ARRAY['Ada', 'Blaise', 'Chien', 'Dorothy', 'Edsger', 'Frances', 'Grace',
		'Hedy', 'Ivan', 'Jean', 'Katherine', 'Łukasz'] AS first,
	ARRAY['Abiodun', 'Brontë', 'Chávez', 'Dvořák', 'Eriksson', 'Fernández',
		'Grünwald', 'Haddad', 'Ito', 'Jansen', 'Kowalska', 'O''Neill'] AS last) AS names
WHERE h % 32 < 3 - n;

ANALYZE companies, users;
