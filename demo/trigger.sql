--
-- From here on, every change of a company goes out with its commit
--
CREATE FUNCTION company_to_userpilot() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
	PERFORM userpilot_identify_company(NEW.id, jsonb_build_object(
		'name', NEW.name, 'address', NEW.address, 'country', NEW.country,
		'registry', NEW.registry, 'addresses', NEW.addresses));
	RETURN NULL;
END
$$;

CREATE TRIGGER to_userpilot AFTER INSERT OR UPDATE ON companies
FOR EACH ROW EXECUTE FUNCTION company_to_userpilot();
