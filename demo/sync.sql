--
-- Everything there is, with one SELECT a table: only the columns named leave
-- the database
--
\echo 'SELECT userpilot_bulk_identify_companies(id, jsonb_build_object(''name'', name, ...)) FROM companies;'
SELECT userpilot_bulk_identify_companies(id, jsonb_build_object(
	'name', name, 'address', address, 'country', country,
	'registry', registry, 'addresses', addresses)) FROM companies;

\echo 'SELECT userpilot_bulk_identify_users(id, jsonb_build_object(''name'', name, ...), company_id) FROM users;'
SELECT userpilot_bulk_identify_users(id, jsonb_build_object(
	'name', name, 'email', email, 'admin', admin, 'created_at', signed_up),
	company_id) FROM users;
