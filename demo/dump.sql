--
-- What Userpilot must have, one record a line: as Userpilot removes a
-- property set to null, it must not have those that are null here
--
SELECT jsonb_build_object('kind', 'companies', 'id', id, 'metadata', jsonb_strip_nulls(jsonb_build_object(
	'name', name, 'address', address, 'country', country,
	'registry', registry, 'addresses', addresses)))
FROM companies
UNION ALL
SELECT jsonb_build_object('kind', 'users', 'id', id::text, 'company_id', company_id, 'metadata', jsonb_strip_nulls(jsonb_build_object(
	'name', name, 'email', email, 'admin', admin, 'created_at', signed_up)))
FROM users;
